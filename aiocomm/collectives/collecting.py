"""How a collective call is made: through an arena, by one call into the extension, or by a `Call`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._operations import limit_of
from aiocomm.collectives import device_shared, requests, shared
from aiocomm.collectives.call import Call
from aiocomm.collectives.quick import is_plain, on_gpus, prepare, shape_of
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm.channel import Channel
    from aiocomm.collectives.device_shared import DeviceShared
    from aiocomm.collectives.quick import Prepared
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm.collectives.shared import Shared
    from aiocomm.group import Group
    from aiocomm_native import _core

__all__ = ["Collecting"]

_SHAPES: Final = 256  # prepared per channel


class _Nothing:
    """Before anything repeats."""

    def attempt(self, *call: Any) -> int:
        return shared.NOT_BEGUN


class Collecting:
    """Base of what has collective operations."""

    _repeats: _core.Repeats | _Nothing = _Nothing()  # calls on the default channel that may be made at once

    def _members(self) -> Group:
        raise NotImplementedError

    async def _collect(
        self,
        operation: str,
        make: Callable[[Group], Request],
        channel: Channel | None,
        deadline: float | None,
        what: tuple[Any, ...] | None = None,
        given: Any = None,
        out: Any = None,
        stream: Any = None,
        begun: int = shared.NOT_BEGUN,
    ) -> None:
        """Run a call.

        Args:
            what: what `make` depends on beside the arrays, where repeats need not make it again.
            given: `IN` of the schedule, if there is `what`.
            out: `OUT` of the schedule, if there is `what`.
            begun: what `Repeats.attempt` has made of it, which has numbered it then.
        """
        if begun == shared.TURN:
            await self._members()._comm._backend.turn()
            return
        group = self._members()
        shape = None
        passed = given, out
        if what is not None and _can_be_found(what):
            shape = shape_of(out, given, *what) if stream is None else None
            if shape is None and (found := on_gpus(group, out, given, stream, what)) is not None:
                shape, out, given = found
        wrong: UsageError | None = None
        if deadline is not None:
            try:
                deadline = limit_of(deadline)
            except UsageError as error:
                wrong, deadline, shape = error, None, None
        scope = group._scope(channel)
        number = 0 if begun == shared.NOT_BEGUN else scope.repeats.last
        if shape is not None and (arena := scope.shared.get(shape)) is not None:
            if begun == shared.NOT_BEGUN:
                number = scope.begin(None)
                begun = arena.attempt(number, given, out)
                if what is not None and channel is None and stream is None:
                    arena.register(what, *passed)
                    self._repeats = scope.repeats
            if await _met(scope, arena, number, begun, out, deadline):
                return
        else:
            assert begun < shared.GOING_ON
        if shape is not None and (prepared := scope.prepared.get(shape)) is not None:
            number = number or scope.begin(None)
            if await _repeated(scope, prepared, number, given, out, deadline):
                return
        request = await _from_headers(scope, operation, make, number, deadline, wrong)
        if shape is not None and shape not in scope.prepared and (request.on_gpu or is_plain(out, given)):
            _prepare(scope, shape, request, out if out is not None else given)


def _can_be_found(what: tuple[Any, ...]) -> bool:
    """Whether calls can be looked up by such arguments; others are wrong, which `make` finds out."""
    try:
        hash(what)
    except Exception:  # whatever comes of looking at them
        return False
    return True


async def _met(
    scope: Scope, arena: Shared | DeviceShared, number: int, outcome: int, out: Any, deadline: float | None
) -> bool:
    """Go on with a call through an arena. False: it is to be made by messages."""
    if outcome == shared.NOT_MET:
        return False
    if outcome >= shared.GOING_ON and not await arena.flight(number, outcome, deadline).run():
        return False
    scope.comm._collective_calls[arena.counted] += 1
    if arena.mean:
        _divide(out, scope.group)
    if outcome == shared.TURN:
        await scope.comm._backend.turn()
    return True


async def _from_headers(
    scope: Scope,
    operation: str,
    make: Callable[[Group], Request],
    number: int,
    deadline: float | None,
    wrong: UsageError | None,
) -> Request:
    """Make a call as if there had been none like it: all ranks compare what they were called with.

    Args:
        number: the call's, if it has one.
        wrong: why this rank does not take part.
    """
    unforeseen: Exception | None = None
    try:
        if wrong is not None:
            raise wrong
        request = make(scope.group)
    except Exception as error:  # the others wait, whatever is wrong
        request = requests.refused(operation, error)
        unforeseen = None if isinstance(error, UsageError) else error
    call = Call(scope, request, deadline)
    if number:
        call.enter(number)
    try:
        await call.run()
    except UsageError:
        if unforeseen is not None:
            raise unforeseen from None
        raise
    if not call.suspended:
        await scope.comm._backend.turn()
    algorithm = request.plan.algorithm if request.plan is not None else "headers"
    scope.comm._collective_calls[f"{operation}/{algorithm}"] += 1
    if request.result is not None:
        _divide(request.result, scope.group)
    return request


def _prepare(scope: Scope, shape: tuple[Any, ...], request: Request, some: Any) -> None:
    """Keep what repeats of a call have in common; `some` is one of its arrays."""
    if len(scope.prepared) >= _SHAPES:
        scope.forget()
    dtype = np.dtype(np.uint8) if some is None or request.on_gpu else some.dtype
    scope.prepared[shape] = prepare(scope, request, dtype)
    if request.on_gpu:
        scope.shared[shape] = device_shared.prepare(scope, request)
    else:
        scope.shared[shape] = shared.prepare(scope, request, dtype)


async def _repeated(
    scope: Scope, prepared: Prepared, number: int, given: Any, out: Any, deadline: float | None
) -> bool:
    """Make a call by messages, as it was prepared. False: nothing was begun."""
    counts = scope.comm._collective_calls
    call = prepared.attempt(number, given, out, deadline)
    if call is False:
        return False
    if call is None:
        counts[prepared.counted] += 1
    else:
        await call.run()
        counts[f"{prepared.operation}/{call.algorithm}"] += 1
    if prepared.mean:
        _divide(out, scope.group)
    if call is None and not counts[prepared.counted] % prepared.in_a_row:
        await scope.comm._backend.turn()  # what never waits lets others run, too
    return True


def _divide(sums: np.ndarray[Any, Any], group: Group) -> None:
    """Make means of them, in place."""
    with np.errstate(all="ignore"):
        np.divide(sums, sums.dtype.type(group.size), out=sums)
