"""Two processes swap handles of regions, on a native channel that nothing else uses.

Calls are numbered; the number is the tag of their messages. Who has the other's handle confirms it, and waits
for that of the other; who gives a call up says so, by a message without bytes. The other, who may come to it
later, or wait in it, then goes on with the next. What is said for calls that are over here is dropped, also
what comes later.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiocomm._numbers import integer
from aiocomm._outcome import told_of
from aiocomm.errors import AiocommError, TransferCancelled, UsageError, UsageTypeError
from aiocomm.region import Region, RemoteRegion, look_away, withdraw
from aiocomm.types import Priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm._operations import Operations
    from aiocomm_native import Transfer

__all__ = ["Exchanges", "exchange"]

_GIVE_UP_S: Final = 5.0  # for the word of one that is given up
_CONFIRM_S: Final = 60.0  # for the last word, for which the peer has a receive, unless it gives up just then


class Exchanges:
    """Those with one incarnation of a peer."""

    def __init__(self, comm: Operations, rank: int, generation: int | None) -> None:
        self._comm = comm
        self._rank, self._generation = rank, generation
        ends = sorted((f"{rank}.{generation}", f"{comm.rank}.{comm._generation}"))
        name = f"\0exchange {' '.join(ends)}"
        self._index = comm._engine.open_channel(name, int(Priority.NORMAL), 1.0)
        self._last = 0
        self._under_way: set[int] = set()

    @classmethod
    def with_peer(cls, comm: Operations, rank: int) -> Exchanges:
        """Those with who has a rank now."""
        peer = rank, comm._generation_of(rank)
        found = comm._exchanges.get(peer)
        if found is None:
            found = comm._exchanges[peer] = cls(comm, *peer)
        return found

    async def swap(self, handle: bytes, limit: float) -> bytes:
        """Give a handle for the peer's."""
        ends = None if limit < 0 else time.monotonic() + limit
        while True:
            self._last = number = self._last + 1
            self._under_way.add(number)
            try:
                if theirs := await self._try(handle, number, ends):
                    return theirs
            except BaseException:
                if not self._comm.closed:
                    self._say(b"", number, _GIVE_UP_S)
                raise
            finally:
                self._under_way.remove(number)
                self.tidy()

    async def _try(self, handle: bytes, number: int, ends: float | None) -> bytes:
        """The peer's handle, once it has this one; none: it has given the call up.

        A message of this side that the peer does not take is not waited for: it has given up, and says so.
        """
        comm, where = self._comm, (self._rank, self._index, number)
        limit = -1.0 if ends is None else max(0.0, ends - time.monotonic())
        theirs, confirmed = bytearray(len(handle)), bytearray(len(handle))
        # Both before anything is sent, so that what the peer sends in answer is taken at once; of one size,
        # as the second may get what was meant for the first while they are withdrawn.
        receives = [comm._recv(memory, *where, limit) for memory in (theirs, confirmed)]
        sent = self._say(handle, number, -1.0)
        sent.add_done_callback(partial(_stop_if_failed, receives))
        last: Transfer[Any] | None = None
        try:
            if not (await receives[0]).nbytes:
                return b""
            last = self._say(b"\1", number, _CONFIRM_S)
            if not (await receives[1]).nbytes:
                return b""
            last = None  # goes on
            return bytes(theirs)
        except BaseException as error:
            if (failure := _failure(sent)) is not None:
                raise failure from None
            if isinstance(error, TransferCancelled):  # by the peer, in the middle of what it sent
                return b""
            raise
        finally:
            for receive in receives:
                withdraw(receive)
            sent.cancel()
            if last is not None:
                last.cancel()

    def _say(self, message: bytes, number: int, limit: float) -> Transfer[Any]:
        sent = self._comm._send(message, self._rank, self._index, number, limit, 0)
        sent.add_done_callback(look_away)
        return sent

    def tidy(self) -> None:
        """Drop what is unread of calls that are over; the channel, if there will be no other."""
        comm, peer = self._comm, (self._rank, self._generation)
        if comm.closed:
            return
        if not comm._is_member(*peer) and not self._under_way:
            if comm._exchanges.pop(peer, None) is not None:
                comm._engine.close_channel(self._index, for_good=True)
            return
        comm._engine.drop_below(self._index, min([self._last + 1, *self._under_way]))


def _failure(sent: Transfer[Any]) -> BaseException | None:
    """Why a message could not be sent, if that is not the peer's doing."""
    if not sent.done() or sent.cancelled():
        return None
    error = sent.exception()
    return None if isinstance(error, TransferCancelled) else error


def _stop_if_failed(receives: Sequence[Transfer[Any]], sent: Transfer[Any]) -> None:
    if _failure(sent) is not None:
        for receive in receives:
            withdraw(receive)


async def exchange(comm: Operations, region: Region, with_: int, limit: float) -> RemoteRegion:
    """See `Communicator.exchange`."""
    if comm.closed or not comm._here():
        comm._refuse()
    with_ = integer("rank", with_)
    if not 0 <= with_ < comm._ranks:
        comm._refuse(dst=with_)
    if not isinstance(region, Region):
        raise UsageTypeError(f"{type(region).__name__} is not a Region: exchange what comm.register() gives")
    if region._comm is not comm:
        raise UsageError("the region belongs to another communicator: register the memory with this one")
    handle = region.handle
    # Only now is nothing left to refuse: a number that one side skips would shift all exchanges after it.
    try:
        theirs = await Exchanges.with_peer(comm, with_).swap(handle, limit)
        return RemoteRegion.from_handle(comm, theirs)
    except AiocommError as error:
        raise told_of(error, f"exchange with rank {with_}") from error
