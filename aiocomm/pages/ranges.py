"""Plans as they are moved: by rows as they are, or by ranges contiguous at the peer with their local rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import anyio.to_thread
import numpy as np

from aiocomm.pages.indices import page_list
from aiocomm.pages.plan_cache import PlanCache
from aiocomm.pages.planner import alike, one_pair, pieces
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from aiocomm.pages.indices import Indices
    from aiocomm.pages.layout import Layout
    from aiocomm.pages.planner import Copies

    Integers = NDArray[np.int64]

__all__ = ["ENTRY_BYTES", "Plan", "Ranges", "plan_pages"]

_STAGED: Final = 1 << 20  # bytes of one staging buffer, at most
_LISTED: Final = 128 << 10  # bytes of ranges that go in one message, about
_SMALL: Final = 32 << 10  # bytes from which a range is better off by itself: it is copied twice less
# The same where GPU memory goes by way of host memory, or bytes by a network: copied as often by themselves.
_LISTED_FAR: Final = 256 << 10
_SMALL_FAR: Final = 128 << 10
# What is kept of a plan takes, for each copy, equal rows (core/rows.hpp) and group.
_COPY_BYTES: Final = 64
_ROWS_BYTES: Final = 56
_GROUP_BYTES: Final = 40
ENTRY_BYTES: Final = 16  # bytes of a range in a list
_INLINE: Final = 2048  # rows that the loop's thread plans itself: a quarter of a millisecond

T = TypeVar("T")


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


class _Form(Generic[T]):
    """What is made when it is first asked for; `cached_property` has one lock for all plans."""

    def __init__(self, make: Callable[[Plan], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type[Plan], name: str) -> None:
        self._name = name

    def __get__(self, plan: Plan, owner: type[Plan]) -> T:
        made = plan.__dict__[self._name] = self._make(plan)
        return made


class Plan:
    """What brings pages from here to there, for every pair of arrays alike. Any thread.

    Its forms are made when they are first asked for.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    @_Form
    def count(self) -> int:
        """Of all rows."""
        return int(self._copies.rows.sum())

    @_Form
    def mean(self) -> float:
        """Of all rows, in bytes; 0 where there are none."""
        return float(self._copies.rows @ self._copies.nbytes) / self.count if self.count else 0.0

    @_Form
    def rows(self) -> _core.Rows:
        """For engines that take rows."""
        c = self._copies
        return _core.Rows(c.source, c.source_stride, c.target, c.target_stride, c.nbytes, c.rows)

    @_Form
    def at_source(self) -> Ranges:
        """For a peer that has the source pages."""
        c = self._copies
        return _ranges(
            _core.far_ranges(c.target, c.target_stride, c.source, c.source_stride, c.nbytes, c.rows, _STAGED),
            _core.MOST_IN_GET,
        )

    @_Form
    def at_target(self) -> Ranges:
        """For a peer that has the target pages."""
        c = self._copies
        return _ranges(
            _core.far_ranges(c.source, c.source_stride, c.target, c.target_stride, c.nbytes, c.rows, _STAGED),
            None,
        )

    @_Form
    def rows_at_source(self) -> _core.Rows:
        """For adapters that take rows, in the order in which these lie at a peer with the source pages."""
        return _rows_of(self.at_source, False)

    @_Form
    def rows_at_target(self) -> _core.Rows:
        """The same where the peer has the target pages."""
        return _rows_of(self.at_target, True)

    def pieces(self, form: str) -> int:
        """Of what a form is made of: how long that takes."""
        return len(self._copies) if form == "rows" else self.count

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about, with the forms that are made."""
        return _COPY_BYTES * len(self._copies) + sum(map(_bytes_of, list(self.__dict__.values())))


_kept: Final[PlanCache[Plan]] = PlanCache(64)


async def plan_pages(
    source: Layout, give: Indices, target: Layout, take: Indices, form: Callable[[Plan], str]
) -> Plan:
    """A plan that is kept, or is made, on another thread where that takes longer than handing it over.

    Nobody may change the lists meanwhile: see `own_list`.

    Args:
        form: names that of the plan which is to be there.

    Raises:
        UsageError: as for `planner.plan`.
    """
    from_, to = page_list(give), page_list(take)
    source, target = alike(source, target)
    found = _kept.find(source, from_, target, to)
    if found is not None and form(found) in found.__dict__:
        return found

    def planned() -> Plan:
        return Plan(one_pair(source, from_, target, to))

    def make(plan: Plan | None) -> Plan:
        plan = plan or planned()
        getattr(plan, form(plan))
        _kept.keep(source, from_, target, to, plan, plan.nbytes)
        return plan

    if found is None and pieces(source, from_, target) <= _INLINE:
        found = planned()
    if found is not None and found.pieces(form(found)) <= _INLINE:
        return make(found)
    return await anyio.to_thread.run_sync(make, found)


def _bytes_of(form: Any) -> int:
    if isinstance(form, Ranges):
        arrays = form.far, form.nbytes, form.first, form.near, form.rows
        return sum(one.nbytes for one in arrays) + _GROUP_BYTES * (len(form.groups) + len(form.groups_far))
    return _ROWS_BYTES * len(form) if isinstance(form, _core.Rows) else 0


def _rows_of(ranges: Ranges, at_target: bool) -> _core.Rows:
    return _core.Rows.of_ranges(ranges.far, ranges.first, ranges.near, ranges.rows, at_target)


def _ranges(found: tuple[Integers, Integers, Integers, Integers, Integers], most: int | None) -> Ranges:
    """With groups; at most so many ranges in the list of a message."""
    nbytes = found[1]
    near, far = _groups(nbytes, most, _SMALL, _LISTED), _groups(nbytes, most, _SMALL_FAR, _LISTED_FAR)
    return Ranges(*found, near, far)


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
