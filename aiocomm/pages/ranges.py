"""Plans as they are moved: by rows as they are, or by ranges contiguous at the peer with their local rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio.to_thread

from aiocomm.pages.plan_cache import PlanCache
from aiocomm.pages.planner import kept_pair, one_pair, page_list
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from aiocomm.pages.layout import Layout
    from aiocomm.pages.planner import Copies

    Integers = NDArray[np.int64]

__all__ = ["Ranges", "plan_copies", "plan_ranges", "ranges_of"]

_STAGED: Final = 1 << 20  # bytes of one staging buffer, at most
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
    """

    far: list[int]
    nbytes: list[int]
    first: list[int]
    near: Integers
    rows: Integers


_kept: Final[dict[bool, PlanCache[Ranges]]] = {True: PlanCache(64), False: PlanCache(64)}


async def plan_ranges(
    source: Layout,
    give: Sequence[int] | Integers,
    target: Layout,
    take: Sequence[int] | Integers,
    at_target: bool,
) -> Ranges:
    """Plan on another thread where it takes longer than handing it over.

    Args:
        at_target: whether the peer has the target pages, or the source pages.

    Raises:
        UsageError: as for `plan`.
    """
    from_, to = page_list(give), page_list(take)
    if (found := _kept[at_target].find(source, from_, target, to)) is not None:
        return found
    if len(from_) + len(to) <= _INLINE:
        return ranges_of(source, from_, target, to, at_target)
    return await anyio.to_thread.run_sync(ranges_of, source, from_, target, to, at_target)


async def plan_copies(
    source: Layout, give: Sequence[int] | Integers, target: Layout, take: Sequence[int] | Integers
) -> Copies:
    """Plan for engines that take rows, as `plan_ranges`."""
    from_, to = page_list(give), page_list(take)
    if (found := kept_pair(source, from_, target, to)) is not None:
        return found
    if len(from_) + len(to) <= _INLINE:
        return one_pair(source, from_, target, to)
    return await anyio.to_thread.run_sync(one_pair, source, from_, target, to)


def ranges_of(source: Layout, give: Integers, target: Layout, take: Integers, at_target: bool) -> Ranges:
    """See `plan_ranges`."""
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
    found = Ranges(starts.tolist(), nbytes.tolist(), first.tolist(), at, rows)
    kept.keep(source, give, target, take, found)
    return found
