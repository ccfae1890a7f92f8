"""Checks the arguments of reductions, as `requests` does those of the other collectives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.collectives import gpu
from aiocomm.collectives.arrays import MEAN, check_name, dtype_name, operator
from aiocomm.collectives.kernels import check_budget
from aiocomm.collectives.narrow import ONCE, Partials, check_algorithm, is_narrow
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
from aiocomm.collectives.steps import IN, OUT, Problem, even
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.collectives.steps import Name
    from aiocomm.group import Group

__all__ = ["reduced"]


def reduced(
    group: Group,
    operation: str,
    x: Any,
    op: str,
    *,
    out: Any = None,
    root: int = 0,
    algorithm: str | None = None,
    counts: Sequence[int] | None = None,
    stream: Any = None,
    sm_budget: int | None = None,
) -> Request:
    """reduce, all_reduce, reduce_scatter."""
    size, rank = group.size, group.rank
    root = root_of(group, root)
    check_name(op)
    check_budget(sm_budget)  # of host arrays, too: what is wrong does not depend on where they are
    gets = operation != "reduce" or rank == root
    in_place = out is None
    source = flat_anywhere(group, x, "x", in_place and gets, stream)
    target = (source if in_place else flat_anywhere(group, out, "out", True, stream)) if gets else None
    item = source.dtype.itemsize
    receives, wanted, said = _results(operation, source, size, rank, counts)
    if target is not None and not in_place:
        shared = overlap(target, source)
        same_dtype(target, source)
        if target.shape[0] != wanted:
            raise UsageError(f"out has {target.shape[0]} elements, the result {wanted}")
        if shared:
            raise UsageError("out and x overlap; leave out out to reduce in place")
    text = f"{op} {dtype_name(source.dtype)} ({said})" + (f" root {root}" if operation == "reduce" else "")
    problem = Problem(rank, size, root, (), receives, item, in_place=in_place and gets)
    views: dict[Name, Any] = {IN: bytes_of(source)}
    if target is not None:
        views[OUT] = bytes_of(target)
    if isinstance(source, gpu.GpuArray):
        arrays = [source, *([target] if isinstance(target, gpu.GpuArray) else ())]
        kernels = gpu.reduction(op, arrays, sm_budget)
        plan, head = find_plan(group, operation, algorithm, problem, source.nbytes, text, on_gpu=True)
        return Request(
            operation,
            head,
            plan,
            views,
            on_gpu=True,
            dtype=source.dtype,
            reduction=kernels,
            problem=problem if algorithm is None else None,
            together=algorithm is None and _together(operation, size, source.nbytes, kernels),
        )
    ufunc = operator(op, source.dtype)
    if is_narrow(source.dtype):
        check_algorithm(operation, algorithm, str(source.dtype))
        plan, head = find_plan(
            group, operation, algorithm, problem, source.nbytes, text, among=ONCE[operation]
        )
        partials = partial(Partials, ufunc, size if op == MEAN else 1)
        return Request(operation, head, plan, views, dtype=source.dtype, ufunc=ufunc, partials=partials)
    plan, head = find_plan(group, operation, algorithm, problem, source.nbytes, text)
    result = target if op == MEAN and isinstance(target, np.ndarray) else None
    return Request(
        operation,
        head,
        plan,
        views,
        dtype=source.dtype,
        ufunc=ufunc,
        result=result,
        problem=problem if algorithm is None else None,
    )


def _results(
    operation: str, source: Any, size: int, rank: int, counts: Sequence[int] | None
) -> tuple[tuple[int, ...], int, str]:
    """Bytes of the results by block, this rank's elements of them, and what all must say the same of."""
    length, item = source.shape[0], source.dtype.itemsize
    if operation == "reduce":
        return (source.nbytes,), length, f"{length}"
    if operation == "all_reduce":
        return even(source.nbytes, item, size), length, f"{length}"
    per = _shares(length, size, counts)
    return tuple(n * item for n in per), per[rank], f"{length}" + (f" as {per}" if counts is not None else "")


def _shares(length: int, size: int, counts: Sequence[int] | None) -> tuple[int, ...]:
    if counts is not None:
        return counts_of("counts", counts, size, length)
    if length % size:
        raise UsageError(f"x has {length} elements, which {size} ranks do not share evenly: pass counts")
    return (length // size,) * size


def _together(operation: str, size: int, nbytes: int, reduction: gpu.Reduction) -> bool:
    """Whether repeats may be made by one kernel per rank."""
    return (
        operation == "all_reduce"
        and size > 1
        and nbytes > 0
        and gpu.kernels_pay(size, nbytes, reduction.sm_budget)
        and reduction.kernels.reach_peers
    )
