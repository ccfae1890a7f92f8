"""Suite `progress`: a large message arrives while the receiver's event loop is stuck in Python."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import session
from .model import Column, Rule, Suite
from .sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_NBYTES = 64 * MIB
_BLOCKED_S = 0.2
_GO, _DATA = 1, 2  # tags


def _compute(seconds: float) -> None:
    """Hold the GIL and the event loop."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class _Burner:
    """Another process that keeps a core busy: "otherwise" is then measured with as many cores left."""

    _PROGRAM = """
import time
end = time.perf_counter() + {0}
print(flush=True)
while time.perf_counter() < end: pass
"""

    def __enter__(self) -> None:
        command = [sys.executable, "-S", "-c", self._PROGRAM.format(_BLOCKED_S)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Send while the receiver awaits, computes or sleeps; return the sender's times until its send ended."""

    async def main(comm: Any, role: int) -> Metrics:
        go = np.ones(8, np.uint8)
        data = np.ones(_NBYTES, np.uint8)
        taken: dict[str, list[float]] = {"waiting": [], "busy": [], "computing": [], "sleeping": []}
        for number in range(arguments["repeats"] + 1):
            for state, times in taken.items():
                if role == 0:
                    await comm.recv(go, src=1, tag=_GO)
                    start = time.perf_counter()
                    await comm.send(data, dst=1, tag=_DATA)
                    if number:  # the first of each is a warm-up
                        times.append(time.perf_counter() - start)
                    continue
                posted = comm.recv(data, src=0, tag=_DATA)
                if state == "busy":
                    with _Burner():
                        await comm.send(go, dst=0, tag=_GO)
                        await posted
                    continue
                await comm.send(go, dst=0, tag=_GO)
                if state == "computing":
                    _compute(_BLOCKED_S)
                elif state == "sleeping":
                    time.sleep(_BLOCKED_S)  # noqa: ASYNC251 -- blocking the loop is what is measured
                await posted
        if role == 1:
            return {}
        found = {f"ms/{state}": statistics.median(times) * 1e3 for state, times in taken.items()}
        found["times_busy/computing"] = found["ms/computing"] / found["ms/busy"]
        found["times_waiting/computing"] = found["ms/computing"] / found["ms/waiting"]
        found["times_waiting/sleeping"] = found["ms/sleeping"] / found["ms/waiting"]
        return found

    return session.within(role, control, arguments, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    return session.run(f"{__name__}:child", name, options, repeats=3 if options.quick else 9)[0]


_COLUMNS = (
    Column("ms/waiting", "receiver awaits\nms", 2),
    Column("ms/busy", "receiver awaits,\na core is busy, ms", 2),
    Column("ms/computing", "loop computes 200 ms\nms", 2),
    Column("ms/sleeping", "loop sleeps 200 ms\nms", 2),
    Column("times_busy/computing", "computing ÷\nawaiting, core busy", 2),
    Column("times_waiting/computing", "computing ÷\nawaiting", 2),
    Column("times_waiting/sleeping", "sleeping ÷\nawaiting", 2),
)
_NAMES = ("aiocomm-shm", "aiocomm-shm-bounce", "aiocomm-tcp")
SUITE = Suite(
    "progress",
    "64 MiB to a receiver whose event loop is blocked for 200 ms",
    session.subjects(_NAMES),
    measure,
    lambda options: _COLUMNS,
    tuple(
        Rule(f"64 MiB, loop {what}", name, metric, "<=", 1.2)
        for name in _NAMES
        for what, metric in (
            ("asleep in a call ÷ awaiting", "times_waiting/sleeping"),
            ("computing ÷ awaiting beside as busy a core", "times_busy/computing"),
        )
    ),
)
