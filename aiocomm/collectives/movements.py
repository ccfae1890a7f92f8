"""Checks the arguments of the collectives that compute nothing, as `reductions` does those of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiocomm.collectives.arrays import dtype_name
from aiocomm.collectives.gpu import GpuArray
from aiocomm.collectives.headers import header
from aiocomm.collectives.requests import (
    Request,
    bytes_of,
    counts_of,
    find_plan,
    flat_anywhere,
    overlap,
    root_of,
    same_dtype,
)
from aiocomm.collectives.steps import IN, OUT, Problem
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiocomm.collectives.requests import Array
    from aiocomm.collectives.steps import Name
    from aiocomm.group import Group

__all__ = ["moved", "swapped"]


class _Given(NamedTuple):
    """One rank's arrays, flat and of one dtype; None where it gives or takes nothing."""

    size: int
    rank: int
    root: int
    source: Array | None
    target: Array | None
    apart: bool  # whether the two share no memory
    counts: Sequence[int] | None  # elements of the blocks, or of those that come
    send_counts: Sequence[int] | None

    @property
    def x(self) -> Array:
        """What this rank gives, where it must give something."""
        assert self.source is not None
        return self.source

    @property
    def out(self) -> Array:
        """Where this rank takes it, where it must take something."""
        assert self.target is not None
        return self.target


@dataclass(slots=True)
class _Blocks:
    """What one rank gives and takes, in elements, as `Problem` has it in bytes.

    Args:
        total: elements of all blocks, by which an algorithm is chosen.
        said: what all ranks must say the same of.
        in_place: x is this rank's own block of out.
        vector: what it gives to each rank, then what it takes from each, where no rank knows all of that.
    """

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    total: int
    said: str
    in_place: bool = False
    vector: tuple[int, ...] = ()


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
    gives = kind != "broadcast" and not (kind == "scatter" and rank != root)
    takes = not (kind == "gather" and rank != root)
    source = flat_anywhere(group, x, "x", False, stream) if gives else None
    written = rank != root or kind != "broadcast"
    target = flat_anywhere(group, out, "out" if gives else "x", written, stream) if takes else None
    apart = source is None or target is None or not overlap(target, source)
    given = _Given(size, rank, root, source, target, apart, counts, send_counts)
    if source is not None and target is not None:
        same_dtype(target, source)
    some = given.out if source is None else source
    blocks = _BLOCKS[operation](given)
    item, on_gpu = some.dtype.itemsize, isinstance(some, GpuArray)
    rooted = f" root {root}" if kind in ("broadcast", "scatter", "gather") else ""
    problem = Problem(
        rank,
        size,
        root,
        tuple(count * item for count in blocks.sends),
        tuple(count * item for count in blocks.receives),
        item,
        in_place=blocks.in_place,
    )
    plan, head = find_plan(
        group,
        "all_gather" if kind == "all_gather" else operation,  # whose algorithms take blocks of any size
        algorithm,
        problem,
        blocks.total * item,
        f"{dtype_name(some.dtype)} ({blocks.said}){rooted}",
        vector=bool(blocks.vector),
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
        np.array(blocks.vector, np.int64).tobytes(),
        on_gpu,
        problem=problem if algorithm is None else None,
    )


def swapped(group: Group, operation: str, everyone: NDArray[Any], mine: NDArray[Any]) -> Request:
    """An all_gather that is part of another operation, by whose name all ranks know it."""
    request = moved(group, "all_gather", everyone, mine)
    return replace(request, operation=operation, header=header(operation))


def _broadcast(given: _Given) -> _Blocks:
    length = given.out.shape[0]
    return _Blocks((), (length,), length, f"{length}")


def _scatter(given: _Given) -> _Blocks:
    own, size = given.out.shape[0], given.size
    if given.source is not None and given.source.shape[0] != own * size:
        raise UsageError(f"x has {given.source.shape[0]} elements, {size} blocks of {own} make {own * size}")
    _check_apart(given)
    return _Blocks((own,) * size, (own,), own * size, f"{own}")


