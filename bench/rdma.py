"""Suite `rdma`: the rdma link beside perftest, from one device of this machine to another, over one rail.

With soft-RoCE in an emulated machine (`python tests/rdma_vm/run.py -- aiocomm bench rdma`) only ratios mean
anything: perftest runs in the same round. Each of its figures stands under every name that it is compared by.

Metrics:
    mib_s/send/SIZE, mib_s/put/SIZE: 2^20 bytes per second, `_WINDOW` messages outstanding, from the first
        post until the last is awaited; perftest: ib_write_bw of 1 MiB.
    mib_s/get/SIZE: The same of reads; perftest: ib_read_bw of 1 MiB.
    native_us/8B: Half of a round trip of two engines that poll, from a send's posting to its receive's
        completion, no Python between; median. perftest: ib_write_lat, of two polling loops.
    half_us/8B: The same by `await`. Loops that spin have a core each; those that sleep share one: what waking
        another core costs is neither's.
    spread_us/8B: By `await`, each loop that sleeps wherever the kernel puts it.
    events_us/8B: perftest: half of a round trip of ib_send_lat that sleeps for its completions, both ends on
        one core: what devices, kernel and verbs alone cost a loop that sleeps.
    p99_us/idle, p99_us/bulk: Half round trips of 1 KiB by `await` on an urgent channel, alone and beside
        16 MiB messages, four outstanding; `p99_times_idle` is their ratio.

Our arrays are those of `aiocomm.empty()`, which stay registered, as perftest's do.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import figures, pair, perftest, qos, work
from .model import Column, Rule, Subject, Suite
from .peers import ours
from .sizes import MIB, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_DEVICES: Final = Path("/sys/class/infiniband")
_GUEST: Final = ("rxea0", "rxeb0")
_SIZES: Final = (MIB, 16 * MIB)
_WINDOW: Final = 4
_WARM: Final = 20
_ROUND_TRIPS: Final = 300
_NATIVE_TRIPS: Final = 2000
_MIBS: Final = 96  # per figure
_SPIN_S: Final = 5e-3  # some half trips of an emulated machine


def devices() -> tuple[str, str] | None:
    """The device of each end: those of the virtual machine's first rail, else the first one for both."""
    found = sorted(path.name for path in _DEVICES.glob("*"))
    if set(_GUEST) <= set(found):
        return _GUEST
    return (found[0], found[0]) if found else None


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure every figure in turn; role 0 sends, puts and gets."""
    link = arguments["link"]
    if link == "rdma":
        os.environ["AIOCOMM_RDMA_DEVICES"] = arguments["devices"][role]

    async def spinning() -> Metrics:
        comm = await ours.connect(role, control, link)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[role % len(cores)]})
        found = {"half_us/8B": await _ping_pong(comm, role) * 1e6}
        await ours.Ours(comm).finish(control)
        return found

    async def sleeping() -> Metrics:
        comm = await ours.connect(role, control, link)
        found = await _latency(comm, role, control)
        if link == "rdma":
            for nbytes in _SIZES:
                count = max(_WINDOW, arguments["mibs"] * MIB // nbytes)
                found |= await _bulk(comm, role, control, nbytes, count)
            found |= await _urgent(comm, role, arguments["trips"])
        await ours.Ours(comm).finish(control)
        return found

    if arguments["spins"]:
        return work.run_on("aiocomm", spinning, _SPIN_S)
    return work.run_on("asyncio", sleeping)


async def _latency(comm: Any, role: int, control: Control) -> Metrics:
    spread = await _ping_pong(comm, role)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread alone
    together = await _ping_pong(comm, role)
    os.sched_setaffinity(0, cores)
    await asyncio.to_thread(control.swap, "native")
    native = comm._engine.half_trips(1 - role, 8, _NATIVE_TRIPS, role == 0)[_WARM:]
    return {
        "half_us/8B": together * 1e6,
        "spread_us/8B": spread * 1e6,
        "native_us/8B": statistics.median(native) * 1e6,
    }


async def _ping_pong(comm: Any, role: int) -> float:
    data, halves = np.ones(8, np.uint8), []
    for number in range(_WARM + _ROUND_TRIPS):
        start = time.perf_counter()
        if role == 0:
            await comm.send(data, dst=1)
            await comm.recv(data, src=1)
        else:
            await comm.recv(data, src=0)
            await comm.send(data, dst=0)
        if number >= _WARM:
            halves.append((time.perf_counter() - start) / 2)
    return statistics.median(halves)


async def _urgent(comm: Any, role: int, count: int) -> Metrics:
    import aiocomm

    urgent = comm.channel("bench-urgent", priority=aiocomm.Priority.URGENT)
    bulk = comm.channel("bench-bulk")
    await qos.ping_pong(urgent, role, _WARM)
    idle = figures.percentile(await qos.ping_pong(urgent, role, count), 0.99)
    halves, rate = await qos.under_load(urgent, bulk, role, count)
    busy = figures.percentile(halves, 0.99)
    return {
        "p99_us/idle": idle * 1e6,
        "p99_us/bulk": busy * 1e6,
        "p99_times_idle": busy / idle,
        "mib_s/bulk": rate * 1e9 / MIB,
    }


async def _bulk(comm: Any, role: int, control: Control, nbytes: int, count: int) -> Metrics:
    import aiocomm

    def full(value: int) -> Any:
        array = aiocomm.empty(nbytes, np.uint8)
        array.fill(value)
        return array

    buffers = [full(role + 1) for _ in range(_WINDOW)]
    found: Metrics = {}

    async def together() -> float:
        await asyncio.to_thread(control.swap, "ready")
        return time.perf_counter()

    def rate(start: float) -> float:
        return nbytes * count / MIB / (time.perf_counter() - start)

    async def turns(post: Any) -> None:
        """Keep `_WINDOW` open: each waits for the one that used its buffer before."""
        open_ = [post(buffer) for buffer in buffers]
        for number in range(count):
            await open_[number % _WINDOW]
            if number + _WINDOW < count:
                open_[number % _WINDOW] = post(buffers[number % _WINDOW])

    start = await together()
    await turns((lambda x: comm.send(x, dst=1)) if role == 0 else (lambda x: comm.recv(x, src=0)))
    found[f"mib_s/send/{show(nbytes)}"] = rate(start)
    if role == 1 and any(buffer[0] != 1 or buffer[-1] != 1 for buffer in buffers):
        raise RuntimeError("what was received is not what was sent")
    region = comm.register(full(3))
    remote = await comm.exchange(region, with_=1 - role)
    for name in ("put", "get"):
        start = await together()
        if role == 0:
            put = name == "put"
            await turns((lambda x: comm.put(x, remote)) if put else (lambda x: comm.get(remote, x)))
            found[f"mib_s/{name}/{show(nbytes)}"] = rate(start)
        await together()
    if role == 0 and any(buffer[-1] != 1 for buffer in buffers):
        raise RuntimeError("what was read is not what was put")
    await region.aclose()
    return found


def _perftest(between: tuple[str, str], options: Options) -> Metrics:
    client, server = between
    count = "50" if options.quick else "200"
    write = perftest.run("ib_write_bw", server, client, "-s", str(MIB), "-n", count)
    read = perftest.run("ib_read_bw", server, client, "-s", str(MIB), "-n", count)
    latency = perftest.run("ib_write_lat", server, client, "-s", "8", "-n", "1000")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    events = perftest.run("ib_send_lat", server, client, "-s", "8", "-n", "1000", "-e")
    os.sched_setaffinity(0, cores)
    typical = "t_typical[usec]"
    found = {"native_us/8B": latency.values[typical], "events_us/8B": events.values[typical]}
    for nbytes in _SIZES:
        for name, row in (("send", write), ("put", write), ("get", read)):
            found[f"mib_s/{name}/{show(nbytes)}"] = row.values["BW average[MiB/sec]"]
    return found


def subjects(options: Options) -> list[Subject]:
    """perftest, the link, and tcp for the latency of `await`."""
    from aiocomm_native import _core

    here = "" if devices() else "no RDMA device: python tests/rdma_vm/run.py -- aiocomm bench rdma"
    built = (
        ""
        if "rdma" in _core.available_links()
        else "this build has no rdma link: apt-get install libibverbs-dev"
    )
    listed = [
        Subject("perftest", "raw", "rdma", here or perftest.missing()),
        Subject("aiocomm-rdma", "ours", "rdma", built or here),
        Subject("aiocomm-rdma-spin", "ours", "rdma", built or here),
        Subject("aiocomm-tcp", "ours", "tcp", here),
        Subject("aiocomm-tcp-spin", "ours", "tcp", here),
    ]
    return [subject for subject in listed if not options.peers or subject.name in options.peers]


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    between = devices()
    if between is None:
        raise RuntimeError("no RDMA device")
    if name == "perftest":
        return _perftest(between, options)
    link = name.split("-")[1]
    mibs, trips = (_MIBS // 3, 200) if options.quick else (_MIBS, 500)
    spins = name.endswith("-spin")
    arguments = {"link": link, "spins": spins, "devices": between, "mibs": mibs, "trips": trips}
    return pair.run(f"{__name__}:child", arguments, options.timeout_s)[0]


_FIGURES: Final = tuple((kind, n) for kind in ("send", "put", "get") for n in _SIZES)
_COLUMNS: Final = (
    *(Column(f"mib_s/{kind}/{show(n)}", f"{kind}\n{show(n)}, MiB/s", 1, "higher") for kind, n in _FIGURES),
    Column("native_us/8B", "half trip\n8 B, µs", 1),
    Column("half_us/8B", "by await", 1),
    Column("events_us/8B", "by events,\none core", 1),
    Column("spread_us/8B", "by await,\nany core", 1),
    Column("p99_us/idle", "urgent\np99, µs", 1),
    Column("p99_us/bulk", "under\nbulk p99", 1),
    Column("p99_times_idle", "p99 ÷\nidle", 2),
)
_PERFTEST: Final = ("perftest",)

SUITE = Suite(
    "rdma",
    "the rdma link beside perftest, over one rail",
    subjects,
    measure,
    lambda options: _COLUMNS,
    (
        *(
            Rule(f"{kind} {show(n)}", "aiocomm-rdma", f"mib_s/{kind}/{show(n)}", ">=", 0.9, _PERFTEST)
            for kind, n in _FIGURES
        ),
        Rule("8 B half trip without Python", "aiocomm-rdma", "native_us/8B", "<=", 1.3, _PERFTEST),
        Rule("urgent p99 under bulk ÷ idle p99", "aiocomm-rdma", "p99_times_idle", "<=", 3.0),
        Rule("8 B by await, spinning", "aiocomm-rdma-spin", "half_us/8B", "<=", 1.0, ("aiocomm-tcp-spin",)),
        Rule("8 B by await, sleeping", "aiocomm-rdma", "half_us/8B", "<=", 1.0, ("aiocomm-tcp",)),
    ),
)
