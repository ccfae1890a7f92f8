"""Lowers two page lists to the fewest copies. Pure: offsets in, offsets out.

A page's bytes in one array are a box of rows: the trailing axes that are contiguous on both sides make a row,
the others, and the arrays, say where rows begin. So every copy is (offset of a page) + (offset of a row), and
planning works on pages and rows apart, never on their product:

1. Pages are put in the order of the destination, so that neighbours on both sides meet whatever their order
was. 2. Where a page's stride is its row, neighbours on both sides merge into one longer row. 3. Equally
spaced rows become one 2-D copy per run of pages, or equally spaced runs one per row: whichever is fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.pages.layout import Layout

    Integers = NDArray[np.int64]

__all__ = ["Copies", "plan"]


@dataclass(frozen=True, slots=True)
class Copies:
    """2-D copies: `rows[i]` rows of `nbytes[i]` bytes, `*_stride[i]` bytes apart. Vectors of one length."""

    source_array: Integers
    source: Integers
    source_stride: Integers
    target_array: Integers
    target: Integers
    target_stride: Integers
    nbytes: Integers
    rows: Integers

    def __len__(self) -> int:
        return len(self.rows)

    def flat(self) -> tuple[Integers, Integers, Integers, Integers, Integers]:
        """Every row by itself: source array and offset, target array and offset, bytes."""
        which = np.repeat(np.arange(len(self.rows)), self.rows)
        first = np.repeat(np.cumsum(self.rows) - self.rows, self.rows)
        number = np.arange(len(which)) - first
        return (
            self.source_array[which],
            self.source[which] + number * self.source_stride[which],
            self.target_array[which],
            self.target[which] + number * self.target_stride[which],
            self.nbytes[which],
        )


def plan(source: Layout, source_pages: Sequence[int], target: Layout, target_pages: Sequence[int]) -> Copies:
    """Copies that bring each source page to the target page at the same place of the lists.

    Raises:
        UsageError: the layouts do not fit, an index is out of range, a target page comes twice, or the lists
            do not hold equally many tokens.
    """
    give, take = (
        _indices("source", source_pages, source.count),
        _indices("target", target_pages, target.count),
    )
    _fit(source, target)
    unit = gcd(source.tokens, target.tokens)
    if len(give) * source.tokens != len(take) * target.tokens:
        raise UsageError(
            f"{len(give)} source pages of {source.tokens} tokens, {len(take)} target pages of {target.tokens}"
        )
    if len(take) and np.bincount(take).max() > 1:
        raise UsageError(f"target page {int(np.bincount(take).argmax())} comes twice")
    if not len(take):
        return Copies(*(np.empty(0, np.int64) for _ in range(8)))
    from_, to = _units(source, give, unit), _units(target, take, unit)
    from_, to = _in_order(from_, to, target, unit)
    row_bytes, rows_from, rows_to = _rows(source, target, unit)
    return _lower(source, target, (from_, to), (rows_from, rows_to), row_bytes)


def _indices(name: str, pages: Sequence[int], count: int) -> Integers:
    found = np.asarray(pages, np.int64).reshape(-1)
    if len(found) and (found.min() < 0 or found.max() >= count):
        wrong = found[(found < 0) | (found >= count)][0]
        raise UsageError(f"{name} page {wrong} is outside 0 to {count - 1}")
    return found


def _fit(source: Layout, target: Layout) -> None:
    def general(layout: Layout) -> tuple[object, ...]:
        shape = [n if axis != layout.token_axis else -1 for axis, n in enumerate(layout.shape)]
        return len(layout.planes), layout.item, layout.token_axis, tuple(shape)

    if general(source) != general(target):
        raise UsageError(
            f"the layouts do not fit: {len(source.planes)} planes with pages of shape {source.shape}, and "
            f"{len(target.planes)} of {target.shape}"
        )


def _units(layout: Layout, pages: Integers, unit: int) -> Integers:
    """Offsets of the parts into which both sides' pages divide."""
    starts = layout.start + pages * layout.page_stride
    parts = layout.tokens // unit
    if layout.token_axis is None or parts == 1:
        return starts
    steps = np.arange(parts, dtype=np.int64) * (unit * layout.strides[layout.token_axis])
    return (starts[:, None] + steps).reshape(-1)


def _in_order(from_: Integers, to: Integers, target: Layout, unit: int) -> tuple[Integers, Integers]:
    if (to[1:] > to[:-1]).all():
        return from_, to
    # Targets are distinct multiples of a step: placing them is faster than sorting them.
    token = target.strides[target.token_axis] * unit if target.token_axis is not None else target.page_stride
    step = gcd(target.page_stride, token)
    base = int(to.min())
    places = (to - base) // step
    most = int(places.max()) + 1
    if most > 16 * len(to):
        order = np.argsort(to, kind="stable")
        return from_[order], to[order]
    placed = np.full(most, -1, np.int64)
    placed[places] = from_
    there = np.flatnonzero(placed >= 0)
    return placed[there], there * step + base


