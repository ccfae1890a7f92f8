"""Suite `overhead`: what a call costs, how ten thousand at once scale, what a million leave behind."""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import session
from .model import Column, Rule, Suite
from .sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_WINDOW = 64
_TURN = 2**20  # tag of the messages that pass the turn; data uses smaller tags
_FEW, _MANY = 1_000, 10_000


class _Side:
    """One process's end of the measurement."""

    def __init__(self, comm: Any, role: int) -> None:
        self.comm, self.role, self.other = comm, role, 1 - role
        self._byte = np.ones(8, np.uint8)

    async def pass_turn(self) -> None:
        await self.comm.send(self._byte, dst=self.other, tag=_TURN)

    async def take_turn(self) -> None:
        await self.comm.recv(self._byte, src=self.other, tag=_TURN)

    async def meet(self) -> None:
        """Return when both are here."""
        turn = self.comm.recv(self._byte, src=self.other, tag=_TURN)
        await self.pass_turn()
        await turn


async def _submit_send(side: _Side, nbytes: int, windows: int) -> tuple[float, float]:
    """Return the median seconds of a call of send(), and of awaiting one that has ended."""
    clock = time.perf_counter
    data = [np.ones(nbytes, np.uint8) for _ in range(_WINDOW)]
    calls: list[float] = []
    awaits: list[float] = []
    for _ in range(windows):
        if side.role == 1:
            transfers = [side.comm.recv(item, src=0) for item in data]
            await side.meet()
            for transfer in transfers:
                await transfer
            await side.pass_turn()
            continue
        await side.meet()
        transfers = []
        for item in data:
            start = clock()
            transfer = side.comm.send(item, dst=1)
            calls.append(clock() - start)
            transfers.append(transfer)
        await side.take_turn()  # all have arrived
        for transfer in transfers:
            await transfer
        start = clock()
        for transfer in transfers:
            await transfer
        awaits.append((clock() - start) / _WINDOW)
    return (statistics.median(calls), statistics.median(awaits)) if calls else (0.0, 0.0)


async def _submit_recv(side: _Side, windows: int) -> tuple[float, float]:
    """Return the median seconds of a call of recv(), and of the first await of one that has ended."""
    clock = time.perf_counter
    calls: list[float] = []
    awaits: list[float] = []
    data = [np.ones(8, np.uint8) for _ in range(_WINDOW)]
    for _ in range(windows):
        if side.role == 1:
            await side.take_turn()
            for item in data:
                await side.comm.send(item, dst=0)
            await side.pass_turn()
            continue
        transfers = []
        for item in data:
            start = clock()
            transfer = side.comm.recv(item, src=1)
            calls.append(clock() - start)
            transfers.append(transfer)
        await side.pass_turn()
        await side.take_turn()
        await transfers[-1]
        if all(t.done() for t in transfers):
            start = clock()
            for transfer in transfers:
                await transfer
            awaits.append((clock() - start) / _WINDOW)
    return (statistics.median(calls), statistics.median(awaits)) if calls else (0.0, 0.0)


async def _in_flight(side: _Side, count: int, posted_first: bool) -> float:
    """Return seconds per transfer with `count` at once, matched by tag and sent in the opposite order."""
    data = [np.ones(8, np.uint8) for _ in range(count)]
    backwards = list(enumerate(data))[::-1]
    await side.meet()
    if side.role == 1:
        if posted_first:
            await side.take_turn()
        transfers = [side.comm.send(item, dst=0, tag=tag) for tag, item in backwards]
        if not posted_first:
            await side.pass_turn()
        for transfer in transfers:
            await transfer
        await side.take_turn()
        return 0.0
    if not posted_first:
        await side.take_turn()
    start = time.perf_counter()
    transfers = [side.comm.recv(item, src=1, tag=tag) for tag, item in enumerate(data)]
    if posted_first:
        await side.pass_turn()
    for transfer in transfers:
        await transfer
    taken = time.perf_counter() - start
    await side.pass_turn()
    return taken / count


