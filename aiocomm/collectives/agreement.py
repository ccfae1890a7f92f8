"""Survivors of a group agree on who is left.

Rounds of flooding: everyone sends its view of who lives to all whom it believes alive and waits for theirs. A
rank decides when all of its view sent exactly its view, and says so in the next round; one that hears of a
decision takes it over. Whoever decided had the same view sent to it by every member of that view, so no two
decisions differ.

Assumes what the transfers promise: processes fail by stopping, messages between live ones arrive, and a wait
for a dead one ends with `PeerLostError`. A pair that has lost its connection while both live counts as a
failure; the ranks that most others exclude learn it by an error. A member that dies meanwhile may be part of
the result: shrink again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from aiocomm._operations import limit_of
from aiocomm.errors import DeadlineExceeded, PeerLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.communicator import Communicator
    from aiocomm_native import Transfer

__all__ = ["agree"]

_ROUND_BITS: Final = 16


async def agree(
    comm: Communicator,
    index: int,
    ranks: Sequence[int],
    alive: Sequence[int],
    epoch: int,
    deadline: float | None,
) -> list[int]:
    """The ranks that are left, in the order of the group; the same at all of them.

    Args:
        index: native channel that nothing else uses.
        alive: the ranks that this one believes alive, itself among them.
        epoch: number of this agreement in the group.

    Raises:
        PeerLostError: the others have excluded this rank.
        DeadlineExceeded: a survivor has not called in time.
    """
    ends = None if deadline is None else time.monotonic() + deadline
    view = set(alive)
    for number in range(len(ranks) + 2):
        tag = epoch << _ROUND_BITS | number
        limit = limit_of(None if ends is None else max(0.0, ends - time.monotonic()))
        sent = frozenset(view)
        replies = await _round(comm, index, sorted(sent - {comm.rank}), _pack(False, ranks, sent), tag, limit)
        decided = [theirs for final, theirs in _unpacked(replies, ranks) if final]
        if decided:
            view = set(decided[0])
            break
        if all(theirs == sent for _, theirs in _unpacked(replies, ranks)) and len(replies) == len(sent) - 1:
            break
        view &= set(replies) | {comm.rank}
        for _, theirs in _unpacked(replies, ranks):
            view &= theirs
        if comm.rank not in view:
            raise PeerLostError("the other survivors have lost this rank, and shrink without it", comm.rank)
    if comm.rank not in view:
        raise PeerLostError("the other survivors have lost this rank, and shrink without it", comm.rank)
    said = _pack(True, ranks, frozenset(view))
    for rank in sorted(view - {comm.rank}):
        told = comm._send(said, rank, index, tag + 1, limit, 0)
        told.add_done_callback(_look_away)
    return [rank for rank in ranks if rank in view]


async def _round(
    comm: Communicator, index: int, others: Sequence[int], message: bytes, tag: int, limit: float
) -> dict[int, bytes]:
    """Swap messages with all others; those that are lost are missing from the answer."""
    pending: list[tuple[int, bytearray, Transfer[Any]]] = []
    for rank in others:
        memory = bytearray(len(message))
        pending.append((rank, memory, comm._recv(memory, rank, index, tag, limit)))
    for rank in others:
        comm._send(message, rank, index, tag, limit, 0).add_done_callback(_look_away)
    replies = {}
    try:
        for rank, memory, receive in pending:
            try:
                await receive
            except PeerLostError:
                continue
            except DeadlineExceeded:
                raise DeadlineExceeded(f"shrink: rank {rank} has not called it in time") from None
            replies[rank] = bytes(memory)
    finally:
        for _, _, receive in pending:
            receive.cancel()
            receive.add_done_callback(_look_away)
    return replies


def _pack(final: bool, ranks: Sequence[int], view: frozenset[int]) -> bytes:
    return bytes([final, *(rank in view for rank in ranks)])


def _unpacked(replies: dict[int, bytes], ranks: Sequence[int]) -> list[tuple[bool, frozenset[int]]]:
    return [
        (bool(reply[0]), frozenset(rank for rank, there in zip(ranks, reply[1:], strict=True) if there))
        for reply in replies.values()
    ]


def _look_away(transfer: Transfer[Any]) -> None:
    if not transfer.cancelled():
        transfer.exception()
