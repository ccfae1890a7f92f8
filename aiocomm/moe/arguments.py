"""Arguments of the kernels of `sources`, as bytes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aiocomm.moe.sources import ADD, MOST_RANKS, MOVE, WEIGH

if TYPE_CHECKING:
    from collections.abc import Sequence

    Run = tuple[int, int, int]  # to, from, bytes

__all__ = ["MOVE_BYTES", "move", "of_adding", "of_weighing"]

MOVE_BYTES: Final = struct.calcsize(MOVE)
_WORD: Final = struct.Struct("<Q")
_WEIGHING: Final = struct.Struct(WEIGH)
_ADDING: Final = struct.Struct("<6Q6I")
_NO_BASES: Final = bytes(8 * MOST_RANKS)
assert _ADDING.size + len(_NO_BASES) == struct.calcsize(ADD)


def move(
    to: int, width: int, base: dict[int, int], table: int, count: int, runs: Sequence[Run] = ()
) -> bytes:
    """The argument of `move_rows`."""
    return _argument(MOVE_BYTES, base, (to, table, count, width, *(number for run in runs for number in run)))


def _argument(nbytes: int, base: dict[int, int], rest: Sequence[int]) -> bytes:
    """A kernel's argument: an address per rank, and what follows; the rest is zeros."""
    argument = bytearray(nbytes)
    for rank, address in base.items():
        _WORD.pack_into(argument, 8 * rank, address)
    struct.pack_into(f"<{len(rest)}Q", argument, 8 * MOST_RANKS, *rest)
    return bytes(argument)


def of_weighing(addresses: Sequence[int], numbers: Sequence[int]) -> bytes:
    """The argument of `weigh_rows`."""
    return _WEIGHING.pack(*addresses, *numbers, 0)


def of_adding(addresses: Sequence[int], numbers: Sequence[int], bases: dict[int, int] | None = None) -> bytes:
    """The argument of `add_rows`."""
    rest = _ADDING.pack(*addresses, *numbers)
    if not bases:
        return _NO_BASES + rest
    begin = bytearray(_NO_BASES)
    for rank, address in bases.items():
        _WORD.pack_into(begin, 8 * rank, address)
    return bytes(begin) + rest
