"""Repeated calls on GPU arrays of one host: ranks meet in their arena, and write into each other's memory.

The arena (see `shared`) tells who has come and where the arrays are; the bytes go by copy engines, or those
of an `all_reduce` by one kernel per rank. Each rank does what `pushes` makes of the schedule, without a
message. Where the ranks do not meet, or one of them is not reached by another, all make the call by messages;
`aiocomm_native/bindings/device_call_py.hpp` has the rules.
"""

from __future__ import annotations

import errno
import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import anyio

from aiocomm.collectives import headers
from aiocomm.collectives.kernels import THREADS
from aiocomm.collectives.plan import make_plan
from aiocomm.collectives.pushes import Part, pushes
from aiocomm.collectives.shared import GOING_ON, NOT_MET, OPEN, STUCK, TURN, ArenaFlight, Place, option_of
from aiocomm.collectives.steps import IN, OUT
from aiocomm.errors import LinkError
from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm.collectives.steps import Problem, Span

__all__ = ["DeviceFlight", "DeviceShared", "prepare"]

_FOUND: Final = ("broadcast", "all_gather", "all_to_all", "all_reduce")
_MOVED: Final = ("broadcast", "scatter", "gather", "all_gather", "all_to_all")
STAYS_S: Final = 5e-3  # that a call waits for late ranks: messages would wait, too, and be slower then
_BUFFERS: Final = {IN: 0, OUT: 1}
_MOST_PARTS: Final = 63
_NAP_S: Final = 1e-4
_WATCH_S: Final = 5e-3  # without progress, after which it is found out who is lost


class DeviceShared:
    """One rank's calls of one shape."""

    mean = False  # kernels divide by themselves

    def __init__(self, scope: Scope, request: Request, parts: tuple[Part, ...], awaits: list[int]) -> None:
        self._scope, self._request = scope, request.without_arrays()
        self._sizes = _bytes(request)
        self._parts, self._awaits = parts, awaits
        self._native: _core.DeviceCall | None = None
        self._registered = False
        self._late: tuple[Any, Any] = None, None  # arrays of a call that waits for the arena
        by_kernel = request.operation == "all_reduce"
        self.counted = f"{request.operation}/{'kernels' if by_kernel else 'pushed'}"

    def attempt(self, number: int, given: Any, out: Any) -> int:
        """Do the call, or begin it: `GOING_ON` or more has to be gone on with by `DeviceFlight`.

        Args:
            number: of the call.
            given: description of `IN`; None where there is none.
            out: of `OUT`, likewise.
        """
        if self._scope.calls:
            return NOT_MET
        if self.place.expected:
            self._late = given, out
            return OPEN
        return self._attempt(number, given, out)

    def attempt_late(self, number: int) -> int:
        """The same once the arena is known, or there is none."""
        (given, out), self._late = self._late, (None, None)
        return self._attempt(number, given, out)

    def forget_late(self) -> None:
        """It is given up before that."""
        self._late = None, None

    def _attempt(self, number: int, given: Any, out: Any) -> int:
        native = self._native
        if native is None and (native := self._made()) is None:
            return NOT_MET
        return native.attempt(self._scope.comm._engine, number, given, out)

    def register(self, what: tuple[Any, ...], given: Any, out: Any) -> None:
        """Have calls with such arrays found by the extension.

        Args:
            given: as it was passed.
            out: likewise.
        """
        operation, *more = what
        if self._native is None or self._registered or operation not in _FOUND:
            return
        self._registered = True
        # As `Repeats.attempt` is asked: an argument, and an option.
        if operation == "all_reduce":
            extra, *options = more
            option = option_of(*options)
        else:
            extra, option = more if operation == "broadcast" else (None, *more)
        counted = self.counted
        self._scope.repeats.add(operation, out, given, extra, self._native, (counted,), option)

    def flight(self, number: int, result: int, deadline: float | None) -> DeviceFlight:
        """What goes on with a call that was begun."""
        return DeviceFlight(self, self._scope, self._request.operation, deadline, number, result)

    @property
    def place(self) -> Place:
        """Of the arena."""
        assert self._scope.place is not None
        return self._scope.place

    @property
    def begun(self) -> _core.DeviceCall | None:
        """What makes the calls, once one was begun."""
        return self._native

    @property
    def native(self) -> _core.DeviceCall:
        """That of a call that was begun."""
        assert self._native is not None
        return self._native

    def _made(self) -> _core.DeviceCall | None:
        scope, request, group = self._scope, self._request, self._scope.group
        if self.place.arena is None:
            return None
        reduction, problem = request.reduction, request.problem
        in_bytes, out_bytes = self._sizes
        native = _core.DeviceCall(
            self.place.arena,
            list(group.ranks),
            scope.index,
            request.header,
            in_bytes,
            out_bytes,
            1 if reduction is None else reduction.itemsize,
            [
                (
                    [
                        (move.rank, _span(move.source), _BUFFERS[move.target.buffer], move.target.start)
                        for move in part.moves
                    ],
                    list(part.after),
                )
                for part in self._parts
            ],
            self._awaits,
            STAYS_S,
        )
        assert problem is not None
        if reduction is not None:
            native.combine(
                reduction.over_all(),
                reduction.kernels.device,
                reduction.sm_budget,
                THREADS,
                group.size if reduction.mean else 0,
            )
        self._native = native
        return native


