"""Suite `qos`: what an urgent message waits for beside bulk on the same link, and whether weights hold."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from . import figures, session
from .model import Column, Rule, Suite
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_PING, _LOAD = 1, 2  # tags
_DEPTH = 4  # bulk messages outstanding
_BACKLOG_NBYTES = (
    32 * MIB
)  # of each of two channels that share a link: neither may run dry while the loops are late
_LARGE_NBYTES = 128 * KIB
_END_NBYTES = 8  # a bulk message of this size says that no more will come
_LONGEST_S = 8.0  # of one ping-pong, however slow


async def ping_pong(channel: Any, role: int, count: int, nbytes: int = KIB) -> list[float]:
    """Return half round trips in seconds; the first byte of the last ping is 1."""
    data, into = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    halves: list[float] = []
    give_up = time.perf_counter() + _LONGEST_S
    while not data[0]:
        start = time.perf_counter()
        if role == 0:
            data[0] = len(halves) + 1 >= count or start > give_up
            await channel.send(data, dst=1, tag=_PING)
            await channel.recv(into, src=1, tag=_PING)
        else:
            await channel.recv(into, src=0, tag=_PING)
            data[0] = into[0]
            await channel.send(data, dst=0, tag=_PING)
        halves.append((time.perf_counter() - start) / 2)
    return halves


class _Load:
    """Keeps bulk messages from rank 0 to rank 1 outstanding on a channel until it is stopped."""

    def __init__(self, channel: Any, role: int, nbytes: int, depth: int = _DEPTH) -> None:
        self._channel = channel
        self._depth = depth
        self._nbytes = nbytes
        self._running = True
        self.under_way = asyncio.Event()
        self.moved = 0  # bytes whose send has ended
        self._task = asyncio.create_task(self._send() if role == 0 else self._receive())

    async def _send(self) -> None:
        data = np.ones(self._nbytes, np.uint8)
        open_ = deque(self._channel.send(data, dst=1, tag=_LOAD) for _ in range(self._depth))
        while self._running:
            await open_.popleft()
            self.moved += self._nbytes
            self.under_way.set()
            open_.append(self._channel.send(data, dst=1, tag=_LOAD))
        end = np.zeros(_END_NBYTES, np.uint8)
        open_.extend(self._channel.send(end, dst=1, tag=_LOAD) for _ in range(self._depth))
        for transfer in open_:
            await transfer

    async def _receive(self) -> None:
        outs = [np.zeros(self._nbytes, np.uint8) for _ in range(self._depth)]
        open_ = deque((self._channel.recv(out, src=0, tag=_LOAD), out) for out in outs)
        while open_:
            transfer, out = open_.popleft()
            status = await transfer
            if status.nbytes != _END_NBYTES:
                open_.append((self._channel.recv(out, src=0, tag=_LOAD), out))

    async def stop(self) -> None:
        self._running = False
        await self._task


async def under_load(
    urgent: Any, bulk: Any, role: int, count: int, nbytes: int = KIB
) -> tuple[list[float], float]:
    """Return half round trips on `urgent` while `bulk` is saturated, and the bulk's rate in GB/s."""
    load = _Load(bulk, role, 16 * MIB)
    if role == 0:
        await load.under_way.wait()
    start, moved = time.perf_counter(), load.moved
    halves = await ping_pong(urgent, role, count, nbytes)
    rate = (load.moved - moved) / (time.perf_counter() - start) / 1e9
    await load.stop()
    return halves, rate


async def _alone(bulk: Any, role: int, seconds: float) -> float:
    """Return the bulk's rate with nothing beside it."""
    load = _Load(bulk, role, 16 * MIB)
    rate = 0.0
    if role == 0:
        await load.under_way.wait()
        start, moved = time.perf_counter(), load.moved
        await asyncio.sleep(seconds)
        rate = (load.moved - moved) / (time.perf_counter() - start) / 1e9
    await load.stop()
    return rate


