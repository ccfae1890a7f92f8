"""Gathers of GPU arrays whose outcome is known: what the tests of pushed collectives have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from fakes.gpu import DeviceArray, driver

if TYPE_CHECKING:
    import aiocomm

    Array = np.ndarray[Any, Any]

__all__ = ["LINKS", "block", "gather_all", "gathered", "on_gpu"]

LINKS = ("shm", "cuda")


def on_gpu(rank: int, values: Array, **how: Any) -> DeviceArray:
    """A copy on this rank's GPU."""
    return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)


def block(rank: int, turn: int, count: int) -> Array:
    """What a rank gives."""
    return np.random.default_rng((rank, turn)).integers(0, 256, count, np.uint8)


def gathered(size: int, turn: int, count: int) -> Array:
    """What all get."""
    return np.concatenate([block(rank, turn, count) for rank in range(size)])


async def gather_all(comm: aiocomm.Communicator, turn: int, count: int, **how: Any) -> None:
    """An all_gather that must succeed."""
    out = on_gpu(comm.rank, np.zeros(comm.size * count, "u1"))
    await comm.all_gather(out, on_gpu(comm.rank, block(comm.rank, turn, count)), **how)
    assert np.array_equal(out.numpy(), gathered(comm.size, turn, count))
