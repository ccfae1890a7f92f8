"""GPU arrays as arguments of collectives, whose schedules move their bytes by the copy engines.

Only reductions compute, and need scratch memory: see `kernels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiocomm._device import NO_STREAM, itemsize_of, part_of
from aiocomm._operations import on_gpu
from aiocomm.collectives import hierarchical
from aiocomm.collectives.arrays import MEAN, check_operator
from aiocomm.collectives.kernels import check_budget, device_of, kernels_of
from aiocomm.errors import LinkError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm._device import Description
    from aiocomm._operations import Operations
    from aiocomm.collectives.kernels import Kernels, Scratch
    from aiocomm.collectives.plan import Plan

__all__ = [
    "GpuArray",
    "Reduction",
    "check_plan",
    "choose",
    "chunk_bytes",
    "flat",
    "form_of",
    "itemsize_in",
    "kernels_pay",
    "name_of",
    "reduction",
    "view",
]

_CHAIN_FROM: Final = 32 << 20  # bytes that would leave the root of a broadcast by itself
_LEAST_CHUNK: Final = 5 << 20  # smaller copies cost the engine more than the overlap gives
_GAP_BYTES: Final = 1 << 19  # that could move between one chunk and the next
_MOST_CHUNKS: Final = 48
_REDUCED_CHUNKS: Final = 4  # of a block that is reduced: each costs messages on the loop, besides the kernel
_ONE_SHOT: Final = 1 << 20  # bytes up to which every rank reduces everything
_KERNEL_BYTES: Final = 8 << 20  # of two ranks' arrays, up to which few multiprocessors beat the copy engines
_MANY_SMS: Final = 16
_BY_HOST: Final = ("all_gather", "reduce", "reduce_scatter", "all_reduce")  # a chain crosses once by itself
_REDUCTIONS: Final = ("reduce", "reduce_scatter", "all_reduce")
SM_BUDGET: Final = 8


@dataclass(frozen=True, slots=True)
class _Type:
    """A dtype, as far as ranks compare it."""

    name: str
    itemsize: int


_NAMES: Final = {
    "B": "uint8",
    "?": "bool",
    "b": "int8",
    "h": "int16",
    "i": "int32",
    "q": "int64",
    "H": "uint16",
    "I": "uint32",
    "Q": "uint64",
    "e": "float16",
    "f": "float32",
    "d": "float64",
    "Zf": "complex64",
    "Zd": "complex128",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}
_FORMS: Final = {name: form for form, name in _NAMES.items()}


def form_of(name: str) -> str:
    """A dtype as descriptions name it."""
    return _FORMS.get(name, name)


def name_of(form: str) -> str:
    """A dtype that a description names."""
    return _NAMES.get(form, form)


def itemsize_in(form: str) -> int:
    """Bytes of an element of a dtype that a description names."""
    return itemsize_of((None, 0, 0, -1, NO_STREAM, form, (0,)))


class GpuArray:
    """A contiguous GPU array, seen as flat."""

    __slots__ = ("_described", "dtype", "nbytes", "shape")

    def __init__(self, described: Description) -> None:
        _, _, nbytes, _, _, form, shape = described
        count = math.prod(shape)
        self._described = described
        self.nbytes = nbytes
        self.shape = (count,)
        self.dtype = _Type(_NAMES.get(form, form), itemsize_of(described))

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self._described[1]

    @property
    def stream(self) -> int:
        """Handle of the stream whose work it waits for."""
        return self._described[4]

    def device(self) -> int:
        """Ordinal of its GPU."""
        return device_of(self._described)

    def part(self, start: int, stop: int, waits: bool, stream: int = NO_STREAM) -> Description:
        """Bytes of it.

        Args:
            waits: for the work of its stream; else an earlier step of the call has done so.
            stream: waited for where `waits` is not set.
        """
        return part_of(self._described, start, stop - start, None if waits else stream)


def flat(comm: Operations, x: Any, name: str, writable: bool, stream: Any) -> GpuArray | None:
    """See a GPU array as flat; None: it is not one.

    Raises:
        UsageError: it cannot be moved, or `stream` cannot be waited for.
    """
    if x is None:
        return None
    described = on_gpu(comm._engine, x, writable, stream)
    if described is None:
        return None
    try:
        comm._engine.check_device_memory(described)  # now, and not when other ranks wait for it
    except LinkError as error:
        raise UsageError(f"{name}: {error}") from error
    return GpuArray(described)


def choose(operation: str, size: int, nbytes: int, hosts: Sequence[int] = ()) -> str:
    """The algorithm for GPUs; every rank chooses alike.

    On each host they reach each other directly. Between hosts bytes should go once: adapters have a tenth of
    the rate.

    Args:
        nbytes: of the whole vector: all blocks together, for all_to_all those of one rank.
        hosts: a number for the host of each rank, where there are several.
    """
    if operation == "all_reduce" and nbytes <= _ONE_SHOT:
        return "one_shot"
    if operation in _BY_HOST and nbytes > _ONE_SHOT and hierarchical.useful(hosts):
        return "hierarchical"
    if operation == "broadcast" and size > 2 and nbytes * (size - 1) >= _CHAIN_FROM:
        return "chain"
    return "direct"


def chunk_bytes(operation: str, block: int, item: int, size: int) -> int:
    """Bytes of the parts into which a block is cut where it is passed on, or reduced.

    Along a chain of `size` ranks, `k` chunks take `k + size - 2` times as long as one, between which there is
    a gap: the least where `k` is about the root below.
    """
    chunks = _REDUCED_CHUNKS
    if operation not in _REDUCTIONS:
        chunks = round(math.sqrt(max(1, size - 2) * block / _GAP_BYTES))
        chunks = min(max(chunks, 1), _MOST_CHUNKS)
    wanted = max(block // chunks, min(block, _LEAST_CHUNK), 1)
    return max(item, wanted // item * item)


def kernels_pay(size: int, nbytes: int, sm_budget: int) -> bool:
    """Whether an all-reduce by one kernel per rank, over all arrays, beats copies that each rank reduces."""
    return size > 2 or nbytes <= _KERNEL_BYTES or sm_budget >= _MANY_SMS


def check_plan(plan: Plan) -> None:
    """Refuse what takes more than copies.

    Raises:
        UsageError: the algorithm needs scratch memory for its copies.
    """
    if plan.scratch and plan.operation not in _REDUCTIONS:
        raise UsageError(
            f"{plan.operation} of GPU arrays by {plan.algorithm} needs scratch memory on the GPU: leave "
            "algorithm= out"
        )


@dataclass(frozen=True, slots=True)
class Reduction:
    """What the `Reduce` steps of a call launch."""

    kernels: Kernels
    dtype: str
    op: str
    itemsize: int
    sm_budget: int
    streams: frozenset[int]  # of the user's arrays
    mean: bool

    def begin(self) -> None:
        """Have the kernels wait for the work that made the user's arrays."""
        for stream in self.streams:
            self.kernels.follow(stream)

    def combine(self, target: int, left: int, right: int, nbytes: int) -> None:
        """Queue a step; the arguments are addresses."""
        count = nbytes // self.itemsize
        self.kernels.combine(self.dtype, self.op, target, left, right, count, self.itemsize, self.sm_budget)

    def over_all(self) -> int:
        """Handle of the function that combines the arrays of all ranks in one launch."""
        return self.kernels.over_all(self.dtype, self.op)

    def divide(self, target: GpuArray, by: int) -> None:
        """Queue that a sum becomes a mean."""
        count = target.nbytes // self.itemsize
        self.kernels.divide(self.dtype, self.op, target.address, count, self.itemsize, by, self.sm_budget)


