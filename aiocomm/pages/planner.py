"""Lowers two page lists to the fewest copies. Pure: offsets in, offsets out.

A page's bytes in one array are a box of rows: the trailing axes that are contiguous on both sides make a row,
the others, and the arrays, say where rows begin. So every copy is (offset of a page) + (offset of a row), and
planning works on pages and rows apart, never on their product:

1. Pages are put in the order of the destination, so that neighbours on both sides meet whatever their order
was. 2. Where a page's stride is its row, neighbours on both sides merge into one longer row. 3. Equally
spaced rows become one 2-D copy per run of pages, or equally spaced runs one per row: whichever is fewer.

The loops over pages are native, and release the GIL. What is planned is the same for every pair of arrays,
and wherever in these pages begin, so it is planned once. What two layouts come to, whatever the pages, is
kept: caches are few, requests many.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from aiocomm.errors import UsageError
from aiocomm.pages.indices import page_list
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.pages.layout import Layout

    Integers = NDArray[np.int64]
    Side = tuple[int, int, int, int]

__all__ = ["Copies", "alike", "one_pair", "pieces", "plan"]


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


@dataclass(frozen=True, slots=True)
class _Matched:
    """Two layouts, whatever the pages.

    Args:
        sides: all of `_core.merge_pages` but the pages.
        row: its bytes.
        rows: where rows begin in a part of a page, on both sides.
        by_rows: the same in equal steps.
        has_bytes: whether a page has any.
        parts: of each source page.
    """

    sides: tuple[Side, Side]
    row: int
    rows: tuple[Integers, Integers]
    by_rows: tuple[Integers, ...]
    has_bytes: bool
    parts: int


def plan(source: Layout, source_pages: Sequence[int], target: Layout, target_pages: Sequence[int]) -> Copies:
    """Copies that bring each source page to the target page at the same place of the lists.

    Raises:
        UsageError: the layouts do not fit, an index is out of range, a target page comes twice, or the lists
            do not hold equally many tokens.
    """
    of, to = alike(source, target)
    found = one_pair(of, page_list(source_pages), to, page_list(target_pages))
    planes, each = len(source.planes), len(found)
    return Copies(
        np.repeat(np.array(source.planes, np.int64), each),
        _tiled(found.source + source.start, planes),
        _tiled(found.source_stride, planes),
        np.repeat(np.array(target.planes, np.int64), each),
        _tiled(found.target + target.start, planes),
        _tiled(found.target_stride, planes),
        _tiled(found.nbytes, planes),
        _tiled(found.rows, planes),
    )


def alike(source: Layout, target: Layout) -> tuple[Layout, Layout]:
    """One pair of arrays of them, from where pages begin, which is planned for all pairs and such views.

    Raises:
        UsageError: they do not have equally many.
    """
    if len(source.planes) != len(target.planes):
        _do_not_fit(source, target)
    return _single(source), _single(target)


@functools.lru_cache(1024)
def _single(layout: Layout) -> Layout:
    """One array from its start, without axes of length 1: they make no difference to what fits."""
    token = layout.token_axis
    kept = [axis for axis, n in enumerate(layout.shape) if n != 1 or axis == token]
    return replace(
        layout,
        planes=(0,),
        shape=tuple(layout.shape[axis] for axis in kept),
        strides=tuple(layout.strides[axis] for axis in kept),
        start=0,
        token_axis=None if token is None else kept.index(token),
    )


def one_pair(source: Layout, give: Integers, target: Layout, take: Integers) -> Copies:
    """`plan` for one pair of arrays, as `alike` gives them: their numbers and starts are 0."""
    found = _matched(source, target)
    if len(give) * source.tokens != len(take) * target.tokens:
        raise UsageError(
            f"{len(give)} source pages of {source.tokens} tokens, {len(take)} target pages of {target.tokens}"
        )
    sides = (give, *found.sides[0]), (take, *found.sides[1])
    from_, to, nbytes, equal, error, page = _core.merge_pages(*sides, found.row)
    match error:
        case 1:
            raise UsageError(f"source page {page} is outside 0 to {source.count - 1}")
        case 2:
            raise UsageError(f"target page {page} is outside 0 to {target.count - 1}")
        case 3:
            raise UsageError(f"target page {page} comes twice")
    if not len(take) or not found.has_bytes:  # engines take no rows of no bytes
        return Copies(*(np.empty(0, np.int64) for _ in range(8)))
    return _lower((from_, to, nbytes), equal, found)


def pieces(source: Layout, give: Integers, target: Layout) -> int:
    """Of what `one_pair` looks at, at most: how long it takes.

    Raises:
        UsageError: the layouts do not fit.
    """
    found = _matched(source, target)
    return len(give) * found.parts * len(found.by_rows[0])


@functools.lru_cache(256)
def _matched(source: Layout, target: Layout) -> _Matched:
    _fit(source, target)
    target = _in_order_of(source, target)
    unit = gcd(source.tokens, target.tokens)
    row, rows_from, rows_to = _rows(source, target, unit)
    return _Matched(
        (_side(source, unit), _side(target, unit)),
        row,
        (rows_from, rows_to),
        _core.equal_steps(rows_from, rows_to),
        source.nbytes > 0,
        source.tokens // unit,
    )


def _fit(source: Layout, target: Layout) -> None:
    def general(layout: Layout) -> tuple[object, ...]:
        shape = [n for axis, n in enumerate(layout.shape) if axis != layout.token_axis]
        return layout.item, layout.token_axis is None, shape

    if general(source) != general(target):
        _do_not_fit(source, target)


def _in_order_of(source: Layout, target: Layout) -> Layout:
    """The target with its token axis at the source's place."""
    at, place = target.token_axis, source.token_axis
    if at is None or place is None or at == place:
        return target

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        rest = [*axes[:at], *axes[at + 1 :]]
        return (*rest[:place], axes[at], *rest[place:])

    return replace(target, shape=moved(target.shape), strides=moved(target.strides), token_axis=place)


