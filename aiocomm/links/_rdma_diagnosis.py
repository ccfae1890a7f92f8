"""What is wrong with a port, or between two ports, and what to do about it. Pure: facts in, problems out."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiocomm.links._rdma_devices import Gid, GidType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.links._rdma_devices import Port

__all__ = [
    "Choice",
    "Problem",
    "choose_gid",
    "choose_partition",
    "pair_problems",
    "port_problems",
    "rail_problems",
]

FULL_MEMBER: Final = 0x8000
_ROCE_HEADERS: Final = 96
"""Bytes of IPv6, UDP, transport headers and checksum that the interface's MTU must hold besides."""
_SMALL_MTU: Final = 1024
_LINK_LOCAL: Final = ipaddress.IPv6Network("fe80::/10")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps a port from working, or from working well (`fatal` False)."""

    port: str
    """Device and port."""
    what: str
    remedy: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.port}: {self.what}; {self.remedy}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The address that a port is used by, and why that one. `gid` is None where none will do."""

    gid: Gid | None
    reason: str


def choose_gid(port: Port) -> Choice:
    """Choose the address of a port, as the link does.

    On RoCE, version 2 only: v1 is never routed, switches treat it otherwise, and two ends with different
    versions do not hear each other. Among these an IPv4 address first, because it is what people route, then
    a global IPv6 one, then a link-local one, which reaches this Ethernet segment only. On InfiniBand the
    first.
    """
    if not port.is_roce:
        return (
            Choice(port.gids[0], "the port's own, index 0 on InfiniBand")
            if port.gids
            else Choice(None, "the port has no GID")
        )
    second = [gid for gid in port.gids if gid.type is GidType.ROCE_V2]
    if not second:
        return Choice(None, f"none of its {len(port.gids)} GIDs is RoCE v2")
    best = min(second, key=lambda gid: (_rank(gid), gid.index))
    return Choice(best, ("RoCE v2 with an IPv4 address", "RoCE v2 with a global IPv6 address",
                         "RoCE v2, link-local: reaches this Ethernet segment only")[_rank(best)])  # fmt: skip


def _rank(gid: Gid) -> int:
    if gid.ipv4 is not None:
        return 0
    return 2 if gid.address in _LINK_LOCAL else 1


def port_problems(port: Port) -> list[Problem]:
    """What is wrong with a port by itself."""
    found = []

    def add(what: str, remedy: str, fatal: bool = True) -> None:
        found.append(Problem(port.name, what, remedy, fatal))

    interface = next((gid.interface for gid in port.gids if gid.interface), "its network interface")
    if port.node_type not in ("CA", "unknown"):
        add(
            f"neither InfiniBand nor RoCE ({port.node_type}: iWARP, EFA or the like)",
            "the link rdma cannot use it: let the link tcp have this network",
        )
        return found
    if not port.is_active:
        add(f"the port is {port.state} (physically {port.physical_state})", _revive(port, interface))
    if choose_gid(port).gid is None:
        if port.is_roce:
            have = ", ".join(dict.fromkeys(gid.type for gid in port.gids)) or "none at all"
            add(
                f"no RoCE v2 GID (it has {have})",
                f"give {interface} an IP address (ip addr add …), and see that the driver offers v2",
            )
        else:
            add("no GID", "start a subnet manager (opensm)")
    if not port.is_roce and port.partitions and not any(key & FULL_MEMBER for key in port.partitions):
        keys = ", ".join(f"{key:#06x}" for key in port.partitions)
        add(
            f"only a limited member of its partitions ({keys})",
            "limited members do not hear each other: make it a full one (opensm: partitions.conf)",
            fatal=False,
        )
    if port.is_roce and port.mtu_nbytes is not None and port.mtu_nbytes < _SMALL_MTU:
        add(
            f"MTU {port.mtu_nbytes}, because {interface} has {port.interface_mtu_nbytes or 'a small one'}",
            f"ip link set {interface} mtu {_SMALL_MTU + _ROCE_HEADERS} or more (4200 allows 4096)",
            fatal=False,
        )
    elif port.mtu_nbytes and port.max_mtu_nbytes and port.mtu_nbytes < port.max_mtu_nbytes:
        remedy = (
            f"ip link set {interface} mtu {port.max_mtu_nbytes + _ROCE_HEADERS} or more, on all ends"
            if port.is_roce
            else "the subnet manager sets it"
        )
        add(f"MTU {port.mtu_nbytes} of {port.max_mtu_nbytes} possible", remedy, fatal=False)
    return found


