"""Checks the arguments of a collective call and makes them what `Call` runs.

What is wrong with a call by itself is found here, before a byte moves; it is told to the other ranks, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._numbers import integer, integers
from aiocomm.collectives import cost, gpu, headers
from aiocomm.collectives.arrays import flat
from aiocomm.collectives.gpu import GpuArray
from aiocomm.collectives.headers import header, refusal
from aiocomm.collectives.plan import Plan, make_plan
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiocomm.collectives.narrow import Partials
    from aiocomm.collectives.steps import Name, Problem
    from aiocomm.group import Group

    Array = NDArray[Any] | GpuArray

__all__ = [
    "Request",
    "barrier",
    "bytes_of",
    "color_of",
    "counts_of",
    "find_plan",
    "flat_anywhere",
    "is_root",
    "key_of",
    "overlap",
    "refused",
    "root_of",
    "same_dtype",
]

_PLANS = 256  # kept per group


@dataclass(slots=True)
class Request:
    """One rank's call, checked.

    Args:
        header: what all ranks compare.
        vector: what it gives to and expects of each rank, where no rank knows all of that.
        ufunc: the reduction.
        result: is divided by the number of ranks at the end, where it is not None.
    """

    operation: str
    header: bytes
    plan: Plan | None = None
    views: dict[Name, Any] = field(default_factory=dict)  # flat bytes, or `GpuArray`
    vector: bytes = b""
    on_gpu: bool = False
    dtype: Any = None
    ufunc: np.ufunc | None = None
    result: NDArray[Any] | None = None
    partials: Callable[[], Partials] | None = None  # of reductions whose results are rounded once
    reduction: gpu.Reduction | None = None  # of GPU arrays
    problem: Problem | None = None  # where any algorithm would do
    together: bool = False  # repeats may be made by one kernel per rank

    def without_arrays(self) -> Request:
        """What repeats have in common: who keeps it keeps no array of this call."""
        return replace(self, views={}, result=None)


def refused(operation: str, error: Exception) -> Request:
    """A call that is wrong by itself: the others learn of it instead of waiting."""
    return Request(operation, refusal(error))


def barrier(operation: str = "barrier") -> Request:
    """Nothing but headers."""
    return Request(operation, header(operation))


def bytes_of(array: Array) -> Any:
    return array if isinstance(array, GpuArray) else array.view(np.uint8)


def flat_anywhere(group: Group, x: Any, name: str, writable: bool, stream: Any) -> Array:
    on_gpu = gpu.flat(group._comm, x, name, writable, stream)
    return flat(x, name, writable) if on_gpu is None else on_gpu


def overlap(a: Array, b: Array) -> bool:
    if isinstance(a, GpuArray) and isinstance(b, GpuArray):
        return a.address < b.address + b.nbytes and b.address < a.address + a.nbytes
    if isinstance(a, GpuArray) or isinstance(b, GpuArray):
        raise UsageError("one array is in host memory, and one on a GPU: copy one of them")
    return bool(np.may_share_memory(a, b))


def find_plan(
    group: Group,
    operation: str,
    algorithm: str | None,
    problem: Problem,
    nbytes: int,
    text: str,
    vector: bool = False,
    on_gpu: bool = False,
    among: Sequence[str] = (),
) -> tuple[Plan, bytes]:
    """The plan and the header, which say the same at every call of this kind.

    Args:
        among: the algorithms to choose from; empty: all.
    """
    if algorithm is not None and not isinstance(algorithm, str):
        raise UsageTypeError(f"algorithm={algorithm!r}: pass its name, or leave it out")
    if on_gpu:
        text += " on GPUs"  # all ranks' arrays are, or none's: their small data travel differently
    key = (operation, algorithm, problem, text)
    found = group._plans.get(key)
    if found is None:
        chosen = algorithm
        if chosen is None and on_gpu:
            chosen = gpu.choose(operation, group.size, nbytes, group.hosts)
        elif chosen is None:
            chosen = cost.choose(operation, group.size, nbytes, group.link, group.hosts, among)
        eager = not vector and not on_gpu and group.size <= headers.DIRECT_MEMBERS
        plan = make_plan(operation, chosen, replace(problem, hosts=group.hosts), eager, on_gpu)
        if on_gpu:
            gpu.check_plan(plan)
        found = plan, header(f"{operation} {text} by {chosen}")
        if len(group._plans) >= _PLANS:
            group._plans.clear()
        group._plans[key] = found
    return found


def root_of(group: Group, root: Any) -> int:
    found = integer("root", root)
    if not 0 <= found < group.size:
        raise UsageError(f"root={found}: ranks of this group are 0 to {group.size - 1}")
    return found


def is_root(group: Group, root: Any) -> bool:
    """Whether this rank is the root; nobody is what `root_of` refuses, or what cannot be looked at."""
    try:
        return integer("root", root) == group.rank
    except Exception:  # which `root_of` meets, too, and tells all
        return False


def color_of(color: Any) -> int:
    found = key_of(color, "color")
    if found < 0:
        raise UsageError(f"color={found} is negative: 0 or more, or None to join no group")
    return found


def key_of(key: Any, name: str = "key") -> int:
    found = integer(name, key)
    if not -(1 << 63) <= found < 1 << 63:
        raise UsageError(f"{name}={found} has more than 64 bits")
    return found


def counts_of(name: str, counts: Sequence[int] | None, size: int, available: int) -> tuple[int, ...]:
    """Counts in elements, checked against the array."""
    found = integers(name, counts, "rank")
    if len(found) != size:
        raise UsageError(f"{name} has {len(found)} entries for {size} ranks")
    if any(count < 0 for count in found):
        raise UsageError(f"{name} has a negative entry: {found}")
    if sum(found) != available:
        raise UsageError(f"{name} sum to {sum(found)} elements, the array has {available}")
    return found


def same_dtype(a: Array, b: Array) -> None:
    if a.dtype != b.dtype:
        raise UsageError(f"out is of dtype {a.dtype}, x of {b.dtype}")