def reduction(op: str, arrays: list[GpuArray], sm_budget: int | None) -> Reduction:
    """Make ready what a reduction of these arrays launches.

    Raises:
        UsageError: there is no such reduction, the arrays are on several GPUs, or it cannot be compiled here.
    """
    dtype = arrays[0].dtype.name
    check_operator(op, dtype, not dtype.startswith(("float", "bfloat")))
    budget = check_budget(sm_budget) or SM_BUDGET
    try:
        devices = {array.device() for array in arrays if array.nbytes}
        if len(devices) > 1:
            raise UsageError(f"out and x are on different GPUs ({devices}): reduce on one of them")
        kernels = kernels_of(min(devices, default=0))
        combined = "sum" if op == MEAN else op
        kernels.prepare(dtype, combined)
    except (LinkError, OSError) as error:
        raise UsageError(f"cannot reduce on this GPU: {error}") from error
    streams = frozenset(array.stream for array in arrays if array.nbytes)
    return Reduction(
        kernels, dtype, combined, arrays[0].dtype.itemsize, budget, streams - {NO_STREAM}, op == MEAN
    )


def view(scratch: Scratch) -> GpuArray:
    """Scratch memory as an array."""
    nbytes = scratch.nbytes
    return GpuArray((scratch, scratch.address, nbytes, scratch.device, NO_STREAM, "B", (nbytes,)))
