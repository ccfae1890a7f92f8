"""Which device is nearest to a GPU, and by which way it would reach its memory; over made-up machines."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm.links import _rdma_gpu as gpus
from aiocomm.links import rdma
from aiocomm.links._cuda_driver import NoDriver
from aiocomm.links._rdma_gpu import Distance, Place, Reach, Way

if TYPE_CHECKING:
    from pathlib import Path

# Two sockets; on the first a switch with a GPU and an adapter, and an adapter at another root port.
GPU = Place(("pci0000:15", "0000:15:01.0", "0000:16:00.0", "0000:17:00.0", "0000:18:00.0"), 0)
DEVICES = {
    "mlx5_far": Place(("pci0000:97", "0000:97:01.0", "0000:98:00.0"), 1),
    "mlx5_node": Place(("pci0000:37", "0000:37:01.0", "0000:38:00.0"), 0),
    "mlx5_root": Place(("pci0000:15", "0000:15:02.0", "0000:1b:00.0"), 0),
    "rxe0": Place(()),
    "mlx5_switch": Place(("pci0000:15", "0000:15:01.0", "0000:16:00.0", "0000:17:02.0", "0000:19:00.0"), 0),
    "mlx5_switches": Place(("pci0000:15", "0000:15:01.0", "0000:1d:00.0"), 0),
}


def test_the_nearest_comes_first() -> None:
    assert gpus.nearest_first(GPU, DEVICES) == [
        ("mlx5_switch", Distance.SWITCH),
        ("mlx5_switches", Distance.SWITCH),
        ("mlx5_root", Distance.ROOT),
        ("mlx5_node", Distance.NODE),
        ("mlx5_far", Distance.FAR),
        ("rxe0", Distance.FAR),
    ]


def test_distance_is_symmetric_and_unknown_nodes_are_far() -> None:
    for one, other in itertools.combinations([GPU, *DEVICES.values()], 2):
        assert gpus.distance(one, other) is gpus.distance(other, one)
    assert gpus.distance(Place(("pci0000:00",)), Place(("pci0000:01",))) is Distance.FAR
    assert gpus.distance(Place(()), Place(())) is Distance.FAR


def test_equals_keep_their_order() -> None:
    same = Place(("pci0000:97", "0000:97:01.0"), 1)
    assert [name for name, _ in gpus.nearest_first(GPU, {"b": same, "a": same})] == ["b", "a"]


@pytest.mark.parametrize(
    ("lacking", "peer_memory", "way", "why"),
    [
        ("", True, Way.DMA_BUF, "have it"),
        ("exports", True, Way.PEER_MEMORY, "open kernel modules"),
        ("registers", True, Way.PEER_MEMORY, "rdma-core 34"),
        ("takes", True, Way.PEER_MEMORY, "refuses"),
        ("exports", False, Way.HOST, "nvidia_peermem"),
        ("registers", False, Way.HOST, "ibv_reg_dmabuf_mr"),
        ("takes", False, Way.HOST, "refuses dma-buf"),
    ],
)
def test_the_way_is_the_best_that_all_have(lacking: str, peer_memory: bool, way: Way, why: str) -> None:
    has = {name: name != lacking for name in ("exports", "registers", "takes")}
    chosen, reason = gpus.choose_way(Reach(**has, peer_memory=peer_memory))
    assert chosen is way
    assert why in reason


def test_places_are_read_from_the_kernel_s_tree(tmp_path: Path) -> None:
    real = tmp_path / "devices/pci0000:15/0000:15:01.0/0000:16:00.0"
    real.mkdir(parents=True)
    (real / "numa_node").write_text("1\n")
    link = tmp_path / "class"
    link.symlink_to(real)
    assert gpus.read_place(link) == Place(("pci0000:15", "0000:15:01.0", "0000:16:00.0"), 1)
    (real / "numa_node").write_text("-1\n")
    assert gpus.read_place(link).node is None
    virtual = tmp_path / "devices/virtual/rxe0"
    virtual.mkdir(parents=True)
    assert gpus.read_place(virtual) == Place(())


def test_the_doctor_tells_it_of_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "pci"
    for name, address in (("gpu", "0000:18:00.0"), ("near", "0000:19:00.0")):
        folder = tree / "pci0000:15/0000:15:01.0" / address
        folder.mkdir(parents=True)
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "by_address").mkdir()
    (tmp_path / "by_address/0000:18:00.0").symlink_to(tmp_path / "gpu")
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "infiniband/mlx5_0/device").symlink_to(tmp_path / "near")
    monkeypatch.setattr(rdma, "_PCI", tmp_path / "by_address")
    monkeypatch.setattr(rdma, "_DEVICES", tmp_path / "infiniband")
    monkeypatch.setattr(rdma, "open_driver", lambda library: _OneGpu())
    monkeypatch.setenv("AIOCOMM_RDMA_NODES", "other_0=1,mlx5_0=3")
    (device,) = [check for check in rdma.discover().checks if check.name == "device mlx5_0"]
    assert "NUMA node 3" in device.detail
    (told,) = [check for check in rdma.discover().checks if check.name == "GPU 0"]
    assert "mlx5_0 behind the same PCIe switch" in told.detail
    assert "adapters" in told.detail
    assert "its memory" in told.detail or "reach it by" in told.detail

    def none(library: object) -> Any:
        raise NoDriver("none here")

    monkeypatch.setattr(rdma, "open_driver", none)
    assert not [check for check in rdma.discover().checks if check.name.startswith("GPU")]


class _OneGpu:
    """A driver that knows GPU 0 at 0000:18:00.0, which exports dma-bufs."""

    def start(self) -> None:
        pass

    def count(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "a GPU"

    def uuid(self, index: int) -> bytes:
        return bytes(16)

    def memory(self, index: int) -> int:
        return 1 << 30

    def attribute(self, which: int, index: int) -> int:
        return {33: 0x18, 34: 0, 50: 0, 124: 1}.get(which, 0)
