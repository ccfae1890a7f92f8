"""What a hop of a chain of GPUs costs, by raw copies: `python -m aiocomm_bench.gpu_chain [FILE.json]`.

One process, the GPUs that it sees. Every GPU passes on what has come, chunk by chunk: its stream waits for a
word, copies, and writes the next GPU's word. Where the word lies, how large a chunk is, and over how many
streams chunks are dealt out in turn decides what a chunk takes beside its bytes.

Microseconds, medians of several rounds, in two ways: `queued`: all was queued before the first copy began;
`issued`: the driver's calls are made meanwhile, by a thread per GPU, through ctypes.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Final

from .gpu_driver import Driver, Memory
from .sizes import MIB

_BYTES: Final = 256 * MIB
_CHUNKS: Final = (4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
_WORDS: Final = ("host", "target", "copied")
_ROUNDS: Final = 7
_GREATER_OR_EQUAL: Final = 0


class _Gpu:
    """One of the chain. What it queues is queued by the thread that has called `enter`."""

    def __init__(self, device: int) -> None:
        self.driver = Driver(device)
        self.memory = self.driver.allocate(_BYTES)
        self.words = self.driver.allocate(4096)  # that others write here
        self.numbers = self.driver.allocate(4096)  # to copy words from
        self.words.fill(0)
        self.streams = [self.driver.stream() for _ in range(2)]

    def enter(self) -> None:
        """Make its context this thread's."""
        Driver(self.driver.device)