async def _messages(side: _Side, count: int) -> None:
    data = [np.ones(8, np.uint8) for _ in range(_WINDOW)]
    for _ in range(count // _WINDOW):
        if side.role == 0:
            transfers = [side.comm.send(item, dst=1) for item in data]
        else:
            transfers = [side.comm.recv(item, src=0) for item in data]
        for transfer in transfers:
            await transfer
        if side.role == 0:
            await side.take_turn()
        else:
            await side.pass_turn()


def _resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _growth(side: _Side, count: int) -> float:
    """Return by how many bytes this process has grown over `count` messages, warm before."""
    await _messages(side, count // 10)
    before = _resident_bytes()
    await _messages(side, count)
    return float(_resident_bytes() - before)


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure each of them in turn."""
    windows, messages = arguments["windows"], arguments["messages"]

    async def main(comm: Any, role: int) -> Metrics:
        side = _Side(comm, role)
        await _messages(side, 1000)
        found: Metrics = {}
        found["submit_us/send8B"], found["await_us/sent"] = await _submit_send(side, 8, windows)
        found["submit_us/send1MiB"], _ = await _submit_send(side, MIB, max(2, windows // 10))
        found["submit_us/recv"], found["await_us/received"] = await _submit_recv(side, windows)
        for order in ("posted", "unexpected"):
            for count in (_FEW, _MANY):
                await _in_flight(side, count, order == "posted")
                times = [await _in_flight(side, count, order == "posted") for _ in range(3)]
                found[f"in_flight_us/{order}/{count}"] = statistics.median(times)
        found = {key: value * 1e6 for key, value in found.items()}
        for order in ("posted", "unexpected"):
            few, many = (found[f"in_flight_us/{order}/{count}"] for count in (_FEW, _MANY))
            found[f"in_flight_growth/{order}"] = many / few if few else 0.0
        found["growth_mib"] = await _growth(side, messages) / MIB
        return found

    return session.within(role, control, arguments, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample; the growth is that of the process that grew more."""
    windows, messages = (10, 100_000) if options.quick else (100, 1_000_000)
    mine, theirs = session.run(f"{__name__}:child", name, options, windows=windows, messages=messages)
    return {**mine, "growth_mib": max(mine["growth_mib"], theirs["growth_mib"])}


_COLUMNS = (
    Column("submit_us/send8B", "send() 8 B\nµs", 2),
    Column("submit_us/send1MiB", "send() 1 MiB\nµs", 2),
    Column("submit_us/recv", "recv()\nµs", 2),
    Column("await_us/sent", "await a\nfinished send, µs", 2),
    Column("await_us/received", "await a\nfinished recv, µs", 2),
    Column(f"in_flight_us/posted/{_FEW}", "1 k open\nµs each", 2),
    Column(f"in_flight_us/posted/{_MANY}", "10 k open\nµs each", 2),
    Column(f"in_flight_us/unexpected/{_FEW}", "1 k unexpected\nµs each", 2),
    Column(f"in_flight_us/unexpected/{_MANY}", "10 k unexpected\nµs each", 2),
    Column("growth_mib", "growth over\n1 M messages, MiB", 2),
)


def _rules(name: str) -> tuple[Rule, ...]:
    calls = ("send8B", "send1MiB", "recv")
    orders = ("posted", "unexpected")
    submits = [Rule(f"µs to submit {k}", name, f"submit_us/{k}", "<=", 3.0) for k in calls]
    awaits = [
        Rule(f"µs to await what was {k}", name, f"await_us/{k}", "<=", 1.0) for k in ("sent", "received")
    ]
    scaling = [Rule(f"µs each, 10 k ÷ 1 k {k}", name, f"in_flight_growth/{k}", "<=", 2.0) for k in orders]
    return (*submits, *awaits, *scaling, Rule("MiB more after 1 M messages", name, "growth_mib", "<=", 1.0))


SUITE = Suite(
    "overhead",
    "cost of a call from Python, ten thousand transfers at once, memory after a million messages",
    session.subjects(("aiocomm-shm", "aiocomm-tcp")),
    measure,
    lambda options: _COLUMNS,
    _rules("aiocomm-shm"),
)
