"""Checks the arguments of a collective call and makes them what `Call` runs.

What is wrong with a call by itself is found here, before a byte moves; it is told to the other ranks, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._numbers import integer, integers
from aiocomm.collectives import cost, gpu, headers
from aiocomm.collectives.arrays import dtype_name, flat
from aiocomm.collectives.gpu import GpuArray
from aiocomm.collectives.headers import header, refusal
from aiocomm.collectives.plan import Plan, make_plan
from aiocomm.collectives.steps import IN, OUT, Problem
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiocomm.collectives.narrow import Partials
    from aiocomm.collectives.steps import Name
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
    "moved",
    "overlap",
    "refused",
    "root_of",
    "same_dtype",
    "swapped",
]

_PLANS = 256  # kept per group


@dataclass(slots=True)
class Request:
    """One rank's call, checked.

    Args:
        header: what all ranks compare.
        vector: what it gives to and expects of each rank, where no rank knows all of that.
        ufunc: the reduction.
        mean_of: divides `result` at the end, where that is not None.
    """

    operation: str
    header: bytes
    plan: Plan | None = None
    views: dict[Name, Any] = field(default_factory=dict)  # flat bytes, or `GpuArray`
    vector: bytes = b""
    on_gpu: bool = False
    dtype: Any = None
    ufunc: np.ufunc | None = None
    result: NDArray[Any] | None = None  # to be divided by the number of ranks
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


def swapped(group: Group, operation: str, everyone: NDArray[Any], mine: NDArray[Any]) -> Request:
    """An all_gather that is part of another operation, by whose name all ranks know it."""
    request = moved(group, "all_gather", everyone, mine)
    return replace(request, operation=operation, header=header(operation))


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


def moved(
    group: Group,
    operation: str,
    out: Any,
    x: Any,
    *,
    root: int = 0,
    algorithm: str | None = None,
    counts: Sequence[int] | None = None,
    send_counts: Sequence[int] | None = None,
    stream: Any = None,
) -> Request:
    """broadcast, scatter, gather, all_gather, all_to_all, and those with counts."""
    size, rank = group.size, group.rank
    root = root_of(group, root)
    kind = operation.removesuffix("v")
    rooted = kind in ("scatter", "gather")
    gives = kind != "broadcast" and not (kind == "scatter" and rank != root)
    takes = not (kind == "gather" and rank != root)
    source = flat_anywhere(group, x, "x", False, stream) if gives else None
    written = rank != root or kind != "broadcast"
    target = flat_anywhere(group, out, "out" if gives else "x", written, stream) if takes else None
    some = target if source is None else source
    assert some is not None
    apart = source is None or target is None or not overlap(target, source)
    if source is not None and target is not None:
        same_dtype(target, source)
    on_gpu = isinstance(some, GpuArray)
    item = some.dtype.itemsize
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    vector: list[int] = []
    in_place = False
    match operation:
        case "broadcast":
            nbytes = some.nbytes
            receives = (nbytes,)
            said = f"{some.shape[0]}"
        case "all_gather" | "all_gatherv" | "gather":
            own = source.shape[0]  # type: ignore[union-attr]
            if counts is None:
                per = (own,) * size
            else:
                per = counts_of("counts", counts, size, target.shape[0])  # type: ignore[union-attr]
                if per[rank] != own:
                    raise UsageError(f"counts promise {per[rank]} elements of rank {rank}, x has {own}")
            if target is not None and target.shape[0] != sum(per):
                raise UsageError(
                    f"out has {target.shape[0]} elements, {size} blocks of {own} make {sum(per)}"
                )
            receives = tuple(n * item for n in per)
            sends = (receives[rank],) if kind == "gather" else ()
            nbytes = sum(receives)
            said = f"{per if counts is not None else own}"
            if not apart:
                in_place = _own_place(target, source, sum(per[:rank]))  # type: ignore[arg-type]
        case "scatter":
            own = target.shape[0]  # type: ignore[union-attr]
            if source is not None and source.shape[0] != own * size:
                raise UsageError(
                    f"x has {source.shape[0]} elements, {size} blocks of {own} make {own * size}"
                )
            sends = (own * item,) * size
            receives = (own * item,)
            nbytes = sum(sends)
            said = f"{own}"
        case "all_to_all":
            length = source.shape[0]  # type: ignore[union-attr]
            if length % size:
                raise UsageError(f"x has {length} elements, which {size} ranks do not share evenly")
            if target.shape[0] != length:  # type: ignore[union-attr]
                raise UsageError(f"out has {target.shape[0]} elements, x {length}")  # type: ignore[union-attr]
            sends = receives = (length // size * item,) * size
            nbytes = sum(sends)
            said = f"{length}"
        case _:  # all_to_allv, gatherv, scatterv: each rank knows its own part only
            give, take = _vectors(group, kind, source, target, root, counts, send_counts)
            sends = tuple(n * item for n in (give if kind != "gather" else give[root : root + 1]))
            receives = tuple(n * item for n in (take if kind != "scatter" else take[root : root + 1]))
            if kind == "scatter" and rank != root:
                sends = ()
            if kind == "gather" and rank != root:
                receives = ()
            vector = [*give, *take]
            nbytes = 0
            said = "counts"
    if kind in ("all_to_all", "scatter") and not apart:
        raise UsageError("out and x overlap")
    text = f"{dtype_name(some.dtype)} ({said})" + (f" root {root}" if rooted or kind == "broadcast" else "")
    problem = Problem(rank, size, root, sends, receives, item, in_place=in_place)
    plan, head = find_plan(
        group,
        operation.replace("all_gatherv", "all_gather"),
        algorithm,
        problem,
        nbytes,
        text,
        vector=bool(vector),
        on_gpu=on_gpu,
    )
    views: dict[Name, Any] = {}
    if source is not None:
        views[IN] = bytes_of(source)
    if target is not None:
        views[OUT] = bytes_of(target)
    return Request(
        operation,
        head,
        plan,
        views,
        np.array(vector, np.int64).tobytes(),
        on_gpu,
        problem=problem if algorithm is None else None,
    )


def _vectors(
    group: Group,
    kind: str,
    source: Array | None,
    target: Array | None,
    root: int,
    counts: Sequence[int] | None,
    send_counts: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """What this rank gives to and takes from each rank, in elements."""
    size, rank = group.size, group.rank
    give, take = [0] * size, [0] * size
    if kind == "all_to_all":
        assert source is not None
        assert target is not None
        give = list(counts_of("send_counts", send_counts, size, source.shape[0]))
        take = list(counts_of("recv_counts", counts, size, target.shape[0]))
        if give[rank] != take[rank]:
            raise UsageError(f"gives itself {give[rank]} elements and expects {take[rank]}")
    elif kind == "gather":
        assert source is not None
        give[root] = source.shape[0]
        if target is not None:
            take = list(counts_of("counts", counts, size, target.shape[0]))
    else:
        assert target is not None
        take[root] = target.shape[0]
        if source is not None:
            give = list(counts_of("counts", counts, size, source.shape[0]))
    return give, take


def _own_place(target: Array, source: Array, start: int) -> bool:
    """Whether x is this rank's own block of out."""
    if _address(target) + start * source.dtype.itemsize != _address(source):
        raise UsageError("x overlaps out, but is not this rank's own block of it")
    return True


def _address(array: Array) -> int:
    return array.address if isinstance(array, GpuArray) else array.ctypes.data