class Chain:
    """GPUs 0 to n - 1, each of which passes on to the next."""

    def __init__(self) -> None:
        first = Driver(0)
        self.gpus = [_Gpu(device) for device in range(first.count())]
        for one, other in itertools.permutations(self.gpus, 2):
            one.enter()
            context = ctypes.c_void_p()
            one.driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), other.driver.device)
            one.driver("cuCtxEnablePeerAccess", context, 0)
        self.gpus[0].enter()
        self.host = first.pinned(64 * 4096)
        self._round = 0

    def cell(self, index: int) -> ctypes.c_uint32:
        """A word of host memory."""
        return ctypes.c_uint32.from_address(self.host + 4 * index)

    def run(self, words: str, chunk: int, streams: int, queued: bool) -> float:
        """Seconds of one round.

        Args:
            words: where they lie: in the host's memory, or in that of the GPU that waits, written by its
                predecessor's stream or copied there.
            chunk: bytes.
            streams: of each GPU.
            queued: all before the first copy begins.
        """
        self._round += 1
        number, last = self._round, len(self.gpus) - 1
        for gpu in self.gpus:
            gpu.enter()
            packed = (ctypes.c_uint32 * 1024)(*[number] * 1024)
            gpu.driver("cuMemcpyHtoD_v2", ctypes.c_uint64(gpu.numbers.address), packed, ctypes.c_size_t(4096))
        ready = threading.Barrier(last + 1)

        def word(of: int, index: int) -> int:
            in_host = words == "host" or of == last
            return (self.host + 4096 * of if in_host else self.gpus[of].words.address) + 4 * index

        def wait_for(gpu: _Gpu, address: int, stream: ctypes.c_void_p) -> None:
            what = ctypes.c_uint64(address), ctypes.c_uint32(number), _GREATER_OR_EQUAL
            gpu.driver("cuStreamWaitValue32_v2", stream, *what)

        def work(at: int) -> None:
            gpu, following = self.gpus[at], self.gpus[at + 1]
            gpu.enter()
            used = gpu.streams[:streams]
            if not queued:
                ready.wait()
            elif at == 0:
                for stream in used:
                    wait_for(gpu, self.host + 4 * 1023, stream)
            for index in range(_BYTES // chunk):
                stream = used[index % streams]
                if at:
                    wait_for(gpu, word(at, index), stream)
                offset = index * chunk
                gpu.driver.copy(following.memory.address + offset, gpu.memory.address + offset, chunk, stream)
                if words == "copied" and at + 1 < last:
                    gpu.driver.copy(word(at + 1, index), gpu.numbers.address, 4, stream)
                else:
                    what = ctypes.c_uint64(word(at + 1, index)), ctypes.c_uint32(number), 0
                    gpu.driver("cuStreamWriteValue32_v2", stream, *what)

        threads = [threading.Thread(target=work, args=(at,)) for at in range(last)]
        for thread in threads:
            thread.start()
        if queued:
            for thread in threads:
                thread.join()
        else:
            ready.wait()
        start = time.perf_counter()
        self.cell(1023).value = number
        count = _BYTES // chunk
        cells = [self.cell(1024 * last + count - 1 - back) for back in range(min(streams, count))]
        while any(cell.value != number for cell in cells):
            pass
        taken = time.perf_counter() - start
        for thread in threads:
            thread.join()
        return taken


def floors(chain: Chain) -> dict[str, float]:
    """A hop's parts between two GPUs, one stream, all queued: microseconds for all bytes."""
    one, other = chain.gpus[:2]
    one.enter()
    found: dict[str, float] = {}
    for name, chunk in (("whole", _BYTES), *((f"{chunk // MIB} MiB", chunk) for chunk in _CHUNKS)):
        for kind in ("copies", "writes", "waits and writes"):
            times = [_hop(chain, one, other, chunk, kind) for _ in range(_ROUNDS)]
            found[f"{name}, {kind}"] = statistics.median(times) * 1e6
    return found


def _hop(chain: Chain, one: _Gpu, other: _Gpu, chunk: int, kind: str) -> float:
    chain._round += 1
    number, stream = chain._round, one.streams[0]
    go, done = chain.host + 4 * 1023, chain.host + 4 * 1022
    met = ctypes.c_uint32(0)  # anything is at least that
    one.driver("cuStreamWaitValue32_v2", stream, ctypes.c_uint64(go), ctypes.c_uint32(number), 0)
    for offset in range(0, _BYTES, chunk):
        if kind == "waits and writes":
            one.driver("cuStreamWaitValue32_v2", stream, ctypes.c_uint64(one.words.address), met, 0)
        one.driver.copy(other.memory.address + offset, one.memory.address + offset, chunk, stream)
        if kind != "copies":
            word = ctypes.c_uint64(other.words.address + 4)
            one.driver("cuStreamWriteValue32_v2", stream, word, ctypes.c_uint32(number), 0)
    one.driver("cuStreamWriteValue32_v2", stream, ctypes.c_uint64(done), ctypes.c_uint32(number), 0)
    start = time.perf_counter()
    chain.cell(1023).value = number
    while chain.cell(1022).value != number:
        pass
    return time.perf_counter() - start


def check(chain: Chain) -> None:
    """What the first has is what the last gets."""
    chain.gpus[0].enter()
    chain.gpus[0].memory.fill(7)
    chain.run("target", 8 * MIB, 2, True)
    last: Memory = chain.gpus[-1].memory
    chain.gpus[-1].enter()
    for offset in (0, _BYTES // 2, _BYTES - 4):
        if last.read(offset, 4) != bytes([7] * 4):
            raise RuntimeError("the bytes are not there")


def main(path: str | None = None) -> None:
    """Measure, print, and write."""
    chain = Chain()
    check(chain)
    found = {f"hop, {name}": round(value, 1) for name, value in floors(chain).items()}
    cases = list(itertools.product(_WORDS, _CHUNKS, (1, 2), (True, False)))
    times: dict[tuple[str, int, int, bool], list[float]] = {case: [] for case in cases}
    for _ in range(_ROUNDS):
        for case in cases:
            try:
                times[case].append(chain.run(*case))
            except OSError as error:
                print(case, error)
                raise
    for (words, chunk, streams, queued), some in times.items():
        name = (
            f"chain, words {words}, {chunk // MIB} MiB, {streams} streams, {'queued' if queued else 'issued'}"
        )
        found[name] = round(statistics.median(some) * 1e6, 1)
    for name, value in found.items():
        print(f"{value:9.1f} us  {name}")
    if path is not None:
        Path(path).write_text(json.dumps({"gpus": len(chain.gpus), "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
