"""RDMA devices, ports and addresses of this machine, as plain values.

The kernel tells most of it in /sys/class/infiniband, without opening a device; limits and MTU come from the
verbs library (`_rdma_verbs`) and are None where that is missing or refused.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiocomm.links._report import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiocomm.links._rdma_verbs import DeviceLimits

__all__ = [
    "DEVICES",
    "Device",
    "Gid",
    "GidType",
    "Port",
    "port_from_json",
    "port_to_json",
    "read_devices",
]

DEVICES: Final = Path("/sys/class/infiniband")
_ENTRY_NBYTES: Final = 64
_GIGABIT: Final = re.compile(r"[\d.]+")


class GidType(enum.StrEnum):
    """How packets to an address look on the wire; `kernel` names as in sysfs."""

    INFINIBAND = "InfiniBand"
    ROCE_V1 = "RoCE v1"
    """Bare Ethernet frames: never routed, and not compatible with v2."""
    ROCE_V2 = "RoCE v2"
    """UDP over IPv4 or IPv6."""


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's address table."""

    index: int
    address: ipaddress.IPv6Address
    type: GidType
    interface: str
    """Network interface that it belongs to; empty on InfiniBand."""

    @property
    def ipv4(self) -> ipaddress.IPv4Address | None:
        """The IPv4 address that it stands for, if it does."""
        return self.address.ipv4_mapped

    @property
    def subnet_prefix(self) -> int:
        """The upper 64 bits: on InfiniBand, the subnet."""
        return int(self.address) >> 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port and what can be reached through it. None means that it could not be found out."""

    device: str
    number: int
    state: str
    """ACTIVE, DOWN, INIT, ARMED, ACTIVE_DEFER, or "unknown"."""
    physical_state: str
    link_layer: str
    """InfiniBand or Ethernet (RoCE)."""
    rate_gbps: float | None
    """Gigabits per second."""
    mtu_nbytes: int | None = None
    max_mtu_nbytes: int | None = None
    interface_mtu_nbytes: int | None = None
    """Of the network interface beneath RoCE: what the active MTU is derived from."""
    gids: tuple[Gid, ...] = ()
    partitions: tuple[int, ...] = ()
    """Partition keys; bit 15 set is a full member."""
    node_type: str = "CA"
    """Of the device: CA is InfiniBand or RoCE, RNIC iWARP, "unspecified" EFA and others."""

    @property
    def name(self) -> str:
        """Device and port, as people write it."""
        return f"{self.device}/{self.number}"

    @property
    def is_roce(self) -> bool:
        """Whether it runs over Ethernet."""
        return self.link_layer == "Ethernet"

    @property
    def is_active(self) -> bool:
        """Whether it carries data."""
        return self.state == "ACTIVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An adapter: hardware, or soft-RoCE."""

    name: str
    firmware: str
    numa_node: int | None
    ports: tuple[Port, ...]
    limits: DeviceLimits | None = None


def read_devices(root: Path = DEVICES, limits: Mapping[str, DeviceLimits] | None = None) -> list[Device]:
    """Read the kernel's tree.

    Args:
        root: /sys/class/infiniband, or a copy.
        limits: What the verbs library knows, by device.
    """
    known = limits or {}
    return [_device(path, known.get(path.name)) for path in sorted(root.glob("*"))]


def _device(path: Path, limits: DeviceLimits | None) -> Device:
    numa = read_text(path / "device/numa_node")
    numbers = sorted(int(port.name) for port in path.glob("ports/*"))
    return Device(
        name=path.name,
        firmware=read_text(path / "fw_ver") or "unknown",
        numa_node=int(numa) if numa and int(numa) >= 0 else None,
        ports=tuple(_port(path.name, path / "ports" / str(number), limits) for number in numbers),
        limits=limits,
    )


def _port(device: str, path: Path, limits: DeviceLimits | None) -> Port:
    number = int(path.name)
    mtu = limits.mtus.get(number) if limits else None
    layer = read_text(path / "link_layer") or "unknown"
    gids = tuple(_gids(path, layer))
    rate = _GIGABIT.match(read_text(path / "rate") or "")
    return Port(
        device=device,
        number=number,
        state=_named(read_text(path / "state")),
        physical_state=_named(read_text(path / "phys_state")),
        link_layer=layer,
        rate_gbps=float(rate[0]) if rate else None,
        mtu_nbytes=mtu.active_nbytes if mtu else None,
        max_mtu_nbytes=mtu.max_nbytes if mtu else None,
        interface_mtu_nbytes=_interface_mtu(path, gids),
        gids=gids,
        partitions=tuple(_partitions(path)),
        node_type=_named(read_text(path.parents[1] / "node_type")),
    )


def _named(value: str | None) -> str:
    """The word of "4: ACTIVE"."""
    return (value or "").partition(": ")[2] or "unknown"


def _gids(port: Path, layer: str) -> list[Gid]:
    found = []
    for index, text in _table(port / "gids"):
        if not text.strip(":0"):  # an empty entry: most of a table of hundreds
            continue
        kernel = read_text(port / "gid_attrs/types" / str(index)) or ""
        interface = read_text(port / "gid_attrs/ndevs" / str(index)) or ""
        # The kernel calls both InfiniBand's and RoCE v1's entries "IB/RoCE v1".
        other = GidType.ROCE_V1 if layer == "Ethernet" else GidType.INFINIBAND
        kind = GidType.ROCE_V2 if kernel == "RoCE v2" else other
        found.append(Gid(index, ipaddress.IPv6Address(text), kind, interface))
    return found


def _table(folder: Path) -> list[tuple[int, str]]:
    """Entries of a numbered table in order, read by bare system calls: there are hundreds to thousands."""
    try:
        numbers = sorted(int(name) for name in os.listdir(folder))
    except OSError:
        return []
    entries = []
    for number in numbers:
        try:
            file = os.open(f"{folder}/{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            entries.append((number, os.read(file, _ENTRY_NBYTES).decode(errors="replace").strip()))
        except OSError:
            pass  # the kernel refuses some entries on reading
        finally:
            os.close(file)
    return entries


def _partitions(port: Path) -> list[int]:
    keys = [int(text, 16) for _, text in _table(port / "pkeys") if text]
    return [key for key in keys if key]


def _interface_mtu(port: Path, gids: tuple[Gid, ...]) -> int | None:
    for interface in dict.fromkeys(gid.interface for gid in gids if gid.interface):
        text = read_text(port.parents[3] / "net" / interface / "mtu")
        if text:
            return int(text)
    return None


def port_to_json(port: Port) -> dict[str, Any]:
    """A port in values that JSON has."""
    plain = dataclasses.asdict(port)
    plain["gids"] = [{**dataclasses.asdict(gid), "address": str(gid.address)} for gid in port.gids]
    return plain


def port_from_json(plain: Mapping[str, Any]) -> Port:
    """The port that another host described.

    Raises:
        ValueError: It is not a port's description.
    """
    try:
        gids = tuple(
            Gid(
                int(gid["index"]),
                ipaddress.IPv6Address(gid["address"]),
                GidType(gid["type"]),
                str(gid["interface"]),
            )
            for gid in plain["gids"]
        )
        return Port(**{**plain, "gids": gids, "partitions": tuple(int(key) for key in plain["partitions"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not the description of a port: {error!r}") from error
