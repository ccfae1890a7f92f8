"""Suite `gpu-mixed`: messages with host memory at one end, or with a network between, against the slower leg.

Each leg is measured in the same processes: pinned copies to and from the device, and host memory to host
memory over the link that carries the message. `shared` is an array of `aiocomm.empty()`, which copy engines
reach by themselves. Scattered pages, put from rank 0, or where they come from `shared` got by rank 1, beside
the same from host to host.

Metrics of pages (of one call, its median):
    pages_gbytes_s/WAY: of 32 KiB.
    pages_us/WAY: microseconds for a page of 1 KiB.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gpu_blocks, pair, work
from .gpu_driver import Driver
from .model import Column, Rule, Subject, Suite
from .peers import ours
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_NAME = "aiocomm-gpu"
_Way = tuple[str, str, str, str, tuple[str, ...]]
# Name, what is sent, what is received into, the pair's link, and the legs between.
_WAYS: tuple[_Way, ...] = (
    ("gpu_to_host", "gpu", "host", "shm", ("out", "shm")),
    ("host_to_gpu", "host", "gpu", "shm", ("shm", "in")),
    ("gpu_to_shared", "gpu", "shared", "shm", ("out",)),
    ("shared_to_gpu", "shared", "gpu", "shm", ("in",)),
    ("gpu_to_gpu_tcp", "gpu", "gpu", "tcp", ("out", "tcp", "in")),
    ("gpu_to_host_tcp", "gpu", "host", "tcp", ("out", "tcp")),
    ("host_to_gpu_tcp", "host", "gpu", "tcp", ("tcp", "in")),
)
_PAGED: tuple[_Way, ...] = (*_WAYS, ("host_to_host", "host", "host", "shm", ("shm",)))
_WARM = 8  # messages before those that are measured: what they lie in is pinned meanwhile
_WARM_S = 0.5  # the same of pages, which are tried to be copied directly from time to time
_PAGES, _OF = 2048, 4096  # that are put, and that an array has


def _missing() -> str:
    try:
        return "" if Driver(0).count() else "no GPU"
    except (AttributeError, OSError) as error:
        return f"no GPU: {error}"


def _subjects(options: Options) -> list[Subject]:
    return (
        [Subject(_NAME, "ours", "staged", _missing())] if not options.peers or _NAME in options.peers else []
    )


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    arguments = {"nbytes": 256 * MIB, "repeats": 6 if options.quick else 12}
    found: Metrics = pair.run(f"{__package__}.gpu_mixed:child", arguments, options.timeout_s)[0]
    return found


def _leg(driver: Driver, address: int, nbytes: int, towards: str) -> float:
    """GB/s of pinned copies of this device, in pieces as large as a message's."""
    stream, pinned = driver.stream(), driver.pinned(nbytes)
    ends = (pinned, address) if towards == "out" else (address, pinned)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        driver.copy(*ends, nbytes, stream)
        driver.wait(stream)
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times[1:]) / 1e9


async def _time(comm: Any, role: int, array: Any) -> float:
    """Of a message from rank 0 to rank 1, until both know that it is there."""
    await comm.barrier()
    start = time.perf_counter()
    await (comm.send(array, 1, synchronous=True) if role == 0 else comm.recv(array, 0))
    return time.perf_counter() - start


async def _pages(comm: Any, role: int, array: Any, nbytes: int, repeats: int, got: bool) -> float:
    """Seconds of a put of scattered pages of so many bytes from rank 0 to rank 1, or of a get by rank 1."""
    import aiocomm

    shaped = (
        array.shaped(_OF, nbytes) if hasattr(array, "shaped") else array[: _OF * nbytes].reshape(_OF, nbytes)
    )
    pages = aiocomm.Pages(shaped)
    if role != int(got):
        async with await comm.lease_pages(pages) as lease:
            await comm.send(lease.handle, 1 - role)
            return float(*await comm.recv_array(1 - role))
    remote = comm.remote_pages((await comm.recv_array(1 - role)).tobytes())
    give, take = (gpu_blocks.pages(_PAGES, _OF, seed) for seed in (1, 2))
    times = []
    until = time.perf_counter() + _WARM_S
    while len(times) < repeats or time.perf_counter() < until:
        start = time.perf_counter()
        await (
            comm.get_pages(remote, give, pages, take) if got else comm.put_pages(pages, give, remote, take)
        )
        times.append(time.perf_counter() - start)
    took = statistics.median(times[-repeats:])
    await comm.send(np.array([took]), 1 - role)
    return took


