"""Which port is nearest to a GPU, and how the port's device could reach that GPU's memory.

Pure but for `read_place`: facts in, choices out, for `aiocomm doctor`. The link chooses alike
(aiocomm_native/links/rdma/gpu.hpp).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiocomm.links._report import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Distance",
    "Place",
    "Reach",
    "Way",
    "choose_way",
    "distance",
    "nearest_first",
    "read_place",
]

PEER_MEMORY: Final = (Path("/sys/module/nvidia_peermem"), Path("/sys/kernel/mm/memory_peers/nv_mem"))
"""Either is there where the driver's own module registers GPU addresses."""


class Way(enum.StrEnum):
    """How bytes of a GPU get to a network device."""

    DMA_BUF = "dma-buf"
    """The driver exports the memory, the verbs library registers the export. Needs no extra module."""
    PEER_MEMORY = "peer memory"
    """A module of the driver (nvidia_peermem) lets GPU addresses be registered like any others."""
    HOST = "host memory"
    """Copied by the GPU's engine to the host, and sent from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a machine has for it."""

    exports: bool
    """The GPU's driver exports memory as a dma-buf."""
    registers: bool
    """The verbs library has `ibv_reg_dmabuf_mr` (rdma-core 34)."""
    takes: bool
    """The device's driver has not refused such a registration. Soft-RoCE refuses all."""
    peer_memory: bool
    """The module is loaded."""


class Distance(enum.IntEnum):
    """What lies between two devices of one host, as `nvidia-smi topo -m` has it."""

    SWITCH = 0
    """PCIe switches only (PIX, PXB): data does not come near a processor."""
    ROOT = 1
    """One root complex (PHB)."""
    NODE = 2
    """The interconnect within a NUMA node (NODE)."""
    FAR = 3
    """The one between NUMA nodes (SYS), or nobody knows."""

    def __str__(self) -> str:
        return _BETWEEN[self]


_BETWEEN: Final = {
    Distance.SWITCH: "behind the same PCIe switch",
    Distance.ROOT: "at the same root complex",
    Distance.NODE: "on the same NUMA node",
    Distance.FAR: "on another NUMA node",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device sits: bridges from the root complex to itself; its NUMA node if there are several."""

    bridges: tuple[str, ...]
    node: int | None = None


def choose_way(reach: Reach) -> tuple[Way, str]:
    """The way with the least in between that all involved have, and why not a better one.

    dma-buf first: kernels support it by themselves, and it follows the life of the memory. Peer memory next.
    """
    if reach.exports and reach.registers and reach.takes:
        return Way.DMA_BUF, "driver, verbs library and device have it"
    if not reach.exports:
        lacks = "the GPU's driver exports no dma-buf: it needs its open kernel modules, 515 or newer"
    elif not reach.registers:
        lacks = "the verbs library has no ibv_reg_dmabuf_mr: install rdma-core 34 or newer"
    else:
        lacks = "the device's driver refuses dma-buf registrations"
    if reach.peer_memory:
        return Way.PEER_MEMORY, lacks
    return Way.HOST, f"{lacks}; nor is nvidia_peermem loaded"


def distance(one: Place, other: Place) -> Distance:
    """What lies between two devices."""
    common = _common(one, other)
    if common > 1:
        return Distance.SWITCH
    if common == 1:
        return Distance.ROOT
    return Distance.NODE if one.node is not None and one.node == other.node else Distance.FAR


def nearest_first(gpu: Place, devices: Mapping[str, Place]) -> list[tuple[str, Distance]]:
    """Names of network devices, nearest to the GPU first; of equals, in the order given."""
    found = [(name, distance(gpu, place), -_common(gpu, place)) for name, place in devices.items()]
    return [(name, between) for name, between, _ in sorted(found, key=lambda entry: entry[1:])]


def _common(one: Place, other: Place) -> int:
    """Bridges that both are behind, the root complex included."""
    count = 0
    for a, b in zip(one.bridges, other.bridges, strict=False):
        if a != b:
            break
        count += 1
    return count


def read_place(device: Path) -> Place:
    """Where a device is, by its folder in /sys (a PCI device, or an adapter's `device`).

    Devices that are on no PCI bus (soft-RoCE) have no bridges.
    """
    parts = device.resolve().parts
    roots = [number for number, part in enumerate(parts) if part.startswith("pci")]
    node = read_text(device / "numa_node")
    return Place(
        tuple(parts[roots[0] :]) if roots else (), int(node) if node is not None and int(node) >= 0 else None
    )
