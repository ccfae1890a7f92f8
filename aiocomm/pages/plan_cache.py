"""Keeps plans by what they were made of, for the next layer, and for the next request of one shape.

Page lists are long: hashing all of them costs as much as planning. Entries are found by a few of their pages,
and compared in full.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiocomm.pages.layout import Layout

    Integers = NDArray[np.int64]

__all__ = ["PlanCache"]

T = TypeVar("T")
_LOOKS: Final = 16  # pages of a list, at most, that its key has: of shorter ones all
_MOST_BYTES: Final = 100 << 20  # of all that is kept: views of some heads have hundreds of rows in each page


class PlanCache(Generic[T]):
    """The plans used last. Any thread.

    Args:
        most: plans kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._plans: OrderedDict[Any, tuple[Integers, Integers, T, int]] = OrderedDict()
        self._bytes = 0  # of all
        self._lock = threading.Lock()

    def find(self, source: Layout, give: Integers, target: Layout, take: Integers) -> T | None:
        """The plan for these lists, if it is kept."""
        key = _key(source, give, target, take)
        with self._lock:
            found = self._plans.get(key)
            if found is None:
                return None
            from_, to, plan, _ = found
            for one, other in ((from_, give), (to, take)):
                if len(one) >= _LOOKS and not np.array_equal(one, other):
                    return None
            self._plans.move_to_end(key)
            return plan

    def keep(
        self, source: Layout, give: Integers, target: Layout, take: Integers, plan: T, nbytes: int
    ) -> None:
        """Keep a plan instead of those that were not used for longest: as many as it takes, but itself.

        Args:
            nbytes: that the plan takes; if that grows, it is kept anew.
        """
        key = _key(source, give, target, take)
        nbytes += give.nbytes + take.nbytes
        with self._lock:
            self._drop(self._plans.pop(key, None))
            self._plans[key] = give.copy(), take.copy(), plan, nbytes
            self._bytes += nbytes
            while len(self._plans) > self._most or (self._bytes > _MOST_BYTES and len(self._plans) > 1):
                self._drop(self._plans.popitem(last=False)[1])

    def _drop(self, kept: tuple[Integers, Integers, T, int] | None) -> None:
        if kept is not None:
            self._bytes -= kept[3]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._plans.clear()
            self._bytes = 0


def _key(source: Layout, give: Integers, target: Layout, take: Integers) -> tuple[Any, ...]:
    some = (tuple(one[:: max(1, 2 * len(one) // _LOOKS)].tolist()) for one in (give, take))
    return source, target, len(give), len(take), *some
