"""Calls that have been made before in the same shape: nothing is checked or planned again.

What a call needs is prepared once per operation, dtype, size and the like, as a native `PreparedCall`: its
header, its steps, and which bytes travel with the header. A call is then one call into the extension, which
posts and awaits messages, compares headers, copies and reduces. What has not come by the time at which the
loop has to have its turn, or is wrong, becomes a `Call` like any other, which goes on from there.

GPU arrays are described for every call; what is looked up is the same for all arrays of one form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from aiocomm._operations import on_gpu
from aiocomm.collectives import headers
from aiocomm.collectives.call import Call, run_locally
from aiocomm.collectives.exchange import HEADERS, slot_bytes
from aiocomm.collectives.gpu import GpuArray
from aiocomm.collectives.plan import Eager
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.collectives.steps import IN, OUT, TMP, Copy, Recv, Reduce, Send, Span
from aiocomm_native import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from aiocomm._device import Description
    from aiocomm.collectives.plan import Plan
    from aiocomm.collectives.requests import Request
    from aiocomm.collectives.scope import Scope
    from aiocomm.collectives.steps import Step
    from aiocomm.group import Group

    _Span = tuple[int, int, int]
    _Step = tuple[int, int, int, _Span, _Span, _Span, int, tuple[int, ...]]
    _Frame = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]

__all__ = ["Prepared", "is_plain", "on_gpus", "operator_of", "prepare", "shape_of"]

_BUFFERS: Final = {IN: 0, OUT: 1, TMP: 2}
_KINDS: Final = {Send: 0, Recv: 1, Copy: 2, Reduce: 3}
_NOTHING: Final = (0, 0, 0)
_NOWHERE: Final = Span(IN, 0, 0)
_FRAMES: Final = 4  # calls of one shape at once whose memory is kept
_KEPT_BYTES: Final = 256 << 10  # of a frame that is kept beside the scope's own spare memory
_IN_A_ROW: Final = 32  # calls that end without a wait, after which other tasks get a turn
_TURN_BYTES: Final = 4 << 20  # the same, by what they move
_MOST_BYTES: Final = 8 << 20  # of a call: what moves more is not for the loop's thread


class Prepared:
    """One rank's call of one shape.

    Args:
        request: has been checked, and ran well.
        dtype: of the arrays.
    """

    def __init__(self, scope: Scope, request: Request, dtype: np.dtype[Any]) -> None:
        group, plan = scope.group, request.plan
        self._scope, self._request = scope, request.without_arrays()
        self.operation = request.operation
        self.counted = f"{self.operation}/{plan.algorithm if plan else 'headers'}"
        self.mean = request.result is not None
        eager = plan.eager if plan is not None else Eager({}, {}, ())
        steps: list[_Step] = []
        self._later: tuple[Copy | Reduce, ...] = ()  # what NumPy has to do with what came
        if eager is None:
            assert plan is not None
            steps = [
                _described(step, 1 + number, waits, followers)
                for step, number, waits, followers in zip(
                    plan.steps, plan.numbers, plan.waits, plan.followers, strict=True
                )
            ]
        elif _native(eager.local, request):
            steps = [_described(step) for step in eager.local]
        else:
            self._later = eager.local
        self._call = _core.PreparedCall(
            channel=scope.index,
            header=request.header,
            rank=group.rank,
            ranks=list(group.ranks),
            width=slot_bytes(group.size),
            header_tag=HEADERS,
            sends=[] if eager is None else [(peer, _span(span)) for peer, span in eager.sends.items()],
            receives=[] if eager is None else [(peer, _span(span)) for peer, span in eager.receives.items()],
            eager=eager is not None,
            writes=plan is not None and any(_target(step).buffer == OUT for step in plan.steps),
            steps=steps,
            item=dtype.itemsize,
            format=f"{dtype.kind}{dtype.itemsize}",
            op=operator_of(request),
            on_gpu=request.on_gpu,
        )
        self._slot_bytes = self._call.slot_bytes
        self._scratch = 0 if plan is None or request.on_gpu else plan.scratch
        self._kept = self._slot_bytes + self._scratch <= _KEPT_BYTES
        self._frames: list[_Frame] = []
        moved = 0 if plan is None else _moved(plan)
        self.in_a_row = max(1, min(_IN_A_ROW, _TURN_BYTES // max(1, moved)))

    def attempt(
        self, number: int, given: Any, out: Any, deadline: float | None
    ) -> Call | Literal[False] | None:
        """Do the call, or begin it: a `Call` that is returned is to be run.

        Args:
            number: of the call.
            given: `IN`, of the dtype and size that was prepared for; None where there is none. Of GPU arrays
                the description.
            out: `OUT`, likewise.

        Returns:
            None: it is done. False: nothing was begun, since these arrays are not like the ones prepared for.
        """
        scope = self._scope
        frame = self._frames.pop() if self._frames else self._frame()
        slots, scratch = frame
        limit = -1.0 if deadline is None else deadline
        begun: Any = self._call.attempt(
            scope.comm._engine, number << TAG_BITS, given, out, slots, scratch, limit
        )
        if begun is None:
            if self._later:
                run_locally(self._later, self._views(given, out, scratch), self._request)
            self._give_back(frame)
            return None
        if begun is False:
            self._give_back(frame)
            return False
        again = replace(self._request, views=self._views(given, out, scratch))
        call = Call(scope, again, deadline)
        call.take_over(number, slots, scratch, *begun)
        return call

    def drop_spare(self) -> None:
        """Keep no memory for the next call."""
        self._frames.clear()

    def _frame(self) -> _Frame:
        scope = self._scope
        return scope.scratch(self._slot_bytes), scope.scratch(self._scratch) if self._scratch else None

    def _give_back(self, frame: _Frame) -> None:
        if self._kept and len(self._frames) < _FRAMES:
            self._frames.append(frame)
            return
        for memory in frame:
            if memory is not None:
                self._scope.give_back(memory)

    def _views(self, given: Any, out: Any, scratch: Any) -> dict[Any, Any]:
        if self._request.on_gpu:
            arrays = {IN: given, OUT: out}
            return {name: GpuArray(one) for name, one in arrays.items() if one is not None}
        views = {IN: given, OUT: out, TMP: scratch}
        return {name: array.reshape(-1).view("u1") for name, array in views.items() if array is not None}


def _span(span: Span) -> _Span:
    return _BUFFERS[span.buffer], span.start, span.stop


def _described(step: Step, number: int = 0, waits: int = 0, followers: tuple[int, ...] = ()) -> _Step:
    peer, spans = -1, [_NOTHING] * 3
    match step:
        case Send():
            peer, spans[0] = step.peer, _span(step.source)
        case Recv():
            peer, spans[0] = step.peer, _span(step.target)
        case Copy():
            spans[:2] = _span(step.target), _span(step.source)
        case Reduce():
            spans[:] = _span(step.target), _span(step.left), _span(step.right)
    return _KINDS[type(step)], peer, number, spans[0], spans[1], spans[2], waits, followers


def operator_of(request: Request) -> str:
    """The name of a request's reduction in the extension; empty: it has none."""
    names = {"add": "sum", "multiply": "prod", "minimum": "min", "maximum": "max"}
    return "" if request.ufunc is None else names[request.ufunc.__name__]


