"""What dispatch and combine have in common: one message to and from every rank, and what follows it.

Every rank sends every other a message on an urgent channel: the call's header and counts, and, as long as
they fit into a slot, the lists and the rows themselves. So a decode batch takes one message per pair. What
does not fit follows on the caller's channel, sent without waiting; the receiver, who knows its exact size by
then, has it written straight into place.

All headers are judged by all ranks; what rode along is used after that only.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import anyio.to_thread
import numpy as np

from aiocomm.collectives import headers
from aiocomm.collectives.flight import Flight
from aiocomm.collectives.steps import Recv, Send
from aiocomm.errors import ExpertsLostError, PeerError, PeerLostError, UsageError
from aiocomm.moe.wire import HEAD_BYTES, Head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.placement import Placement
    from aiocomm.moe.routing import Part

    Bytes = NDArray[np.uint8]

__all__ = ["HEAD_TAG", "LISTS", "PATHS", "ROWS", "Exchange"]

PATHS: Final = ("auto", "latency", "bandwidth")
LISTS, ROWS = 0, 1  # what may follow
HEAD_TAG: Final = 1
_FOLLOWING: Final = 2  # tags of what follows, by its kind
_SLOT_BYTES: Final = 2 << 20
_SLOTS_BYTES: Final = 64 << 20  # of all ranks
_LINE: Final = 64
_RIDE_BYTES: Final = 1 << 20  # of a message whose rows ride; larger ones are worth a round of their own
_INLINE_BYTES: Final = 4 << 20  # of memory traffic that the loop's thread does itself: about a millisecond


class Exchange(Flight):
    """One dispatch or combine of this rank.

    Args:
        bulk: native channel for what follows.
        header: what all ranks compare.
        parts: what this rank routed to each rank.
    """

    def __init__(
        self,
        scope: Scope,
        bulk: int,
        operation: str,
        header: bytes,
        placement: Placement | None,
        parts: Sequence[Part],
        path: str,
        deadline: float | None,
    ) -> None:
        super().__init__(scope, operation, deadline)
        self._bulk = bulk
        self._header = header
        self._placement = placement
        self._parts = parts
        size = self._group.size
        # Whole lines, so that lists lie where their elements may.
        self._slot_bytes = min(_SLOT_BYTES, max(_RIDE_BYTES, _SLOTS_BYTES // size)) // _LINE * _LINE
        self._ride_bytes = {"auto": _RIDE_BYTES, "latency": self._slot_bytes, "bandwidth": HEAD_BYTES}[path]
        self._wanted = set(range(2 * size)) - {self._group.rank, size + self._group.rank}
        self._for_heads = False  # which are waited for, so one more of several is no news
        self._heads: dict[int, Head] = {}
        self._sizes: dict[int, int] = {}  # of receives of what follows, by their key
        self._borrowed: list[Bytes] = []
        self._slots: Bytes = np.empty(0, np.uint8)
        self.rode = True  # nothing followed

    @property
    def operation(self) -> str:
        """Its name."""
        return self._operation

    @property
    def number(self) -> int:
        """Of the call in its scope."""
        return self._number

    async def run(self) -> None:
        """Do the call.

        Raises:
            UsageError: the ranks called differently; the same error on all.
            ExpertsLostError, TransferCancelled, DeadlineExceeded, LinkError, ClosedError: as for transfers.
        """
        try:
            if not self._number:  # else it was begun by the extension
                self._number = self._scope.begin(self)
        except PeerLostError as error:  # another rank has given it up for that
            raise await self._complete(self._explained(error)) from None
        try:
            self._start()
            if not self._slots.nbytes:
                self._slots = self._borrow(self._group.size * self._slot_bytes)
            if not self._begin_quickly():
                for peer in self._others():
                    self._post(Recv, (True, peer), peer, self._slot(peer), HEAD_TAG)
                await self._send()
            if not self._has_received():
                self._for_heads = True
                while self._wanted:
                    self._settle_sends()
                    if self._wanted:
                        self._raise_header_trouble()
                        await self._wait()
                self._for_heads = False
                if not await self._receive_quickly():
                    self._heads = {peer: Head.unpack(self._slot(peer)) for peer in self._others()}
                    self._judge()
                    await self._receive()
                await self._rest()
            await self._finish()
        except BaseException as error:
            await self._give_up(error)
            if (complete := await self._complete(error)) is not error:
                raise complete from error.__cause__
            raise
        finally:
            del self._scope.calls[self._number]
            for memory in self._borrowed:
                self._scope.give_back(memory)

    # ------------------------------------------------------------ of each operation

    def _start(self) -> None:
        """Begin what takes a while by itself."""

    def _begin_quickly(self) -> bool:
        """Swap messages without a turn of the loop. False: nothing is sent."""
        return False

    def _has_received(self) -> bool:
        """Whether beginning has done it all, and nothing is under way."""
        return False

    async def _receive_quickly(self) -> bool:
        """Judge and receive, where nothing is unusual. False: it is to be done from the beginning."""
        return False

    def _check_rows(self, peer: int, brings: int, got: int) -> None:
        """Of a combine: that a rank brings back what it has got."""
        if brings != got:
            raise PeerError(
                f"combine: {self._group.names[peer]} brings {brings} rows of the {got} it got",
                self._group.ranks[peer],
            )

    async def _send(self) -> None:
        """Send every rank its message, and what follows it."""
        raise NotImplementedError

    async def _receive(self) -> None:
        """Use what rode along, and receive what follows."""
        raise NotImplementedError

    async def _finish(self) -> None:
        """Work on what has come."""
        raise NotImplementedError

    # ------------------------------------------------------------ messages

    def _others(self) -> list[int]:
        """The other ranks, so that not all begin with the same."""
        size, rank = self._group.size, self._group.rank
        return [(rank + away) % size for away in range(1, size)]

    def _slot(self, peer: int) -> Bytes:
        return self._slots[peer * self._slot_bytes : (peer + 1) * self._slot_bytes]

    def _borrow(self, nbytes: int) -> Bytes:
        """Scratch memory until the call has ended."""
        memory = self._scope.scratch(nbytes)
        self._borrowed.append(memory)
        return memory[:nbytes]

    def _send_head(self, peer: int, message: Any) -> None:
        self._post(Send, (True, self._group.size + peer), peer, message, HEAD_TAG)

    def _send_following(self, peer: int, kind: int, data: Bytes) -> None:
        self.rode = False
        if data.nbytes:
            self._post(Send, (False, self._key(peer, kind)), peer, data, _FOLLOWING + kind, self._bulk)

    def _receive_following(self, peer: int, kind: int, into: Bytes) -> None:
        if into.nbytes:
            key = (False, 2 * self._group.size + self._key(peer, kind))
            self._sizes[key[1]] = into.nbytes
            self._post(Recv, key, peer, into, _FOLLOWING + kind, self._bulk)

    @staticmethod
    def _key(peer: int, kind: int) -> int:
        return 2 * peer + kind

    def _has_work(self) -> bool:
        return not (self._for_heads and self._wanted)

    def _header_ended(self, index: int) -> None:
        self._wanted.discard(index)
        self._missing.discard(index)

    def _data_ended(self, index: int, nbytes: int | None) -> None:
        if nbytes is not None and nbytes != self._sizes[index]:
            self._data_error = UsageError(f"{nbytes} bytes came where {self._sizes[index]} were expected")

    def _judge(self) -> None:
        heads, rank = self._heads, self._group.rank
        every = [self._header if peer == rank else heads[peer].header for peer in range(self._group.size)]
        if (trouble := headers.judge(every, self._group.names)) is not None:
            self._differs = True
            raise UsageError(f"{self._operation}: {trouble}")
        self._judged = True
        self._raise_trouble()

    async def _rest(self) -> None:
        """Wait for all transfers."""
        while True:
            self._settle_sends()
            self._raise_trouble()
            if not self._flying and self._data_error is None:
                return
            await self._wait()

    @staticmethod
    def _is_inline(nbytes: int) -> bool:
        """Whether so much memory traffic does not hold the loop up."""
        return nbytes <= _INLINE_BYTES

    async def _work(self, nbytes: int, work: Callable[[], None]) -> None:
        """Do work on memory, on another thread if it would hold the loop up."""
        if self._is_inline(nbytes):
            work()
        else:
            await _to_its_end(work)

    # ------------------------------------------------------------ failures

    async def _complete(self, error: BaseException) -> BaseException:
        """Of a lost rank, with the tokens that were routed to it, which may not be known yet."""
        if not isinstance(error, ExpertsLostError) or self._parts:
            return error
        with contextlib.suppress(Exception):  # what is known has to do, whatever is wrong with the rest
            if await self._find_parts():
                return self._explained(error)
        return error

    async def _find_parts(self) -> bool:
        """Route the tokens, of a call that has ended before that. False: they cannot be had."""
        return False

    def _explained(self, error: BaseException) -> BaseException:
        found = super()._explained(error)
        if not isinstance(found, PeerLostError) or found.peer not in self._group.ranks:
            return found
        assert found.peer is not None
        lost = self._group.ranks.index(found.peer)
        tokens = self._parts[lost].tokens if self._parts else np.empty(0, np.int64)
        experts = self._placement.held[lost] if self._placement is not None else np.empty(0, np.int64)
        what = f"{self._operation} (call {self._number} of {self._group.label})"
        return ExpertsLostError(
            f"{what}: {self._group.names[lost]} is gone "
            f"with {len(experts)} experts, to which {len(tokens)} tokens of this rank were routed; "
            "group.shrink() goes on with the rest",
            found.peer,
            tuple(tokens.tolist()),
            tuple(experts.tolist()),
        )


async def _to_its_end(work: Callable[[], None]) -> None:
    """Do work on another thread; a cancellation is raised once nothing touches its memory any more."""
    failures: list[Exception] = []

    async def run() -> None:
        try:
            await anyio.to_thread.run_sync(work)
        except Exception as error:
            failures.append(error)

    # Task.cancel() goes through a shield to the thread, but not to a child of the task, which is waited for.
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
    if failures:
        raise failures[0]
