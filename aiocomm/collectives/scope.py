"""One group on one channel: its native channel, its numbered calls, and news of calls that failed elsewhere.

Calls are numbered as they begin; the number is part of every message's tag, so calls that overlap do not mix.
A rank whose call fails tells the others, who may be waiting for a rank that waited for it. Once a member is
lost, the others may go on without this group: what waits for them to call fails, although all that the lost
one had to send has come.
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import numpy as np

from aiocomm.collectives import headers
from aiocomm.collectives.gate import Gate
from aiocomm.collectives.kernels import Scratch
from aiocomm.errors import AiocommError, ClosedError, DeadlineExceeded, PeerLostError, TransferCancelled
from aiocomm.region import look_away
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from aiocomm.channel import Channel
    from aiocomm.collectives.device_shared import DeviceShared
    from aiocomm.collectives.flight import Flight
    from aiocomm.collectives.kernels import Kernels
    from aiocomm.collectives.quick import Prepared
    from aiocomm.collectives.shared import Place, Shared
    from aiocomm.communicator import Communicator
    from aiocomm.group import Group
    from aiocomm.moe.memory import Pool
    from aiocomm_native import Transfer

__all__ = ["TAG_BITS", "Scope"]

TAG_BITS: Final = 24  # of a tag: the message within its call; the rest is the call's number
_ABORT_TAG: Final = 0
_ABORT_S: Final = 5.0
_KEPT_BYTES: Final = 64 << 20  # scratch memory kept for the next call, of the host and of each GPU
_REMEMBERED: Final = 4096
_MISSED: Final = 16
_LOOK_S: Final = 0.01  # after which it is looked whether others are gone


class Scope:
    """Made by `Group` for each channel on which it is used."""

    def __init__(self, comm: Communicator, group: Group, index: int) -> None:
        self.comm = comm
        self.group = group
        self.index = index
        self.channel: Channel | None = None  # on which it is used
        self.given_up = 0  # the last call that was given up in advance, when that was closed
        self.calls: dict[int, Flight] = {}
        self.rows: int | None = None  # the native channel of rows that follow, of dispatch and combine
        self._failed: dict[int, AiocommError] = {}  # calls that others gave up, and this rank has not begun
        self._untidy = 0  # the last call that failed, of which messages may lie unread or be on their way
        self.repeats = _core.Repeats(
            comm._engine, comm._here, self.calls, self._failed, comm._collective_calls
        )
        self._missed: deque[tuple[int, AiocommError, int]] = deque(maxlen=_MISSED)
        self._spare: list[npt.NDArray[np.uint8]] = []
        self._device_spare: dict[int, list[Scratch]] = {}  # by GPU
        self.prepared: dict[Any, Prepared | None] = {}  # by the shape of the call; None: not a quick one
        self.shared: dict[Any, Shared | DeviceShared | None] = {}  # by the shape, likewise
        self.pools: dict[int, Pool] = {}  # by GPU, of dispatch and combine
        self._lost: tuple[int, int] | None = None  # a member, and the last call that does not fail for that
        self._asked: list[tuple[int, int]] = []  # calls that others want to have ended, and who
        self._gate = Gate(comm._backend)
        self.place: Place | None = None  # of the arena, once a call may go through it
        comm._scopes.add(self)
        for rank in group.ranks:
            self.look_for(rank)
        self.listen()

    def begin(self, call: Flight | None) -> int:
        """Number a call; without one, it ends before anything else runs, or enters itself in `calls`.

        Raises:
            AiocommError: another rank has given it up already.
        """
        self.tidy()
        number = self.repeats.take()
        if (error := self._failed.pop(number, None)) is not None:
            self._untidy = number
            raise error
        if call is not None:
            self.enter(number, call)
        return number

    def tidy(self, failed: int = 0) -> None:
        """Drop what others have sent, or still send, for calls that have failed: nobody receives it any more.

        Left unread it would be kept, and count toward what a peer may leave unread.

        Args:
            failed: a call that is failing, of which that is done later.
        """
        if self._untidy and not self.comm.closed:
            below = min([self._untidy + 1, *self.calls])
            for index in (self.index, self.rows):
                if index is not None:
                    self.comm._engine.drop_below(index, below << TAG_BITS)
            if below > self._untidy:
                self._untidy = 0
        self._untidy = max(self._untidy, failed)

    def is_given_up(self, number: int) -> bool:
        """Whether another rank has given up a call that this one has not begun."""
        return number in self._failed

    def enter(self, number: int, call: Flight) -> None:
        """Enter a call that was numbered, and tell it what has been heard of it, or concerns it."""
        self.calls[number] = call
        if self._lost is not None and number > self._lost[1]:
            call.lose(self._lost[0])
        for about, error, source in self._missed:
            if about == number:
                call.abort(error, source)

    def look_for(self, rank: int) -> None:
        """Take notice of a rank of the world of which there is news: it may be a member that is lost."""
        if self.group._is_lost(rank):
            self.lose(rank)

    def lose(self, rank: int, after: int = 0) -> None:
        """A member is lost: calls after this one fail, unless all members are known to have called them."""
        if rank not in self.group.ranks:
            return
        if self._lost is None or after < self._lost[1]:
            self._lost = rank, after
        for number, call in list(self.calls.items()):
            if number > after:
                call.lose(rank)

    def scratch(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Memory for a call, not cleared; to be given back."""
        place = _smallest(self._spare, nbytes)
        return np.empty(nbytes, np.uint8) if place is None else self._spare.pop(place)

    def give_back(self, memory: npt.NDArray[np.uint8]) -> None:
        """Keep memory for the next call, whose first touch would be slow, unless that is much."""
        if self._is_paused:
            return
        if sum(one.nbytes for one in self._spare) + memory.nbytes <= _KEPT_BYTES:
            self._spare.append(memory)

    def device_scratch(self, kernels: Kernels, nbytes: int) -> Scratch:
        """Device memory for a call; to be given back."""
        spare = self._device_spare.setdefault(kernels.device, [])
        place = _smallest(spare, nbytes)
        if place is not None:
            return spare.pop(place)
        spare.clear()  # too small, all of them: what is made now serves their calls, too
        return Scratch(kernels, nbytes)

    def give_back_device(self, memory: Scratch) -> None:
        """Keep memory for the next call: freeing it would wait for all that the GPU does.

        The largest always, since its like is wanted again; the others as long as all of them are not much.
        """
        if self._is_paused:
            return
        spare = self._device_spare.setdefault(memory.device, [])
        spare.append(memory)
        spare.sort(key=lambda one: one.nbytes, reverse=True)
        while len(spare) > 1 and sum(one.nbytes for one in spare) > _KEPT_BYTES:
            spare.pop()

    def drop_failed(self, number: int) -> None:
        """A call that others may have given up counts as made here."""
        self._failed.pop(number, None)

    def abort(
        self, number: int, error: BaseException, why: headers.Why = headers.Why.OTHER
    ) -> list[Transfer[Any]]:
        """Tell the other members that a call has failed here, also one that only another rank has lost."""
        lost = -1
        if isinstance(error, DeadlineExceeded):
            why = headers.Why.DEADLINE
        elif isinstance(error, PeerLostError) and error.peer is not None:
            why, lost = headers.Why.LOST, error.peer
        text = "cancelled"
        if isinstance(error, Exception):
            text = str(error) if isinstance(error, AiocommError) else f"{type(error).__name__}: {error}"
        message = headers.abort_message(number, why, lost, text)
        others = [rank for rank in self.group.ranks if rank != self.comm.rank]
        return [] if self.comm.closed else [self._send(message, rank) for rank in others]

    # ------------------------------------------------------------ before leaving

    async def settle(self) -> None:
        """Wait until no other member reads memory that was lent to it; for as long as it and we are there."""
        comm = self.comm
        self.ask()
        while not comm.closed and any(
            comm._peers[self.group.ranks[rank]].alive
            for pool in self.pools.values()
            for _, ranks in pool.lent()
            for rank in ranks
        ):
            with anyio.move_on_after(_LOOK_S):
                await self._gate.wait()

    def ask(self) -> None:
        """Have other members say when they have ended the calls in which they read memory that was lent."""
        lent = [one for pool in self.pools.values() for one in pool.lent()]
        # All of it first: answers come meanwhile.
        for number, rank in [(number, rank) for number, ranks in lent for rank in ranks]:
            message = headers.abort_message(number, headers.Why.ASKS, -1, "")
            self._tell(message, self.group.ranks[rank])

    def let_go(self) -> None:
        """The group was closed: give memory back, and what others still read once they have said so."""
        self.forget(all_memory=True)
        for pool in self.pools.values():
            pool.let_go()
        self.ask()

    def answer(self) -> None:
        """Tell those who ask that a call has ended here, or will not begin."""
        for asked in self._asked[:]:
            number, source = asked
            has_ended = number <= self.repeats.last or number in self._failed
            # Others may ask while one is told, and are answered at once.
            if asked in self._asked and number not in self.calls and has_ended:
                self._asked.remove(asked)
                self._tell(headers.abort_message(number, headers.Why.ENDED, -1, ""), source)

    def forget(self, all_memory: bool = False) -> None:
        """Keep no calls that repeat.

        Args:
            all_memory: none for them either: no call begins any more.
        """
        self.repeats.clear()
        self.shared.clear()
        self.prepared.clear()
        if all_memory:
            self.drop_spare()
            if self.place is not None:
                self.place.arena = None

    def drop_spare(self) -> None:
        """Keep no memory for the next call, which may never come."""
        self._spare.clear()
        self._device_spare.clear()
        for prepared in self.prepared.values():
            if prepared is not None:
                prepared.drop_spare()

    @property
    def _is_paused(self) -> bool:
        """Whether its channel is closed, and maybe never opened again, or its group."""
        return self.group.closed or (self.channel is not None and self.channel.closed)

    def close(self) -> None:
        """Give memory back; no call is under way any more."""
        for pool in self.pools.values():
            pool.close()

    def _has_ended(self, number: int, source: int) -> None:
        for pool in self.pools.values():
            pool.heard(self.group.ranks.index(source), number, exactly=True)
        self._gate.ring()

    def _tell(self, message: bytes, rank: int) -> None:
        if not self.comm.closed:
            self._send(message, rank)

    def _send(self, message: bytes, rank: int) -> Transfer[Any]:
        told = self.comm._send(message, rank, self.index, _ABORT_TAG, _ABORT_S, 0)
        told.add_done_callback(self._told)
        return told

    def _told(self, transfer: Transfer[Any]) -> None:
        """A word of this scope's has ended. Until then it is kept, although nobody may need it any more."""
        look_away(transfer)

    def listen(self) -> None:
        """Take word of the others from now on, also of what they have said before."""
        self._news = bytearray(headers.ABORT_BYTES)
        while True:
            receive = self.comm._recv(self._news, -1, self.index, _ABORT_TAG, -1.0)
            if not receive.done():
                self.comm._engine.begin_submitted()
            if not receive.done():
                break
            # Said before this rank was here: calls that it begins now must know.
            if not self._take(receive):
                return
        standing = self.comm._standing
        standing.add(receive)
        # A group that is only listened for may be collected.
        receive.add_done_callback(partial(_heard, weakref.ref(self), standing))

    def hear(self, receive: Transfer[Any]) -> None:
        """Take word of another rank, and listen for the next."""
        if self._take(receive):
            self.listen()

    def _take(self, receive: Transfer[Any]) -> bool:
        """Take word of another rank. False: nobody will say more."""
        if not receive.cancelled() and receive.exception() is None:
            source, _, nbytes = receive.result()
            word = headers.parse_abort(self._news[:nbytes])
            if word is not None and source in self.group.ranks:
                self._news_of(source, *word)
            return True
        # Of a word that was lost on its way only that is known; others come. Nobody is left without a sender.
        return not receive.cancelled() and receive.peer >= 0 and not _is_closed(receive)

    def _news_of(self, source: int, number: int, why: headers.Why, lost: int, text: str) -> None:
        if why is headers.Why.ASKS:
            self._asked.append((number, source))
            return self.answer()
        if why is headers.Why.ENDED:
            return self._has_ended(number, source)
        call = self.calls.get(number)
        error: AiocommError
        if why is headers.Why.LOST:
            error = PeerLostError(text, lost)
        elif why is headers.Why.DEADLINE and call is not None and call.has_deadline:
            error = DeadlineExceeded(text)  # this rank's own is about to pass, too
        else:
            error = TransferCancelled(f"{self.group.name_of(source)} gave the call up: {text}", source)
        if call is not None:
            call.abort(error, source)
            if why is headers.Why.CLOSED:
                for later, other in [one for one in self.calls.items() if one[0] > number]:
                    self.abort(later, error)
                    other.abort(error, source)
        elif number <= self.repeats.last:
            self._missed.append((number, error, source))  # of a call that is being begun, maybe
        elif len(self._failed) < _REMEMBERED:
            self._failed[number] = error
        if why is headers.Why.LOST:
            self.lose(lost, number)


def _smallest(spare: Sequence[npt.NDArray[np.uint8] | Scratch], nbytes: int) -> int | None:
    """Index of the smallest that is large enough."""
    fitting = [(one.nbytes, place) for place, one in enumerate(spare) if one.nbytes >= nbytes]
    return min(fitting)[1] if fitting else None


def _is_closed(receive: Transfer[Any]) -> bool:
    return isinstance(receive.exception(), ClosedError)


def _heard(listening: weakref.ref[Scope], standing: set[Transfer[Any]], receive: Transfer[Any]) -> None:
    standing.discard(receive)
    if (scope := listening()) is not None:
        scope.hear(receive)
    else:
        look_away(receive)
