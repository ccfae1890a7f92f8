"""Urgent latency while bulk flows: a ping-pong beside a stream of keys and values that never pauses.

Idle; on the urgent channel beside the bulk; and on the bulk's own channel, as it would be without channels. A
whole request's keys and values are always queued. Two sizes, because messages of at most `eager_max` (64 KiB)
are handed over at once and never queue behind data, in whichever channel: above it the channel decides.

Idle pings also pay for waking a sleeping loop, which bulk keeps awake: a median below idle is no error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from aiocomm.demo.session import DEADLINE_S, DECODE, PREFILL, open_channels, order

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiocomm
    from aiocomm.demo.model import Floats, KVCache

__all__ = ["PLAN", "Case", "Latency", "echo", "measure"]

Case: TypeAlias = Literal["idle", "urgent", "same"]
PING, PONG, BULK = 1 << 20, (1 << 20) + 1, (1 << 20) + 2
SMALL, LARGE = 1 << 10, 128 << 10
PLAN: tuple[tuple[int, Case], ...] = (
    (SMALL, "idle"),
    (SMALL, "urgent"),
    (LARGE, "idle"),
    (LARGE, "urgent"),
    (LARGE, "same"),
)
_LAST = 1
"""First byte of the ping that ends the ping-pong. A bulk message of one element ends the bulk."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Half round trips of the urgent message, in seconds, and what the bulk moved beside it."""

    nbytes: int
    case: Case
    half_trips_s: tuple[float, ...]
    bulk_bytes_per_s: float

    def percentile(self, percent: float) -> float:
        """Half round trip in seconds that `percent` of the pings stayed within."""
        return float(np.percentile(self.half_trips_s, percent))


def planes(cache: KVCache, length: int) -> list[Floats]:
    """The messages of one request's keys and values."""
    parts = [cache.layer(index, 0, length) for index in range(len(cache.keys))]
    return [array for part in parts for array in (part.keys, part.values)]


async def measure(
    comm: aiocomm.Communicator,
    cache: KVCache,
    length: int,
    nbytes: int,
    case: Case,
    rounds: int,
    limit_s: float,
) -> Latency:
    """Rank 0: ping `rounds` times, or for `limit_s` seconds if that is over sooner."""
    await order(comm, do="echo", length=length, nbytes=nbytes, case=case)
    stopping, flowing = asyncio.Event(), asyncio.Event()
    moved = 0

    async def pump() -> None:
        nonlocal moved
        channel = open_channels(comm).kv
        messages = planes(cache, length)
        queued = deque(channel.send(m, dst=DECODE, tag=BULK, deadline=DEADLINE_S) for m in messages)
        while not stopping.is_set():
            for message in messages:
                sent = queued.popleft()
                await sent
                moved += sent.nbytes
                flowing.set()
                queued.append(channel.send(message, dst=DECODE, tag=BULK, deadline=DEADLINE_S))
        end = messages[0].reshape(-1)[:1]
        queued.extend(channel.send(end, dst=DECODE, tag=BULK, deadline=DEADLINE_S) for _ in messages)
        await asyncio.gather(*queued)

    async def ping() -> tuple[list[float], float]:
        channels = open_channels(comm)
        channel = channels.kv if case == "same" else channels.tokens
        out, back = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        start, before, times = perf_counter(), moved, []
        for left in reversed(range(rounds)):
            begin = perf_counter()
            out[0] = _LAST if left == 0 or begin - start > limit_s else 0
            reply = channel.recv(back, src=DECODE, tag=PONG, deadline=DEADLINE_S)
            await channel.send(out, dst=DECODE, tag=PING, deadline=DEADLINE_S)
            await reply
            times.append((perf_counter() - begin) / 2)
            if out[0] == _LAST:
                break
        return times, (moved - before) / (perf_counter() - start)

    async with asyncio.TaskGroup() as group:
        if case != "idle":
            group.create_task(pump())
            await flowing.wait()
        times, rate = await ping()
        stopping.set()
    return Latency(nbytes, case, tuple(times), rate)


async def echo(comm: aiocomm.Communicator, cache: KVCache, length: int, nbytes: int, case: Case) -> None:
    """Rank 1: the other half of `measure`. The bulk overwrites the cache."""
    channels = open_channels(comm)

    async def drain() -> None:
        targets = planes(cache, length)
        queued = deque(channels.kv.recv(t, src=PREFILL, tag=BULK, deadline=DEADLINE_S) for t in targets)
        again: Iterator[Floats] = iter(())
        ended = False
        while queued:
            status = await queued.popleft()
            ended = ended or status.nbytes == targets[0].itemsize
            if not ended:
                target = next(again, None)
                if target is None:
                    again = iter(targets)
                    target = next(again)
                queued.append(channels.kv.recv(target, src=PREFILL, tag=BULK, deadline=DEADLINE_S))

    async def answer() -> None:
        channel = channels.kv if case == "same" else channels.tokens
        message = np.zeros(nbytes, np.uint8)
        while message[0] != _LAST:
            await channel.recv(message, src=PREFILL, tag=PING, deadline=DEADLINE_S)
            await channel.send(message, dst=PREFILL, tag=PONG, deadline=DEADLINE_S)

    async with asyncio.TaskGroup() as group:
        if case != "idle":
            group.create_task(drain())
        group.create_task(answer())
