"""Runs one rank's part of a collective call on the communicator's transfers.

Rules:
- Headers (see `headers`) are sent and awaited first to last; data moves meanwhile. The call succeeds only
  when all headers have come and agree, and all steps have ended.
- A step begins as soon as what it waits for has ended, so messages and reductions overlap. Reductions run on
  the loop's thread, a chunk at a time, while the engine moves the next chunks. Large copies are messages to
  oneself: the engine's threads copy them, beside what they fetch from others.
- Reductions of GPU arrays are launched, and count as ended: what follows waits for their stream, on the GPU.
  The call has ended once the host knows, by a message that waited so, that they have.
- Failures end it as they end every `Flight`.
"""

from __future__ import annotations

import time
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.collectives import gpu, headers
from aiocomm.collectives.exchange import Exchange, slot_bytes
from aiocomm.collectives.steps import OUT, TMP, Copy, Recv, Reduce, Send, Span
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from aiocomm.collectives.kernels import Scratch
    from aiocomm.collectives.narrow import Partials
    from aiocomm.collectives.plan import Plan
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm_native import Transfer

__all__ = ["Call", "run_locally"]

_LARGE_COPY: Final = 4 << 20  # bytes that are not copied on the loop's thread
_BREATH_S: Final = 1e-3  # of work after which other tasks get a turn


