"""Suites `collectives`, `-3` and `-4`: the same calls in host memory through us, Gloo and MPI.

`memcpy-one-thread` calls nothing: every process copies, within itself, its even share of the bytes that a
call has to copy once.

Metrics:
    us/OPERATION/SIZE: Microseconds per call, median over the calls of the slowest process; SIZE is that of
        one rank's array.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import pair, peers, session, work
from .model import Column, Rule, Suite
from .peers import ours
from .peers.raw_copies import copy
from .sizes import KIB, MIB, show

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .control import Control
    from .model import Metrics, Options
    from .peers.base import Array

    Calls = dict[str, Callable[[Array, Array], Awaitable[None]]]

_SIZES = ((KIB, 300), (MIB, 60), (64 * MIB, 5))
_OPERATIONS = ("all_gather", "broadcast", "all_reduce", "all_to_all")


def _aiocomm(comm: Any) -> Calls:
    async def all_gather(out: Array, x: Array) -> None:
        await comm.all_gather(out, x)

    async def broadcast(out: Array, x: Array) -> None:
        await comm.broadcast(x)

    async def all_reduce(out: Array, x: Array) -> None:
        await comm.all_reduce(x)

    async def all_to_all(out: Array, x: Array) -> None:
        await comm.all_to_all(out, x)

    return {f.__name__: f for f in (all_gather, broadcast, all_reduce, all_to_all)}


def _gloo() -> Calls:
    import torch
    import torch.distributed as dist

    tensor = torch.from_numpy

    async def all_gather(out: Array, x: Array) -> None:
        dist.all_gather_into_tensor(tensor(out), tensor(x))

    async def broadcast(out: Array, x: Array) -> None:
        dist.broadcast(tensor(x), 0)

    async def all_reduce(out: Array, x: Array) -> None:
        dist.all_reduce(tensor(x))

    async def all_to_all(out: Array, x: Array) -> None:
        dist.all_to_all_single(tensor(out), tensor(x))

    return {f.__name__: f for f in (all_gather, broadcast, all_reduce, all_to_all)}


def _mpi() -> Calls:
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    async def all_gather(out: Array, x: Array) -> None:
        world.Allgather([x, MPI.BYTE], [out, MPI.BYTE])

    async def broadcast(out: Array, x: Array) -> None:
        world.Bcast([x, MPI.BYTE], 0)

    async def all_reduce(out: Array, x: Array) -> None:
        world.Allreduce(MPI.IN_PLACE, [x, MPI.FLOAT])

    async def all_to_all(out: Array, x: Array) -> None:
        world.Alltoall([x, MPI.BYTE], [out, MPI.BYTE])

    return {f.__name__: f for f in (all_gather, broadcast, all_reduce, all_to_all)}


def _raw(ranks: int) -> Calls:
    async def all_gather(out: Array, x: Array) -> None:
        for block in out.reshape(ranks, -1):
            copy(block, x)

    async def broadcast(out: Array, x: Array) -> None:
        copy(out, x[len(x) // ranks :])

    async def all_reduce(out: Array, x: Array) -> None:
        given = x.view(np.uint8)
        for _ in range(2):  # the parts that are added, and the sums
            copy(out, given[len(given) // ranks :])

    async def all_to_all(out: Array, x: Array) -> None:
        copy(out, x)

    return {f.__name__: f for f in (all_gather, broadcast, all_reduce, all_to_all)}


async def _measure(
    calls: Calls, role: int, ranks: int, cases: list[list[int]], checked: bool = True, empty: Any = np.empty
) -> Metrics:
    found: Metrics = {}
    for nbytes, count in cases:
        x, out = empty(nbytes, np.uint8), empty(nbytes * ranks, np.uint8)
        x[:], out[:] = role + 1, 0
        await calls["all_gather"](out, x)
        if checked and (out[0], out[-1]) != (1, ranks):
            raise RuntimeError("what was gathered is not what was given")
        for operation in _OPERATIONS:
            x[:] = 0  # sums stay 0: no operation on denormals or infinities is measured
            call = calls[operation]
            given, into = x, out
            if operation == "all_to_all":  # blocks of one size
                given = x[: nbytes - nbytes % ranks]
                into = out[: len(given)]
            elif operation == "all_reduce":
                given = x.view(np.float32)
            for _ in range(3):
                await call(into, given)
            taken = []
            for _ in range(count):
                start = time.perf_counter()
                await call(into, given)
                taken.append(time.perf_counter() - start)
            found[f"us/{operation}/{show(nbytes)}"] = statistics.median(taken) * 1e6
    return found


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure every operation and size in turn."""
    peer = peers.find(arguments["peer"])
    ranks, cases = arguments["ranks"], arguments["cases"]

    async def main() -> Metrics:
        if peer.kind == "ours":
            import aiocomm

            comm = await ours.connect(role, control, "shm")
            empty = aiocomm.empty if "empty" in peer.name else np.empty
            found = await _measure(_aiocomm(comm), role, ranks, cases, empty=empty)
            await ours.Ours(comm).finish(control)
            return found
        transport = await peer.open(role, control)
        if peer.kind == "raw":
            large = [case for case in cases if case[0] >= MIB]  # of smaller ones the calls decide
            found = await _measure(_raw(ranks), role, ranks, large, checked=False)
        else:
            found = await _measure(_gloo() if peer.name == "gloo" else _mpi(), role, ranks, cases)
        await transport.finish(control)
        return found

    return work.run_on(peer.loop, main)


