"""Suites `handoff` and `gpu-handoff`: KV blocks go from a prefill engine's worker to a decode engine's.

Both ends are what vLLM's worker processes run of a connector, without vLLM: caches of 32 layers in one
allocation, layers outermost, blocks of 16 tokens with 8 heads of 256 elements (keys and values) of two bytes.
A request's blocks lie in no order, at either end. `nixl` does by hand what vLLM's NixlConnector does for one:
of descriptors prepared once, of every block in every layer, it reads those of the request, polls until they
have come, and tells the other by a notification. It looks up no handshake, lease or failure; ours does.

Metrics:
    us/BLOCKS: Microseconds from when the decode worker is told of a request until it says that all blocks
        have come; median of requests, one after the other. BLOCKS are the blocks of the request.
    p90_us/BLOCKS: The same, which 90 % do not exceed.
    held_us/BLOCKS: Of that, for how long the engine's own thread is held, where it does not wait; median.
    gbytes_s/BLOCKS: 1e9 bytes per second of the median.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from . import figures, pair, peers
from .gpu_driver import Driver
from .gpu_driver import missing as missing_gpu
from .model import Column, Rule, Subject, Suite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .control import Control
    from .model import Metrics, Options

_LAYERS, _HEADS, _TOKENS, _CONTENT = 32, 8, 16, 256
_ROW: Final = _HEADS * _TOKENS * _CONTENT * 2  # bytes of a block in one layer
_BLOCKS = {"host": 256, "gpu": 2048}  # of an engine
_REQUESTS = {"host": ((1, 200), (16, 100), (128, 30)), "gpu": ((1, 200), (16, 200), (128, 100), (1024, 30))}
_WARM: Final = 5  # requests that do not count
_OURS = {"host": "aiocomm-vllm", "gpu": "aiocomm-vllm-gpu"}
_NIXL = {"host": "nixl", "gpu": "nixl-gpu"}


class _Worker(Protocol):
    """One end. Role 0 lends, role 1 fetches."""

    def lend(self, request: str, blocks: tuple[int, ...]) -> None: ...

    def wait_lent(self, request: str) -> None: ...

    def fetch(self, request: str, there: tuple[int, ...], here: tuple[int, ...]) -> float:
        """Returns when all have come; seconds for which the engine's thread was held."""


class _Ours:
    """The workers of `aiocomm.vllm`, whose engine looks now and then at what has ended, as vLLM's does."""

    def __init__(self, role: int, cache: Any, where: str, links: list[str]) -> None:
        from aiocomm.vllm.caches import Axes, Caches, Geometry
        from aiocomm.vllm.ranks import Place
        from aiocomm.vllm.worker import Options as Said
        from aiocomm.vllm.worker import Worker

        engine = ("prefill", "decode")[role]
        self._worker = Worker(Said(where, links=links), Place(engine, 0, 0, 1, _HEADS))
        geometry = Geometry("bench", "bfloat16", _LAYERS, _TOKENS, _HEADS, _CONTENT, 1)
        self._worker.join(Caches([cache], Axes(1, 2, 3), _TOKENS), geometry)

    def lend(self, request: str, blocks: tuple[int, ...]) -> None:
        from aiocomm.vllm.steps import Step

        self._worker.begin(Step(keep={request: blocks}))

    def wait_lent(self, request: str) -> None:
        while request not in self._worker.ended()[0]:
            time.sleep(20e-6)

    def fetch(self, request: str, there: tuple[int, ...], here: tuple[int, ...]) -> float:
        from aiocomm.vllm.steps import Fetch, Origin, Step

        start = time.perf_counter()
        self._worker.begin(Step(fetch=[Fetch(request, Origin("prefill", 1, request), there, here)]))
        held = time.perf_counter() - start
        while True:
            start = time.perf_counter()
            _, received, failed = self._worker.ended()
            held += time.perf_counter() - start
            if failed:
                raise RuntimeError(f"{request} did not come")
            if request in received:
                return held
            time.sleep(20e-6)

    def close(self) -> None:
        self._worker.close()