def _gather(given: _Given) -> _Blocks:
    blocks = _all_gather(given)
    return replace(blocks, sends=(given.x.shape[0],))


def _all_gather(given: _Given) -> _Blocks:
    own, size = given.x.shape[0], given.size
    if given.target is not None and given.target.shape[0] != own * size:
        raise UsageError(
            f"out has {given.target.shape[0]} elements, {size} blocks of {own} make {own * size}"
        )
    return _Blocks((), (own,) * size, own * size, f"{own}", _in_place(given, own * given.rank))


def _all_gatherv(given: _Given) -> _Blocks:
    own, rank, length = given.x.shape[0], given.rank, given.out.shape[0]
    per = counts_of("counts", given.counts, given.size, length)
    if per[rank] != own:
        raise UsageError(f"counts promise {per[rank]} elements of rank {rank}, x has {own}")
    return _Blocks((), per, length, f"{per}", _in_place(given, sum(per[:rank])))


def _all_to_all(given: _Given) -> _Blocks:
    length, size = given.x.shape[0], given.size
    if length % size:
        raise UsageError(f"x has {length} elements, which {size} ranks do not share evenly")
    if given.out.shape[0] != length:
        raise UsageError(f"out has {given.out.shape[0]} elements, x {length}")
    _check_apart(given)
    per = (length // size,) * size
    return _Blocks(per, per, length, f"{length}")


def _all_to_allv(given: _Given) -> _Blocks:
    give = counts_of("send_counts", given.send_counts, given.size, given.x.shape[0])
    take = counts_of("recv_counts", given.counts, given.size, given.out.shape[0])
    if give[given.rank] != take[given.rank]:
        raise UsageError(f"gives itself {give[given.rank]} elements and expects {take[given.rank]}")
    _check_apart(given)
    return _Blocks(give, take, 0, "counts", vector=(*give, *take))


def _gatherv(given: _Given) -> _Blocks:
    own, root = given.x.shape[0], given.root
    take: tuple[int, ...] = ()
    if given.target is not None:
        take = counts_of("counts", given.counts, given.size, given.target.shape[0])
    in_place = _in_place(given, sum(take[: given.rank]))
    vector = (*_only(own, root, given.size), *(take or (0,) * given.size))
    return _Blocks((own,), take, 0, "counts", in_place, vector)


def _scatterv(given: _Given) -> _Blocks:
    own, root = given.out.shape[0], given.root
    give: tuple[int, ...] = ()
    if given.source is not None:
        give = counts_of("counts", given.counts, given.size, given.source.shape[0])
    _check_apart(given)
    vector = (*(give or (0,) * given.size), *_only(own, root, given.size))
    return _Blocks(give, (own,), 0, "counts", vector=vector)


_BLOCKS: dict[str, Callable[[_Given], _Blocks]] = {
    "broadcast": _broadcast,
    "scatter": _scatter,
    "scatterv": _scatterv,
    "gather": _gather,
    "gatherv": _gatherv,
    "all_gather": _all_gather,
    "all_gatherv": _all_gatherv,
    "all_to_all": _all_to_all,
    "all_to_allv": _all_to_allv,
}


def _only(count: int, root: int, size: int) -> tuple[int, ...]:
    """Nothing of any rank but the root."""
    return tuple(count if rank == root else 0 for rank in range(size))


def _check_apart(given: _Given) -> None:
    if not given.apart:
        raise UsageError("out and x overlap")


def _in_place(given: _Given, start: int) -> bool:
    """Whether x is this rank's own block of out, which begins at element `start`; nothing else overlaps."""
    if given.apart:
        return False
    if _address(given.out) + start * given.x.dtype.itemsize != _address(given.x):
        raise UsageError("x overlaps out, but is not this rank's own block of it")
    return True


def _address(array: Array) -> int:
    return array.address if isinstance(array, GpuArray) else array.ctypes.data