def _native(steps: tuple[Step, ...], request: Request) -> bool:
    """Whether the extension can do these steps with the same bits as NumPy."""
    if not any(isinstance(step, Reduce) for step in steps):
        return True
    dtype = request.dtype
    return request.partials is None and _core.reduces(f"{dtype.kind}{dtype.itemsize}", operator_of(request))


def _target(step: Step) -> Span:
    return _NOWHERE if isinstance(step, Send) else step.target


def _moved(plan: Plan) -> int:
    return sum(_target(step).nbytes for step in plan.steps)


def prepare(scope: Scope, request: Request, dtype: np.dtype[Any]) -> Prepared | None:
    """What repeats of a call need, if they are not so large that other tasks should run meanwhile."""
    plan = request.plan
    if scope.group.size > headers.DIRECT_MEMBERS or request.vector:
        return None
    if request.reduction is not None:
        return None
    if plan is None or plan.eager is not None or request.on_gpu:  # what GPUs copy takes no time of the loop's
        return Prepared(scope, request, dtype)
    if _moved(plan) > _MOST_BYTES or not _native(plan.steps, request):
        return None
    return Prepared(scope, request, dtype)


def shape_of(out: Any, given: Any, *more: Any) -> tuple[Any, ...] | None:
    """What a call depends on, where its arrays are NumPy's own; the rest is looked at when it is repeated."""
    if type(out) is np.ndarray:
        if given is None:
            return out.dtype, out.size, *more
        if type(given) is np.ndarray:
            return out.dtype, out.size, given.dtype, given.size, *more
    elif out is None:
        if given is None:
            return more
        if type(given) is np.ndarray:
            return given.dtype, given.size, None, None, *more
    return None


def on_gpus(
    group: Group, out: Any, given: Any, stream: Any, what: tuple[Any, ...]
) -> tuple[tuple[Any, ...], Description | None, Description | None] | None:
    """The same of GPU arrays, with their descriptions: of `out`, and of `given` where that is not part of it.

    None: they are not both on GPUs, or are wrong, which the call as it is made the first time tells all.
    """
    engine = group._comm._engine
    if not engine.has_mover():
        return None
    described: list[Description | None] = []
    try:
        for array, writable in ((out, True), (given, False)):
            described.append(None if array is None else on_gpu(engine, array, writable, stream))
            if described[-1] is None and array is not None:
                return None
    except Exception:
        return None
    into, source = described
    form = [None if one is None else (one[5], one[2]) for one in described]  # arrays are seen as flat
    inside = None  # where in `out` it begins
    if into is not None and source is not None:
        start = source[1] - into[1]
        if -source[2] < start < into[2]:
            inside, source = start, None
    return ("GPU", *form, inside, *what), into, source


def is_plain(out: Any, given: Any) -> bool:
    """Whether repeats with such arrays can be prepared: contiguous, apart, and those written to writable."""
    if out is not None and not out.flags.c_contiguous:
        return False
    if given is None:
        return True
    return bool(given.flags.c_contiguous) and (out is None or not np.may_share_memory(out, given))