class _Nixl:
    """An agent with its blocks, as NixlConnector registers and prepares them."""

    def __init__(self, role: int, cache: Any, control: Control, gpu: bool) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        kind = "VRAM" if gpu else "DRAM"
        base = cache.address if gpu else cache.ctypes.data
        device = role if gpu else 0
        blocks = cache.shape[1]
        # Without a progress thread, which is the faster where both ends poll.
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = agent = nixl_agent(f"agent{role}", config)
        self._blocks, self._other = blocks, f"agent{1 - role}"
        agent.register_memory([(base, _LAYERS * blocks * _ROW, device, "")], kind)
        metadata, its_base, its_device = control.swap((agent.get_agent_metadata(), base, device))
        agent.add_remote_agent(metadata)

        def prepared(name: str, base: int, device: int) -> Any:
            rows = [(base + row * _ROW, _ROW, device) for row in range(_LAYERS * blocks)]
            return agent.prep_xfer_dlist(name, agent.get_xfer_descs(rows, kind))

        self._mine = prepared("NIXL_INIT_AGENT", base, device)
        self._its = prepared(self._other, its_base, its_device) if role == 1 else None
        control.swap("prepared")

    def lend(self, request: str, blocks: tuple[int, ...]) -> None:
        """Nothing tells the agent who may read what."""

    def wait_lent(self, request: str) -> None:
        while request.encode() not in self._agent.get_new_notifs().get(self._other, []):
            pass

    def fetch(self, request: str, there: tuple[int, ...], here: tuple[int, ...]) -> float:
        start = time.perf_counter()
        layers = np.arange(_LAYERS)[:, None] * self._blocks
        mine, its = (np.ravel(layers + np.array(blocks)) for blocks in (here, there))
        handle = self._agent.make_prepped_xfer(
            "READ", self._mine, mine, self._its, its, notif_msg=request.encode()
        )
        self._agent.transfer(handle)
        held = time.perf_counter() - start
        while (state := self._agent.check_xfer_state(handle)) != "DONE":
            if state == "ERR":
                raise RuntimeError("nixl: transfer failed")
        start = time.perf_counter()
        self._agent.release_xfer_handle(handle)
        return held + time.perf_counter() - start


@contextlib.contextmanager
def _rendezvous(role: int, control: Control) -> Iterator[str]:
    """Where the workers meet: role 0 has it in a process of its own."""
    if role:
        yield control.recv()
        return
    where = f"unix://@aiocomm-bench-handoff-{os.getpid()}"
    command = [sys.executable, "-P", "-m", "aiocomm", "rendezvous", "--listen", where]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        control.send(where)
        try:
            yield where
        finally:
            process.terminate()