def _measure_among(ranks: int, name: str, options: Options) -> Metrics:
    """Take one sample: of the slowest process."""
    peer = peers.find(name)
    scale = 4 if options.quick else 1
    wanted = [(n, count) for n, count in _SIZES if not options.sizes or n in options.sizes]
    arguments = {"peer": name, "ranks": ranks, "cases": [(n, max(3, count // scale)) for n, count in wanted]}
    found = pair.run(
        f"{__name__}:child",
        arguments,
        options.timeout_s,
        environment=peer.environment,
        launcher=peer.launcher,
        size=ranks,
    )
    return {key: max(one[key] for one in found) for key in found[0]}


_COLUMNS = tuple(
    Column(f"us/{operation}/{show(n)}", f"{operation}\n{show(n)}, µs", 0)
    for operation in _OPERATIONS
    for n, _ in _SIZES
)
_PEERS = ("gloo", "mpi4py")
_SLEEPERS = ("gloo",)
_RAW = ("memcpy-one-thread",)
_OURS = ("aiocomm-shm", "aiocomm-shm-spin", "aiocomm-shm-empty", "aiocomm-shm-empty-spin")
_WORDS = {2: "two", 3: "three", 4: "four"}


def _rules(ranks: int) -> tuple[Rule, ...]:
    rules = []
    for operation in _OPERATIONS:
        for n, _ in _SIZES:
            bound = 1.0 if n < MIB else 1 / 1.3  # ahead where bytes decide
            what = f"{operation} {show(n)}, {_WORDS[ranks]} ranks"
            # Like with like: MPI burns a core per process while it waits; Gloo sleeps.
            for subject, how, against in (
                ("aiocomm-shm-spin", "spinning", _PEERS),
                ("aiocomm-shm-empty-spin", "aiocomm.empty(), spinning", _PEERS),
                ("aiocomm-shm", "sleeping", _SLEEPERS),
            ):
                metric = f"us/{operation}/{show(n)}"
                rules.append(Rule(f"{what}, {how}", subject, metric, "<=", bound, against))
    return tuple(rules)


SUITES = tuple(
    Suite(
        "collectives" if ranks == 2 else f"collectives-{ranks}",
        f"{word} processes, host memory: all_gather, broadcast, all_reduce, all_to_all",
        session.subjects((*_RAW, *_PEERS, *_OURS)),
        partial(_measure_among, ranks),
        lambda options: _COLUMNS,
        _rules(ranks),
    )
    for ranks, word in _WORDS.items()
)
