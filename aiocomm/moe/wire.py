"""What a message of the exchange looks like.

A message begins with the call's header (see `collectives.headers`), which all ranks compare, and a fixed
block: rows, assignments, and what follows in the same message. Lists and rows that do not ride with it come
by messages of their own, whose sizes are known from it.

    header | rows, assignments, flags | counts, experts, weights | rows' bytes
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.collectives.headers import HEADER_BYTES
from aiocomm.moe.routing import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiocomm.moe.placement import Placement

    Bytes = NDArray[np.uint8]

__all__ = [
    "HEAD_BYTES",
    "LISTS_RIDE",
    "ROWS_RIDE",
    "Head",
    "lists_bytes",
    "pack_lists",
    "unpack_lists",
    "view_lists",
]

LISTS_RIDE: Final = 1
ROWS_RIDE: Final = 2
_NONE: Any = np.empty(0, np.int64)
_HEAD: Final = struct.Struct(f"<{HEADER_BYTES}sQQQ")
HEAD_BYTES: Final = _HEAD.size


class Head:
    """The first bytes of a message."""

    __slots__ = ("assignments", "flags", "header", "rows")

    def __init__(self, header: bytes, rows: int, assignments: int, flags: int) -> None:
        self.header = header
        self.rows = rows
        self.assignments = assignments
        self.flags = flags

    def pack(self) -> bytes:
        """The bytes that travel."""
        return _HEAD.pack(self.header, self.rows, self.assignments, self.flags)

    @classmethod
    def unpack(cls, message: Any) -> Head:
        """Parse a message of at least `HEAD_BYTES`."""
        return cls(*_HEAD.unpack_from(message))


def _padded(rows: int) -> int:
    return (2 * rows + 3) & ~3  # what follows is aligned for its elements


def lists_bytes(rows: int, assignments: int) -> int:
    """Bytes of a part's lists."""
    return _padded(rows) + 8 * assignments


def pack_lists(part: Part, into: Bytes) -> None:
    """Write counts, experts and weights; `into` has `lists_bytes`."""
    start, m = _padded(part.rows), len(part.experts)
    into[: 2 * part.rows].view(np.uint16)[:] = part.counts
    into[start : start + 4 * m].view(np.int32)[:] = part.experts
    into[start + 4 * m : start + 8 * m].view(np.float32)[:] = part.weights


def view_lists(head: Head, lists: Bytes) -> Part:
    """Views of the lists in a message, which `arrange` checks."""
    start, m = _padded(head.rows), head.assignments
    experts = lists[start : start + 4 * m].view(np.int32)
    return Part(
        _NONE,
        lists[: 2 * head.rows].view(np.uint16),
        experts,
        lists[start + 4 * m : start + 8 * m].view(np.float32),
    )


def unpack_lists(head: Head, lists: Bytes, placement: Placement, rank: int) -> Part:
    """Views of the lists in a message to `rank`.

    Raises:
        ValueError: they contradict the message's head, or the placement.
    """
    part, m = view_lists(head, lists), head.assignments
    counts, experts = part.counts, part.experts
    if int(counts.sum(dtype=np.int64)) != m or not counts.all():
        raise ValueError("its lists of experts contradict their own counts")
    if m and (
        experts.min() < 0 or experts.max() >= placement.experts or (placement.owner[experts] != rank).any()
    ):
        raise ValueError("it sent tokens for experts that this rank has not")
    return part
