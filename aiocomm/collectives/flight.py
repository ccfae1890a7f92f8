"""The transfers of one call by this rank: posted, watched, and ended together.

Rules:
- Whatever goes wrong, nothing touches the caller's arrays after the call: all transfers are cancelled and
  have ended.
- A failure that the others cannot see by themselves is told to them before this rank's transfers are
  cancelled.
- A rank that left had done its part: a send to it that could not end has not failed.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from aiocomm._operations import limit_of, overlapping
from aiocomm._outcome import told_of
from aiocomm.collectives.gate import Gate
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import Recv, Send
from aiocomm.errors import (
    AiocommError,
    ClosedError,
    DeadlineExceeded,
    PeerLostError,
    TransferCancelled,
)
from aiocomm.region import look_away
from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm.collectives.scope import Scope
    from aiocomm_native import Transfer

__all__ = ["LINGER_S", "Flight"]

LINGER_S: Final = 1e-4  # that is looked for news before the task is suspended, at most
_BREATH_S: Final = 1e-3  # of that, after which other tasks get a turn
_EXPLANATION_S: Final = 1.0  # that a peer's reason for giving up may come after its cancelled transfers


class Flight:
    """Base of a call. `_missing` are the ranks of the group whose headers have not come."""

    _linger_s = LINGER_S

    def __init__(self, scope: Scope, operation: str, deadline: float | None) -> None:
        self._scope = scope
        self._group = scope.group
        self._operation = operation
        self._deadline_s = deadline
        self._ends = None if deadline is None else time.monotonic() + limit_of(deadline)
        self._gate = Gate(scope.comm._backend)
        self._flying: dict[tuple[bool, int], Transfer[Any]] = {}
        self._header_error: BaseException | None = None
        self._data_error: BaseException | None = None
        self._aborted: AiocommError | None = None
        self._quit: set[int] = set()  # ranks of the world that have given it up
        self._unsure: list[tuple[tuple[bool, int], PeerLostError]] = []
        self._missing = set(range(self._group.size)) - {self._group.rank}
        self._judged = False
        self._differs = False  # the headers do, of which all ranks make the same
        self._over = False
        self._number = 0
        self._silent: list[tuple[tuple[bool, int], Transfer[Any]]] = []  # whose ends no callback tells yet
        self._listening = False
        self._breath = time.monotonic() + _BREATH_S
        self._brief = False  # nothing large moves: looking for news takes no core from who copies
        self.suspended = False  # other tasks have had a turn

    @property
    def has_deadline(self) -> bool:
        """Whether this rank's call has a deadline of its own."""
        return self._ends is not None

    def abort(self, error: AiocommError, source: int) -> None:
        """Another rank of the world has given the call up."""
        if self._aborted is None:
            self._aborted = error
        self._quit.add(source)
        self._gate.ring()

    def lose(self, rank: int) -> None:
        """A rank of the world is lost: the others may not call any more, as far as they have not."""
        if self._header_error is None:
            self._header_error = PeerLostError(f"{self._group.name_of(rank)} is gone", rank)
        self._gate.ring()

    # ------------------------------------------------------------ hooks

    def _header_ended(self, index: int) -> None:
        """Note that a transfer that was posted as a header has ended well."""
        raise NotImplementedError

    def _data_ended(self, index: int, nbytes: int | None) -> None:
        """Note that a transfer of data has ended well; `nbytes` is what a receive got."""
        raise NotImplementedError

    def _has_work(self) -> bool:
        """Whether the call can go on by itself, while transfers are under way and nothing is wrong."""
        return True

    # ------------------------------------------------------------ transfers

    def _post(
        self,
        kind: type[Send | Recv],
        key: tuple[bool, int],
        peer: int,
        data: Any,
        tag: int,
        channel: int | None = None,
        patient: bool = False,
    ) -> None:
        """Submit a transfer, whose end is told under `key`; headers have a True in it.

        Args:
            patient: it has no deadline.
        """
        comm, rank = self._scope.comm, self._group.ranks[peer]
        index = self._scope.index if channel is None else channel
        limit = -1.0 if self._ends is None or patient else max(0.0, self._ends - time.monotonic())
        full = self._number << TAG_BITS | tag
        if kind is Send:
            transfer = comm._send(data, rank, index, full, limit, 0)
        else:
            try:
                transfer = comm._recv(data, rank, index, full, limit)
            except ValueError as error:
                overlapping(error)
                raise
        self._watch(key, transfer)

    def _watch(self, key: tuple[bool, int], transfer: Transfer[Any]) -> None:
        """Tell the end of a transfer, which may have come."""
        self._flying[key] = transfer
        if transfer.done():
            self._ended(key, transfer)
        elif self._listening:
            transfer.add_done_callback(partial(self._ended, key))
        else:
            self._silent.append((key, transfer))

    def _listen(self) -> None:
        """Have all ends told from now on, also of what is posted while the task is suspended."""
        self._listening = True
        for key, transfer in self._silent:
            if self._flying.get(key) is transfer:
                transfer.add_done_callback(partial(self._ended, key))
        self._silent.clear()

    def _ended(self, key: tuple[bool, int], transfer: Transfer[Any]) -> None:
        is_header, index = key
        if self._flying.get(key) is not transfer:
            return  # it was seen before its callback came
        del self._flying[key]
        if transfer.cancelled() or self._over:
            look_away(transfer)
            self._gate.ring()
            return
        if (error := transfer.exception()) is not None:
            if isinstance(error, PeerLostError) and transfer.kind == "send":
                self._unsure.append((key, error))
            elif is_header:
                self._header_error = self._header_error or error
            else:
                self._data_error = self._data_error or error
        elif is_header:
            self._header_ended(index)
        else:
            self._data_ended(index, transfer.result().nbytes if transfer.kind == "recv" else None)
        # A turn of the task costs more than this: most ends only bring the last one nearer.
        wrong = self._unsure or self._header_error is not None or self._data_error is not None
        if wrong or not self._flying or self._has_work():
            self._gate.ring()

    def _settle_sends(self) -> None:
        """Judge sends to ranks that are gone, now that it is known whether they left or were lost."""
        for (is_header, index), error in self._unsure:
            if error.peer not in self._scope.comm._left:
                if is_header:
                    self._header_error = self._header_error or error
                else:
                    self._data_error = self._data_error or error
            elif is_header:
                self._header_ended(index)
            else:
                self._data_ended(index, None)
        self._unsure.clear()

    def _linger(self) -> bool:
        """Look for news for a moment, where the loop has nothing else to do: a wake-up takes longer.

        Returns:
            Whether there is news.
        """
        gate, flying = self._gate, self._flying
        while not gate.rung:
            if (
                not self._brief
                or time.monotonic() > self._breath
                or not _core.linger(list(flying.values()), self._linger_s, self._linger_s > LINGER_S)
            ):
                return False
            for key, transfer in list(flying.items()):
                if transfer.done():
                    self._ended(key, transfer)
        return True

    async def _news(self) -> None:
        """Return when there is news, whatever it is."""
        if not self._linger():
            self._listen()
            self.suspended = True
            await self._gate.wait()
            self._listening = False
            self._breath = time.monotonic() + _BREATH_S
        else:
            await self._gate.wait()  # which it does not

    async def _wait(self) -> None:
        """Return when there is news."""
        error = self._data_error if self._judged else self._header_error
        if error is None:
            await self._news()
            return
        self._listen()
        # A peer withdrew its transfers: it says why in a message of its own.
        with anyio.move_on_after(_EXPLANATION_S):
            await self._gate.wait()
            return
        raise self._explained(error)

    # ------------------------------------------------------------ failures

    def _raise_header_trouble(self) -> None:
        """While headers are missing, what is known to be wrong."""
        if self._header_error is not None and not isinstance(self._header_error, TransferCancelled):
            raise self._explained(self._header_error)
        if self._aborted is not None:
            raise self._explained(self._aborted)

    def _raise_trouble(self) -> None:
        """Once all headers have come, what is known to be wrong."""
        if self._aborted is not None:
            raise self._explained(self._aborted)
        if self._data_error is not None and not isinstance(self._data_error, TransferCancelled):
            raise self._explained(self._data_error)

    def _explained(self, error: BaseException) -> BaseException:
        """The error of one transfer as one of the whole call."""
        if error is self._aborted:
            return error
        if isinstance(error, ClosedError) and isinstance(self._aborted, ClosedError):
            return self._aborted  # the group was closed, and with it the channel of this transfer
        what = f"{self._operation} (call {self._number} of {self._group.label})"
        if isinstance(error, DeadlineExceeded):
            within = f"within {self._deadline_s:g} s"
            if self._missing:
                late = ", ".join(self._group.names[peer] for peer in sorted(self._missing))
                return DeadlineExceeded(f"{what}: not called {within} by {late}")
            return DeadlineExceeded(f"{what}: all have called it, but the data had not moved {within}")
        if isinstance(error, PeerLostError) and error.peer is not None:
            name = self._group.name_of(error.peer)
            return PeerLostError(f"{what}: {name} is gone; group.shrink() goes on with the rest", error.peer)
        if isinstance(error, ClosedError) and self._scope.comm.closed:
            return ClosedError(f"{what}: the communicator was closed")
        return told_of(error, what) if isinstance(error, AiocommError) else error

    async def _give_up(self, error: BaseException) -> None:
        """Tell the others if they cannot know, cancel all, and wait until nothing is touched any more."""
        if not self._differs and self._aborted is None:
            self._scope.abort(self._number, error)
        self._scope.tidy(self._number)
        self._over = True
        self._listen()
        kept = set()
        if self._differs:  # the others have yet to hear what
            kept = {one for (header, _), one in self._flying.items() if header and one.kind == "send"}
        for transfer in list(self._flying.values()):
            if transfer not in kept:
                transfer.cancel()
        try:
            while not kept.isdisjoint(self._flying.values()):
                await self._gate.wait()
        finally:
            for transfer in list(self._flying.values()):
                transfer.cancel()
            await self._gate.wait_shielded(lambda: not self._flying)