def _rows(source: Layout, target: Layout, unit: int) -> tuple[int, Integers, Integers]:
    """Bytes of a row, and where rows begin in a part of a page, on both sides."""
    shape = [unit if axis == source.token_axis else n for axis, n in enumerate(source.shape)]
    row, axis = source.item, len(shape)
    while axis and (shape[axis - 1] == 1 or source.strides[axis - 1] == target.strides[axis - 1] == row):
        row *= shape[axis - 1]
        axis -= 1
    offsets = []
    for layout in (source, target):
        found = np.zeros(1, np.int64)
        for n, stride in zip(shape[:axis], layout.strides[:axis], strict=True):
            found = (found[:, None] + np.arange(n, dtype=np.int64) * stride).reshape(-1)
        offsets.append(found)
    return row, offsets[0], offsets[1]


def _runs(a: Integers, b: Integers) -> tuple[Integers, Integers]:
    """Cut two lists of offsets into runs in which both grow by constant steps: starts and lengths.

    A run takes as many as it can before the next one begins.
    """
    n = len(a)
    if n < 3:
        return np.zeros(1, np.int64), np.array([n])
    same = (np.diff(a, 2) == 0) & (np.diff(b, 2) == 0)
    if same.all():
        return np.zeros(1, np.int64), np.array([n])
    if not same.any():  # pairs are runs, too: any two are equally spaced
        starts = np.arange(0, n, 2)
        return starts, np.diff(np.append(starts, n))
    # Two stretches may share an end: the earlier one keeps it.
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8)))
    begins = [0]
    for first, last in edges.reshape(-1, 2).tolist():
        begin, end = max(first, begins[-1]), last + 2  # elements begin..end-1
        if end - begin < 2:
            continue
        begins.extend(range(begins[-1] + 2, begin, 2))
        if begin > begins[-1]:
            begins.append(begin)
        begins.append(end)
    if begins[-1] < n:
        begins.extend(range(begins[-1] + 2, n, 2))
    else:
        begins.pop()
    at = np.array(begins)
    return at, np.diff(np.append(at, n))


def _lower(
    source: Layout,
    target: Layout,
    pages: tuple[Integers, Integers],
    rows: tuple[Integers, Integers],
    row_bytes: int,
) -> Copies:
    from_, to = pages
    # 2. neighbours on both sides
    adjacent = (from_[1:] - from_[:-1] == row_bytes) & (to[1:] - to[:-1] == row_bytes)
    starts = np.concatenate(([0], np.flatnonzero(~adjacent) + 1))
    nbytes = np.diff(np.append(starts, len(to))) * row_bytes
    from_, to = from_[starts], to[starts]
    # 3. either all rows of a run of pages at once, or all equally spaced runs of one length
    row_at, row_n = _runs(*rows)
    if nbytes.min() == nbytes.max():
        page_at, page_n = _runs(from_, to)
    else:
        page_at, page_n = np.arange(len(to)), np.ones(len(to), np.int64)
    by_rows = len(row_at) * len(to) <= len(page_at) * len(rows[0])
    if by_rows:
        times, inner, inner_n, lists = len(to), row_at, row_n, rows
    else:
        times, inner, inner_n, lists = len(rows[0]), page_at, page_n, (from_, to)
    begin_from = ((from_ if by_rows else rows[0])[:, None] + lists[0][inner]).reshape(-1)
    begin_to = ((to if by_rows else rows[1])[:, None] + lists[1][inner]).reshape(-1)
    after = np.minimum(inner + 1, inner + inner_n - 1)
    strides = [_tiled(one[after] - one[inner], times) for one in lists]
    lengths = np.repeat(nbytes, len(inner)) if by_rows and len(inner) > 1 else nbytes
    if not by_rows:
        lengths = _tiled(nbytes[inner], times)
    planes = len(source.planes)
    each = len(begin_from)
    return Copies(
        np.repeat(np.array(source.planes, np.int64), each),
        _tiled(begin_from, planes),
        _tiled(strides[0], planes),
        np.repeat(np.array(target.planes, np.int64), each),
        _tiled(begin_to, planes),
        _tiled(strides[1], planes),
        _tiled(lengths, planes),
        _tiled(_tiled(inner_n, times), planes),
    )


def _tiled(one: Integers, times: int) -> Integers:
    return one if times == 1 else np.tile(one, times)
