"""GPU arrays as arguments of collectives, whose schedules move their bytes by the copy engines.

No algorithm that needs scratch memory, and none that computes, is run on them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiocomm._device import NO_STREAM, itemsize_of, part_of
from aiocomm._operations import on_gpu
from aiocomm.errors import LinkError, UsageError

if TYPE_CHECKING:
    from aiocomm._device import Description
    from aiocomm._operations import Operations
    from aiocomm.collectives.plan import Plan

__all__ = ["GpuArray", "check_plan", "choose", "chunk_bytes", "flat"]

_CHAIN_FROM: Final = 1 << 20  # bytes that leave the root of a broadcast, all in
_LEAST_CHUNK: Final = 4 << 20  # smaller copies cost the engine more than the overlap gives
_CHUNKS: Final = 32


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
}


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

    def part(self, start: int, stop: int, waits: bool) -> Description:
        """Bytes of it.

        Args:
            waits: for the work of its stream; else an earlier step of the call has done so.
        """
        return part_of(self._described, start, stop - start, None if waits else NO_STREAM)


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


def choose(operation: str, size: int, nbytes: int) -> str:
    """The algorithm for GPUs that reach each other directly; every rank chooses alike."""
    if operation == "broadcast" and size > 2 and nbytes * (size - 1) >= _CHAIN_FROM:
        return "chain"
    return "direct"


def chunk_bytes(block: int, item: int) -> int:
    """Bytes of the parts into which a block is cut where it is passed on."""
    wanted = max(block // _CHUNKS, min(block, _LEAST_CHUNK), 1)
    return max(item, wanted // item * item)


def check_plan(plan: Plan) -> None:
    """Refuse what takes more than copies.

    Raises:
        UsageError: the algorithm needs scratch memory.
    """
    if plan.scratch:
        raise UsageError(
            f"{plan.operation} of GPU arrays by {plan.algorithm} needs scratch memory on the GPU: leave "
            "algorithm= out"
        )
