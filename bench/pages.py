"""Suite `pages`: planning 100,000 page descriptors, and what a hand-over of as many costs the loop.

Metrics:
    ms/plan/CASE: Milliseconds to plan 100,000 descriptors, median; nothing of it was kept from before. CASE
        is `scattered` (as many pages in no order), `lists` (the same as Python lists), `layers` (782 pages of
        128 rows), `sizes` (6,250 pages of 16 tokens into pages of one token), `swapped` (782 pages of 16
        tokens and 8 heads, into heads before tokens).
    ms/put, ms/get: `put_pages` and `get_pages` of the scattered ones, 64 bytes each, to and from another
        process, planned anew; median.
    ms/cpu/put, ms/cpu/get: What of all threads that took of the process that asked: of its cores.
    ms/cpu/put/owner, ms/cpu/get/owner: And of the other process.
    ms/stall: The longest that a task which only gives its turn up waited for the next one, during one put.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from . import session
from .model import Column, Rule, Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .control import Control
    from .model import Metrics, Options

_COUNT, _PAGES, _BYTES = 100_000, 200_000, 64
_CASES = ("scattered", "lists", "layers", "sizes", "swapped")


def _forget() -> None:
    from aiocomm.pages import planner, ranges

    planner._matched.cache_clear()
    ranges._kept.clear()


def _cases() -> dict[str, Callable[[], Any]]:
    from aiocomm.pages import Pages
    from aiocomm.pages.planner import plan

    rng = np.random.default_rng(1)

    def layout(*shape: int, **how: int) -> Any:
        return Pages(np.zeros(shape, np.uint8), **how).layout

    def some(count: int, of: int) -> Any:
        return rng.permutation(of)[:count]

    single, layers = layout(_PAGES, 1), layout(128, 2000, 64, page_axis=1)
    give, take = some(_COUNT, _PAGES), some(_COUNT, _PAGES)
    listed = give.tolist(), take.tolist()
    wide, narrow = layout(20_000, 16, 8, token_axis=1), layout(_PAGES, 1, 8, token_axis=1)
    nhd, hnd = layout(2000, 16, 8, 8, token_axis=1), layout(2000, 8, 16, 8, token_axis=2)
    few, other, large = some(782, 2000), some(782, 2000), some(6250, 20_000)
    return {
        "scattered": lambda: plan(single, give, single, take),
        "lists": lambda: plan(single, listed[0], single, listed[1]),
        "layers": lambda: plan(layers, few, layers, other),
        "sizes": lambda: plan(wide, large, narrow, take),
        "swapped": lambda: plan(nhd, few, hnd, other),
    }


def _plans(repeats: int) -> Metrics:
    found: Metrics = {}
    for name, call in _cases().items():
        taken = []
        for _ in range(repeats):
            _forget()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        found[f"ms/plan/{name}"] = statistics.median(taken) * 1e3
    return found


async def _move(comm: Any, role: int, repeats: int) -> Metrics:
    import aiocomm

    memory = np.full((_PAGES, _BYTES), 1 + role, np.uint8)
    pages = aiocomm.Pages(memory)
    rng = np.random.default_rng(2)
    give, take = (rng.permutation(_PAGES)[:_COUNT] for _ in range(2))
    if role:
        lease = await comm.lease_pages(pages)
        await comm.send(np.frombuffer(lease.handle, np.uint8), dst=0)
        for _ in range(2 * (repeats + 1)):
            await comm.recv(bytearray(1), src=0)
            start = time.process_time()
            await comm.recv(bytearray(1), src=0)
            await comm.send(np.array([time.process_time() - start]), dst=0)
        if not (memory[take] == 1).all():
            raise RuntimeError("what was put is not there")
        return {}
    remote = comm.remote_pages((await comm.recv_array(src=1)).tobytes())
    back = aiocomm.Pages(np.zeros_like(memory))
    calls = {
        "put": lambda: comm.put_pages(pages, give, remote, take),
        "get": lambda: comm.get_pages(remote, take, back, give),
    }
    found: dict[str, list[float]] = {}
    for number in range(repeats + 1):
        for name, call in calls.items():
            _forget()
            await comm.send(b"x", dst=1)
            start, of_cores = time.perf_counter(), time.process_time()
            await call()
            taken = time.perf_counter() - start, time.process_time() - of_cores
            await comm.send(b"x", dst=1)
            owner = float((await comm.recv_array(src=1))[0])
            if number:  # the first touches all memory
                for what, value in zip(
                    (f"ms/{name}", f"ms/cpu/{name}", f"ms/cpu/{name}/owner"), (*taken, owner), strict=True
                ):
                    found.setdefault(what, []).append(value * 1e3)
    if not np.array_equal(back.arrays[0][give], memory[give]):
        raise RuntimeError("what was got is not what was put")
    return {what: statistics.median(values) for what, values in found.items()} | await _stall(calls["put"])


async def _stall(put: Callable[[], Any]) -> Metrics:
    waits: list[float] = []

    async def give_way() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0)
            waits.append(time.perf_counter() - start)

    _forget()
    ticking = asyncio.ensure_future(give_way())
    await asyncio.sleep(0)
    await put()
    ticking.cancel()
    return {"ms/stall": max(waits) * 1e3}


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Plan in one process, put from it to the other."""
    repeats = arguments["repeats"]
    planned = _plans(repeats) if role == 0 else {}
    return {**planned, **session.within(role, control, arguments, partial(_move, repeats=repeats))}


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    return session.run(f"{__name__}:child", name, options, repeats=3 if options.quick else 9)[0]


_COLUMNS = (
    *(Column(f"ms/plan/{case}", f"plan\n{case}, ms", 2) for case in _CASES),
    Column("ms/put", "put_pages\nms", 1),
    Column("ms/cpu/put", "of cores\nhere, ms", 1),
    Column("ms/cpu/put/owner", "there\nms", 1),
    Column("ms/get", "get_pages\nms", 1),
    Column("ms/cpu/get", "of cores\nhere, ms", 1),
    Column("ms/cpu/get/owner", "there\nms", 1),
    Column("ms/stall", "loop held\nat most, ms", 2),
)

SUITE = Suite(
    "pages",
    "100,000 page descriptors: planned, and handed over between two processes",
    session.subjects(("aiocomm-shm",)),
    measure,
    lambda options: _COLUMNS,
    (
        *(
            Rule(f"plan of 100,000 descriptors, {case}, ms", "aiocomm-shm", f"ms/plan/{case}", "<=", 5.0)
            for case in _CASES
            if case != "lists"
        ),
        Rule("cores' time, 100,000 descriptors put, ms", "aiocomm-shm", "ms/cpu/put", "<=", 10.0),
    ),
)