async def _shares(heavy: Any, light: Any, role: int, seconds: float) -> tuple[float, float]:
    """Return the bytes that two saturated channels moved; their messages differ in size on purpose."""
    loads = tuple(
        _Load(channel, role, nbytes, _BACKLOG_NBYTES // nbytes)
        for channel, nbytes in ((heavy, 4 * MIB), (light, MIB))
    )
    moved = (0.0, 0.0)
    if role == 0:
        await asyncio.gather(*(load.under_way.wait() for load in loads))
        await asyncio.sleep(seconds / 5)
        before = [load.moved for load in loads]
        await asyncio.sleep(seconds)
        moved = (loads[0].moved - before[0], loads[1].moved - before[1])
    await asyncio.gather(*(load.stop() for load in loads))
    return moved


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure every phase in turn."""
    count, seconds = arguments["count"], arguments["seconds"]

    async def main(comm: Any, role: int) -> Metrics:
        import aiocomm

        urgent = comm.channel("bench-urgent", priority=aiocomm.Priority.URGENT)
        bulk = comm.channel("bench-bulk")
        await ping_pong(urgent, role, 50)
        idle = await ping_pong(urgent, role, count)
        alone = await _alone(bulk, role, seconds / 2)
        with_channels, rate = await under_load(urgent, bulk, role, count)
        without, _ = await under_load(comm, comm, role, count)
        # What is larger than an eager message waits in its channel's queue, behind whatever is there.
        large = {
            "idle": await ping_pong(urgent, role, count // 10, _LARGE_NBYTES),
            "channels": (await under_load(urgent, bulk, role, count // 10, _LARGE_NBYTES))[0],
            "without": (await under_load(comm, comm, role, count // 100, _LARGE_NBYTES))[0],
        }
        heavy, light = comm.channel("bench-heavy", weight=3.0), comm.channel("bench-light", weight=1.0)
        heavy_bytes, light_bytes = await _shares(heavy, light, role, seconds)
        if role == 1:
            return {}
        found: Metrics = {"bulk_gbytes_s": rate, "bulk_kept": rate / alone}
        for name, halves in (("idle", idle), ("channels", with_channels), ("without", without)):
            found[f"p50_us/{name}"] = figures.percentile(halves, 0.5) * 1e6
            found[f"p99_us/{name}"] = figures.percentile(halves, 0.99) * 1e6
        for name, halves in large.items():
            found[f"large_p50_us/{name}"] = figures.percentile(halves, 0.5) * 1e6
        found["large_times_idle/channels"] = found["large_p50_us/channels"] / found["large_p50_us/idle"]
        found["large_times_idle/without"] = found["large_p50_us/without"] / found["large_p50_us/idle"]
        found["p99_times_idle/channels"] = found["p99_us/channels"] / found["p99_us/idle"]
        found["p99_times_idle/without"] = found["p99_us/without"] / found["p99_us/idle"]
        total = heavy_bytes + light_bytes
        found["share_of_3"] = heavy_bytes / total
        found["share_error"] = max(abs(heavy_bytes / total / 0.75 - 1), abs(light_bytes / total / 0.25 - 1))
        return found

    return session.within(role, control, arguments, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    count, seconds = (3000, 0.5) if options.quick else (20_000, 2.0)
    return session.run(f"{__name__}:child", name, options, count=count, seconds=seconds)[0]


_COLUMNS = (
    Column("p50_us/idle", "idle\np50, µs", 1),
    Column("p99_us/idle", "idle\np99, µs", 1),
    Column("p50_us/channels", "under bulk,\nchannels p50", 1),
    Column("p99_us/channels", "under bulk,\nchannels p99", 1),
    Column("p50_us/without", "under bulk,\none channel p50", 1),
    Column("p99_us/without", "under bulk,\none channel p99", 1),
    Column("p99_times_idle/channels", "p99 ÷ idle,\nchannels", 2),
    Column("p99_times_idle/without", "p99 ÷ idle,\none channel", 2),
    Column("large_times_idle/channels", "128 KiB p50 ÷\nidle, channels", 2),
    Column("large_times_idle/without", "128 KiB p50 ÷\nidle, one channel", 1),
    Column("bulk_gbytes_s", "bulk\nGB/s", 2, "higher"),
    Column("bulk_kept", "bulk ÷\nalone", 2, "higher"),
    Column("share_of_3", "share of\nweight 3 of 4", 3, "neither"),
)

SUITE = Suite(
    "qos",
    "urgent 1 KiB beside saturating bulk on one link; two channels of weights 3 and 1",
    session.subjects(("aiocomm-shm", "aiocomm-tcp")),
    measure,
    lambda options: _COLUMNS,
    (
        *(
            rule
            for subject, large in (("aiocomm-shm", 3.0), ("aiocomm-tcp", 6.0))
            for rule in (
                Rule("urgent p99 under bulk ÷ idle p99", subject, "p99_times_idle/channels", "<=", 3.0),
                Rule("urgent 128 KiB under bulk ÷ idle", subject, "large_times_idle/channels", "<=", large),
                Rule("weights 3:1, error of a share", subject, "share_error", "<=", 0.05),
            )
        ),
    ),
)
