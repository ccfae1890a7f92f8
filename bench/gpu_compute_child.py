"""What a transfer costs the kernels beside it: ours, and NCCL's, between two GPUs of two processes."""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

from .gpu_driver import Driver
from .peers import ours
from .sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .control import Control
    from .model import Metrics


# Of all subjects the same: one array that fits into the GPU's cache would disturb the kernels less.
_ARRAYS, _EACH = 4, 64 * MIB
_SETTLES_S = 0.15
_HEATS_S = 1.0


def _kernels(torch: Any) -> dict[str, Callable[[], Any]]:
    def square(n: int, m: int, k: int) -> Callable[[], Any]:
        a = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(k, m, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(n, m, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(a, b, out=out)

    query = torch.randn(1, 32, 8192, 128, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return {
        "matmul2048": square(2048, 4096, 4096),
        "matmul8192": square(8192, 8192, 8192),
        "attention8192": lambda: torch.nn.functional.scaled_dot_product_attention(
            query, query, query, is_causal=True
        ),
        "memory": lambda: torch.add(x, 1.0, out=y),
    }


class _Flow:
    """A transfer that goes on beside the kernels: what it has moved, and since when that is counted."""

    def __init__(self) -> None:
        self.moved = 0.0
        self._counted = (0.0, 0.0)

    def count(self) -> None:
        self._counted = (time.perf_counter(), self.moved)

    def rate(self) -> float:
        """GB/s since `count`."""
        since, moved = self._counted
        return (self.moved - moved) / (time.perf_counter() - since) / 1e9


def _rate(torch: Any, kernel: Callable[[], Any], seconds: float, flow: _Flow) -> tuple[float, float]:
    """Kernels per second and the flow's GB/s; the loop runs ahead of the GPU by a few dozen launches only.

    The kernels run for a while before they are counted, and so without a pause from one measurement to the
    next: a GPU whose power is what limits it runs faster for a while after every pause.
    """
    stream = torch.cuda.current_stream()
    events: list[Any] = []

    def run(for_s: float) -> float:
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < for_s:
            for _ in range(8):
                kernel()
            event = torch.cuda.Event()
            event.record(stream)
            events.append(event)
            done += 8
            if len(events) > 4:
                events.pop(0).synchronize()
        torch.cuda.synchronize()
        return done / (time.perf_counter() - start)

    run(_SETTLES_S)
    flow.count()
    kernels = run(seconds)
    return kernels, flow.rate()


def _measure(
    torch: Any, flow: _Flow, begin: Callable[[], None], end: Callable[[], None], arguments: Mapping[str, Any]
) -> Metrics:
    """Each kernel alone and beside the transfer, in turns; neither `begin` nor `end` waits.

    Clocks drift by more than a transfer costs, so each turn beside it is held against those before and after.
    """
    seconds, turns = arguments["seconds"], arguments["turns"]
    found: Metrics = {}
    for name, kernel in _kernels(torch).items():
        _rate(torch, kernel, _HEATS_S, flow)
        alone = [_rate(torch, kernel, seconds, flow)[0]]
        kept, moved = [], []
        for _ in range(turns):
            begin()
            beside, rate = _rate(torch, kernel, seconds, flow)
            end()
            moved.append(rate)
            alone.append(_rate(torch, kernel, seconds, flow)[0])
            kept.append(2 * beside / (alone[-2] + alone[-1]))
        found[f"kernels_s/{name}"] = statistics.median(alone)
        found[f"kept/{name}"] = statistics.median(kept)
        found[f"gbytes_s/{name}"] = statistics.median(moved)
        # Time lost per GB moved while the kernels ran.
        found[f"lost_us_per_gb/{name}"] = statistics.median(
            max(0.0, 1 - k) / max(m, 1e-9) * 1e6 for k, m in zip(kept, moved, strict=True)
        )
    return found


def child_ours(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Bulk sends from rank 0, whose GPU computes, on a loop in a thread of its own; rank 1 only receives."""
    import torch

    torch.cuda.set_device(role)
    arrays = [torch.zeros(_EACH, dtype=torch.uint8, device="cuda") for _ in range(_ARRAYS)]
    torch.cuda.synchronize()
    wanted, stopping = threading.Event(), threading.Event()
    flow = _Flow()

    async def main() -> None:
        comm = await ours.connect(role, control, "cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            while True:
                if role == 0:
                    while not wanted.is_set() and not stopping.is_set():  # noqa: ASYNC110 -- of a thread
                        await asyncio.sleep(0.0005)
                    go = bytearray([int(wanted.is_set())])
                    await comm.send(go, 1)
                else:
                    go = bytearray(1)
                    await comm.recv(go, 0)
                if not go[0]:
                    break
                await _messages(comm, role, arrays, wanted, flow)
        await comm.barrier()
        await comm.aclose()

    if role == 1:
        asyncio.run(main())
        return {}
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()

    found = _measure(torch, flow, wanted.set, wanted.clear, arguments)
    stopping.set()
    thread.join()
    return found


async def _messages(comm: Any, role: int, arrays: list[Any], wanted: threading.Event, flow: _Flow) -> None:
    if role == 0:
        open_ = [comm.send(array, 1, tag=1) for array in arrays]
        number = 0
        while wanted.is_set():
            await open_[number % 4]
            flow.moved += arrays[0].nbytes
            open_[number % 4] = comm.send(arrays[number % 4], 1, tag=1)
            number += 1
        end = arrays[0][:16]
        open_ += [comm.send(end, 1, tag=1) for _ in arrays]
        for transfer in open_:
            await transfer
        return
    receives = [comm.recv(array, 0, tag=1) for array in arrays]
    number, left = 0, 4
    while left:
        status = await receives[number % 4]
        if status.nbytes == 16:
            left -= 1
        else:
            receives[number % 4] = comm.recv(arrays[number % 4], 0, tag=1)
        number += 1


def child_floor(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """The same by raw copies, which a thread keeps queued.

    With `told`, each is followed by what tells a reader of host memory that it has ended: a value that the
    stream writes, or a word that it copies.
    """
    import torch

    torch.cuda.set_device(role)
    torch.zeros(1, device="cuda")
    driver = Driver(role)
    memory = driver.allocate(_ARRAYS * _EACH)
    peer = driver.open(control.swap(memory.handle()))
    if role == 1:
        control.recv()
        return {}
    stop = threading.Event()
    threads: list[threading.Thread] = []
    flow = _Flow()
    word = driver.pinned(4096)
    tell = {
        "": lambda stream: None,
        "write": lambda stream: driver.write(word, stream),
        "copy": lambda stream: driver.copy(word, memory.address, 4, stream),
    }[arguments.get("told", "")]

    def copies() -> None:
        mine = Driver(role)  # the context, on this thread
        streams = [mine.stream(), mine.stream()]
        number = 0
        while not stop.is_set():
            stream = streams[number % 2]
            mine.wait(stream)
            at = number % _ARRAYS * _EACH
            mine.copy(peer + at, memory.address + at, _EACH, stream)
            tell(stream)
            flow.moved += _EACH
            number += 1
        for stream in streams:
            mine.wait(stream)

    def begin() -> None:
        stop.clear()
        threads.append(threading.Thread(target=copies))
        threads[-1].start()

    def end() -> None:
        stop.set()
        threads[-1].join()

    found = _measure(torch, flow, begin, end, arguments)
    control.send("end")
    return found


def child_nccl(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """The same by NCCL's send and recv, launched by a thread on a stream of their own."""
    import torch
    import torch.distributed as dist

    mine = 20000 + os.getpid() % 20000
    theirs = control.swap(mine)
    torch.cuda.set_device(role)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{theirs if role else mine}",
        rank=role,
        world_size=2,
        device_id=torch.device("cuda", role),
    )
    arrays = [torch.zeros(_EACH, dtype=torch.uint8, device="cuda") for _ in range(_ARRAYS)]
    stream = torch.cuda.Stream()
    flow = _Flow()
    go = torch.zeros(1, dtype=torch.uint8, device="cuda")

    def messages(stop: threading.Event) -> None:
        torch.cuda.set_device(role)
        with torch.cuda.stream(stream):
            while True:
                more = not stop.is_set()
                if role == 0:
                    go.fill_(int(more))
                    dist.send(go, 1)
                else:
                    dist.recv(go, 0)
                    more = bool(go.item())
                if not more:
                    return
                for data in arrays + arrays:
                    if role == 0:
                        dist.send(data, 1)
                    else:
                        dist.recv(data, 0)
                stream.synchronize()
                flow.moved += 2 * _ARRAYS * _EACH

    if role == 1:
        while control.recv() == "begin":
            messages(threading.Event())
        return {}
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def begin() -> None:
        stop.clear()
        control.send("begin")
        threads.append(threading.Thread(target=messages, args=(stop,)))
        threads[-1].start()

    def end() -> None:
        stop.set()
        threads[-1].join()

    found = _measure(torch, flow, begin, end, arguments)
    control.send("end")
    return found
