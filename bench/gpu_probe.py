"""What calls of the driver cost, and which engines hold each other up: causes behind the suite's figures.

All in microseconds. A call by ctypes takes some itself: `call_us/nothing` says how many.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

from . import figures, gpu_blocks
from .sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .control import Control
    from .gpu_driver import Driver, Memory
    from .model import Metrics

_BUFFER_ID = 7
_SMALL = 64 * KIB


def _times(call: Callable[[], object], count: int = 500) -> list[float]:
    clock = time.perf_counter
    found = []
    for _ in range(count):
        start = clock()
        call()
        found.append((clock() - start) * 1e6)
    return found


def _median(call: Callable[[], object], count: int = 500) -> float:
    return statistics.median(_times(call, count))


def calls(driver: Driver, own: Memory, peer: int) -> Metrics:
    """Calls that a message makes, one after the other with nothing under way."""
    stream, legacy = driver.stream(), ctypes.c_void_p(0)
    address, number, value = ctypes.c_uint64(own.address), ctypes.c_ulonglong(), ctypes.c_int()
    word = ctypes.c_uint64()
    pinned = driver.pinned(4096)
    driver("cuMemHostGetDevicePointer_v2", ctypes.byref(word), ctypes.c_void_p(pinned), 0)
    copy = driver.call("cuMemcpyAsync", ctypes.c_uint64(peer), address, ctypes.c_size_t(_SMALL), stream)
    write = driver.call("cuStreamWriteValue32_v2", stream, word, ctypes.c_uint32(1), 0)
    issued: dict[str, list[float]] = {"copy": [], "write": []}
    for _ in range(500):
        for name, call in (("copy", copy), ("write", write)):
            issued[name] += _times(call, 1)
        driver.wait(stream)
    seen, cell = [], ctypes.c_uint32.from_address(pinned)
    for _ in range(1000):
        cell.value = 0
        start = time.perf_counter()
        copy()
        write()
        while not cell.value:
            pass
        seen.append((time.perf_counter() - start) * 1e6)
    nothing = _median(driver.call("cuDriverGetVersion", ctypes.byref(value)))
    capturing = driver.call("cuStreamIsCapturing", legacy, ctypes.byref(value))
    attribute = driver.call("cuPointerGetAttribute", ctypes.byref(number), _BUFFER_ID, address)
    return {
        # A copy until it is seen, less what two calls cost in Python: the driver's part of a half round trip.
        "half_us/64KiB": statistics.median(seen) - 2 * nothing,
        "call_us/nothing": nothing,
        "call_us/buffer_id": _median(attribute),
        "call_us/capturing": _median(capturing),
        "call_us/query_legacy": _median(driver.call("cuStreamQuery", legacy)),
        "call_us/query": _median(driver.call("cuStreamQuery", stream)),
        "call_us/mode": _median(
            driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(2)))
        ),
        "call_us/copy": statistics.median(issued["copy"]),
        "call_us/write": statistics.median(issued["write"]),
    }


def sleeping() -> Metrics:
    """How late a timer of 2 ms is, and a thread that has slept as long and is woken by another."""
    clock = time.perf_counter
    late, woken = [], []
    for _ in range(100):
        start = clock()
        time.sleep(0.002)
        late.append((clock() - start - 0.002) * 1e6)
    reader, writer = os.pipe()

    def wait() -> None:
        for _ in range(100):
            os.read(reader, 1)
            woken.append(clock())

    thread = threading.Thread(target=wait)
    thread.start()
    rung = []
    for _ in range(100):
        time.sleep(0.002)  # the interpreter's lock is free
        rung.append(clock())
        os.write(writer, b"x")
    thread.join()
    os.close(reader)
    os.close(writer)
    waking = [(b - a) * 1e6 for a, b in zip(rung, woken, strict=True)]
    return {
        f"{name}_us/{part}": figures.percentile(times, share)
        for name, times in (("timer_late", late), ("wake", waking))
        for part, share in (("median", 0.5), ("p90", 0.9), ("max", 1.0))
    }


class Detour:
    """64 KiB through pinned host memory and back to the device: the engines beside those between devices."""

    def __init__(self, driver: Driver, own: Memory, peer: int) -> None:
        stream, pinned = driver.stream(), driver.pinned(_SMALL)
        address, size = ctypes.c_uint64(own.address), ctypes.c_size_t(_SMALL)
        host = ctypes.c_void_p(pinned)
        self._wait = lambda: driver.wait(stream)
        self._ways = {
            "out": driver.call("cuMemcpyDtoHAsync_v2", host, address, size, stream),
            "in": driver.call("cuMemcpyHtoDAsync_v2", address, host, size, stream),
            "peer": driver.call("cuMemcpyAsync", ctypes.c_uint64(peer), address, size, stream),
        }

    def measure(self, beside: str, count: int, ways: tuple[str, ...] = ("out", "in", "peer")) -> Metrics:
        """Median of each way, until the host sees the end."""

        def turn(way: str) -> None:
            self._ways[way]()
            self._wait()

        for way in ways:
            turn(way)
        return {f"{way}_us/{beside}": _median(lambda way=way: turn(way), count) for way in ways}


def windowed(driver: Driver, own: int, peer: int, nbytes: int, count: int) -> float:
    """GB/s of copies of which two are in flight, each on a stream of its own."""
    streams = [driver.stream(), driver.stream()]
    start = time.perf_counter()
    for number in range(count):
        stream = streams[number % 2]
        driver.wait(stream)
        driver.copy(peer + number % 4 * nbytes, own + number % 4 * nbytes, nbytes, stream)
    for stream in streams:
        driver.wait(stream)
    return nbytes * count / (time.perf_counter() - start) / 1e9


async def beside_raw(
    own: Memory, handle: bytes, pages: tuple[list[int], list[int]], put: Callable[[int], Awaitable[None]]
) -> float:
    """Rate of calls for scattered pages over that of raw batches, in turns.

    What a copy in a batch takes is the driver's time on a core, and cores differ by more than what is looked
    for, the same ones from second to second.
    """
    driver, block, calls = own.driver, gpu_blocks.BLOCK, 2 * gpu_blocks.AT_ONCE
    peer, stream = driver.open(handle), driver.stream()
    give, take = pages
    to, source = ([at + n * block for n in ns] for at, ns in ((peer, take), (own.address, give)))
    batch = driver.batch(to, source, block, stream)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            batch()
        driver.wait(stream)
        between = time.perf_counter()
        await put(calls)
        found.append((between - start) / (time.perf_counter() - between))
    driver.close(peer)
    return statistics.median(found)


def opening(driver: Driver, role: int, own: Memory, peer: int, control: Control) -> Metrics:
    """What exporting and opening 40 allocations costs, and what a small copy beside takes."""
    fresh = [driver.allocate(4 * MIB) for _ in range(40)]
    exported = []
    times = _times(lambda: exported.append(fresh[len(exported)].handle()), len(fresh))
    found: Metrics = {"export_us": statistics.median(times)}
    handles = control.swap(exported)
    stream = driver.stream()

    def copy() -> None:
        driver.copy(peer, own.address, _SMALL, stream)
        driver.wait(stream)

    if role == 0:
        found["copy_p99_us/alone"] = figures.percentile(_times(copy, 2000), 0.99)
        opened: list[int] = []
        took: dict[str, list[float]] = {}
        made: Any = type(driver)

        def open_all() -> None:
            mine = made(driver.device)  # its context, on this thread
            took["open"] = _times(lambda: opened.append(mine.open(handles[len(opened)])), len(handles))

        thread = threading.Thread(target=open_all)
        thread.start()
        beside = []
        while thread.is_alive():
            beside += _times(copy, 1)
        thread.join()
        found["open_us"] = statistics.median(took["open"])
        found["open_max_us"] = max(took["open"])
        found["copy_p99_us/opening"] = figures.percentile(beside, 0.99)
        found["copy_max_us/opening"] = max(beside)
        found["close_us"] = statistics.median(_times(lambda: driver.close(opened.pop()), len(opened)))
    control.swap("closed")
    return found