def _revive(port: Port, interface: str) -> str:
    if port.is_roce:
        return f"ip link set {interface} up, and look at cable and switch"
    if port.state in ("INIT", "ARMED"):
        return "the cable is in, but no subnet manager answers: start one (opensm)"
    return "plug the cable in; ibstat tells more"


def rail_problems(ports: Sequence[Port]) -> list[Problem]:
    """What is wrong between ports of one host that are used together."""
    mtus = {port.mtu_nbytes for port in ports if port.mtu_nbytes}
    if len(mtus) < 2:
        return []
    slow = min((port for port in ports if port.mtu_nbytes), key=lambda port: port.mtu_nbytes or 0)
    others = ", ".join(f"{port.name} {port.mtu_nbytes}" for port in ports if port is not slow)
    return [
        Problem(
            slow.name,
            f"MTU {slow.mtu_nbytes}, others have more ({others})",
            "set the same on all rails",
            False,
        )
    ]


def pair_problems(ours: Port, theirs: Port, prefix_length: int = 24) -> list[Problem]:
    """What keeps two active ports of two hosts from talking, or from talking well.

    Args:
        ours: A port here; problems name it.
        theirs: A port there.
        prefix_length: Of the IPv4 network that ours belongs to. Another network works where it is routed.
    """
    found = []

    def add(what: str, remedy: str, fatal: bool = True) -> None:
        found.append(Problem(ours.name, what, remedy, fatal))

    if ours.link_layer != theirs.link_layer:
        add(
            f"{ours.link_layer} here, {theirs.link_layer} at the peer ({theirs.name})",
            "they share no wire: choose other devices",
        )
        return found
    if ours.mtu_nbytes and theirs.mtu_nbytes and ours.mtu_nbytes != theirs.mtu_nbytes:
        small = min(ours.mtu_nbytes, theirs.mtu_nbytes)
        add(
            f"MTU {ours.mtu_nbytes} here, {theirs.mtu_nbytes} at the peer ({theirs.name})",
            f"the pair uses {small}; if packets are lost, set the same on both ends and all switches",
            fatal=False,
        )
    mine, its = choose_gid(ours).gid, choose_gid(theirs).gid
    if mine is None or its is None:
        return found  # told by port_problems of that side
    if ours.is_roce:
        found += _roce_subnet(ours, theirs, mine, its, prefix_length)
    elif mine.subnet_prefix != its.subnet_prefix:
        add(
            f"InfiniBand subnet {mine.subnet_prefix:016x} here, "
            f"{its.subnet_prefix:016x} at the peer ({theirs.name})",
            "connect both to one subnet manager; subnets are not routed",
        )
    keys = choose_partition(ours), choose_partition(theirs)
    if not ours.is_roce and not _meet(*keys):
        add(
            f"no common partition: {keys[0]:#06x} is used here, {keys[1]:#06x} at the peer ({theirs.name})",
            "let the first partition in which either port is a full member be the same (partitions.conf)",
        )
    return found


def _roce_subnet(ours: Port, theirs: Port, mine: Gid, its: Gid, prefix_length: int) -> list[Problem]:
    if mine.ipv4 is None or its.ipv4 is None:
        if (mine.ipv4 is None) == (its.ipv4 is None):
            return []
        what = f"{mine.ipv4 or mine.address} here, {its.ipv4 or its.address} at the peer ({theirs.name})"
        return [
            Problem(ours.name, f"IPv4 and IPv6 do not meet: {what}", "give both the same kind of address")
        ]
    network = ipaddress.IPv4Network((mine.ipv4, prefix_length), strict=False)
    if its.ipv4 in network:
        return []
    what = f"peer {its.ipv4} ({theirs.name}) is on another subnet than {mine.ipv4}/{prefix_length}"
    remedy = f"works if routed (ip route get {its.ipv4} from {mine.ipv4}); else use one subnet per rail"
    return [Problem(ours.name, what, remedy, fatal=False)]


def choose_partition(port: Port) -> int:
    """Choose a port's partition, as the link does: the first of a full member, else the first; 0 is none."""
    return next((key for key in port.partitions if key & FULL_MEMBER), next(iter(port.partitions), 0))


def _meet(one: int, other: int) -> bool:
    """Whether it is one partition, of which one side at least is a full member."""
    if not one or not other:
        return True  # not known is not wrong
    return one & ~FULL_MEMBER == other & ~FULL_MEMBER and bool((one | other) & FULL_MEMBER)
