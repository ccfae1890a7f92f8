"""Suite `moe`: two processes, host memory, dispatch and combine through us, and by hand on Gloo and MPI.

What is done by hand routes and sums with the same code as ours, and moves the same rows: counts, then lists
and rows, and the sums back.

Metrics:
    us/dispatch/TOKENS: Microseconds per dispatch, median of the slower process; TOKENS is a rank's batch.
    us/combine/TOKENS: The same for combine.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import pair, peers, session, work
from .model import Column, Rule, Suite
from .peers import ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .control import Control
    from .model import Metrics, Options

    Swap = Callable[[Any, Any, list[int], list[int]], None]  # out, given, bytes from and to each rank

_EXPERTS, _CHOICES, _HIDDEN = 64, 4, 2048
_BATCHES = ((8, 200), (128, 60), (2048, 8))
_RANKS = 2


class _ByHand:
    """Dispatch and combine on an all-to-all of bytes."""

    def __init__(self, rank: int, swap: Swap) -> None:
        from aiocomm.moe.placement import place

        self._rank = rank
        self._swap = swap
        self._placement = place(_EXPERTS, None, _RANKS)

    async def dispatch(self, x: Any, ids: Any, weights: Any) -> Any:
        from aiocomm.moe import wire
        from aiocomm.moe.routing import arrange, route

        parts = route(ids, weights, self._placement)
        given = np.array([[part.rows, len(part.experts)] for part in parts])
        taken = np.empty_like(given)
        self._swap(taken, given, [16] * _RANKS, [16] * _RANKS)
        packed = [np.empty(wire.lists_bytes(*counts), np.uint8) for counts in given.tolist()]
        for part, memory in zip(parts, packed, strict=True):
            wire.pack_lists(part, memory)
        sizes = [wire.lists_bytes(*counts) for counts in taken.tolist()]
        lists = np.empty(sum(sizes), np.uint8)
        self._swap(lists, np.concatenate(packed), sizes, [len(memory) for memory in packed])
        row = x.itemsize * x.shape[1]
        rows = np.empty((int(taken[:, 0].sum()), x.shape[1]), x.dtype)
        order = np.concatenate([part.tokens for part in parts])
        self._swap(rows, x[order], (taken[:, 0] * row).tolist(), (given[:, 0] * row).tolist())
        came = []
        for (count, assignments), start in zip(taken.tolist(), np.cumsum([0, *sizes]).tolist(), strict=False):
            head = wire.Head(b"", count, assignments, 0)
            came.append(wire.unpack_lists(head, lists[start:], self._placement, self._rank))
        return parts, arrange(came, self._placement, self._rank), rows

    async def combine(self, outputs: Any, state: Any, tokens: int) -> Any:
        from aiocomm.moe.weighting import add_up, weigh

        parts, found, _ = state
        hidden = outputs.shape[1]
        sums = np.empty((int(found.starts[-1]), hidden), np.float32)
        weigh(outputs, found, 0, len(sums), sums)
        back = np.empty((sum(part.rows for part in parts), hidden), np.float32)
        sizes = [part.rows * hidden * 4 for part in parts]
        self._swap(back, sums, sizes, (np.diff(found.starts) * hidden * 4).tolist())
        result = np.empty((tokens, hidden), np.float32)
        cuts = np.cumsum([part.rows for part in parts])[:-1]
        tokens_of = [part.tokens for part in parts]
        add_up(list(zip(tokens_of, np.split(back, cuts), strict=True)), False, result)
        return result


class _Ours:
    def __init__(self, comm: Any) -> None:
        self._comm = comm

    async def dispatch(self, x: Any, ids: Any, weights: Any) -> Any:
        came = await self._comm.dispatch(x, ids, weights, experts=_EXPERTS)
        return came, came._found, came.tokens

    async def combine(self, outputs: Any, state: Any, tokens: int) -> Any:
        return await self._comm.combine(outputs, state[0])


def _gloo(out: Any, given: Any, take: list[int], give: list[int]) -> None:
    import torch
    import torch.distributed as dist

    tensors = [torch.from_numpy(a.reshape(-1).view(np.uint8)) for a in (out, given)]
    dist.all_to_all_single(*tensors, take, give)


def _mpi(out: Any, given: Any, take: list[int], give: list[int]) -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Alltoallv([given, give, MPI.BYTE], [out, take, MPI.BYTE])


async def _measure(layer: Any, role: int, batches: list[list[int]], meet: Callable[[], Any]) -> Metrics:
    found: Metrics = {}
    for tokens, count in batches:
        seeded = np.random.default_rng(role)
        x = np.ones((tokens, _HIDDEN), np.float32)
        ids = seeded.integers(0, _EXPERTS, (tokens, _CHOICES))
        weights = np.full(ids.shape, 1 / _CHOICES, np.float32)
        taken: list[tuple[float, float]] = []
        for _ in range(count + 3):
            await meet()
            start = time.perf_counter()
            state = await layer.dispatch(x, ids, weights)
            middle = time.perf_counter()
            outputs = state[2][state[1].rows]
            await meet()
            begin = time.perf_counter()
            result = await layer.combine(outputs, state, tokens)
            taken.append((middle - start, time.perf_counter() - begin))
        if not np.allclose(result, x):
            raise RuntimeError("what came back is not the weighted sum of what went out")
        for name, column in zip(("dispatch", "combine"), zip(*taken[3:], strict=True), strict=True):
            found[f"us/{name}/{tokens}"] = statistics.median(column) * 1e6
    return found


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure every batch in turn."""
    peer = peers.find(arguments["peer"])

    async def main() -> Metrics:
        if peer.kind == "ours":
            comm = await ours.connect(role, control, "shm")
            found = await _measure(_Ours(comm), role, arguments["batches"], comm.barrier)
            await ours.Ours(comm).finish(control)
            return found
        transport = await peer.open(role, control)

        async def meet() -> None:
            swap(np.empty(_RANKS, np.uint8), np.empty(_RANKS, np.uint8), [1] * _RANKS, [1] * _RANKS)

        swap = _gloo if peer.name == "gloo" else _mpi
        found = await _measure(_ByHand(role, swap), role, arguments["batches"], meet)
        await transport.finish(control)
        return found

    return work.run_on(peer.loop, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample: of the slower process."""
    peer = peers.find(name)
    scale = 4 if options.quick else 1
    batches = [(n, max(3, count // scale)) for n, count in _BATCHES]
    mine, theirs = pair.run(
        f"{__name__}:child",
        {"peer": name, "batches": batches},
        options.timeout_s,
        environment=peer.environment,
        launcher=peer.launcher,
    )
    return {key: max(value, theirs[key]) for key, value in mine.items()}


_COLUMNS = tuple(
    Column(f"us/{operation}/{tokens}", f"{operation}\n{tokens} tokens, µs", 0)
    for tokens, _ in _BATCHES
    for operation in ("dispatch", "combine")
)
_PEERS = ("gloo", "mpi4py")
_OURS = ("aiocomm-shm", "aiocomm-shm-spin")


def _rules() -> tuple[Rule, ...]:
    rules = []
    for tokens, _ in _BATCHES:
        for operation in ("dispatch", "combine"):
            subject = "aiocomm-shm-spin" if tokens < 128 else "aiocomm-shm"
            name = f"{operation} {tokens} tokens, two ranks"
            rules.append(Rule(name, subject, f"us/{operation}/{tokens}", "<=", 1.0, _PEERS))
    return tuple(rules)


SUITE = Suite(
    "moe",
    "two processes, host memory: dispatch and combine of a mixture of experts",
    session.subjects((*_PEERS, *_OURS)),
    measure,
    lambda options: _COLUMNS,
    _rules(),
)
