"""Runs one rank's part of a collective call on the communicator's transfers.

Rules:
- Headers (see `headers`) are sent and awaited first to last; data moves meanwhile. The call succeeds only
  when all headers have come and agree, and all steps have ended.
- A step begins as soon as what it waits for has ended, so messages and reductions overlap. Reductions run on
  the loop's thread, a chunk at a time, while the engine moves the next chunks.
- Whatever goes wrong, nothing touches the caller's arrays after the call: all transfers are cancelled and
  have ended.
- A failure that the others cannot see by themselves is told to them before this rank's transfers are
  cancelled.
"""

from __future__ import annotations

import time
from functools import partial
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
import numpy as np

from aiocomm.collectives import headers
from aiocomm.collectives.exchange import Exchange
from aiocomm.collectives.gate import Gate
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import TMP, Copy, Recv, Send
from aiocomm.errors import DeadlineExceeded, PeerLostError, TransferCancelled, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from aiocomm.collectives.plan import Plan
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm.errors import AiocommError
    from aiocomm_native import Transfer

__all__ = ["Call"]

_BREATH_S: Final = 1e-3  # of work after which other tasks get a turn
_EXPLANATION_S: Final = 0.25  # that a peer's reason for giving up may come after its cancelled transfers


class Call(Exchange):
    """One call of one collective by this rank."""

    def __init__(self, scope: Scope, request: Request, deadline: float | None) -> None:
        super().__init__(scope, request)
        self._deadline_s = deadline
        self._ends = None if deadline is None else time.monotonic() + deadline
        self._gate = Gate(scope.comm._backend)
        self._flying: dict[tuple[bool, int], Transfer[Any]] = {}
        self._header_error: BaseException | None = None
        self._data_error: BaseException | None = None
        self._aborted: AiocommError | None = None
        self._judged = False
        self._ready: list[int] = []
        self._waits: list[int] = []
        self._left = 0
        self._unsure: list[tuple[tuple[bool, int], PeerLostError]] = []
        self._over = False
        self._memory: npt.NDArray[np.uint8] | None = None

    @property
    def has_deadline(self) -> bool:
        """Whether this rank's call has a deadline of its own."""
        return self._ends is not None

    def abort(self, error: AiocommError) -> None:
        """Another rank has given the call up."""
        if self._aborted is None:
            self._aborted = error
        self._gate.ring()

    async def run(self) -> None:
        """Do the call.

        Raises:
            UsageError: the ranks called differently; the same error on all.
            PeerLostError, TransferCancelled, DeadlineExceeded, LinkError, ClosedError: as for transfers.
        """
        self._number = self._scope.begin(self)
        try:
            self._send_headers()
            if self._plan is not None and self._plan.eager is None:
                self._start(self._plan)
            while True:
                self._judge()
                if self._data_error is None:
                    await self._advance()
                if self._judged and not self._left and not self._flying:
                    return
                await self._wait()
        except BaseException as error:
            await self._give_up(error)
            raise
        finally:
            del self._scope.calls[self._number]
            for memory in (self._slots, self._memory):
                if memory is not None:
                    self._scope.give_back(memory)

    # ------------------------------------------------------------ headers

    def _settle_sends(self) -> None:
        """Judge sends to ranks that are gone.

        A rank that left had done its part: it has what was sent, and left before it could say so.
        """
        for (is_header, index), error in self._unsure:
            if error.peer not in self._scope.comm._left:
                if is_header:
                    self._header_error = self._header_error or error
                else:
                    self._data_error = self._data_error or error
            elif is_header:
                self._header_ended(index)
            else:
                self._end(index)
        self._unsure.clear()

    def _judge(self) -> None:
        """Raise what is known to be wrong; run the eager part once all headers have come."""
        self._settle_sends()
        if self._judged:
            self._raise_trouble()
            return
        if self._missing:
            if self._header_error is not None:
                raise self._explained(self._header_error)
            if self._aborted is not None:
                raise self._aborted
            return
        group, request = self._group, self._request
        own = request.header
        width = headers.HEADER_BYTES
        all_headers = [
            own if peer == group.rank else self._slot(peer)[:width].tobytes() for peer in range(group.size)
        ]
        names = group.names
        trouble = headers.judge(all_headers, names)
        if trouble is None and request.vector:
            end = width + 16 * group.size
            vectors = [
                np.frombuffer(request.vector, np.int64).tolist()
                if peer == group.rank
                else self._slot(peer)[width:end].view(np.int64).tolist()
                for peer in range(group.size)
            ]
            trouble = headers.unpaired(vectors, names)
        if trouble is not None:
            raise UsageError(f"{request.operation}: {trouble}")
        self._judged = True
        if self._plan is not None and self._plan.eager is not None:
            self._run_eager(self._plan)
        self._raise_trouble()

    def _raise_trouble(self) -> None:
        if self._aborted is not None:
            raise self._aborted
        if self._data_error is not None and not isinstance(self._data_error, TransferCancelled):
            raise self._explained(self._data_error)

    async def _wait(self) -> None:
        if not (self._judged and self._data_error is not None):
            await self._gate.wait()
            return
        # A peer withdrew its transfers: it says why in a message of its own.
        with anyio.move_on_after(_EXPLANATION_S):
            await self._gate.wait()
            return
        raise self._data_error

    def _run_eager(self, plan: Plan) -> None:
        assert plan.eager is not None
        views = self._views(plan)
        for peer, span in plan.eager.receives.items():
            start = headers.HEADER_BYTES + len(self._request.vector)
            views[span.buffer][span.start : span.stop] = self._slot(peer)[start : start + span.nbytes]
        for step in plan.eager.local:
            self._local(step)

    # ------------------------------------------------------------ steps

    def _views(self, plan: Plan) -> dict[Any, npt.NDArray[np.uint8]]:
        views = self._request.views
        if plan.scratch and TMP not in views:
            self._memory = self._scope.scratch(plan.scratch)
            views[TMP] = self._memory
        return views

    def _start(self, plan: Plan) -> None:
        self._views(plan)
        self._waits = list(plan.waits)
        self._left = len(plan.steps)
        self._ready = list(plan.first)
        heapify(self._ready)

    async def _advance(self) -> None:
        """Begin every step that may begin."""
        plan, ready = self._plan, self._ready
        breath = time.monotonic() + _BREATH_S
        while ready and plan is not None and self._data_error is None:
            index = heappop(ready)
            step = plan.steps[index]
            if isinstance(step, Send | Recv):
                span = step.source if isinstance(step, Send) else step.target
                data = self._request.views[span.buffer][span.start : span.stop]
                self._post(type(step), (False, index), step.peer, data, 1 + plan.numbers[index])
                continue
            self._local(step)
            self._end(index)
            if time.monotonic() > breath:
                await anyio.lowlevel.checkpoint()
                breath = time.monotonic() + _BREATH_S

    def _local(self, step: Any) -> None:
        views, request = self._request.views, self._request
        if isinstance(step, Copy):
            a, b = step.source, step.target
            views[b.buffer][b.start : b.stop] = views[a.buffer][a.start : a.stop]
            return
        assert request.ufunc is not None
        left, right, target = (
            views[s.buffer][s.start : s.stop].view(request.dtype)
            for s in (step.left, step.right, step.target)
        )
        request.ufunc(left, right, out=target)

    def _end(self, index: int) -> None:
        assert self._plan is not None
        self._left -= 1
        for follower in self._plan.followers[index]:
            self._waits[follower] -= 1
            if not self._waits[follower]:
                heappush(self._ready, follower)

    def _post(self, kind: type[Send | Recv], key: tuple[bool, int], peer: int, data: Any, tag: int) -> None:
        comm, rank = self._scope.comm, self._group.ranks[peer]
        limit = -1.0 if self._ends is None else max(0.0, self._ends - time.monotonic())
        full = self._number << TAG_BITS | tag
        if kind is Send:
            transfer = comm._send(data, rank, self._scope.index, full, limit, 0)
        else:
            transfer = comm._recv(data, rank, self._scope.index, full, limit)
        self._flying[key] = transfer
        if transfer.done():
            self._ended(key, transfer)
        else:
            transfer.add_done_callback(partial(self._ended, key))

    def _ended(self, key: tuple[bool, int], transfer: Transfer[Any]) -> None:
        is_header, index = key
        del self._flying[key]
        self._gate.ring()
        if transfer.cancelled() or self._over:
            if not transfer.cancelled():
                transfer.exception()
            return
        if (error := transfer.exception()) is not None:
            if isinstance(error, PeerLostError) and transfer.kind == "send":
                self._unsure.append((key, error))
            elif is_header:
                self._header_error = self._header_error or error
            else:
                self._data_error = self._data_error or error
            return
        if is_header:
            self._header_ended(index)
            return
        assert self._plan is not None
        step = self._plan.steps[index]
        if isinstance(step, Recv) and (came := transfer.result().nbytes) != step.target.nbytes:
            self._data_error = UsageError(f"{came} bytes came where {step.target.nbytes} were expected")
            return
        self._end(index)

    # ------------------------------------------------------------ failures

    def _explained(self, error: BaseException) -> BaseException:
        """The error of one transfer as one of the whole call."""
        what = f"{self._request.operation} (call {self._number} of {self._group.label})"
        if isinstance(error, DeadlineExceeded):
            within = f"within {self._deadline_s:g} s"
            if self._missing:
                late = ", ".join(self._group.names[peer] for peer in sorted(self._missing))
                return DeadlineExceeded(f"{what}: not called {within} by {late}")
            return DeadlineExceeded(f"{what}: all have called it, but the data had not moved {within}")
        if isinstance(error, PeerLostError) and error.peer is not None:
            name = self._group.name_of(error.peer)
            return PeerLostError(f"{what}: {name} is gone; group.shrink() goes on with the rest", error.peer)
        return error

    async def _give_up(self, error: BaseException) -> None:
        """Tell the others if they cannot know, cancel all, and wait until nothing is touched any more."""
        if not isinstance(error, UsageError) and error is not self._aborted:
            self._scope.abort(self._number, error)
        self._over = True
        for transfer in list(self._flying.values()):
            transfer.cancel()
        await self._gate.wait_shielded(lambda: not self._flying)
