"""Durations, counted by size: what statistics keep instead of every one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Histogram"]

_NS: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many operations took how long.

    `counts[i]` is the number of those that took less than `bounds_s[i]` seconds and not less than the bound
    before it. Each bound is twice the one before; the last one is infinite.
    """

    counts: tuple[int, ...]

    @property
    def bounds_s(self) -> tuple[float, ...]:
        """Upper bounds of the slots, in seconds."""
        last = len(self.counts) - 1
        return tuple(math.inf if slot == last else 2.0**slot * _NS for slot in range(len(self.counts)))

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def percentile(self, fraction: float) -> float:
        """The bound in seconds that this fraction of the operations stayed below, 0 where there were none.

        Raises:
            ValueError: the fraction is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"{fraction} is no fraction: 0 to 1")
        wanted, seen = fraction * self.total, 0
        for count, bound in zip(self.counts, self.bounds_s, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0

    def __sub__(self, earlier: Histogram) -> Self:
        """What was counted since an earlier snapshot."""
        return type(self)(tuple(a - b for a, b in zip(self.counts, earlier.counts, strict=True)))

    @classmethod
    def of(cls, counts: Sequence[int]) -> Self:
        """Of the native side's counters, where slot i starts at 2^(i-1) ns."""
        return cls(tuple(counts))