def _do_not_fit(source: Layout, target: Layout) -> None:
    raise UsageError(
        f"the layouts do not fit: {len(source.planes)} planes with pages of shape {source.shape} of "
        f"{source.item} bytes, and {len(target.planes)} of {target.shape} of {target.item}"
    )


def _side(layout: Layout, unit: int) -> Side:
    step = 0 if layout.token_axis is None else unit * layout.strides[layout.token_axis]
    return layout.count, layout.page_stride, layout.tokens // unit, step


def _rows(source: Layout, target: Layout, unit: int) -> tuple[int, Integers, Integers]:
    """Bytes of a row, and where rows begin in a part of a page, on both sides."""
    shape = [unit if axis == source.token_axis else n for axis, n in enumerate(source.shape)]
    row, axis = source.item, len(shape)
    while axis and (shape[axis - 1] == 1 or source.strides[axis - 1] == target.strides[axis - 1] == row):
        row *= shape[axis - 1]
        axis -= 1
    # Of axes that lie in another order on each side only one can be a copy's: the longest.
    outer = [a for a in range(axis) if shape[a] > 1]
    if _order(source, outer) != _order(target, outer):
        longest = max(outer, key=lambda a: shape[a])
        outer = [*(a for a in outer if a != longest), longest]
    offsets = []
    for layout in (source, target):
        found = np.zeros(1, np.int64)
        for a in outer:
            found = (found[:, None] + np.arange(shape[a], dtype=np.int64) * layout.strides[a]).reshape(-1)
        offsets.append(found)
    return row, offsets[0], offsets[1]


def _order(layout: Layout, axes: Sequence[int]) -> list[int]:
    return sorted(axes, key=lambda a: -layout.strides[a])


def _lower(merged: tuple[Integers, Integers, Integers], equal: bool, matched: _Matched) -> Copies:
    """Either all rows of a run of pages at once, or all equally spaced runs of one length."""
    from_, to, nbytes = merged
    rows, by_rows = matched.rows, matched.by_rows
    by_pages = _core.equal_steps(from_, to) if equal else None
    if by_pages is None or len(by_rows[0]) * len(to) <= len(by_pages[0]) * len(rows[0]):
        times, outer, found = len(to), (from_, to), by_rows
        lengths = np.repeat(nbytes, len(by_rows[0])) if len(by_rows[0]) > 1 else nbytes
    else:
        times, outer, found = len(rows[0]), rows, by_pages
        lengths = np.full(times * len(by_pages[0]), nbytes[0])
    _, inner_n, a, step_a, b, step_b = found
    begin_from, begin_to = ((out[:, None] + one).reshape(-1) for out, one in ((outer[0], a), (outer[1], b)))
    arrays = np.zeros(len(begin_from), np.int64)
    return Copies(
        arrays,
        begin_from,
        _tiled(step_a, times),
        arrays,
        begin_to,
        _tiled(step_b, times),
        lengths,
        _tiled(inner_n, times),
    )


def _tiled(one: Integers, times: int) -> Integers:
    return one if times == 1 else np.tile(one, times)
