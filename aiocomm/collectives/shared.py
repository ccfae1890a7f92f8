"""Repeated calls through memory that the ranks of a group on one host share: an arena.

Rank 0 makes the arena once a call of a shape has run, and tells the others where to find it. What repeats in
that shape is then one call into the extension, in which the ranks meet and copy by themselves. Where they do
not meet within a moment, all make the call by messages; `aiocomm_native/core/arena.hpp` has the rules.

What is large goes on in a thread, while the loop runs. A call that has met and fails at one rank fails on
all, and the group goes by messages from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from aiocomm.collectives import headers
from aiocomm.collectives.flight import Flight
from aiocomm.collectives.quick import operator_of
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import Recv
from aiocomm.errors import DeadlineExceeded, LinkError, PeerLostError, TransferCancelled
from aiocomm.region import look_away
from aiocomm_native import _core

if TYPE_CHECKING:
    import numpy as np

    from aiocomm.collectives.gate import Gate
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope

__all__ = [
    "DONE",
    "GOING_ON",
    "NOT_BEGUN",
    "NOT_MET",
    "OPEN",
    "STUCK",
    "TURN",
    "ArenaFlight",
    "Place",
    "Shared",
    "SharedFlight",
    "option_of",
    "prepare",
]

# What has come of a call; the extension says which is what.
NOT_BEGUN: Final = _core.NOT_BEGUN
NOT_MET: Final = _core.NOT_MET
DONE: Final = _core.DONE
TURN: Final = _core.DONE_TURN
GOING_ON: Final = _core.GOING_ON
STUCK: Final = _core.STUCK
OPEN: Final = _core.OPEN

_KINDS: Final = {"barrier": 0, "broadcast": 1, "all_gather": 2, "all_to_all": 3, "all_reduce": 4}
_IN_ORDER: Final = ("one_shot", "direct")  # reduce in the order of the ranks, as an arena does
_TAG: Final = 1  # of no call: calls are numbered from 1
_NEVER: Final = (1 << TAG_BITS) - 1  # of messages that nobody sends
_WAYS: Final = ("shared", "mapped", "cma")  # by numbers of the extension
_PLACE: Final = struct.Struct("<iiQ")
_NOWHERE: Final = (-1, -1, 0)
_CHUNK_BYTES: Final = 32 << 10
_TURN_S: Final = 1e-3
_THREAD_BYTES: Final = 8 << 20  # that a call moves, from which on a thread does it
_THREAD_S: Final = 20e-3
_LEAVE_S: Final = 1e-3
_WATCH_S: Final = 5e-3  # without progress, after which it is found out who is lost
_REASON_S: Final = 5.0  # that the reason for which a call was given up may come after its end
_GOODBYE_S: Final = 0.25  # the same, once a rank is known to have left
_LOOK_S: Final = 0.01  # after which it is looked for that


class Place:
    """A scope's arena, once it is known here."""

    def __init__(self, scope: Scope) -> None:
        self.arena: _core.Arena | None = None
        self.expected = False  # it has yet to be told of here
        self.waiting: list[Gate] = []  # of those who want to know
        self._scope = scope
        group = scope.group
        if group.rank:
            self.expected = True
            self._told = bytearray(_PLACE.size)
            receive = scope.comm._recv(self._told, group.ranks[0], scope.index, _TAG, -1.0)
            receive.add_done_callback(self._found)
            return
        with contextlib.suppress(LinkError, OSError):
            self.arena = _core.Arena.create(group.size)
        told = _PLACE.pack(*(_NOWHERE if self.arena is None else self.arena.place))
        for rank in group.ranks[1:]:
            sent = scope.comm._send(told, rank, scope.index, _TAG, -1.0, 0)
            sent.add_done_callback(self._sent)

    def _sent(self, told: Any) -> None:
        """Until then the scope is kept, although nobody may need it any more."""
        look_away(told)

    def _found(self, receive: Any) -> None:
        self.expected = False
        if not receive.cancelled() and receive.exception() is None:
            place, group = _PLACE.unpack(self._told), self._scope.group
            if place != _NOWHERE:
                found: Any = _core.Arena.open(place, group.rank, group.size)
                self.arena = found
        for gate in self.waiting:
            gate.ring()
        self.waiting.clear()


