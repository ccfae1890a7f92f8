"""Failures of transfers that nobody awaited: told when the communicator's block ends, and a log line now.

A server that lives for weeks may have many, all alike: the first of them are kept, the rest is counted.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from aiocomm.errors import AiocommError, ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Unawaited"]

_KEPT: Final = 32


class Unawaited:
    """Made by a communicator.

    Args:
        on_first: is called with the first.
    """

    def __init__(self, on_first: Callable[[AiocommError], None]) -> None:
        self._on_first = on_first
        self._numbers = itertools.count(1)
        self._all = 0
        self._kept: list[AiocommError] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, error: BaseException) -> None:
        """A transfer was let go, and nobody has looked at this.

        Called by the collector, on whatever thread and in the middle of whatever: no lock may be taken here.
        """
        if not isinstance(error, AiocommError) or isinstance(error, ClosedError):
            return  # what the end of a communicator ends is no failure
        self._all = number = next(self._numbers)
        if number <= _KEPT:
            self._kept.append(error)
        if number == 1:
            self._on_first(error)

    def take(self) -> list[AiocommError]:
        """The first of them, once; what is left out is told by a note of the last."""
        kept, self._kept = self._kept, []
        if kept and self._all > len(kept):
            more = self._all - len(kept)
            kept[-1].add_note(f"nobody awaited {more:,} more transfers, which failed, too")
        self._all, self._numbers = 0, itertools.count(1)
        return kept