async def _all(role: int, control: Control, driver: Driver, arguments: Mapping[str, Any]) -> Metrics:
    nbytes, repeats = int(arguments["nbytes"]), int(arguments["repeats"])
    import aiocomm

    gpu = driver.allocate(nbytes)
    arrays: dict[str, Any] = {"gpu": gpu, "host": np.ones(nbytes, np.uint8)}
    arrays["shared"] = aiocomm.empty(nbytes, np.uint8)
    arrays["shared"][:] = 1
    mine = _leg(driver, gpu.address, nbytes, "in" if role else "out")
    theirs = control.swap(mine)
    legs = {"out": theirs if role else mine, "in": mine if role else theirs}
    found: Metrics = {}
    for carrier, links in (("shm", ("cuda",)), ("tcp", ("tcp", "cuda"))):
        comm = await ours.connect(role, control, *links)
        try:
            leg_times = []
            for name, source, into, link, between in _WAYS:
                if link != carrier:
                    continue
                array = arrays[into if role else source]
                for _ in range(_WARM):
                    await _time(comm, role, array)
                # In turns with the leg of the link alone, whose rate drifts.
                times, ratios = [], []
                for _ in range(repeats):
                    alone = await _time(comm, role, arrays["host"])
                    times.append(await _time(comm, role, array))
                    leg_times.append(alone)
                    took = legs | {carrier: nbytes / alone / 1e9}
                    slower = max(nbytes / took[leg] / 1e9 for leg in between)
                    ratios.append(slower / times[-1])
                found[f"gbytes_s/{name}"] = nbytes / statistics.median(times) / 1e9
                found[f"of_leg/{name}"] = statistics.median(ratios)
            found[f"leg_gbytes_s/{carrier}"] = nbytes / statistics.median(leg_times) / 1e9
            for name, source, into, link, _ in _PAGED:
                if link == carrier:
                    array, got = arrays[into if role else source], source == "shared"
                    large = await _pages(comm, role, array, 32 * KIB, repeats, got)
                    small = await _pages(comm, role, array, KIB, repeats, got)
                    found[f"pages_gbytes_s/{name}"] = _PAGES * 32 * KIB / max(large, 1e-9) / 1e9
                    found[f"pages_us/{name}"] = small / _PAGES * 1e6
        finally:
            await comm.aclose()
    return found | {f"leg_gbytes_s/{leg}": rate for leg, rate in legs.items()}


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Measure each way; role 0's figures count."""
    driver = Driver(role % Driver(0).count())
    return work.run_on("asyncio", lambda: _all(role, control, driver, arguments))


_COLUMNS = (
    *(Column(f"leg_gbytes_s/{leg}", f"leg {leg}\nGB/s", 1, "higher") for leg in ("out", "in", "shm", "tcp")),
    *(
        Column(f"{metric}/{name}", f"{name.replace('_', ' ')}\n{unit}", digits, "higher")
        for name, *_ in _WAYS
        for metric, unit, digits in (("gbytes_s", "GB/s", 1), ("of_leg", "÷ slower leg", 2))
    ),
    *(
        Column(f"pages_gbytes_s/{name}", f"{name.replace('_', ' ')}\npages 32 KiB, GB/s", 1, "higher")
        for name, *_ in _PAGED
    ),
    *(Column(f"pages_us/{name}", f"{name.replace('_', ' ')}\npage of 1 KiB, µs") for name, *_ in _PAGED),
)

SUITE = Suite(
    "gpu-mixed",
    "GPU memory and host memory, or another host",
    _subjects,
    measure,
    lambda options: _COLUMNS,
    tuple(
        # A raw copy, which nobody has to be told of, is a harder measure than a link.
        Rule(
            f"{name.replace('_', ' ')} ÷ slower leg",
            _NAME,
            f"of_leg/{name}",
            ">=",
            0.85 if "shared" in name else 0.9,
        )
        for name, *_ in _WAYS
    ),
)
