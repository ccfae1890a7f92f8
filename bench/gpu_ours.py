"""aiocomm between two GPUs of two processes, in each mode that a user can choose."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from aiocomm._streams import LEGACY, NO_STREAM

from . import figures, gpu_blocks, gpu_probe, work
from .gpu_driver import Driver, Kernel
from .peers import ours
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .control import Control
    from .gpu_driver import Memory
    from .model import Metrics

_PING, _LOAD, _END = 1, 2, 3  # tags

SPIN_S = 3e-3
"""Of the mode that spins: longer than a copy of 1 GiB, so that no core sleeps, as with NIXL and NCCL."""


async def _one_way(comm: Any, role: int, arrays: list[Memory], count: int, outstanding: int) -> float:
    """Rate in GB/s; `outstanding` messages at once, each of its own array."""
    await comm.barrier()
    start = time.perf_counter()

    def begin(number: int) -> Any:
        array = arrays[number % len(arrays)]
        return comm.send(array, 1) if role == 0 else comm.recv(array, 0)

    await _keep(count, outstanding, begin)
    return arrays[0].nbytes * count / (time.perf_counter() - start) / 1e9


async def _keep(count: int, outstanding: int, begin: Callable[[int], Any]) -> None:
    """Run `count` operations, so many of them at once."""
    open_: deque[Any] = deque()
    for number in range(count):
        if len(open_) == outstanding:
            await open_.popleft()
        open_.append(begin(number))
    for transfer in open_:
        await transfer


async def _one_by_one(comm: Any, role: int, array: Memory, name: str, count: int) -> Metrics:
    """The first message after a pause, and the median of those that follow at once."""
    await comm.barrier()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await (comm.send(array, 1) if role == 0 else comm.recv(array, 0))
        times.append(time.perf_counter() - start)
    return {
        f"gbytes_s_first/{name}": array.nbytes / times[0] / 1e9,
        f"gbytes_s_steady/{name}": array.nbytes / statistics.median(times[1:]) / 1e9,
        f"gbytes_s_slowest/{name}": array.nbytes / max(times[1:]) / 1e9,
    }


async def _parts(comm: Any, role: int, data: Memory, into: Memory) -> Metrics:
    """Where a half round trip of 64 KiB goes: the calls that submit, and from the match to the end."""
    calls: dict[str, list[float]] = {"send": [], "recv": []}
    clock = time.perf_counter

    def timed(name: str, array: Memory) -> Any:
        start = clock()
        transfer = getattr(comm, name)(array, 1 - role, tag=_PING)
        calls[name].append(clock() - start)
        return transfer

    for _ in range(500):
        for name in ("send", "recv") if role == 0 else ("recv", "send"):
            await timed(name, data if name == "send" else into)
    completions = comm.links["cuda"].completions()
    for _ in range(200):
        for name in ("send", "recv") if role == 0 else ("recv", "send"):
            await timed(name, data if name == "send" else into)
    moved: dict[str, list[float]] = {"send": [], "recv": []}
    for _ in range(400):
        done = await anext(completions)
        moved[done.kind].append(done.moved_s)
    await completions.aclose()
    counted = [comm.links["cuda"].statistics().device]
    halves = await _ping_pong(comm, role, data, into, 1000)
    counted.append(comm.links["cuda"].statistics().device)
    grown = {key.partition("small_")[2]: counted[1][key] - counted[0].get(key, 0) for key in counted[1]}
    small = {
        f"part_us/{key[:-3]}": ns / 1e3 / max(1, grown["copies"]) for key, ns in grown.items() if "_ns" in key
    }
    # Described beforehand, and with no stream to look at: what those two cost.
    known = [(x, x.address, x.nbytes, x.driver.device, NO_STREAM, "B", x.shape) for x in (data, into)]
    halves = await _ping_pong(comm, role, *known, 1000)
    await comm.barrier()
    found = {"half_us_known/64KiB": statistics.median(halves) * 1e6}
    # With a stream to wait for, idle as it is.
    queued = [(*one[:4], LEGACY, *one[5:]) for one in known]
    halves = await _ping_pong(comm, role, *queued, 1000)
    await comm.barrier()
    found["half_us_stream/64KiB"] = statistics.median(halves) * 1e6
    return (
        found
        | small
        | {f"part_us/call_{name}": statistics.median(times[:500]) * 1e6 for name, times in calls.items()}
        | {f"part_us/moved_{name}": statistics.median(times) * 1e6 for name, times in moved.items()}
    )


async def _both_ways(
    comm: Any, role: int, data: list[Memory], into: list[Memory], count: int, outstanding: int
) -> float:
    await comm.barrier()
    start = time.perf_counter()
    await asyncio.gather(
        _keep(count, outstanding, lambda number: comm.send(data[number % len(data)], 1 - role)),
        _keep(count, outstanding, lambda number: comm.recv(into[number % len(into)], 1 - role)),
    )
    return data[0].nbytes * count / (time.perf_counter() - start) / 1e9


async def _ping_pong(channel: Any, role: int, data: Memory, into: Memory, count: int) -> list[float]:
    halves = []
    for _ in range(count):
        start = time.perf_counter()
        if role == 0:
            await channel.send(data, 1, tag=_PING)
            await channel.recv(into, 1, tag=_PING)
        else:
            await channel.recv(into, 0, tag=_PING)
            await channel.send(data, 0, tag=_PING)
        halves.append((time.perf_counter() - start) / 2)
    return halves


class _Load:
    """Keeps messages from rank `source` to the other outstanding on a channel until it is stopped."""

    def __init__(self, channel: Any, role: int, source: int, arrays: list[Memory]) -> None:
        self._channel, self._role, self._source, self._arrays = channel, role, source, arrays
        self._running = True
        self.moved = 0
        self.under_way = asyncio.Event()
        self._task = asyncio.create_task(self._send() if role == source else self._receive())

    async def _send(self) -> None:
        other = 1 - self._role
        open_ = deque((self._channel.send(a, other, tag=_LOAD), a) for a in self._arrays)
        while self._running:
            transfer, array = open_.popleft()
            await transfer
            self.moved += array.nbytes
            self.under_way.set()
            open_.append((self._channel.send(array, other, tag=_LOAD), array))
        end = self._arrays[0][:16]
        open_.extend((self._channel.send(end, other, tag=_LOAD), end) for _ in self._arrays)
        for transfer, _ in open_:
            await transfer

    async def _receive(self) -> None:
        open_ = deque((self._channel.recv(a, self._source, tag=_LOAD), a) for a in self._arrays)
        self.under_way.set()
        while open_:
            transfer, array = open_.popleft()
            status = await transfer
            if status.nbytes != 16:
                self.moved += status.nbytes
                open_.append((self._channel.recv(array, self._source, tag=_LOAD), array))

    async def stop(self) -> None:
        self._running = False
        await self._task


async def _rate(comm: Any, loads: list[_Load], role: int, meanwhile: Any) -> tuple[float, Any]:
    """Slowest rate of the loads that rank `role` drives while `meanwhile` runs."""
    for load in loads:
        await load.under_way.wait()
    await comm.barrier()
    start, before = time.perf_counter(), [load.moved for load in loads]
    result = await meanwhile
    elapsed = time.perf_counter() - start
    await comm.barrier()
    rates = [(load.moved - moved) / elapsed / 1e9 for load, moved in zip(loads, before, strict=True)]
    for load in loads:
        await load.stop()
    return min(rates), result


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def measure(comm: Any, role: int, driver: Driver, arguments: Mapping[str, Any]) -> Metrics:
    """Measure everything; role 0's figures count."""
    large, repeats, pings = int(arguments["large"]), int(arguments["repeats"]), int(arguments["pings"])
    import aiocomm

    urgent_data, urgent_into = driver.allocate(64 * KIB), driver.allocate(64 * KIB)
    data, into, more = (driver.allocate(large) for _ in range(3))
    mine = data if role == 0 else into
    found: Metrics = {}
    data.fill(3 + role)
    await _one_way(comm, role, [mine], 2, 1)
    if role == 1 and (into.read(0, 4096) != bytes([3]) * 4096 or into.read(large - 7, 7) != bytes([3]) * 7):
        raise AssertionError("the bytes did not arrive")
    await _one_way(comm, role, [mine, more], 2, 2)
    found["gbytes_s/1GiB"] = await _one_way(comm, role, [mine, more], repeats, 2)
    found["gbytes_s_serial/1GiB"] = await _one_way(comm, role, [mine], repeats, 1)
    found.update(await _one_by_one(comm, role, mine[: min(large, 256 * MIB)], "256MiB", 2 * repeats))
    pieces = [mine[at * 16 * MIB : (at + 1) * 16 * MIB] for at in range(16)]
    await _one_way(comm, role, pieces, 16, 8)
    found["gbytes_s/16MiB"] = await _one_way(comm, role, pieces, 400, 8)
    await _both_ways(comm, role, [data], [into, more], 2, 2)
    found["gbytes_s_both/1GiB"] = await _both_ways(comm, role, [data], [into, more], 4 * repeats, 2)
    found["gbytes_s_both_serial/1GiB"] = await _both_ways(comm, role, [data], [into], 2 * repeats, 1)
    await _ping_pong(comm, role, urgent_data, urgent_into, 200)
    for nbytes, name in ((8, "8B"), (64 * KIB, "64KiB"), (MIB, "1MiB")):
        a, b = (urgent_data, urgent_into) if nbytes <= 64 * KIB else (data, into)
        halves = await _ping_pong(comm, role, a[:nbytes], b[:nbytes], pings)
        found[f"half_us/{name}"] = statistics.median(halves) * 1e6
        found[f"p99_us/{name}"] = figures.percentile(halves, 0.99) * 1e6
    found.update(await _parts(comm, role, urgent_data, urgent_into))
    found.update(await _one_sided(comm, role, [data, more], into, repeats))
    urgent = comm.channel("bench-urgent", priority=aiocomm.Priority.URGENT)
    bulk = comm.channel("bench-bulk")
    await _ping_pong(urgent, role, urgent_data, urgent_into, 100)
    outgoing = [data[at * large // 4 : (at + 1) * large // 4] for at in range(4)]
    incoming = [into[at * large // 4 : (at + 1) * large // 4] for at in range(4)]
    one = outgoing if role == 0 else incoming
    alone, _ = await _rate(comm, [_Load(bulk, role, 0, one)], role, _sleep(0.3))
    kept, halves = await _rate(
        comm,
        [_Load(bulk, role, 0, one)],
        role,
        _ping_pong(urgent, role, urgent_data, urgent_into, pings),
    )
    found["urgent_us/one_way"] = statistics.median(halves) * 1e6
    found["urgent_p99_us/one_way"] = figures.percentile(halves, 0.99) * 1e6
    found["bulk_gbytes_s/alone"], found["bulk_gbytes_s/one_way"] = alone, kept
    found["bulk_kept/one_way"] = kept / alone

    def two_loads() -> list[_Load]:
        return [
            _Load(bulk, role, 0, outgoing if role == 0 else incoming),
            _Load(bulk, role, 1, outgoing if role == 1 else incoming),
        ]

    alone, _ = await _rate(comm, two_loads(), role, _sleep(0.3))
    kept, halves = await _rate(
        comm, two_loads(), role, _ping_pong(urgent, role, urgent_data, urgent_into, pings)
    )
    found["urgent_us/both_ways"] = statistics.median(halves) * 1e6
    found["urgent_p99_us/both_ways"] = figures.percentile(halves, 0.99) * 1e6
    found["bulk_gbytes_s/both_alone"], found["bulk_gbytes_s/both_ways"] = alone, kept
    found["bulk_kept/both_ways"] = kept / alone
    found.update(await _pages(comm, role, data, into))
    found.update(await _gathers(comm, role, data, into, repeats))
    found.update(await _shares(comm, role, one))
    found.update(await _first_sends(comm, role, driver, urgent, urgent_data, urgent_into))
    found.update(await _reduces(comm, data, repeats))
    found.update(await _launches(comm, role, driver, bulk, one))
    return found


async def _one_sided(comm: Any, role: int, arrays: list[Memory], into: Memory, repeats: int) -> Metrics:
    """Rank 0 puts into and gets from memory of rank 1, which does nothing."""
    found: Metrics = {}
    async with comm.register(into) as region:
        remote = await comm.exchange(region, 1 - role)
        await comm.barrier()
        if role == 0:
            for name, call in (("put", comm.put), ("get", lambda x, r: comm.get(r, x))):
                await call(arrays[0], remote)
                await call(arrays[1], remote)
                for outstanding, key in ((2, "gbytes_s"), (1, "gbytes_s_serial")):
                    start = time.perf_counter()
                    await _keep(repeats, outstanding, lambda number: call(arrays[number % 2], remote))  # noqa: B023
                    elapsed = time.perf_counter() - start
                    found[f"{name}_{key}/1GiB"] = into.nbytes * repeats / elapsed / 1e9
        await comm.barrier()
    return found


async def _pages(comm: Any, role: int, data: Memory, into: Memory) -> Metrics:
    """Blocks of pages by put_pages and get_pages, to be held against raw 2-D copies and raw batches."""
    import aiocomm

    found: Metrics = {}
    for name, shape, axis, count, budget in (
        ("strided", gpu_blocks.STRIDED, 1, gpu_blocks.PAGES, None),
        ("scattered", gpu_blocks.SCATTERED, 0, gpu_blocks.BLOCKS, None),
        ("gathered", gpu_blocks.SCATTERED, 0, gpu_blocks.BLOCKS, 8),
    ):
        ours = aiocomm.Pages(data.shaped(*shape), page_axis=axis)
        async with await comm.lease_pages(aiocomm.Pages(into.shaped(*shape), page_axis=axis)) as lease:
            theirs, at = bytearray(lease.handle + into.handle()), len(lease.handle)
            receiving = comm.recv(theirs, 1 - role, tag=_END)
            await comm.send(lease.handle + into.handle(), 1 - role, tag=_END)
            await receiving
            remote = comm.remote_pages(bytes(theirs[:at]))
            give, take = (gpu_blocks.pages(count, shape[axis], seed) for seed in (1, 2))
            await comm.barrier()
            if role == 0:

                def put() -> Any:
                    return comm.put_pages(ours, give, remote, take, sm_budget=budget)  # noqa: B023

                def get() -> Any:
                    return comm.get_pages(remote, take, ours, give, sm_budget=budget)  # noqa: B023

                for key, call, outstanding in (
                    ("pages_one_gbytes_s", put, 1),
                    ("pages_gbytes_s", put, gpu_blocks.AT_ONCE),
                    ("pages_get_gbytes_s", get, gpu_blocks.AT_ONCE),
                ):
                    for _ in range(2):
                        await call()
                    start = time.perf_counter()
                    await _keep(gpu_blocks.CALLS, outstanding, lambda _: asyncio.ensure_future(call()))  # noqa: B023
                    moved = gpu_blocks.CALLS * gpu_blocks.BLOCKS * gpu_blocks.BLOCK
                    found[f"{key}/{name}"] = moved / (time.perf_counter() - start) / 1e9
                if name == "scattered":
                    begin = lambda _: asyncio.ensure_future(put())  # noqa: E731
                    puts = partial(_keep, outstanding=gpu_blocks.AT_ONCE, begin=begin)
                    ratio = await gpu_probe.beside_raw(data, bytes(theirs[at:]), (give, take), puts)
                    found["pages_over_raw/scattered"] = ratio
            await comm.barrier()
    return found


async def _gathers(comm: Any, role: int, data: Memory, into: Memory, repeats: int) -> Metrics:
    """all_gather of two ranks: bytes that each sends, per second; small ones in µs."""
    found: Metrics = {}
    for name, nbytes, count in (("128MiB", 128 * MIB, repeats), ("1MiB", MIB, 300), ("64KiB", 64 * KIB, 300)):
        out, x = into[: 2 * nbytes], data[:nbytes]
        times = []
        for _ in range(count):
            start = time.perf_counter()
            await comm.all_gather(out, x)
            times.append(time.perf_counter() - start)
        median = statistics.median(times[len(times) // 4 :])
        if nbytes >= 16 * MIB:
            found[f"all_gather_gbytes_s/{name}"] = nbytes / median / 1e9
        else:
            found[f"all_gather_us/{name}"] = median * 1e6
    await comm.barrier()
    return found


class Floats:
    """Device memory as float32."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        seen = memory.__cuda_array_interface__
        self.__cuda_array_interface__ = seen | {"typestr": "<f4", "shape": (memory.nbytes // 4,)}


async def _reduces(comm: Any, data: Memory, repeats: int) -> Metrics:
    """all_reduce of float32 in place, in µs."""
    found: Metrics = {}
    for name, nbytes, count in (("256MiB", 256 * MIB, repeats), ("64KiB", 64 * KIB, 300)):
        x = Floats(data[:nbytes])
        times = []
        for _ in range(count):
            start = time.perf_counter()
            await comm.all_reduce(x, sm_budget=16)
            times.append(time.perf_counter() - start)
        found[f"all_reduce_us/{name}"] = statistics.median(times[len(times) // 4 :]) * 1e6
    await comm.barrier()
    return found


async def _shares(comm: Any, role: int, arrays: list[Memory]) -> Metrics:
    heavy, light = comm.channel("bench-heavy", weight=3.0), comm.channel("bench-light", weight=1.0)
    large, small = 16 * MIB, 4 * MIB
    loads = [
        _Load(
            heavy,
            role,
            0,
            [arrays[0][at * large : (at + 1) * large] for at in range(arrays[0].nbytes // large)][:8],
        ),
        _Load(
            light,
            role,
            0,
            [arrays[1][at * small : (at + 1) * small] for at in range(arrays[1].nbytes // small)][:16],
        ),
    ]
    for load in loads:
        await load.under_way.wait()
    await asyncio.sleep(0.05)
    before = [load.moved for load in loads]
    await asyncio.sleep(0.5)
    moved = [load.moved - b for load, b in zip(loads, before, strict=True)]
    await comm.barrier()
    for load in loads:
        await load.stop()
    share = moved[0] / max(1, sum(moved))
    return {"share_of_3": share, "share_error": max(abs(share / 0.75 - 1), abs((1 - share) / 0.25 - 1))}


async def _first_sends(
    comm: Any, role: int, driver: Driver, urgent: Any, data: Memory, into: Memory
) -> Metrics:
    """Half round trips beside messages of memory never seen before, and beside the same ones again."""
    fresh = [driver.allocate(4 * MIB) for _ in range(40)]
    found: Metrics = {}

    async def send_all() -> None:
        for array in fresh:
            await (comm.send(array, 1, tag=_END) if role == 0 else comm.recv(array, 0, tag=_END))

    for name in ("first", "second"):
        await comm.barrier()
        task = asyncio.create_task(send_all())
        halves = await _ping_pong(urgent, role, data, into, 1000)
        await task
        found[f"p99_us/beside_{name}"] = figures.percentile(halves, 0.99) * 1e6
        found[f"max_us/beside_{name}"] = max(halves) * 1e6
    return found


async def _receive_all(comm: Any, arrays: list[Memory], count: int) -> None:
    open_: deque[Any] = deque()
    for number in range(count):
        if len(open_) == 8:
            await open_.popleft()
        open_.append(comm.recv(arrays[number % len(arrays)], 0, tag=_END))
    for transfer in open_:
        await transfer


async def _launches(comm: Any, role: int, driver: Driver, bulk: Any, arrays: list[Memory]) -> Metrics:
    """Kernels per second that the loop's thread launches, alone and beside the busy copy thread."""
    stream = driver.stream()
    launch = Kernel(driver).launcher(stream)

    def count() -> float:
        start = time.perf_counter()
        launched = 0
        while time.perf_counter() - start < 0.03:
            for _ in range(100):
                launch()
            launched += 100
        driver.wait(stream)
        return launched / (time.perf_counter() - start)

    # Submitted in advance: the loop's thread is busy with launching, and the copy thread goes on by itself.
    count_ahead = 1000
    small = [arrays[at // 4][at % 4 * 16 * MIB : (at % 4 + 1) * 16 * MIB] for at in range(16)]
    count()
    alone, beside = [], []
    for _ in range(5):
        await comm.barrier()
        alone.append(count())
        await comm.barrier()
        ahead = [comm.send(small[0], 1, tag=_END) for _ in range(count_ahead)] if role == 0 else []
        await comm.barrier()
        if role == 0:
            found = count()
            # Over too early: nothing was measured.
            beside.append(math.nan if all(transfer.done() for transfer in ahead) else found)
        else:
            await _receive_all(comm, small, count_ahead)
            beside.append(0.0)
        for transfer in ahead:
            await transfer
    kept = [b / a for a, b in zip(alone, beside, strict=True)]
    return {
        "launches_s/alone": statistics.median(alone),
        "launches_s/beside": statistics.median(beside),
        "launches_kept": statistics.median(kept),
    }


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Run one mode."""
    driver = Driver(role % Driver(0).count())

    async def opened() -> Metrics:
        comm = await ours.connect(role, control, "cuda")
        try:
            return await measure(comm, role, driver, arguments)
        finally:
            await comm.aclose()

    return work.run_on(arguments["loop"], opened, SPIN_S)
