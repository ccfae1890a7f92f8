"""Small calls that have been made before in the same shape: nothing is checked or planned again.

What a call of one round needs is prepared once per operation, dtype, size and the like: its header, which
bytes go to whom with it, where what comes belongs, and what is reduced. A call then posts its receives and
sends, spins for them where the loop spins, compares the headers, and does the local part. Only if something
has not come by then, or is wrong, does it become a `Flight` like any other, with the same rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.collectives import headers
from aiocomm.collectives.exchange import HEADERS
from aiocomm.collectives.flight import LINGER_S, Flight
from aiocomm.collectives.plan import EAGER_BYTES, Eager
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import IN, TMP, Copy, Reduce
from aiocomm.errors import UsageError
from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm.collectives.steps import Span
    from aiocomm_native import Transfer

    _Operand = tuple[int, int, int]  # IN or OUT, from and to which element; or the rank that it came from

__all__ = ["Prepared", "QuickCall", "prepare"]

_DONE: Final = 1
_GIVEN, _OUT, _CAME = 0, 1, 2
_FRAMES: Final = 4  # calls of one shape at once whose memory is kept


class _Frame:
    """Memory for what comes in one call: a slot per rank, and views of what lies in it."""

    def __init__(self, size: int, width: int, payloads: dict[int, int], dtype: Any) -> None:
        memory = np.empty(size * width, np.uint8)
        self.slots = [memory[peer * width : (peer + 1) * width].data for peer in range(size)]
        starts = {peer: peer * width + headers.HEADER_BYTES for peer in payloads}
        self.payloads = {
            peer: memory[starts[peer] : starts[peer] + nbytes].view(dtype)
            for peer, nbytes in payloads.items()
        }


class Prepared:
    """One rank's call of one shape.

    Args:
        request: has been checked, and ran well.
        dtype: of the arrays.
    """

    def __init__(self, scope: Scope, request: Request, dtype: np.dtype[Any]) -> None:
        group, plan = scope.group, request.plan
        self._scope = scope
        self.operation = request.operation
        self.counted = f"{request.operation}/{plan.algorithm if plan else 'headers'}"
        self.mean = request.result is not None
        self.header = request.header
        self.peers = [(group.rank + away) % group.size for away in range(1, group.size)]
        self._dtype, self._ufunc, self._partials = dtype, request.ufunc, request.partials
        self._width = headers.HEADER_BYTES + 16 * group.size + EAGER_BYTES
        self._frames: list[_Frame] = []
        eager = plan.eager if plan is not None and plan.eager is not None else Eager({}, {}, ())
        self._came = eager.receives
        self._sources = [(peer, group.ranks[peer]) for peer in self.peers]
        sends = [
            (self._operand(eager.sends[peer]) if peer in eager.sends else None, group.ranks[peer])
            for peer in self.peers
        ]
        self._alike = len({operand for operand, _ in sends}) == 1
        self._sends = sends
        # Rows that end where they came need no copy: what is reduced is taken from there.
        self._copies = [
            (self._operand(span), (_CAME, peer, 0)) for peer, span in self._came.items() if span.buffer != TMP
        ]
        self._copies += [
            (self._operand(step.target), self._operand(step.source))
            for step in eager.local
            if isinstance(step, Copy)
        ]
        self._reductions = [
            (self._operand(step.left), self._operand(step.right), self._operand(step.target))
            for step in eager.local
            if isinstance(step, Reduce)
        ]

    def _operand(self, span: Span) -> _Operand:
        if span.buffer == TMP:
            return next((_CAME, peer, 0) for peer, there in self._came.items() if there == span)
        item = self._dtype.itemsize
        return _GIVEN if span.buffer == IN else _OUT, span.start // item, span.stop // item

    def attempt(self, given: Any, out: Any, deadline: float | None) -> QuickCall | None:
        """Do the call, or begin it: what is returned is to be resumed.

        Args:
            given: flat `IN`, of the dtype and size that was prepared for; None where there is none.
            out: flat `OUT`.

        Raises:
            AiocommError: another rank has given the call up.
        """
        scope = self._scope
        comm, index = scope.comm, scope.index
        full = scope.begin(None) << TAG_BITS | HEADERS
        limit = -1.0 if deadline is None else deadline
        if self._frames:
            frame = self._frames.pop()
        else:
            payloads = {peer: span.nbytes for peer, span in self._came.items()}
            frame = _Frame(scope.group.size, self._width, payloads, self._dtype)
        slots, recv, send = frame.slots, comm._recv, comm._send
        flying = [recv(slots[peer], rank, index, full, limit) for peer, rank in self._sources]
        message = None
        for operand, rank in self._sends:
            if message is None or not self._alike:
                message = self.header
                if operand is not None:
                    message += self._array(operand, frame, given, out).tobytes()
            flying.append(send(message, rank, index, full, limit, 0))
        if _core.settle(flying, LINGER_S) == _DONE:
            header, width = self.header, headers.HEADER_BYTES
            for peer in self.peers:
                if slots[peer][:width].tobytes() != header:
                    break
            else:
                self.finish(frame, given, out)
                return None
        return QuickCall(self, frame, full >> TAG_BITS, flying, given, out, deadline)

    @staticmethod
    def _array(operand: _Operand, frame: _Frame, given: Any, out: Any) -> Any:
        kind, start, stop = operand
        if kind == _CAME:
            return frame.payloads[start]
        return (given if kind == _GIVEN else out)[start:stop]

    def finish(self, frame: _Frame, given: Any, out: Any) -> None:
        """Do the local part, on what has come."""
        array, ufunc = self._array, self._ufunc
        for target, source in self._copies:
            array(target, frame, given, out)[:] = array(source, frame, given, out)
        partials = None if self._partials is None else self._partials()
        for left, right, target in self._reductions:
            assert ufunc is not None
            if partials is not None:
                a, b, into = ((one, array(one, frame, given, out)) for one in (left, right, target))
                partials.reduce(a, b, into, target[0] == _OUT)
                continue
            ufunc(
                array(left, frame, given, out),
                array(right, frame, given, out),
                array(target, frame, given, out),
            )
        if len(self._frames) < _FRAMES:
            self._frames.append(frame)


def prepare(scope: Scope, request: Request, dtype: np.dtype[Any]) -> Prepared | None:
    """What repeats of a call need, if it is one of a single round and small."""
    plan = request.plan
    if scope.group.size > headers.DIRECT_MEMBERS or (plan is not None and plan.eager is None):
        return None
    if plan is not None and plan.eager is not None:
        # A copy among reductions would have to keep its place: then it is not for here.
        local, came = plan.eager.local, set(plan.eager.receives.values())
        if len({type(step) for step in local}) > 1 or not _scratch(local) <= came:
            return None
    return Prepared(scope, request, dtype)


def _scratch(steps: tuple[Copy | Reduce, ...]) -> set[Span]:
    spans: list[Span] = []
    for step in steps:
        spans += (
            (step.target, step.source) if isinstance(step, Copy) else (step.target, step.left, step.right)
        )
    return {span for span in spans if span.buffer == TMP}


class QuickCall(Flight):
    """A quick call that has to wait, or that has failed."""

    def __init__(
        self,
        prepared: Prepared,
        frame: _Frame,
        number: int,
        flying: list[Transfer[Any]],
        given: Any,
        out: Any,
        deadline: float | None,
    ) -> None:
        super().__init__(prepared._scope, prepared.operation, deadline)
        self._prepared = prepared
        self._frame = frame
        self._number = number
        self._begun = flying
        self._arrays = given, out
        self._brief = True

    def _has_work(self) -> bool:
        return not (self._missing or self._judged)

    def _header_ended(self, index: int) -> None:
        self._missing.discard(index)  # sends count from the size on

    async def resume(self) -> None:
        """Wait for the rest.

        Raises:
            AiocommError: as `Call.run`.
        """
        prepared, size = self._prepared, self._group.size
        self._scope.calls[self._number] = self
        try:
            keys = [*prepared.peers, *(size + peer for peer in prepared.peers)]
            for key, transfer in zip(keys, self._begun, strict=True):
                self._watch((True, key), transfer)
            while self._missing or self._flying:
                self._settle_sends()
                if self._missing:
                    self._raise_header_trouble()
                else:
                    self._judge()
                if self._missing or self._flying:
                    await self._wait()
            self._settle_sends()
            self._judge()
            prepared.finish(self._frame, *self._arrays)
        except BaseException as error:
            await self._give_up(error)
            raise
        finally:
            del self._scope.calls[self._number]

    def _judge(self) -> None:
        if not self._judged:
            width, rank = headers.HEADER_BYTES, self._group.rank
            own, slots = self._prepared.header, self._frame.slots
            every = [
                own if peer == rank else slots[peer][:width].tobytes() for peer in range(self._group.size)
            ]
            if (trouble := headers.judge(every, self._group.names)) is not None:
                raise UsageError(f"{self._operation}: {trouble}")
            self._judged = True
        self._raise_trouble()
