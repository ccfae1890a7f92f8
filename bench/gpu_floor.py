"""Raw copies between two GPUs of two processes: what nothing above the copy engines can beat."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from . import gpu_blocks, gpu_probe
from .gpu_driver import Driver
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics


def _blocks(
    driver: Driver, own: int, peer: int, stream: Any, control: Control, role: int
) -> dict[str, float]:
    """Blocks of pages: as 2-D copies where they have a stride in common, else as a batch."""
    control.swap("blocks")
    found = {}
    if role == 0:
        layers, available, block = gpu_blocks.STRIDED
        give = gpu_blocks.pages(gpu_blocks.PAGES, available, 1)
        take = gpu_blocks.pages(gpu_blocks.PAGES, available, 2)
        pitch = available * block

        def strided() -> None:
            for a, b in zip(give, take, strict=True):
                driver.copy_rows((peer + b * block, pitch), (own + a * block, pitch), block, layers, stream)

        give_all = gpu_blocks.pages(gpu_blocks.BLOCKS, gpu_blocks.SCATTERED[0], 1)
        take_all = gpu_blocks.pages(gpu_blocks.BLOCKS, gpu_blocks.SCATTERED[0], 2)
        to, source = ([at + n * block for n in ns] for at, ns in ((peer, take_all), (own, give_all)))
        scattered = driver.batch(to, source, block, stream)

        for name, queue in (("strided", strided), ("scattered", scattered)):
            queue()
            for calls, key in ((1, "pages_one_gbytes_s"), (gpu_blocks.CALLS, "pages_gbytes_s")):
                driver.wait(stream)
                start = time.perf_counter()
                for _ in range(gpu_blocks.CALLS // calls):
                    for _ in range(calls):
                        queue()
                    driver.wait(stream)
                moved = gpu_blocks.CALLS * gpu_blocks.BLOCKS * block
                found[f"{key}/{name}"] = moved / (time.perf_counter() - start) / 1e9
    control.swap("blocks done")
    return found


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Push, first one way, then both ways at once."""
    large = int(arguments["large"])
    driver = Driver(role % Driver(0).count())
    own, into = driver.allocate(large), driver.allocate(large)
    peer = driver.open(control.swap(into.handle()))
    stream = driver.stream()
    found: Metrics = {}

    def rate(nbytes: int, count: int) -> float:
        driver.copy(peer, own.address, nbytes, stream)
        driver.wait(stream)
        start = time.perf_counter()
        for number in range(count):
            driver.copy(peer + number % (large // nbytes) * nbytes, own.address, nbytes, stream)
        driver.wait(stream)
        return nbytes * count / (time.perf_counter() - start) / 1e9

    for name, nbytes, count in (("1GiB", large, arguments["repeats"]), ("16MiB", 16 * MIB, 200)):
        control.swap("one way")
        if role == 0:
            found[f"gbytes_s/{name}"] = rate(nbytes, count)
        control.swap("one way done")
    control.swap("each awaited")
    if role == 0:
        start = time.perf_counter()
        for _ in range(arguments["repeats"]):
            driver.copy(peer, own.address, large, stream)
            driver.wait(stream)
        found["gbytes_s_serial/1GiB"] = large * arguments["repeats"] / (time.perf_counter() - start) / 1e9
        for key in ("put", "get"):
            found[f"{key}_gbytes_s/1GiB"] = found["gbytes_s/1GiB"]
            found[f"{key}_gbytes_s_serial/1GiB"] = found["gbytes_s_serial/1GiB"]
        seen = []
        for _ in range(1000):
            start = time.perf_counter()
            driver.copy(peer, own.address, 64 * KIB, stream)
            driver.wait(stream)
            seen.append(time.perf_counter() - start)
        found["copy_us/64KiB"] = statistics.median(seen) * 1e6
    found.update(_blocks(driver, own.address, peer, stream, control, role))
    control.swap("both ways")
    both = rate(large, 4 * arguments["repeats"])
    found["gbytes_s_both/1GiB"] = min(both, control.swap(both))
    for size in (8, 16, 32):
        both = gpu_probe.windowed(driver, own.address, peer, size * MIB, 2000)
        found[f"gbytes_s_both_windowed/{size}MiB"] = min(both, control.swap(both))
    detour = gpu_probe.Detour(driver, own, peer)
    if role == 0:
        found.update(gpu_probe.calls(driver, own, peer))
        found.update(detour.measure("alone", 200))
        found.update(gpu_probe.sleeping())
    control.swap("beside both ways")
    for _ in range(8):
        driver.copy(peer, own.address, large, stream)
    found.update(detour.measure("both_ways", 20, ("out", "in")))
    driver.wait(stream)
    found.update(gpu_probe.opening(driver, role, own, peer, control))
    control.swap("done")
    return found
