"""Suite `faults`: how soon whoever waits for a process learns that it was killed, at each step of a transfer.

Rank 0 starts a process, brings it to a step, kills it by SIGKILL, and takes the time from just before the
kill until each of its own waiting transfers has raised `PeerLostError`. The kernel's own work on the dead
process (its memory is given back before its sockets are closed) is part of that.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import session
from .model import Column, Rule, Suite
from .sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from .control import Control
    from .model import Metrics, Options

_STEPS: Final = ("idle", "unmatched", "receives", "sends", "serves", "owns", "called")
_LARGE: Final = 32 * MIB
_OPEN: Final = 4  # large transfers outstanding
_HANDLE_TAG: Final = 5


def victim(step: str, address: str, link: str) -> None:
    """Be the process that is killed; says on its standard output when it has come to its step."""

    async def main() -> None:
        import aiocomm

        comm = await aiocomm.connect(address, rank=1, size=2, links=(link,), warmup=step != "called")
        memory = np.ones(_LARGE, np.uint8)
        busy: list[Any] = []
        if step == "receives":
            busy = [comm.recv(np.empty(_LARGE, np.uint8), 0) for _ in range(_OPEN)]
        elif step == "sends":
            busy = [comm.send(memory, 0) for _ in range(_OPEN)]
        elif step in ("serves", "owns"):
            region = comm.register(memory)
            await comm.send(region.handle, 0, tag=_HANDLE_TAG)
        print("ready", flush=True)
        while busy:
            await busy.pop(0)
            busy.append(comm.recv(memory, 0) if step == "receives" else comm.send(memory, 0))
        await asyncio.Event().wait()

    asyncio.run(main())


async def _waiting(comm: Any, step: str) -> list[Any]:
    """Return transfers that only the victim can end; the first of large ones is under way."""
    if step == "idle":
        return [comm.recv(bytearray(8), 1), comm.recv_array(1)]
    if step == "unmatched":
        return [comm.send(b"small", 1, synchronous=True), comm.send(np.ones(_LARGE, np.uint8), 1)]
    if step == "called":
        return [comm.send(b"small", 1), comm.recv(bytearray(8), 1), comm.send(np.ones(MIB, np.uint8), 1)]
    data = [np.ones(_LARGE, np.uint8) for _ in range(_OPEN)]
    start: Callable[[Any], Any]
    if step == "receives":
        start = lambda array: comm.send(array, 1)  # noqa: E731
    elif step == "sends":
        start = lambda array: comm.recv(array, 1)  # noqa: E731
    else:
        remote = comm.remote((await comm.recv_array(1, tag=_HANDLE_TAG)).tobytes())
        if step == "serves":
            start = lambda array: comm.get(remote, array)  # noqa: E731
        else:
            start = lambda array: comm.put(array, remote)  # noqa: E731
    await start(data[0])  # now the rest is moving
    return [start(array) for array in data]


async def _told(transfer: Awaitable[object], killed: list[float]) -> float | None:
    """Return the seconds until it has failed, or None where it came through before the kill."""
    from aiocomm import PeerLostError

    try:
        await transfer
    except PeerLostError:
        return time.monotonic() - killed[0]
    return None


def _start(step: str, address: str, link: str) -> subprocess.Popen[bytes]:
    program = f"import {__package__}.faults as f; f.victim({step!r}, {address!r}, {link!r})"
    return subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Return once it stands still."""
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


async def _kill(step: str, link: str) -> list[float]:
    """Return the seconds after which each waiter was told."""
    import aiocomm

    address = f"unix://@aiocomm-bench-{secrets.token_hex(8)}"
    process = _start(step, address, link)
    try:
        comm = await aiocomm.connect(address, rank=0, size=2, links=(link,), deadline=60.0)
        assert process.stdout is not None
        if (await asyncio.to_thread(process.stdout.readline)).strip() != b"ready":
            raise RuntimeError(f"the process that was to be killed at {step!r} did not come up")
        if step == "called":
            _stop(process)
        killed = [0.0]
        waiters = [asyncio.create_task(_told(t, killed)) for t in await _waiting(comm, step)]
        await asyncio.sleep(0)
        killed[0] = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        told = [seconds for seconds in await asyncio.gather(*waiters) if seconds is not None]
        await comm.aclose()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return told


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Kill at every step in turn; the second process of the pair has nothing to do."""
    if role == 1:
        return {}
    link = "tcp" if arguments["peer"] == "aiocomm-tcp" else "shm"
    found: Metrics = {}
    everything: list[float] = []
    for step in _STEPS:
        told: list[float] = []
        for _ in range(arguments["kills"]):
            told += asyncio.run(_kill(step, link))
        if not told:
            raise RuntimeError(f"every transfer came through before the kill at {step!r}")
        found[f"worst_ms/{step}"] = max(told) * 1e3
        everything += told
    found["median_ms"] = statistics.median(everything) * 1e3
    found["worst_ms"] = max(everything) * 1e3
    found["told"] = len(everything)
    return found


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    return session.run(f"{__name__}:child", name, options, kills=2 if options.quick else 5)[0]


_COLUMNS = (
    Column("told", "waiters\ntold", 0, "neither"),
    Column("median_ms", "median\nms", 1),
    *(Column(f"worst_ms/{step}", f"worst,\n{step}, ms", 1) for step in _STEPS),
)
_MODES = ("aiocomm-shm", "aiocomm-tcp")

SUITE = Suite(
    "faults",
    "time from kill -9 of a process until whoever waits for it is told",
    session.subjects(_MODES),
    measure,
    lambda options: _COLUMNS,
    tuple(Rule("ms until told of a kill, worst", name, "worst_ms", "<=", 50.0) for name in _MODES),
)