class DeviceFlight(ArenaFlight):
    """A call that goes on: not all have come, our own operations are under way, or others are waited for."""

    def __init__(
        self,
        call: DeviceShared,
        scope: Scope,
        operation: str,
        deadline: float | None,
        number: int,
        result: int,
    ) -> None:
        super().__init__(scope, operation, deadline, number, result)
        self._call = call
        self._engine = scope.comm._engine
        self._watched = False

    async def run(self) -> bool:
        """Go on to the end. False: the call is to be made by messages.

        Raises:
            PeerLostError, TransferCancelled, DeadlineExceeded, LinkError, ClosedError: as for transfers.
        """
        since = time.monotonic()
        try:
            if self._call.place.expected:
                await self._arena()
            while self._result > TURN:
                if self._result == GOING_ON:
                    await self._own()
                    if self._data_error is not None:
                        if not _is_unreachable(self._data_error):
                            raise self._explained(self._data_error)
                        self._device.decline()
                        self._result = NOT_MET
                        break
                    since = time.monotonic()
                elif self._result in (OPEN, STUCK):
                    stuck_s = time.monotonic() - since
                    await anyio.sleep(0 if stuck_s < _WATCH_S else min(stuck_s / 10, 100 * _NAP_S))
                    if stuck_s > _WATCH_S and not self._watched:
                        self._watch_others()
                else:
                    raise await self._why_broken()
                self._result = self._device.proceed(self._engine, self._late())
                self._raise_unless_done()
        except BaseException as error:
            self._call.forget_late()
            device = self._call.begun
            if device is not None:
                device.give_up()
                self._take()  # what has begun just now, as the ranks met
            try:
                await self._give_up(error)
            finally:
                if device is not None:
                    device.let_go()
                    await self._leave()
            raise
        else:
            return await self._end()
        finally:
            del self._scope.calls[self._number]

    @property
    def _device(self) -> _core.DeviceCall:
        return self._call.native

    async def _arena(self) -> None:
        """Begin, once it is known where the arena is."""
        place = self._call.place
        place.waiting.append(self._gate)
        with anyio.move_on_after(STAYS_S):  # in vain, where rank 0 has other calls than this one
            while place.expected:
                await self._gate.wait()
                self._raise_wrong()
        self._result = self._call.attempt_late(self._number)

    def _take(self) -> None:
        """Watch our own operation, if there is one that is not watched yet."""
        transfer: Any = self._device.take(self._engine)
        if transfer is not None:
            self._watch((False, 0), transfer)
            self._listen()

    async def _own(self) -> None:
        """Return when our own operation has ended, or nobody can do the call so."""
        self._take()
        began = time.monotonic()
        while (False, 0) in self._flying:
            now = time.monotonic()
            limits = [] if self._ends is None else [self._ends - now]
            if not self._watched:
                limits.append(began + _WATCH_S - now)
            with anyio.move_on_after(max(0.0, min(limits)) if limits else None):
                await self._gate.wait()
            if not self._watched and time.monotonic() > began + _WATCH_S:
                self._watch_others()
            self._raise_wrong()
        self._device.let_go()

    def _watch_others(self) -> None:
        self._watched = True
        super()._watch_others()

    def _has_work(self) -> bool:
        return (False, 0) not in self._flying

    def _nobody_touches(self) -> bool:
        return self._device.left(self._engine)


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, LinkError) and error.code == errno.EXDEV


def _span(span: Span) -> tuple[int, int, int]:
    return _BUFFERS[span.buffer], span.start, span.stop


def _bytes(request: Request) -> tuple[int, int]:
    """Of `IN` and of `OUT`; 0: there is none, or one is part of the other."""
    given, out = request.views.get(IN), request.views.get(OUT)
    problem = request.problem
    apart = given is not None and not (problem is not None and problem.in_place)
    return given.nbytes if apart and given is not None else 0, 0 if out is None else out.nbytes


@functools.lru_cache(256)
def _parts(operation: str, algorithm: str, problem: Problem) -> tuple[tuple[Part, ...], ...] | None:
    """Of all ranks; the problem is that of any of them."""
    schedules = []
    for rank in range(problem.size):
        per = replace(problem, rank=rank, in_place=problem.in_place and rank == problem.rank)
        schedules.append(make_plan(operation, algorithm, _seen_from(operation, per), False, True).steps)
    found = pushes(schedules)
    return None if found is None or any(len(parts) > _MOST_PARTS for parts in found) else found


def _seen_from(operation: str, problem: Problem) -> Problem:
    """A problem as its rank sees it: of what has a root, other ranks give or take one block."""
    size, root, rank = problem.size, problem.root, problem.rank
    if operation == "scatter":
        block = problem.receives[0]
        return replace(problem, sends=(block,) * size if rank == root else (), receives=(block,))
    if operation == "gather":
        block = problem.sends[0]
        return replace(problem, sends=(block,), receives=(block,) * size if rank == root else ())
    return problem


def prepare(scope: Scope, request: Request) -> DeviceShared | None:
    """What repeats of a call on GPU arrays need to go through an arena, if they may."""
    group, plan, problem = scope.group, request.plan, request.problem
    if not 2 <= group.size <= headers.DIRECT_MEMBERS or group.link != "shm" or group.hosts:
        return None
    if plan is None or problem is None or request.vector:
        return None
    rank = group.rank
    if request.operation == "all_reduce":
        if not request.together:
            return None
        parts: tuple[Part, ...] = (Part(()),)
        awaits = [int(other != rank) for other in range(group.size)]
    elif request.operation in _MOVED:
        found = _parts(request.operation, plan.algorithm, problem)
        if found is None:
            return None
        parts = found[rank]
        awaits = [_last_to(rank, other) if number != rank else 0 for number, other in enumerate(found)]
    else:
        return None
    if scope.place is None:
        scope.place = Place(scope)
    return DeviceShared(scope, request, parts, awaits)


def _last_to(rank: int, parts: tuple[Part, ...]) -> int:
    """How many parts of another rank have to be in place until all that comes from it is."""
    return max(
        (1 + at for at, part in enumerate(parts) if any(m.rank == rank for m in part.moves)), default=0
    )