class Shared:
    """One rank's calls of one shape."""

    def __init__(self, scope: Scope, request: Request, dtype: np.dtype[Any]) -> None:
        self._scope, self._request, self._dtype = scope, request.without_arrays(), dtype
        self._native: _core.SharedCall | None = None
        self._registered = False
        self._counted = tuple(f"{request.operation}/{way}" for way in _WAYS)
        self.mean = request.result is not None

    def attempt(self, number: int, given: Any, out: Any) -> int:
        """Do the call, or begin it: `GOING_ON` or more has to be gone on with by `SharedFlight`.

        Args:
            number: of the call.
            given: `IN`; None where there is none.
            out: `OUT`, likewise.
        """
        scope = self._scope
        native = self._native
        if scope.calls or (native is None and (native := self._made()) is None):
            return NOT_MET
        return native.attempt(scope.comm._engine, number, given, out)

    @property
    def counted(self) -> str:
        """Under which name the statistics count the call that has met last."""
        return self._counted[0 if self._native is None else self._native.way]

    def register(self, what: tuple[Any, ...], given: Any, out: Any) -> None:
        """Have calls with such arrays, and without options, found by the extension."""
        operation, *more = what
        if self._native is None or self._registered or self.mean or any(one is not None for one in more[1:]):
            return
        self._registered = True
        extra = more[0] if more else None
        self._scope.repeats.add(operation, out, given, extra, self._native, self._counted)

    def _made(self) -> _core.SharedCall | None:
        place = self._scope.place
        if place is None or place.arena is None:
            return None
        engine, group = self._scope.comm._engine, self._scope.group
        place.arena.set_processes([engine.process_of(rank) for rank in group.ranks])
        request, problem, dtype = self._request, self._request.problem, self._dtype
        sizes: tuple[int, ...] = (0,)
        root, in_place = 0, False
        if problem is not None:
            sizes, root, in_place = problem.receives, problem.root, problem.in_place
        self._native = _core.SharedCall(
            place.arena,
            _KINDS[request.operation],
            root,
            list(sizes),
            in_place,
            dtype.itemsize if request.operation == "all_reduce" else 1,
            f"{dtype.kind}{dtype.itemsize}",
            operator_of(request),
            request.header,
        )
        return self._native

    def flight(self, number: int, result: int, deadline: float | None) -> SharedFlight:
        """What goes on with a call that was begun."""
        assert self._native is not None
        return SharedFlight(self._scope, self._request.operation, deadline, self._native, number, result)


class ArenaFlight(Flight):
    """Base of a call that was begun through an arena, and goes on."""

    def __init__(
        self, scope: Scope, operation: str, deadline: float | None, number: int, result: int
    ) -> None:
        super().__init__(scope, operation, deadline)
        self._result = result
        self._missing.clear()
        self._number = number
        scope.enter(number, self)

    # ------------------------------------------------------------ hooks

    def _nobody_touches(self) -> bool:
        """Whether no other rank uses the arrays any more, now that this one has failed."""
        raise NotImplementedError

    def _errno(self) -> int:
        """Of memory that could not be reached after all; 0: there is none."""
        return 0

    # ------------------------------------------------------------ news of others

    def _watch_others(self) -> None:
        """Receive what is never sent: that ends where its sender is lost, or leaves."""
        for peer in range(self._group.size):
            if peer != self._group.rank:
                self._post(Recv, (True, peer), peer, bytearray(1), _NEVER, patient=True)
        self._listen()

    def _raise_wrong(self) -> None:
        if self._aborted is not None:
            raise self._explained(self._aborted)
        if (error := self._header_error) is not None:
            met = self._result != OPEN
            if not (met and isinstance(error, PeerLostError) and error.peer in self._scope.comm._left):
                raise self._explained(error)
            self._header_error = None  # it had done its part
        if self._late() and self._result != OPEN:  # else the messages say who has not called
            raise self._explained(DeadlineExceeded("not done in time"))

    def _raise_unless_done(self) -> None:
        """Who has done its part may leave before this rank has seen that."""
        if self._result > TURN:
            self._raise_wrong()

    def _late(self) -> bool:
        return self._ends is not None and time.monotonic() > self._ends

    def _lost_in_it(self) -> PeerLostError | None:
        """That a rank is gone, and had not left with its part done."""
        error = self._header_error
        if isinstance(error, PeerLostError) and error.peer not in self._scope.comm._left:
            return error
        return None

    async def _why_broken(self) -> BaseException:
        """Wait for the reason, which comes as a message, unless it is here, or a rank is known to be lost.

        Whoever has it may stand still before it can say so; only who closes its communicator says nothing.
        """
        what = f"{self._operation} (call {self._number} of {self._group.label})"
        if code := self._errno():
            return LinkError(
                f"{what}: memory of a rank cannot be read or written by another ({os.strerror(code)}): "
                "arrays must not be unmapped meanwhile; AIOCOMM_CMA=off has all copied by their owners"
            )
        ends, left = time.monotonic() + _REASON_S, False
        while (error := self._aborted or self._lost_in_it()) is None and time.monotonic() < ends:
            if self._late():
                return self._explained(DeadlineExceeded("not done in time"))
            if not left and (left := not self._scope.comm._left.isdisjoint(self._group.ranks)):
                ends = time.monotonic() + _GOODBYE_S
            with anyio.move_on_after(_LOOK_S):
                await self._gate.wait()
        if error is not None:
            return self._explained(error)
        return TransferCancelled(f"{what}: another rank has given it up")

    # ------------------------------------------------------------ ends

    async def _leave(self) -> None:
        """Return once no other rank touches the arrays, whatever is cancelled meanwhile."""
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not self._nobody_touches():
                try:
                    await anyio.sleep(_LEAVE_S)
                except asyncio.CancelledError as error:  # Task.cancel() goes through a shield
                    cancelled = error
        if cancelled is not None:
            raise cancelled

    async def _end(self) -> bool:
        """Let go of what is under way. False: the call is to be made by messages.

        Raises:
            PeerLostError, TransferCancelled, DeadlineExceeded: what another rank has said of it meanwhile.
        """
        if self._flying:
            self._over = True
            for transfer in list(self._flying.values()):
                transfer.cancel()
            try:
                await self._gate.wait_shielded(lambda: not self._flying)
            except BaseException as error:  # cancelled
                if self._result == NOT_MET:  # the others make the call by messages, and wait for ours
                    self._scope.abort(self._number, error)
                raise
        if self._result == NOT_MET and self._aborted is not None:
            raise self._explained(self._aborted)
        return self._result != NOT_MET

    def _header_ended(self, index: int) -> None:
        """Nothing is sent there; see `_watch_others`."""

    def _data_ended(self, index: int, nbytes: int | None) -> None:
        """What is written into others' memory is told to them by the arena."""

    def _has_work(self) -> bool:
        return False


