"""A layer of experts on GPUs beside one on hosts: what the tests of dispatch and combine have in common."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from fakes.gpu import Address, DeviceArray, Handle, driver

import aiocomm

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

__all__ = ["EXPERTS", "LINKS", "Rows", "batch", "layer", "on_gpu", "to_host"]

LINKS = ("shm", "cuda")
EXPERTS = 10


def on_gpu(rank: int, values: Array, **how: Any) -> DeviceArray:
    """A copy on this rank's GPU; of a dtype that the interface has no name for, its bytes."""
    shown = values if values.dtype.kind != "V" else values.view(np.uint16)
    return DeviceArray(shown.shape, shown.dtype, device=rank % driver().count, **how).write(shown)


def to_host(array: Any, dtype: Any) -> Array:
    """What a GPU array holds, row by row."""
    found = np.empty(array.shape, np.dtype(array.__cuda_array_interface__["typestr"]))
    if found.nbytes:
        driver().use(array.device)
        driver()(
            "cuMemcpyDtoH", Handle(found.ctypes.data), Address(array.address), ctypes.c_size_t(found.nbytes)
        )
    return found.view(dtype)


class Rows:
    """The first rows of a GPU array."""

    def __init__(self, whole: DeviceArray, count: int) -> None:
        self._whole = whole
        self.__cuda_array_interface__ = whole.__cuda_array_interface__ | {"shape": (count, *whole.shape[1:])}


def batch(rank: int, tokens: int, hidden: int, dtype: Any = np.float32) -> tuple[Array, Array, Array]:
    """What a rank dispatches: no other rank has it. Some of it is zero, which has no exponent."""
    seeded = np.random.default_rng((rank, tokens))
    x = seeded.normal(size=(tokens, hidden)).astype(dtype)
    x[1::4] = 0
    return x, seeded.integers(-1, EXPERTS, (tokens, 3)), seeded.random((tokens, 3), np.float32)


async def layer(
    group: Any,
    tokens: int,
    hidden: int,
    dtype: Any = np.float32,
    placement: Any = None,
    wire: Any = None,
    ids_on_gpu: bool = True,
    **options: Any,
) -> None:
    """A dispatch and a combine of GPU arrays beside those of host arrays."""
    rank = group._comm.rank if hasattr(group, "_comm") else group.rank
    x, ids, weights = batch(rank, tokens, hidden, dtype)
    common = {"experts": EXPERTS, "placement": placement}
    expected = await group.dispatch(x, ids, weights, **common)
    small = (on_gpu(rank, ids), on_gpu(rank, weights)) if ids_on_gpu else (ids, weights)
    came = await group.dispatch(on_gpu(rank, x), *small, **common, **options)
    assert isinstance(came.tokens, aiocomm.DeviceArray)
    assert np.array_equal(to_host(came.tokens, dtype), expected.tokens)
    for name in ("rows", "weights", "offsets", "starts", "experts"):
        assert np.array_equal(getattr(came, name), getattr(expected, name))
    outputs = (expected.inputs * 1.7).astype(dtype)
    wanted = await group.combine(outputs, expected, wire=wire)
    out = None if tokens % 2 else on_gpu(rank, np.zeros((tokens, hidden), np.float32))
    if out is not None:
        wanted = await group.combine(outputs, expected, wire=wire, out=np.empty((tokens, hidden), np.float32))
    else:
        await group.combine(outputs, expected, wire=wire)
    result = await group.combine(on_gpu(rank, outputs), came, wire=wire, out=out, **options)
    found = to_host(result, dtype) if out is None else out.numpy()
    assert found.tobytes() == wanted.tobytes()
