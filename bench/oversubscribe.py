"""Suite `oversubscribe`: two pairs play ping-pong on two cores: who spins takes a core from another."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from . import figures, peers, session, work
from .model import Column, Rule, Suite
from .pair import Pair

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options
    from .peers import Transport

_STARTING_S = 4.0  # until all four processes have imported and connected
_LAST = 7  # value of the byte that ends the game


async def _play(transport: Transport, role: int, begin: float, end: float) -> list[float]:
    """Return the half round trips, in seconds, that began between two times of the monotonic clock."""
    data, into = await transport.allocate(8)
    halves: list[float] = []
    while data[0] != _LAST:
        start = time.monotonic()
        if role == 0:
            if start >= end:
                data[0] = _LAST
            await transport.send(data)
            await transport.recv(into)
        else:
            await transport.recv(into)
            data[0] = into[0]
            await transport.send(data)
        if begin <= start < end:
            halves.append((time.monotonic() - start) / 2)
    return halves


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> dict[str, list[float]]:
    """Play from `begin` to `end`, which all processes share."""
    peer = peers.find(arguments["peer"])

    async def main() -> dict[str, list[float]]:
        transport = await peer.open(role, control)
        halves = await _play(transport, role, arguments["begin"], arguments["end"])
        await transport.finish(control)
        return {"halves": halves if role == 0 else []}

    return work.run_on(peer.loop, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample: the slower of both pairs."""
    peer = peers.find(name)
    begin = time.monotonic() + _STARTING_S
    arguments = {"peer": name, "begin": begin, "end": begin + (1.0 if options.quick else 3.0)}
    available = sorted(os.sched_getaffinity(0))
    cores = frozenset(available[:2]) if len(available) > 2 else None
    kwargs: dict[str, Any] = {"environment": peer.environment, "launcher": peer.launcher, "cores": cores}
    program = f"{__name__}:child"
    with Pair(program, arguments, **kwargs) as one, Pair(program, arguments, **kwargs) as two:
        games = [pair.wait(options.timeout_s)[0]["halves"] for pair in (one, two)]
    if not all(games):
        raise RuntimeError(f"a pair had not connected within {_STARTING_S:.0f} s")
    return {
        "p50_us": max(figures.percentile(game, 0.5) for game in games) * 1e6,
        "p99_us": max(figures.percentile(game, 0.99) for game in games) * 1e6,
        "worst_us": max(max(game) for game in games) * 1e6,
    }


_COLUMNS = (
    Column("p50_us", "half trip 8 B\np50, µs", 1),
    Column("p99_us", "p99, µs", 1),
    Column("worst_us", "worst, µs", 0),
)
_SUBJECTS = ("handmade-ring", "mpi4py", "ucxx-best", "aiocomm-shm", "aiocomm-shm-spin")

SUITE = Suite(
    "oversubscribe",
    "four processes on two cores, two pairs playing ping-pong",
    session.subjects(_SUBJECTS),
    measure,
    lambda options: _COLUMNS,
    (Rule("8 B p99 with 4 processes on 2 cores, µs", "aiocomm-shm-spin", "p99_us", "<=", 1000.0),),
)
