"""The links under test: all that this build has, and shm once for each way in which it moves bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes import adapters
from harness import world

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair


@dataclass(frozen=True)
class Variant:
    """A link, settings under which it takes one of its paths, and where arrays lie."""

    link: str
    name: str
    settings: dict[str, str] = field(default_factory=dict)
    shared: bool = False
    simulated: bool = False
    """Over adapters that exist only in this process: fakes/adapters.py."""

    @property
    def way(self) -> str:
        """Its name without what it is simulated on."""
        return self.name.removesuffix("-simulated")

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
        """An array of zeros where this variant has them."""
        array = aiocomm.empty(shape, dtype) if self.shared else np.empty(shape, dtype)
        array.fill(0)
        return array

    def ones(self, nbytes: int) -> np.ndarray[Any, Any]:
        """An array of bytes that are 1, so that one look at it shows what has come."""
        array = self.array(nbytes)
        array.fill(1)
        return array

    def random(self, nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
        """An array of bytes that no other seed gives."""
        array = self.array(nbytes)
        array[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
        return array


# A thread may stand still for seconds on a busy machine; what was posted takes seconds in an emulated one.
# That is waited for: a pair that is torn down for it would be another test.
_PATIENCE = {"AIOCOMM_DRAIN_TIMEOUT_S": "30", "AIOCOMM_HEARTBEAT_S": "10"}
# In the virtual machine one host's two ports are both ends: pairs of this process talk over two rails.
_GUEST = {"AIOCOMM_RDMA_DEVICES": "rxea0,rxea1"}
_RDMA = _GUEST if "AIOCOMM_RDMA_GUEST" in os.environ else {}
_EXTRA = {
    "shm": [
        Variant("shm", "shm-stream", {"AIOCOMM_CMA": "off"}),
        Variant("shm", "shm-mapped", shared=True),
    ],
    "rdma": [] if _RDMA else [Variant("rdma", "rdma-simulated", simulated=True)],
}


def _name(variant: Variant) -> str:
    return variant.name


_MISSING = {
    "rdma": None
    if any(Path("/sys/class/infiniband").glob("*"))
    else "no RDMA device: python tests/rdma_vm/run.py -- pytest tests/links -k rdma"
}
VARIANTS = [
    variant
    if variant.simulated or _MISSING.get(link) is None
    else pytest.param(variant, marks=pytest.mark.skip(reason=str(_MISSING[link])))
    for link in _core.available_links()
    if link not in ("self", "cuda")  # cuda moves GPU memory beside the others: test_gpu_*.py
    for variant in [Variant(link, link, _RDMA if link == "rdma" else {}), *_EXTRA.get(link, [])]
]


@pytest.fixture(params=VARIANTS, ids=_name)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """One way in which bytes move."""
    chosen: Variant = request.param
    for key, value in (_PATIENCE | chosen.settings).items():
        monkeypatch.setenv(key, value)
    if chosen.simulated:
        monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(adapters.build()))
    return chosen


@pytest.fixture
async def pair(variant: Variant) -> AsyncIterator[Pair]:
    """Ranks 0 and 1 on this loop, connected over the link under test."""
    async with world(2, links=(variant.link,), warmup=True) as (a, b):
        yield a, b
