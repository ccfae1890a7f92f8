"""Plans as they are moved: by rows as they are, or by ranges contiguous at the peer with their local rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import anyio.to_thread
import numpy as np

from aiocomm.pages.indices import page_list
from aiocomm.pages.plan_cache import PlanCache
from aiocomm.pages.planner import alike, one_pair
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from aiocomm.pages.indices import Indices
    from aiocomm.pages.layout import Layout

    Integers = NDArray[np.int64]

__all__ = ["ENTRY_BYTES", "Ranges", "plan_far_rows", "plan_ranges", "plan_rows", "ranges_of"]

T = TypeVar("T")
_STAGED: Final = 1 << 20  # bytes of one staging buffer, at most
_LISTED: Final = 128 << 10  # bytes of ranges that go in one message, about
_SMALL: Final = 32 << 10  # bytes from which a range is better off by itself: it is copied twice less
# The same where GPU memory goes by way of host memory, or bytes by a network: copied as often by themselves.
_LISTED_FAR: Final = 256 << 10
_SMALL_FAR: Final = 128 << 10
ENTRY_BYTES: Final = 16  # bytes of a range in a list
_INLINE: Final = 4096  # pages that the loop's thread plans itself: a quarter of a millisecond


@dataclass(frozen=True, slots=True)
class Ranges:
    """For every pair of arrays alike.

    Args:
        far: where each range begins at the peer, in bytes.
        nbytes: of each range.
        first: the first row of each range, and the number of all rows.
        near: where each row begins here, in bytes.
        rows: bytes of each row.
        groups: the first range of each group that may go in one message, and the number of all ranges.
        groups_far: the same where an end is GPU memory, or a network is between.
    """

    far: Integers
    nbytes: Integers
    first: Integers
    near: Integers
    rows: Integers
    groups: list[int]
    groups_far: list[int]


_kept_rows: Final[PlanCache[_core.Rows]] = PlanCache(64)
_kept_far_rows: Final[dict[bool, PlanCache[_core.Rows]]] = {True: PlanCache(64), False: PlanCache(64)}
_kept: Final[dict[bool, PlanCache[Ranges]]] = {True: PlanCache(64), False: PlanCache(64)}


async def plan_ranges(
    source: Layout,
    give: Indices,
    target: Layout,
    take: Indices,
    at_target: bool,
) -> Ranges:
    """Plan on another thread where it takes longer than handing it over.

    Args:
        at_target: whether the peer has the target pages, or the source pages.

    Raises:
        UsageError: as for `plan`.
    """
    return await _planned(_kept[at_target], ranges_of, source, give, target, take, at_target)


async def plan_rows(source: Layout, give: Indices, target: Layout, take: Indices) -> _core.Rows:
    """Plan for engines that take rows, as `plan_ranges`."""
    return await _planned(_kept_rows, _rows_of, source, give, target, take)


async def plan_far_rows(
    source: Layout,
    give: Indices,
    target: Layout,
    take: Indices,
    at_target: bool,
) -> _core.Rows:
    """Plan for adapters that take rows, in the order in which these lie at the peer, as `plan_ranges`."""
    return await _planned(_kept_far_rows[at_target], _far_rows_of, source, give, target, take, at_target)


async def _planned(
    kept: PlanCache[T],
    work: Callable[..., T],
    source: Layout,
    give: Indices,
    target: Layout,
    take: Indices,
    *more: bool,
) -> T:
    """A plan that is kept, or is made, on another thread where that takes longer than handing it over.

    Nobody may change the lists meanwhile: see `own_list`.
    """
    from_, to = page_list(give), page_list(take)
    source, target = alike(source, target)
    if (found := kept.find(source, from_, target, to)) is not None:
        return found
    if len(from_) + len(to) <= _INLINE:
        return work(source, from_, target, to, *more)
    return await anyio.to_thread.run_sync(work, source, from_, target, to, *more)


def _rows_of(source: Layout, give: Integers, target: Layout, take: Integers) -> _core.Rows:
    copies = one_pair(source, give, target, take)
    found = _core.Rows(
        copies.source,
        copies.source_stride,
        copies.target,
        copies.target_stride,
        copies.nbytes,
        copies.rows,
    )
    _kept_rows.keep(source, give, target, take, found)
    return found


def _far_rows_of(
    source: Layout, give: Integers, target: Layout, take: Integers, at_target: bool
) -> _core.Rows:
    ranges = ranges_of(source, give, target, take, at_target)
    found = _core.Rows.of_ranges(ranges.far, ranges.first, ranges.near, ranges.rows, at_target)
    _kept_far_rows[at_target].keep(source, give, target, take, found)
    return found


def ranges_of(source: Layout, give: Integers, target: Layout, take: Integers, at_target: bool) -> Ranges:
    """See `plan_ranges`."""
    source, target = alike(source, target)
    kept = _kept[at_target]
    if (found := kept.find(source, give, target, take)) is not None:
        return found
    copies = one_pair(source, give, target, take)
    near, far = (
        (copies.source, copies.source_stride),
        (copies.target, copies.target_stride),
    )
    if not at_target:
        near, far = far, near
    starts, nbytes, first, at, rows = _core.far_ranges(*near, *far, copies.nbytes, copies.rows, _STAGED)
    most = None if at_target else _core.MOST_IN_GET
    groups = _groups(nbytes, most, _SMALL, _LISTED)
    groups_far = _groups(nbytes, most, _SMALL_FAR, _LISTED_FAR)
    found = Ranges(starts, nbytes, first, at, rows, groups, groups_far)
    kept.keep(source, give, target, take, found)
    return found


def _groups(nbytes: Integers, most: int | None, least: int, listed: int) -> list[int]:
    """Where a message of ranges below `least` ends: after `listed` bytes, or `most` entries of its list."""
    if not len(nbytes):
        return [0]
    small = nbytes < least
    message = np.cumsum(nbytes + ENTRY_BYTES) // listed
    if most is not None:
        message = message * (len(nbytes) // most + 1) + np.arange(len(nbytes)) // most
    together = small[1:] & small[:-1] & (message[1:] == message[:-1])
    return [0, *(np.flatnonzero(~together) + 1).tolist(), len(nbytes)]
