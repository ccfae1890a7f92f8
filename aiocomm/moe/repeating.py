"""Finds dispatches and combines of GPU arrays that repeat, by the form of their arrays and by their options.

A repeat is one whose arrays have the types, shapes, GPUs and streams of one before; addresses may differ.
Whatever is wrong with a call is found out, and told to all ranks, by the call as it is made the first time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._operations import on_gpu
from aiocomm.collectives.kernels import device_of
from aiocomm.moe.device_quick import MOST_CHOICES_AT_ONCE, QuickCombine, QuickDispatch
from aiocomm.moe.dispatched import Dispatched
from aiocomm.moe.placement import place
from aiocomm.moe.repeats import Begun, CombineRepeat, DispatchRepeat
from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm._device import Description
    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.memory import Pool

__all__ = ["Begun", "combine", "dispatch", "keep_combine", "keep_dispatch"]

_REPEATS: Final = 64  # that are kept
_NONE: Final = "none"  # in place of a form


def _pool_of(scope: Scope, described: Description) -> Pool | None:
    """Of the GPU of an array, where a call may be a repeat."""
    pool = scope.pools.get(device_of(described))
    return None if pool is None or not pool.repeats or pool.missed or scope._failed else pool


def _described(scope: Scope, array: Any, writable: bool, stream: Any) -> Description | None:
    if stream is None:
        return _core.describe_array(array, writable)  # type: ignore[return-value]
    return on_gpu(scope.comm._engine, array, writable, stream)


def _on_another(one: Description, other: Description) -> bool:
    return (one[3] != other[3] or one[3] < 0) and device_of(one) != device_of(other)


def _form_of(array: Any, form: str, dtype: Any, tokens: Description) -> Any:
    """What a repeat is found by. `_NONE`: there are none of such arrays."""
    kind = type(array)
    if kind is tuple:
        return _NONE if array[5] != form or _on_another(array, tokens) else array[3:]
    if kind is np.ndarray:
        return array.shape if array.dtype == dtype and array.flags.c_contiguous else _NONE
    return None if array is None else _NONE


def _key_of_dispatch(
    tokens: Description, ids: Any, weights: Any, where: Any, path: str, sm_budget: Any
) -> tuple[Any, ...]:
    return (
        "dispatch",
        tokens[3:],
        _form_of(ids, "q", np.int64, tokens),
        _form_of(weights, "f", np.float32, tokens),
        where,
        path,
        sm_budget,
        type(sm_budget),
    )


def dispatch(
    scope: Scope,
    tokens: Any,
    expert_ids: Any,
    weights: Any,
    experts: Any,
    placement: Any,
    path: Any,
    deadline: float | None,
    stream: Any,
    sm_budget: Any,
) -> Begun | None:
    """Make a dispatch that is like one before. None: it is not, or is wrong: nothing was begun."""
    try:
        described = _described(scope, tokens, False, stream)
        if described is None or (pool := _pool_of(scope, described)) is None:
            return None
        if type(expert_ids) is not np.ndarray:
            expert_ids = _described(scope, expert_ids, False, stream)
        if weights is not None and type(weights) is not np.ndarray:
            weights = _described(scope, weights, False, stream) or _NONE
        where = experts if placement is None else place(experts, placement, scope.group.size)
        key = _key_of_dispatch(described, expert_ids, weights, where, path, sm_budget)
        repeat = pool.repeats.get(key)
    except Exception:  # which the usual call meets, too, and tells all
        return None
    if repeat is None or type(experts) is not int:
        return None
    found: Begun | None = repeat.attempt(described, expert_ids, weights, deadline)
    return found


def keep_dispatch(call: QuickDispatch, text: str, placed: bool, path: str, sm_budget: Any) -> None:
    """Have calls like this one, which has ended well, be repeats."""
    ids, weights = call._ids, call._weights
    if not call.may_repeat or (usual := call._pool.usual.get(call.kind)) is None:
        return
    shape = call._shape(ids)
    if weights is not None and call._shape(weights) != shape:
        return
    if not 0 < math.prod(shape) <= MOST_CHOICES_AT_ONCE:
        return
    where = call._placed if placed else call._placed.experts
    key = _key_of_dispatch(call._tokens.description, ids, weights, where, path, sm_budget)
    if _NONE not in key:
        _keep(call._pool, key, DispatchRepeat(call, text, *usual))


def _key_of_combine(
    outputs: Description, out: Description | None, wire: Any, path: str, sm_budget: Any
) -> tuple[Any, ...]:
    into = None if out is None else (*out[3:6], out[6][1:])
    more = wire, type(wire), path, sm_budget, type(sm_budget)
    return "combine", *outputs[3:6], outputs[6][1:], into, *more


def combine(
    scope: Scope,
    outputs: Any,
    dispatched: Any,
    out: Any,
    wire: Any,
    path: Any,
    deadline: float | None,
    stream: Any,
    sm_budget: Any,
) -> Begun | None:
    """Make a combine that is like one before. None: it is not, or is wrong: nothing was begun."""
    try:
        if type(dispatched) is not Dispatched or dispatched._group is not scope.group:
            return None
        described = _described(scope, outputs, False, stream)
        if described is None or (pool := _pool_of(scope, described)) is None:
            return None
        into = None
        if out is not None:
            into = _described(scope, out, True, stream)
            if into is None or _on_another(into, described):
                return None
        repeat = pool.repeats.get(_key_of_combine(described, into, wire, path, sm_budget))
    except Exception:  # likewise
        return None
    if repeat is None:
        return None
    found: Begun | None = repeat.attempt(described, dispatched, into, deadline)
    if found is not None and out is not None and found.call is None:
        found.result = out
    return found


def keep_combine(call: QuickCombine, text: str, wire: Any, path: str, sm_budget: Any) -> None:
    """Have calls like this one, which has ended well, be repeats."""
    if not call.may_repeat or not call._row or call._packed:
        return
    out = None if call._out is None else call._out.description
    key = _key_of_combine(call._outputs.description, out, wire, path, sm_budget)
    try:
        _keep(call._pool, key, CombineRepeat(call, text))
    except TypeError:  # a `wire` that cannot be looked up
        return


def _keep(pool: Pool, key: Any, repeat: Any) -> None:
    if repeat.backend != "asyncio":  # on others nobody lingers
        return
    if len(pool.repeats) >= _REPEATS:
        pool.repeats.clear()
    pool.repeats[key] = repeat
