"""The public operations on experts, the same on a communicator and on a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from aiocomm._operations import limit_of
from aiocomm.collectives.arrays import dtype_name, dtype_of, flat
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm.moe import device_calls, repeating
from aiocomm.moe.device_calls import Options, matrix_of
from aiocomm.moe.device_quick import QuickCombine, QuickDispatch
from aiocomm.moe.dispatched import Dispatched, named
from aiocomm.moe.exchange import PATHS
from aiocomm.moe.moving import Combine, Dispatch, Refused
from aiocomm.moe.placement import place
from aiocomm.moe.routing import routed
from aiocomm.moe.weighting import KINDS, check_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray

    from aiocomm.channel import Channel
    from aiocomm.group import Group
    from aiocomm.moe.exchange import Exchange
    from aiocomm.moe.routing import Part

    Array = NDArray[Any]

__all__ = ["ExpertOperations"]


class ExpertOperations:
    """Dispatch and combine of a mixture of experts.

    All ranks of a group call them in one order on a channel, which is apart from the order of the other
    collective operations. Several may be under way at once. Common to both:

    - `path`: `"latency"`: rows travel with the counts, in one message per pair, as long as they fit into its
      slot (2 MiB, less in groups of more than 32). `"bandwidth"`: counts first, then the rows, straight into
      place. `"auto"` decides by size, pair by pair; ranks need not agree.
      Of GPU arrays: the others' kernels read up to 256 MiB of a rank where they are, more is got by copy
      engines; `"latency"` and `"bandwidth"` force the one or the other.
    - `channel`: whose priority and weight apply to rows that follow the counts; messages with counts go on an
      urgent channel. One that is none, or another communicator's, is refused at this rank only, which cannot
      know where the others wait for it.
    - `stream`: of GPU arrays, which all ranks pass or none: whose queued work is waited for by the GPU;
      default: the current stream of the array's library.
    - `sm_budget`: streaming multiprocessors that a kernel for GPU arrays may take, default 64.
    - `deadline`: seconds from now; `DeadlineExceeded` then names the ranks that have not called.
    - `UsageError`, the same on all ranks, if they differ in hidden size, dtype, experts or placement, or if
      one rank's arguments are wrong.
    - `ExpertsLostError` if a rank is gone, with its experts and the caller's tokens that were routed to them.
    - `TransferCancelled` if another rank gave up or was cancelled. Cancelling the awaiting task ends the call
      on all ranks; the await ends once nothing touches the arrays.
    """

    def _members(self) -> Group:
        raise NotImplementedError

    async def dispatch(
        self,
        tokens: Any,
        expert_ids: Any,
        weights: Any = None,
        *,
        experts: int,
        placement: Sequence[int] | None = None,
        path: str = "auto",
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> Dispatched:
        """Send each token to the ranks that hold its experts, and receive the tokens for this rank's.

        A token travels once to each rank, however many of its experts are there.

        Args:
            tokens: host or GPU array of shape (tokens, hidden), of any dtype; ranks may have different
                numbers of tokens, or none.
            expert_ids: the experts of each token, -1 for none; integers of shape (tokens, choices). Those of
                tokens on a GPU may be a GPU array, too, which is read back without holding the loop up.
            weights: of the same shape; they travel along, as float32, for `combine`. Default: 1.
            experts: number of experts of all ranks together.
            placement: the rank of each expert; default: contiguous blocks of nearly one size.
        """
        group = self._members()
        scope, bulk = group._expert_scope(channel)
        limit, wrong = _limit(deadline)
        call: Dispatch | QuickDispatch
        parts: list[Part] = []
        if scope.pools and wrong is None:
            again = repeating.dispatch(
                scope, tokens, expert_ids, weights, experts, placement, path, limit, stream, sm_budget
            )
            if again is not None:
                if again.call is not None:
                    return await _dispatched(group, again.call)
                if again.turn:
                    await scope.comm._backend.turn()
                return again.result  # type: ignore[no-any-return]
        try:
            _check(wrong, path)
            options = Options(scope, bulk, path, limit, stream, sm_budget)
            on_gpu = matrix_of(options, tokens, "tokens")
            given = _matrix(tokens, "tokens") if on_gpu is None else on_gpu
            where = place(experts, placement, group.size)
            hidden = given.shape[1] if isinstance(given, np.ndarray) else given.hidden
            dtype = dtype_name(given.dtype) if isinstance(given, np.ndarray) else given.dtype
            text = f"dispatch {dtype} hidden {hidden}, {where.experts} experts"
            if placement is not None:
                text += f" placed {where.digest}"
            if isinstance(given, np.ndarray):
                parts = routed(len(given), expert_ids, weights, where)
                call = Dispatch(scope, bulk, text, given, where, parts, path, limit)
            else:
                call = device_calls.dispatch(options, text, given, expert_ids, weights, where)
        except Exception as error:  # the others wait, whatever is wrong
            await _refuse(Refused(scope, bulk, "dispatch", error, limit), error)
        if isinstance(call, QuickDispatch):
            came = await _dispatched(group, call)
            repeating.keep_dispatch(call, text, placement is not None, path, sm_budget)
            return came
        await call.run()
        _count(group, call)
        more = where, parts, call.count, call.tokens, call.found
        return Dispatched(group, call.number, *more, where=named(scope))

    async def combine(
        self,
        outputs: Any,
        dispatched: Dispatched,
        *,
        out: Any = None,
        wire: DTypeLike | None = None,
        path: str = "auto",
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> Any:
        """Bring the experts' outputs back to the ranks of the tokens, weighted and summed.

        Sums are in float32 (float64 for float64), in an order that only routing and placement decide: on a
        rank by ascending expert, then over the ranks.

        Args:
            outputs: of the experts of this rank, one row per assignment of `dispatched`, in their order;
                floats of shape (assignments, hidden), on the GPU where the tokens came to, or on the host.
            dispatched: what the ranks' common `dispatch` returned.
            out: receives the result; shape (tokens, hidden), any floating dtype; it may overlap `outputs`.
                Default: a new array of the dtype of `outputs`; where they are on a GPU, a `DeviceArray`.
            wire: dtype in which the ranks' sums travel, or its name, default that of the sums; a shorter
                one rounds each that travels, once.

        Returns:
            The result, `out` where it is given: one row per token that this rank dispatched, zeros for those
            without experts.
        """
        group = self._members()
        scope, bulk = group._expert_scope(channel)
        limit, wrong = _limit(deadline)
        call: Combine | QuickCombine
        result: Any = None
        if scope.pools and wrong is None:
            again = repeating.combine(scope, outputs, dispatched, out, wire, path, limit, stream, sm_budget)
            if again is not None:
                if again.call is not None:
                    return await _combined(group, again.call, out)
                if again.turn:
                    await scope.comm._backend.turn()
                return again.result
        try:
            _check(wrong, path)
            options = Options(scope, bulk, path, limit, stream, sm_budget)
            if not isinstance(dispatched, Dispatched) or dispatched._group is not group:
                raise UsageError("dispatched is not what a dispatch of this group returned")
            on_gpu = matrix_of(options, outputs, "outputs")
            if (on_gpu is None) != (dispatched._tables is None):
                places = ["in host memory", "on a GPU"]
                ours, theirs = places if on_gpu is None else places[::-1]
                raise UsageError(f"outputs is {ours}, and the tokens were {theirs}")
            given = _matrix(outputs, "outputs") if on_gpu is None else on_gpu
            rows, hidden = given.shape if isinstance(given, np.ndarray) else (given.rows, given.hidden)
            if rows != len(dispatched.rows):
                raise UsageError(
                    f"outputs has {rows} rows for {len(dispatched.rows)} assignments: one each, in "
                    "their order"
                )
            dtype = dtype_name(given.dtype) if isinstance(given, np.ndarray) else given.dtype
            travels = _wire(wire, dtype)
            kind = f"{dtype} hidden {hidden} as {travels}"
            text = f"combine of {dispatched._label}: {kind}"
            if isinstance(given, np.ndarray):
                check_kind("outputs", dtype)
                check_kind("wire", travels)
                shape = (dispatched._count, hidden)
                result = np.empty(shape, given.dtype) if out is None else _matrix(out, "out", writable=True)
                if result.shape != shape:
                    raise UsageError(f"out has shape {result.shape}, the result {shape}")
                check_kind("out", dtype_name(result.dtype))
                more = given, dispatched, dtype_of(travels), result, path, limit
                call = Combine(scope, bulk, text, *more)
            else:
                call = device_calls.combine(options, text, given, dispatched, travels, out)
        except Exception as error:  # likewise
            await _refuse(Refused(scope, bulk, "combine", error, limit), error)
        if isinstance(call, QuickCombine):
            result = await _combined(group, call, out)
            repeating.keep_combine(call, kind, wire, path, sm_budget)
            return result
        await call.run()
        _count(group, call)
        return result if out is None else out


async def _dispatched(group: Group, call: QuickDispatch) -> Dispatched:
    await call.run()
    _count(group, call)
    more = call.placed, call.parts, call.count, call.tokens, call.found, call.tables
    return Dispatched(group, call.number, *more, named(call._scope))


async def _combined(group: Group, call: QuickCombine, out: Any) -> Any:
    await call.run()
    _count(group, call)
    return call.result if out is None else out


def _limit(deadline: float | None) -> tuple[float | None, UsageError | None]:
    """Seconds, and what is wrong with them."""
    try:
        return None if deadline is None else limit_of(deadline), None
    except UsageError as error:
        return None, error


async def _refuse(call: Refused, error: Exception) -> NoReturn:
    """Tell all ranks what is wrong with a call.

    Raises:
        UsageError: the same on all.
        Exception: as it came, if it is of another kind.
    """
    try:
        await call.run()
    except UsageError:
        if isinstance(error, UsageError):
            raise
    raise error


def _count(group: Group, call: Exchange) -> None:
    group._comm._collective_calls[f"{call.operation}/{'latency' if call.rode else 'bandwidth'}"] += 1


def _check(wrong: UsageError | None, path: str) -> None:
    if wrong is not None:
        raise wrong
    if not isinstance(path, str) or path not in PATHS:
        raise UsageError(f"unknown path {path!r}: choose from {', '.join(PATHS)}")


def _wire(wire: Any, dtype: str) -> str:
    """Name of the dtype in which partial sums travel. NumPy knows bfloat16 only where ml_dtypes is loaded."""
    if wire is None:
        return "float64" if dtype == "float64" else "float32"
    if isinstance(wire, str) and wire in KINDS:
        return wire
    if type(wire).__module__ == "torch":
        return str(wire).removeprefix("torch.")
    try:
        named = np.dtype(wire)
        if named.names is not None:  # no name that NumPy knows
            raise TypeError("it has fields")
        return dtype_name(named)
    except (TypeError, ValueError) as error:
        raise UsageTypeError(f"wire={wire!r} is no dtype: {error}") from error


def _matrix(x: Any, name: str, writable: bool = False) -> Array:
    """A two-dimensional view of a contiguous host array of any library."""
    array = flat(x, name, writable)
    shape = tuple(x.shape) if hasattr(x, "shape") else (len(array),)
    if len(shape) != 2:
        raise UsageError(f"{name} has shape {shape}: pass two dimensions, (rows, hidden)")
    return array.reshape(shape)
