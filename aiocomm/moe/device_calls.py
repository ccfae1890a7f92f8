"""Checks the arguments of a dispatch or combine of GPU arrays, and makes them calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiocomm._device import NO_STREAM, describe
from aiocomm._operations import on_gpu
from aiocomm._streams import LEGACY
from aiocomm.collectives.arrays import array_of
from aiocomm.collectives.kernels import check_budget, device_of
from aiocomm.errors import LinkError, UsageError
from aiocomm.moe.device_exchange import Matrix, Setting
from aiocomm.moe.device_quick import QuickCombine, QuickDispatch
from aiocomm.moe.memory import Pool
from aiocomm.moe.weighting import check_kind
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiocomm._device import Description
    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.dispatched import Dispatched
    from aiocomm.moe.placement import Placement

__all__ = ["Options", "combine", "dispatch", "matrix_of"]

SM_BUDGET: Final = 64
_SETTINGS: Final = 64  # that are kept


class Options:
    """What callers say beside the arrays."""

    def __init__(
        self,
        scope: Scope,
        bulk: int,
        path: str,
        deadline: float | None,
        stream: Any,
        sm_budget: int | None,
    ) -> None:
        self.scope = scope
        self.stream = stream
        self._bulk, self._path, self._deadline = bulk, path, deadline
        self._sm_budget = check_budget(sm_budget) or SM_BUDGET

    def setting(self, described: Iterable[Description], otherwise: int | None = None) -> Setting:
        """Where these arrays are.

        Args:
            otherwise: the GPU of those that are empty and do not say.

        Raises:
            UsageError: on several GPUs, or on one that cannot be used.
        """
        scope, arrays = self.scope, list(described)
        _, _, _, device, stream, _, _ = arrays[0]
        alike = all(one[2] and one[3] == device and one[4] == stream for one in arrays)
        pool = scope.pools.get(device) if alike else None  # as last time, mostly
        key = stream, self._bulk, self._path, self._deadline, self._sm_budget
        if pool is not None and (known := pool.settings.get(key)) is not None:
            return known  # type: ignore[no-any-return]
        try:
            devices = {device_of(one) for one in arrays if one[2]}
            if len(devices) > 1:
                raise UsageError(f"the arrays are on several GPUs ({sorted(devices)}): one rank uses one")
            device = devices.pop() if devices else self._device_of_empty(arrays, otherwise)
            if device not in scope.pools:
                scope.pools[device] = Pool(scope.comm._engine, device)
        except (LinkError, OSError) as error:
            raise UsageError(f"cannot use this GPU: {error}") from error
        # Results are used on some stream, whatever the arrays say of themselves.
        streams = frozenset(one[4] for one in arrays) - {NO_STREAM} or frozenset((LEGACY,))
        made = Setting(scope.pools[device], self._bulk, self._path, self._deadline, self._sm_budget, streams)
        if pool is not None and len(pool.settings) < _SETTINGS:
            pool.settings[key] = made
        return made

    def _device_of_empty(self, arrays: Iterable[Description], otherwise: int | None) -> int:
        """The GPU that a rank without rows uses: as they say, as calls before, or as the thread has it."""
        known = [one[3] for one in arrays if one[3] >= 0]
        if otherwise is not None:
            known.append(otherwise)
        for scope in (self.scope, *self.scope.comm._lenders):
            known += scope.pools
        return known[0] if known else max(0, _core.current_device())


def matrix_of(options: Options, x: Any, name: str, writable: bool = False) -> Matrix | None:
    """See a GPU array; None: it is not one.

    Raises:
        UsageError: it cannot be used, or has not two dimensions.
    """
    engine = options.scope.comm._engine
    if (described := on_gpu(engine, x, writable, options.stream)) is None:
        return None
    return Matrix(described, name)


def dispatch(
    options: Options, text: str, tokens: Matrix, expert_ids: Any, weights: Any, where: Placement
) -> QuickDispatch:
    """The call of a rank whose tokens are on a GPU."""
    ids = _small(options, expert_ids, "expert_ids")
    found = None if weights is None else _small(options, weights, "weights")
    on_gpus = [one for one in (ids, found) if isinstance(one, tuple)]
    setting = options.setting([tokens.description, *on_gpus])
    return QuickDispatch(options.scope, setting, text, tokens, where, ids, found)


def combine(
    options: Options, text: str, outputs: Matrix, dispatched: Dispatched, wire: str, out: Any
) -> QuickCombine:
    """The call of a rank whose outputs are on a GPU.

    Raises:
        UsageError: `out` does not fit.
    """
    shape = (dispatched._count, outputs.hidden)
    target = None
    if out is not None:
        target = matrix_of(options, out, "out", True)
        if target is None:
            raise UsageError(
                "outputs is on a GPU, and out in host memory: the result is made where outputs is"
            )
        if (target.rows, target.hidden) != shape:
            raise UsageError(f"out has shape {(target.rows, target.hidden)}, the result {shape}")
    result = outputs.dtype if target is None else target.dtype
    for name, dtype in (("outputs", outputs.dtype), ("wire", wire), ("out", result)):
        check_kind(name, dtype)
    arrays = [outputs.description] + ([] if target is None else [target.description])
    tables = dispatched._tables
    assert tables is not None
    setting = options.setting(arrays, tables.device)
    if tables.device != setting.pool.device:
        raise UsageError(
            f"outputs is on GPU {setting.pool.device}, the tokens were dispatched to GPU {tables.device}"
        )
    return QuickCombine(options.scope, setting, text, outputs, dispatched, wire, target, result)


def _small(options: Options, array: Any, name: str) -> Any:
    """The description of a GPU array, or a host array.

    Raises:
        UsageError: it is none.
    """
    described = None
    if hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__"):
        described = describe(array, False, options.stream)
    return array_of(array, name) if described is None else described