class SharedFlight(ArenaFlight):
    """A call on host arrays that has met, or has not yet."""

    def __init__(
        self,
        scope: Scope,
        operation: str,
        deadline: float | None,
        native: _core.SharedCall,
        number: int,
        result: int,
    ) -> None:
        super().__init__(scope, operation, deadline, number, result)
        self._native = native

    async def run(self) -> bool:
        """Go on to the end. False: the ranks have not met, and the call is to be made by messages.

        Raises:
            PeerLostError, TransferCancelled, DeadlineExceeded, ClosedError: as for transfers.
        """
        moved = time.monotonic()
        watched = False
        try:
            while self._result > TURN:
                if self._result == _core.BROKEN:
                    raise await self._why_broken()
                if self._result in (GOING_ON, OPEN):
                    moved = time.monotonic()
                    await self._scope.comm._backend.turn()
                else:
                    stuck_s = time.monotonic() - moved
                    await anyio.sleep(0 if stuck_s < _WATCH_S else min(stuck_s / 10, 0.01))
                    if stuck_s > _WATCH_S and not watched:
                        watched = True
                        self._watch_others()
                if self._native.moved > _THREAD_BYTES and self._result != OPEN:
                    self._result = await anyio.to_thread.run_sync(self._native.proceed, _THREAD_S)
                else:
                    self._result = self._native.proceed(_TURN_S)
                self._raise_unless_done()
        except BaseException as error:
            left = self._native.abandon()
            try:
                await self._give_up(error)
            finally:
                if not left:
                    await self._leave()
            raise
        else:
            return await self._end()
        finally:
            del self._scope.calls[self._number]

    def _nobody_touches(self) -> bool:
        return self._native.abandon()

    def _errno(self) -> int:
        return self._native.error


def prepare(scope: Scope, request: Request, dtype: np.dtype[Any]) -> Shared | None:
    """What repeats of a call need to go through an arena, if they may."""
    group, plan = scope.group, request.plan
    if request.operation not in _KINDS or request.on_gpu or request.partials is not None or request.vector:
        return None
    if not 2 <= group.size <= headers.DIRECT_MEMBERS or group.link != "shm" or group.hosts:
        return None
    if request.operation != "barrier":
        problem = request.problem
        if plan is None or problem is None or not sum(problem.receives):
            return None
    if request.operation == "all_reduce":
        if plan is None or plan.algorithm not in _IN_ORDER or _CHUNK_BYTES % dtype.itemsize:
            return None
        if not _core.reduces(f"{dtype.kind}{dtype.itemsize}", operator_of(request)):
            return None
    if scope.place is None:
        scope.place = Place(scope)
    return Shared(scope, request, dtype)


def option_of(algorithm: str | None, sm_budget: int | None) -> Any:
    """Both options of a reduction as the one that `Repeats` finds calls by; of two no call is found."""
    if sm_budget is None:
        return algorithm
    return sm_budget if algorithm is None else (algorithm, sm_budget)
