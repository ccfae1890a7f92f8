"""Suite `gpu-ring`: all GPUs of a host at once, one process each, every one sending to the next.

Raw copies and ours are taken by the same processes, one after the other: what differs is the runtime.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import TYPE_CHECKING, Any

from . import pair, work
from .gpu_driver import Driver, missing
from .model import Column, Rule, Subject, Suite
from .sizes import GIB, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_NAME = "aiocomm-gpu"
_SMALL = 64 * KIB


def _subjects(options: Options) -> list[Subject]:
    chosen = not options.peers or _NAME in options.peers
    return [Subject(_NAME, "ours", "nvlink", missing())] if chosen else []


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    arguments = {"large": 256 * MIB if options.quick else GIB, "repeats": 6 if options.quick else 12}
    found: Metrics = pair.run(f"{__package__}.gpu_ring:child", arguments, options.timeout_s)[0]
    return found


async def _handles(comm: Any, mine: bytes) -> bytes:
    """Each rank's handle goes to the one before it, which copies into that memory."""
    theirs = bytearray(len(mine))
    receiving = comm.recv(theirs, (comm.rank + 1) % comm.size)
    await comm.send(mine, (comm.rank - 1) % comm.size)
    await receiving
    return bytes(theirs)


async def ring(comm: Any, large: int, repeats: int) -> Metrics:
    """What every rank runs; rates are those of the slowest rank, in GB/s that each sends."""
    import numpy as np

    driver = Driver(comm.rank)
    data, into = driver.allocate(large), driver.allocate(large)
    found: Metrics = {}

    async def slowest(rate: float) -> float:
        rates = np.zeros(comm.size)
        await comm.all_gather(rates, np.array([rate]))
        return float(rates.min())

    peer, stream = driver.open(await _handles(comm, into.handle())), driver.stream()
    driver.copy(peer, data.address, large, stream)
    driver.wait(stream)
    await comm.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        driver.copy(peer, data.address, large, stream)
    driver.wait(stream)
    found["raw_gbytes_s/1GiB"] = await slowest(large * repeats / (time.perf_counter() - start) / 1e9)

    following, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    async def turn() -> None:
        receiving = comm.recv(into, before)
        await comm.send(data, following)
        await receiving

    data.fill(comm.rank + 1)
    await turn()
    if into.read(large - 7, 7) != bytes([before + 1]) * 7:
        raise AssertionError("the bytes did not arrive")
    await comm.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        await turn()
    found["gbytes_s/1GiB"] = await slowest(large * repeats / (time.perf_counter() - start) / 1e9)
    found["of_raw/1GiB"] = found["gbytes_s/1GiB"] / found["raw_gbytes_s/1GiB"]

    part = large // comm.size
    for name, nbytes, count in (("large", part, 2 * repeats), ("64KiB", _SMALL, 300)):
        out, x = into[: nbytes * comm.size], data[:nbytes]
        times = []
        for _ in range(count):
            start = time.perf_counter()
            await comm.all_gather(out, x)
            times.append(time.perf_counter() - start)
        median = statistics.median(times[len(times) // 4 :])
        if name == "large":
            found["all_gather_gbytes_s/bus"] = (comm.size - 1) * nbytes / median / 1e9
        else:
            found["all_gather_us/64KiB"] = median * 1e6
    await comm.barrier()
    return found


async def _all(large: int, repeats: int) -> Metrics:
    import aiocomm

    count = Driver(0).count()
    world = aiocomm.spawn(ring, count - 1, large, repeats, links=("shm", "cuda"))
    async with asyncio.timeout(120), world as comm:
        return {"gpus": float(count)} | await ring(comm, large, repeats)


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Role 0 starts the others by itself."""
    if role:
        return {}
    return work.run_on("asyncio", lambda: _all(int(arguments["large"]), int(arguments["repeats"])))


_COLUMNS = (
    Column("gpus", "GPUs", 0, "neither"),
    Column("raw_gbytes_s/1GiB", "raw ring\nGB/s each", 1, "higher"),
    Column("gbytes_s/1GiB", "ours\nGB/s each", 1, "higher"),
    Column("of_raw/1GiB", "÷ raw", 3, "higher"),
    Column("all_gather_gbytes_s/bus", "all_gather\nbus GB/s", 1, "higher"),
    Column("all_gather_us/64KiB", "of 64 KiB\nµs", 1),
)

SUITE = Suite(
    "gpu-ring",
    "all GPUs of a host at once",
    _subjects,
    measure,
    lambda options: _COLUMNS,
    (Rule("each to the next ÷ raw copies", _NAME, "of_raw/1GiB", ">=", 0.97),),
)
