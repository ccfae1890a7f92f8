"""Prefill in one process, decode in another: the two workers, and the run in one process to compare.

Rank 0 is the client and prefills; rank 1 decodes. Both ends of a request:

    rank 0                                            rank 1
    order (tokens channel, urgent) ─────────────────► posts a receive per layer for keys and for values,
    prefill: each layer's keys and values             straight into its cache
      as soon as they exist (kv channel, bulk) ─────► decodes the prompt's last byte: each layer's attention
    token messages ◄──────── (tokens channel, urgent) waits for its keys and values, no longer
                                                      then token by token

Neither process awaits the transfers while it computes: they go on meanwhile. Times are `time.perf_counter()`,
which is one clock for all processes of a Linux host. Both runs are measured alike: from the order to the
token's arrival at the client, prefilling all of the prompt but its last byte, then decoding that byte.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

import aiocomm
from aiocomm.demo.blas import limit_threads
from aiocomm.demo.latency import echo
from aiocomm.demo.model import KVCache, LayerKV, ModelConfig, Transformer, finish
from aiocomm.demo.session import (
    DEADLINE_S,
    DECODE,
    ORDER,
    PREFILL,
    Channels,
    open_channels,
    order,
    pack,
    receive,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

__all__ = ["Job", "Run", "SplitRun", "decode_worker", "run_single", "run_split", "stop"]

TOKEN, RESULT = 2, 3
"""Tags on the tokens channel. On the kv channel, layer i's keys have tag 2i and its values 2i + 1."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the decode worker is started with."""

    model: ModelConfig
    capacity: int
    threads: int


@dataclass(frozen=True, slots=True)
class Run:
    """Times of one request, in seconds after it was made, and what it produced.

    `prefilled_s` is when the last layer's keys and values existed, before they were submitted: a stamp after
    the loop would count freeing the model's temporaries, and the last layer's transfer, as prefill.
    """

    prefilled_s: float
    token_s: tuple[float, ...]
    tokens: tuple[int, ...]
    checksum: int

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.token_s[0]

    @property
    def per_token_s(self) -> float | None:
        """Mean time per further token."""
        count = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / count if count else None


@dataclass(frozen=True, slots=True)
class SplitRun(Run):
    """A run over two processes: also when each layer's keys and values were submitted and had arrived."""

    submitted_s: tuple[float, ...]
    arrived_s: tuple[float, ...]
    nbytes: int


def checksum(cache: KVCache, length: int) -> int:
    """CRC-32 of the first `length` positions of every layer."""
    value = 0
    for index in range(len(cache.keys)):
        part = cache.layer(index, 0, length)
        value = zlib.crc32(part.values.data, zlib.crc32(part.keys.data, value))
    return value


def run_single(
    model: Transformer,
    cache: KVCache,
    prompt: NDArray[np.uint8],
    count: int,
    progress: Callable[[], None] = lambda: None,
) -> Run:
    """Prefill and decode in this process; `progress` is called after every layer and token."""
    cache.length = 0
    start = perf_counter()
    prefilled = 0.0
    for _ in model.prefill(prompt[:-1], cache):
        prefilled = perf_counter() - start
        progress()
    token, tokens, times = int(prompt[-1]), [], []
    for _ in range(count):
        token = finish(model.decode(token, cache))
        times.append(perf_counter() - start)
        tokens.append(token)
        progress()
    return Run(prefilled, tuple(times), tuple(tokens), checksum(cache, len(prompt) - 1))


async def run_split(
    comm: aiocomm.Communicator,
    model: Transformer,
    cache: KVCache,
    prompt: NDArray[np.uint8],
    count: int,
    progress: Callable[[], None] = lambda: None,
) -> SplitRun:
    """Prefill here and let rank 1 decode; `progress` is called after every layer and token."""
    channels = open_channels(comm)
    cache.length = 0
    tokens = np.zeros(count, np.int32)
    start = perf_counter()
    replies = [
        channels.tokens.recv(tokens[i : i + 1], src=DECODE, tag=TOKEN, deadline=DEADLINE_S)
        for i in range(count)
    ]
    await order(comm, do="generate", cached=len(prompt) - 1, last=int(prompt[-1]), count=count)
    submitted, sends = [], []
    for part in model.prefill(prompt[:-1], cache):
        submitted.append(perf_counter() - start)
        sends += [
            channels.kv.send(part.keys, dst=DECODE, tag=2 * part.layer, deadline=DEADLINE_S),
            channels.kv.send(part.values, dst=DECODE, tag=2 * part.layer + 1, deadline=DEADLINE_S),
        ]
        progress()
    times = []
    for reply in replies:
        await reply
        times.append(perf_counter() - start)
        progress()
    await asyncio.gather(*sends)
    result = await receive(channels.tokens, DECODE, RESULT)
    return SplitRun(
        submitted[-1],
        tuple(times),
        tuple(tokens.tolist()),
        result["checksum"],
        tuple(submitted),
        tuple(at - start for at in result["arrived"]),
        sum(send.nbytes for send in sends),
    )


async def stop(comm: aiocomm.Communicator) -> None:
    """Let the decode worker return."""
    await order(comm, do="stop")


async def decode_worker(comm: aiocomm.Communicator, job: Job) -> None:
    """Rank 1: serve orders until told to stop."""
    limit_threads(job.threads)
    channels = open_channels(comm)
    model, cache = Transformer(job.model), KVCache(job.model, job.capacity, aiocomm.empty)
    while True:
        what = await receive(channels.tokens, PREFILL, ORDER)
        match what.pop("do"):
            case "generate":
                await _generate(channels, model, cache, **what)
            case "echo":
                await echo(comm, cache, **what)
            case _:
                return


async def _generate(
    channels: Channels, model: Transformer, cache: KVCache, cached: int, last: int, count: int
) -> None:
    arrived = [0.0] * model.config.layers

    async def receive(part: LayerKV) -> None:
        keys = channels.kv.recv(part.keys, src=PREFILL, tag=2 * part.layer, deadline=DEADLINE_S)
        await channels.kv.recv(part.values, src=PREFILL, tag=2 * part.layer + 1, deadline=DEADLINE_S)
        await keys
        arrived[part.layer] = perf_counter()

    cache.length = cached
    token = last
    async with asyncio.TaskGroup() as group:
        arrivals = [
            group.create_task(receive(cache.layer(index, 0, cached))) for index in range(model.config.layers)
        ]
        for _ in range(count):
            token = await _step(model.decode(token, cache), arrivals)
            await channels.tokens.send(
                np.array([token], np.int32), dst=PREFILL, tag=TOKEN, deadline=DEADLINE_S
            )
    result = {"arrived": arrived, "checksum": checksum(cache, cached)}
    await channels.tokens.send(pack(result), dst=PREFILL, tag=RESULT, deadline=DEADLINE_S)


async def _step(step: Generator[LayerKV, None, int], arrivals: list[asyncio.Task[None]]) -> int:
    """Drive one decode step; at each layer's pause wait for that layer's keys and values."""
    while True:
        try:
            part = next(step)
        except StopIteration as end:
            return int(end.value)
        await arrivals[part.layer]