def _cache(role: int, memory: str) -> Any:
    """All of one end's blocks; what each row of the prefill engine's begins with tells where it is."""
    shape = (_LAYERS, _BLOCKS[memory], _HEADS, _TOKENS, 2 * _CONTENT)
    rows = np.arange(_LAYERS * _BLOCKS[memory]).reshape(shape[:2])
    if memory == "host":
        cache = np.full(shape, 7, np.uint8)
        if role == 0:
            cache.view(np.int64)[:, :, 0, 0, 0] = rows
        return cache
    whole = Driver(role).allocate(rows.size * _ROW)
    if role == 0:
        for layer in rows:
            data = np.full((len(layer), _ROW // 8), 7)
            data[:, 0] = layer
            whole.write(int(layer[0]) * _ROW, data.tobytes())
    return whole.shaped(*shape)


def _check(cache: Any, there: tuple[int, ...], here: tuple[int, ...]) -> None:
    blocks = cache.shape[1]
    for layer, (block, into) in itertools.product(range(_LAYERS), zip(there, here, strict=True)):
        if isinstance(cache, np.ndarray):
            came = cache[layer, into].tobytes()[:8]
        else:
            came = cache.read((layer * blocks + into) * _ROW, 8)
        if int.from_bytes(came, "little") != layer * blocks + block:
            raise RuntimeError("blocks that came are not those that were lent")


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Hand requests over, one after the other."""
    memory = arguments["memory"]
    cache = _cache(role, memory)
    if arguments["name"] in _NIXL.values():
        return _hand_over(_Nixl(role, cache, control, memory == "gpu"), role, control, cache, arguments)
    links = ["shm", "cuda"] if memory == "gpu" else ["shm"]
    with _rendezvous(role, control) as where:
        worker = _Ours(role, cache, where, links)
        try:
            return _hand_over(worker, role, control, cache, arguments)
        finally:
            control.swap("done")
            worker.close()


def _hand_over(
    worker: _Worker, role: int, control: Control, cache: Any, arguments: Mapping[str, Any]
) -> Metrics:
    found: Metrics = {}
    rng = np.random.default_rng(3)  # the same at both ends
    blocks = _BLOCKS[arguments["memory"]]
    for count, requests in arguments["requests"]:
        taken, held = [], []
        for number in range(requests + _WARM):
            there, here = (tuple(rng.permutation(blocks)[:count].tolist()) for _ in range(2))
            request = f"{count}-{number}"
            if role == 0:
                worker.lend(request, there)
                control.swap("lent")
                worker.wait_lent(request)
                continue
            control.swap("asks")
            start = time.perf_counter()
            of_thread = worker.fetch(request, there, here)
            taken.append(time.perf_counter() - start)
            held.append(of_thread)
        if role == 1:
            _check(cache, there, here)
            taken, held = taken[_WARM:], held[_WARM:]
            found[f"us/{count}"] = statistics.median(taken) * 1e6
            found[f"p90_us/{count}"] = figures.percentile(taken, 0.9) * 1e6
            found[f"held_us/{count}"] = statistics.median(held) * 1e6
            found[f"gbytes_s/{count}"] = count * _LAYERS * _ROW / statistics.median(taken) / 1e9
    return found


def _missing(name: str, memory: str) -> str:
    if name in _NIXL.values() and find_spec("nixl") is None:
        return "pip install nixl"
    return missing_gpu() if memory == "gpu" else ""


def _subjects(memory: str, options: Options) -> list[Subject]:
    wire = "memory" if memory == "host" else "nvlink"
    everyone = [(_OURS[memory], "ours"), (_NIXL[memory], "peer")]
    return [
        Subject(name, kind, wire, _missing(name, memory))  # type: ignore[arg-type]
        for name, kind in everyone
        if not options.peers or name in options.peers
    ]


def _measure(memory: str, name: str, options: Options) -> Metrics:
    requests = [
        (count, max(10, number // 4) if options.quick else number) for count, number in _REQUESTS[memory]
    ]
    quiet = peers.find("nixl").environment
    arguments = {"memory": memory, "name": name, "requests": requests}
    found: Metrics = pair.run(f"{__name__}:child", arguments, options.timeout_s, environment=quiet)[1]
    return found


def _columns(memory: str, options: Options) -> tuple[Column, ...]:
    found: list[Column] = []
    for count, _ in _REQUESTS[memory]:
        found += [
            Column(f"us/{count}", f"{count} blocks\nµs", 0),
            Column(f"p90_us/{count}", "90 %\nµs", 0),
            Column(f"held_us/{count}", "thread held\nµs", 0),
        ]
    return (*found, Column(f"gbytes_s/{count}", f"{count} blocks\nGB/s", 1, "higher"))


def _suite(name: str, memory: str, title: str) -> Suite:
    ours, nixl = _OURS[memory], (_NIXL[memory],)
    return Suite(
        name,
        title,
        partial(_subjects, memory),
        partial(_measure, memory),
        partial(_columns, memory),
        tuple(
            Rule(f"{count} blocks handed over", ours, f"us/{count}", "<=", 1.0, nixl)
            for count, _ in _REQUESTS[memory][1:]
        ),
    )


SUITES = (
    _suite("handoff", "host", "a request's KV blocks of 2 MiB, handed over between workers of two engines"),
    _suite("gpu-handoff", "gpu", "a request's KV blocks of 2 MiB, handed over from one GPU to another"),
)
