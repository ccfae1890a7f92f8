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

from typing import TYPE_CHECKING, Any, Final

import anyio

from aiocomm._operations import limit_of
from aiocomm._outcome import told_of
from aiocomm.collectives.gate import Gate
from aiocomm.errors import AiocommError, ClosedError, DeadlineExceeded, PeerLostError
from aiocomm.region import look_away

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.communicator import Communicator
    from aiocomm_native import Transfer

__all__ = ["Agreement"]

_ROUND_BITS: Final = 16
_FOREVER: Final = -1.0


class Agreement:
    """One rank's part of an agreement. Who gives it up can go on with it later: the others do not begin anew.

    Args:
        index: native channel that nothing else uses, and that this closes.
        ranks: of the group.
        alive: the ranks that this one believes alive, itself among them.
        epoch: number of this agreement in the group.
    """

    def __init__(
        self, comm: Communicator, index: int, ranks: Sequence[int], alive: Sequence[int], epoch: int
    ) -> None:
        self.epoch = epoch
        self.index = index
        self._comm, self._ranks = comm, ranks
        self._view = set(alive)
        self._sent: frozenset[int] = frozenset()  # in this round
        self._round = -1
        self._waiting: dict[int, tuple[bytearray, Transfer[Any]]] = {}  # for the views of others
        self._sending: set[Transfer[Any]] = set()
        self._closed = False
        self._stopped: str | None = None  # why
        self._gate = Gate(comm._backend)

    async def reach(self, deadline: float | None) -> list[int]:
        """The ranks that are left, in the order of the group; the same at all of them.

        Raises:
            PeerLostError: the others have excluded this rank.
            DeadlineExceeded: a survivor has not called in time.
            ClosedError: `stop` was called.
        """
        limit = limit_of(deadline)
        with anyio.move_on_after(None if deadline is None else limit):
            while True:
                if not self._waiting:
                    self._begin_round()
                await self._all_here()
                if self._ends():
                    self._tell()
                    return [rank for rank in self._ranks if rank in self._view]
        late = [rank for rank, (_, receive) in self._waiting.items() if not receive.done()]
        who = f"rank {late[0]} has not called it" if late else "the survivors have not agreed"
        raise DeadlineExceeded(f"shrink: {who} in time")

    def _begin_round(self) -> None:
        comm = self._comm
        self._round += 1
        self._sent = frozenset(self._view)
        message = _pack(False, self._ranks, self._sent)
        others = sorted(self._sent - {comm.rank})
        for rank in others:
            memory = bytearray(len(message))
            receive = comm._recv(memory, rank, self.index, self._tag(0), _FOREVER)
            self._waiting[rank] = memory, receive
            receive.add_done_callback(lambda _: self._gate.ring())
        for rank in others:
            self._send(message, rank, self._tag(0))

    def _tag(self, later: int) -> int:
        return self.epoch << _ROUND_BITS | self._round + later

    async def _all_here(self) -> None:
        while not all(receive.done() for _, receive in self._waiting.values()):
            await self._gate.wait()
            if self._stopped is not None:
                raise ClosedError(f"shrink: {self._stopped}")

    def _ends(self) -> bool:
        """Whether the views of this round settle it."""
        comm, replies = self._comm, {}
        for rank, (memory, receive) in self._waiting.items():
            error = None if receive.cancelled() else receive.exception()
            if error is None and not receive.cancelled():
                replies[rank] = bytes(memory)
            elif not isinstance(error, AiocommError):
                raise error or PeerLostError("shrink was cut off", rank)
            elif not isinstance(error, PeerLostError):
                raise told_of(error, "shrink")
        self._waiting = {}
        views = _unpacked(replies, self._ranks)
        decided = [theirs for final, theirs in views if final]
        ends = bool(decided)
        if decided:
            self._view = set(decided[0])
        elif all(theirs == self._sent for _, theirs in views) and len(replies) == len(self._sent) - 1:
            ends = True
        else:
            self._view &= set(replies) | {comm.rank}
            for _, theirs in views:
                self._view &= theirs
        if comm.rank not in self._view:
            raise PeerLostError("the other survivors have lost this rank, and shrink without it", comm.rank)
        return ends

    def _tell(self) -> None:
        said = _pack(True, self._ranks, frozenset(self._view))
        for rank in sorted(self._view - {self._comm.rank}):
            self._send(said, rank, self._tag(1))

    def _send(self, message: bytes, rank: int, tag: int) -> None:
        sent = self._comm._send(message, rank, self.index, tag, _FOREVER, 0)
        self._sending.add(sent)
        sent.add_done_callback(self._gone)

    def _gone(self, transfer: Transfer[Any]) -> None:
        look_away(transfer)
        self._sending.discard(transfer)
        self._close_if_all_is_said()

    def stop(self, why: str) -> None:
        """Have `reach` end with `ClosedError`. What this rank has said may settle it at the others."""
        self._stopped = why
        self._gate.ring()

    def close(self) -> None:
        """Give the channel back, once all has been said that others wait for."""
        self._closed = True
        self._close_if_all_is_said()

    def _close_if_all_is_said(self) -> None:
        if self._closed and not self._sending and not self._comm.closed:
            self._comm._engine.close_channel(self.index, for_good=True)


def _pack(final: bool, ranks: Sequence[int], view: frozenset[int]) -> bytes:
    return bytes([final, *(rank in view for rank in ranks)])


def _unpacked(replies: dict[int, bytes], ranks: Sequence[int]) -> list[tuple[bool, frozenset[int]]]:
    return [
        (bool(reply[0]), frozenset(rank for rank, there in zip(ranks, reply[1:], strict=True) if there))
        for reply in replies.values()
    ]
