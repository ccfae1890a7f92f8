"""Host memory for long lists, used again once nobody has an array over it: new pages take long to get."""

from __future__ import annotations

import sys
from typing import Final

from aiocomm_native import _core

__all__ = ["LONG", "Rooms"]

LONG: Final = 4 << 10  # bytes: an allocator may give pages back, and get new ones
_KEPT: Final = 4


def _counted(rooms: list[bytearray]) -> list[int]:
    """How many references there are to each."""
    return [sys.getrefcount(room) for room in rooms]


_OURS: Final = _counted([bytearray(1)])[0]  # where nobody else has one


class Rooms:
    """Bytearrays; arrays over one, and whatever has these, are references to it."""

    def __init__(self) -> None:
        self._kept: list[bytearray] = []

    def take(self, nbytes: int) -> bytearray:
        """One of that size, not cleared, which is the caller's for as long as anything refers to it."""
        if nbytes < LONG:
            return _core.uncleared(nbytes)
        kept = self._kept
        for place, count in enumerate(_counted(kept)):
            if count == _OURS and len(kept[place]) == nbytes:
                return kept[place]
        made = _core.uncleared(nbytes)
        if len(kept) == _KEPT:
            del kept[0]  # it stays with those who have it
        kept.append(made)
        return made