class Call(Exchange):
    """One call of one collective by this rank."""

    def __init__(self, scope: Scope, request: Request, deadline: float | None) -> None:
        super().__init__(scope, request, deadline)
        self._begun = False
        self._ready: list[int] = []
        self._waits: list[int] = []
        self._left = 0
        self._memory: npt.NDArray[np.uint8] | None = None
        self._device_memory: Scratch | None = None
        self._launched = False
        self._unproven = False  # kernels were launched after the last message that waits for them
        self._partials = None if request.partials is None else request.partials()
        self._divides = request.reduction is not None and request.reduction.mean

    async def run(self) -> None:
        """Do the call.

        Raises:
            UsageError: the ranks called differently; the same error on all.
            PeerLostError, TransferCancelled, DeadlineExceeded, LinkError, ClosedError: as for transfers.
        """
        if not self._number:
            self._number = self._scope.begin(self)
        try:
            if not self._begun:
                self._send_headers()
                if self._plan is not None and self._plan.eager is None:
                    self._start(self._plan)
            while True:
                self._judge()
                if self._data_error is None:
                    await self._advance()
                if self._judged and not self._left and not self._flying and not self._prove():
                    return
                await self._wait()
        except BaseException as error:
            try:
                await self._give_up(error)
            finally:  # a second cancellation is raised there, and kernels run on
                if self._launched and self._request.reduction is not None:
                    self._request.reduction.kernels.synchronize()
            raise
        finally:
            del self._scope.calls[self._number]
            for memory in (self._slots, self._memory):
                if memory is not None:
                    self._scope.give_back(memory)
            if self._device_memory is not None:
                self._scope.give_back_device(self._device_memory)

    def enter(self, number: int) -> None:
        """Give the call a number that `Scope.begin` has returned; before `run`."""
        self._number = number
        self._scope.enter(number, self)

    @property
    def algorithm(self) -> str:
        """What it is made by."""
        return "headers" if self._plan is None else self._plan.algorithm

    def take_over(
        self,
        number: int,
        slots: npt.NDArray[np.uint8],
        scratch: npt.NDArray[np.uint8] | None,
        heads: Sequence[tuple[int, Transfer[Any]]],
        steps: Sequence[tuple[int, Transfer[Any]]],
        waits: Sequence[int],
        ready: Sequence[int],
        left: int,
    ) -> None:
        """Go on with a call that was begun natively; before `run`.

        Args:
            slots: where headers come.
            scratch: memory of the schedule.
            heads: headers under way, or not ended well, numbered as `Exchange` does.
            steps: messages of steps, likewise.
            waits: by step, how many others it waits for.
            ready: steps that may begin.
            left: steps that have not ended.
        """
        self.enter(number)
        self._begun = True
        self._width = slot_bytes(self._group.size)
        self._slots, self._memory = slots, scratch
        self._waits, self._ready, self._left = list(waits), list(ready), left
        heapify(self._ready)
        self._missing &= {key for key, _ in heads}
        for is_head, some in ((True, heads), (False, steps)):
            for key, transfer in some:
                self._watch((is_head, key), transfer)

    # ------------------------------------------------------------ headers

    def _judge(self) -> None:
        """Raise what is known to be wrong; run the eager part once all headers have come."""
        self._settle_sends()
        if self._judged:
            self._raise_trouble()
            return
        if self._missing:
            self._raise_header_trouble()
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
            self._differs = True
            raise UsageError(f"{request.operation}: {trouble}")
        self._judged = True
        if self._plan is not None and self._plan.eager is not None:
            self._run_eager(self._plan)
        self._raise_trouble()

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
        reduction = self._request.reduction
        if reduction is not None and TMP not in views:
            self._device_memory = self._scope.device_scratch(reduction.kernels, max(plan.scratch, 2))
            views[TMP] = gpu.view(self._device_memory)
        elif plan.scratch and TMP not in views:
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
                data = self._part(span, not plan.waits[index], plan.reduced[index])
                self._post(type(step), (False, index), step.peer, data, 1 + plan.numbers[index])
                continue
            on_gpu = self._request.on_gpu
            if isinstance(step, Copy) and (on_gpu or step.target.nbytes >= _LARGE_COPY):
                self._copy_by_engine(index, step)
                continue
            if on_gpu and isinstance(step, Reduce):
                self._launch(step)
            else:
                self._local(step)
            self._end(index)
            if time.monotonic() > breath:
                await self._scope.comm._backend.turn()
                breath = time.monotonic() + _BREATH_S

    def _part(self, span: Span, first: bool, reduced: bool = False) -> Any:
        """Bytes of a buffer; of a GPU's, they wait for its stream where no earlier step of the call has.

        Args:
            reduced: they wait for the kernels that were launched.
        """
        view, reduction = self._request.views[span.buffer], self._request.reduction
        if not self._request.on_gpu:
            return view[span.start : span.stop]
        if reduced and reduction is not None:
            self._unproven = False
            return view.part(span.start, span.stop, False, reduction.kernels.stream)
        return view.part(span.start, span.stop, first)

    def _launch(self, step: Reduce) -> None:
        """Queue the kernel of a step."""
        reduction = self._request.reduction
        assert reduction is not None
        if not self._launched:
            reduction.begin()
        self._launched = self._unproven = True
        target, left, right = (
            self._request.views[span.buffer].address + span.start
            for span in (step.target, step.left, step.right)
        )
        reduction.combine(target, left, right, step.target.nbytes)

    def _prove(self) -> bool:
        """Post what ends when the kernels have, where nothing else was; False: all is done."""
        reduction = self._request.reduction
        if reduction is None:
            return False
        if self._divides and (result := self._request.views.get(OUT)) is not None and result.nbytes:
            self._divides = False
            if not self._launched:
                reduction.begin()
            self._launched = self._unproven = True
            reduction.divide(result, self._group.size)
        if not self._unproven:
            return False
        assert self._plan is not None
        here, last = self._group.rank, len(self._plan.steps)
        word = Span(TMP, 0, 1), Span(TMP, 1, 2)
        self._post(Recv, (False, ~last), here, self._part(word[1], False, True), 1 + last)
        self._post(Send, (False, ~last - 1), here, self._part(word[0], False, True), 1 + last)
        return True

    def _copy_by_engine(self, index: int, step: Copy) -> None:
        """Copy as a message to oneself."""
        here, tag = self._group.rank, 1 + index
        self._post(Recv, (False, index), here, self._part(step.target, True), tag)
        self._post(Send, (False, ~index), here, self._part(step.source, True), tag)

    def _local(self, step: Copy | Reduce) -> None:
        _do(step, self._request.views, self._request, self._partials)

    def _end(self, index: int) -> None:
        assert self._plan is not None
        self._left -= 1
        for follower in self._plan.followers[index]:
            self._waits[follower] -= 1
            if not self._waits[follower]:
                heappush(self._ready, follower)

    def _has_work(self) -> bool:
        return bool(self._ready) or not (self._missing or self._judged)

    def _data_ended(self, index: int, nbytes: int | None) -> None:
        assert self._plan is not None
        if index < 0:  # the sending half of a copy
            return
        step = self._plan.steps[index]
        if nbytes is not None and isinstance(step, Recv) and nbytes != step.target.nbytes:
            self._data_error = UsageError(f"{nbytes} bytes came where {step.target.nbytes} were expected")
            return
        self._end(index)


def _do(
    step: Copy | Reduce, views: dict[Any, npt.NDArray[np.uint8]], request: Request, partials: Partials | None
) -> None:
    if isinstance(step, Copy):
        a, b = step.source, step.target
        views[b.buffer][b.start : b.stop] = views[a.buffer][a.start : a.stop]
        return
    assert request.ufunc is not None
    left, right, target = (
        views[s.buffer][s.start : s.stop].view(request.dtype) for s in (step.left, step.right, step.target)
    )
    if partials is None:
        with np.errstate(all="ignore"):  # as the extension does it: this rank's settings are not the others'
            request.ufunc(left, right, out=target)
        return
    partials.reduce((step.left, left), (step.right, right), (step.target, target), step.target.buffer == OUT)


def run_locally(
    steps: Sequence[Copy | Reduce], views: dict[Any, npt.NDArray[np.uint8]], request: Request
) -> None:
    """Do the local steps of a call whose messages have come."""
    partials = None if request.partials is None else request.partials()
    for step in steps:
        _do(step, views, request, partials)
