"""What dispatch and combine of GPU arrays cost the host that calls them.

`stages` tells it of one call, on any driver: microseconds before the one call into the extension, at each of
its stages, and after it. `gpu-moe` notes it. Alone, this is a program of two ranks for the simulated driver:

    PYTHONPATH=tests python -P -m aiocomm_bench.moe_host [TOKENS ...]

It prints medians of the stages, where the ranks and the driver's threads share what cores there are; and what
Python takes where nothing is waited for: what the extension returned once is returned again, at once.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiocomm import Communicator

__all__ = ["STAGES", "host_us", "stages"]

_COMMON: Final = ("before", "own launch", "meanwhile", "own kernel", "send", "messages", "launch")
STAGES: Final = {
    "dispatch": (*_COMMON[:4], "route", *_COMMON[4:], "lists", "rows", "after"),
    "combine": (*_COMMON, "rows", "after"),
}
_EXPERTS, _CHOICES = 256, 8
_HIDDEN: Final = 64  # what the host does depends on rows only; the simulated driver copies by itself
_WELL: Final = 3  # stage
_TURNS, _WARM, _REPLAYED, _SERIES = 120, 20, 100, 20


def stages(comm: Communicator, operation: str, begin_ns: int, end_ns: int) -> dict[str, float] | None:
    """Microseconds of a call's stages; None: it was not one call into the extension.

    Args:
        begin_ns: when it was made, on the monotonic clock; `take` has been called since the one before.
        end_ns: when it returned.
    """
    marks = take(comm)
    names = STAGES[operation]
    if len(marks) != len(names) - 1:
        return None
    at = [begin_ns, *marks, end_ns]
    return {name: (at[place + 1] - at[place]) / 1e3 for place, name in enumerate(names)}


def take(comm: Communicator) -> list[int]:
    """When the last call reached its stages; forgets it."""
    scope, _ = comm._members()._expert_scope(None)
    found: list[int] = []
    for pool in scope.pools.values():
        if pool.calls is not None:
            found += pool.calls.take_marks()
    return found


def host_us(found: dict[str, float]) -> float:
    """Microseconds before and after the extension."""
    return found["before"] + found["after"]


class _Layer:
    """One rank's arrays."""

    def __init__(self, comm: Communicator, tokens: int) -> None:
        import numpy as np
        from fakes.gpu import DeviceArray

        def on_gpu(values: Any) -> Any:
            return DeviceArray(values.shape, values.dtype, device=comm.rank).write(values)

        seeded = np.random.default_rng(comm.rank)
        ids = np.array([seeded.choice(_EXPERTS, _CHOICES, replace=False) for _ in range(tokens)])
        self._comm, self._on_gpu = comm, on_gpu
        self._x = on_gpu(np.ones((tokens, _HIDDEN), np.float16))
        self._ids, self._weights = on_gpu(ids), on_gpu(np.full(ids.shape, 1 / _CHOICES, np.float32))
        self._out = on_gpu(np.zeros((tokens, _HIDDEN), np.float16))
        self._outputs: Any = None
        self._came: Any = None

    async def dispatch(self) -> None:
        self._came = await self._comm.dispatch(self._x, self._ids, self._weights, experts=_EXPERTS)

    async def combine(self) -> None:
        if self._outputs is None:
            import numpy as np

            self._outputs = self._on_gpu(np.ones((len(self._came.rows), _HIDDEN), np.float16))
        await self._comm.combine(self._outputs, self._came, out=self._out, wire="float16")


class _Replayed:
    """Calls of the extension, and the same again from memory."""

    again: bool = False

    def __init__(self, *how: Any) -> None:
        from aiocomm_native import _core

        self._calls = _core.ExpertCalls(*how)
        self._ranks = len(how[2])
        self._made: dict[str, Any] = {}
        self.take_marks = self._calls.take_marks

    def _keep(self, name: str, outcome: Any) -> Any:
        if outcome[0] == _WELL:
            self._made[name] = outcome
        return outcome

    def give_tokens(self, *arguments: Any) -> Any:
        return self if _Replayed.again else self._calls.give_tokens(*arguments)

    def give_terms(self, *arguments: Any) -> Any:
        return self if _Replayed.again else self._calls.give_terms(*arguments)

    def dispatch(self, *arguments: Any) -> Any:
        if not _Replayed.again:
            return self._keep("dispatch", self._calls.dispatch(*arguments))
        made = self._made["dispatch"]
        return (*made[:4], [arguments[3]] * len(made[4]), *made[5:])  # all calls have ended at the others

    def combine(self, *arguments: Any) -> Any:
        if not _Replayed.again:
            return self._keep("combine", self._calls.combine(*arguments))
        arguments[-1]([arguments[3]] * self._ranks)  # all calls have ended at the others
        return self._made["combine"]


async def _timed(call: Callable[[], Awaitable[None]]) -> tuple[int, int]:
    begin = time.monotonic_ns()
    await call()
    return begin, time.monotonic_ns()


async def _measure(comm: Communicator, sizes: list[int]) -> None:
    from aiocomm.collectives import kernels
    from aiocomm.moe import device_quick, repeats

    kernels.compiled = lambda source, architecture: source.encode() + b"\0"
    device_quick.LINGER_S = 5.0  # type: ignore[misc]
    repeats.ExpertCalls = _Replayed  # type: ignore[misc,assignment]
    layers = {tokens: _Layer(comm, tokens) for tokens in sizes}
    for tokens, layer in layers.items():
        calls = {"dispatch": layer.dispatch, "combine": layer.combine}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        for turn in range(_TURNS):
            for name, call in calls.items():
                await comm.barrier()
                take(comm)
                told = stages(comm, name, *await _timed(call))
                if told is not None and turn >= _WARM:
                    found[name].append(told)
        await comm.barrier()
        if comm.rank == 0:
            for name, turns in found.items():
                medians = {stage: statistics.median(one[stage] for one in turns) for stage in STAGES[name]}
                told_us = ", ".join(f"{stage} {median:.0f}" for stage, median in medians.items())
                print(f"{tokens} tokens, {name}, µs (median of {len(turns)}): {told_us}", flush=True)
            _Replayed.again = True
            await _replay(tokens, calls)
            _Replayed.again = False
        await comm.barrier()
        if comm.rank:  # whose calls have the numbers of those that only rank 0 made
            scope, _ = comm._members()._expert_scope(None)
            for _ in range(2 * _REPLAYED * _SERIES):
                scope.begin(None)


async def _replay(tokens: int, calls: dict[str, Callable[[], Awaitable[None]]]) -> None:
    series: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_SERIES):
        spent = dict.fromkeys(calls, 0)
        for _ in range(_REPLAYED):
            for name, call in calls.items():
                begin, end = await _timed(call)
                spent[name] += end - begin
        for name, total in spent.items():
            series[name].append(total / _REPLAYED / 1e3)
    for name, each in series.items():
        print(
            f"{tokens} tokens, {name}, µs without waiting: {statistics.median(each):.1f} "
            f"({min(each):.1f} to {max(each):.1f})",
            flush=True,
        )


async def _main(sizes: list[int]) -> None:
    import cloudpickle
    from fakes import simulated

    import aiocomm

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["AIOCOMM_LIBCUDA"] = str(simulated.build())
    async with aiocomm.spawn(_measure, 1, sizes, links=("shm", "cuda"), warmup=True) as comm:
        await _measure(comm, sizes)


if __name__ == "__main__":
    asyncio.run(_main([int(one) for one in sys.argv[1:]] or [16, 128]))
