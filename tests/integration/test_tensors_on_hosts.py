"""Tensors in host memory that torch does not export as they are: those with gradients, or of other dtypes."""

from __future__ import annotations

import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import all_call, world

import aiocomm
from aiocomm.arrays import as_buffer

pytestmark = pytest.mark.anyio
EXPORTED = {"torch.float32", "torch.uint8", "torch.int64"}


class Tensor:
    """What torch's has, as far as it is looked at."""

    __module__ = "torch.nn.parameter"  # as parameters say; tensors are of "torch"

    def __init__(self, values: Any, dtype: str = "torch.float32", needs_gradients: bool = False) -> None:
        self.values, self.dtype, self.needs_gradients = values, dtype, needs_gradients
        self.shape, self.device = values.shape, "cpu"

    def _check(self) -> None:
        if self.needs_gradients:
            raise RuntimeError("Can't export tensors that require gradient, use tensor.detach()")
        if self.dtype not in EXPORTED:
            raise TypeError(f"Got unsupported ScalarType {self.dtype}")

    def __dlpack__(self, **how: Any) -> Any:
        self._check()
        return self.values.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __array__(self, *_: Any, **__: Any) -> Any:
        self._check()
        return self.values

    def __len__(self) -> int:
        return len(self.values)

    def detach(self) -> Tensor:
        return Tensor(self.values, self.dtype)

    def dim(self) -> int:
        return self.values.ndim  # type: ignore[no-any-return]

    def reshape(self, *shape: int) -> Tensor:
        return Tensor(self.values.reshape(shape), self.dtype)

    def is_contiguous(self) -> bool:
        return self.values.flags.c_contiguous  # type: ignore[no-any-return]

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.values.itemsize for step in self.values.strides)

    def element_size(self) -> int:
        return self.values.itemsize  # type: ignore[no-any-return]

    def view(self, dtype: str) -> Tensor:
        if not self.values.ndim:
            raise RuntimeError("self.dim() cannot be 0 to view Float as Byte (different element sizes)")
        return Tensor(self.values.view(np.uint8), dtype)


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(uint8="torch.uint8"))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_parameters_are_reduced_as_what_they_are() -> None:
    """Not as the bytes that they consist of."""
    async with world(2) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            parameter = Tensor(np.full(3, comm.rank + 1.5, np.float32), needs_gradients=True)
            await comm.all_reduce(parameter)
            assert parameter.values.tolist() == [4.0] * 3

        await all_call(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_had_as_bytes_is_not_computed_with() -> None:
    async with world(2) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            halves = Tensor(np.full(3, comm.rank, np.uint32), "torch.complex32")
            with pytest.raises(aiocomm.UsageError, match="cannot reduce arrays"):
                await comm.all_reduce(halves)
            await comm.broadcast(halves, root=1)
            assert halves.values.tolist() == [1] * 3

        await all_call(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_experts_weights_of_any_tensor() -> None:
    async with world(2) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            weights = np.array([[0.5], [2.0]], np.float32)
            for given in (
                Tensor(weights, needs_gradients=True),
                Tensor(weights.astype(ml_dtypes.bfloat16), "torch.bfloat16"),
            ):
                came = await comm.dispatch(np.ones((2, 4), np.float32), [[0], [1]], given, experts=2)
                result = await comm.combine(came.inputs, came)
                assert result[:, 0].tolist() == [0.5, 2.0]

        await all_call(members, rank)


def test_buffers() -> None:
    one = as_buffer(Tensor(np.array(1, np.float32), needs_gradients=True), False)
    assert (one.format, one.shape) == ("f", ())
    short = as_buffer(Tensor(np.array(1, ml_dtypes.bfloat16), "torch.bfloat16"), False)
    assert (short.format, short.nbytes) == ("B", 2)
    turned = Tensor(np.ones((2, 3), ml_dtypes.bfloat16).T, "torch.bfloat16")
    with pytest.raises(aiocomm.UsageError, match=r"not contiguous .*x\.contiguous\(\)"):
        as_buffer(turned, False)
