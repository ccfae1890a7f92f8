"""Suite `idle`: how often any thread of a connected process wakes, and what it burns, while nothing moves."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import session
from .model import Column, Rule, Suite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .control import Control
    from .model import Metrics, Options

_SETTLE_S = 0.002  # nobody may wake from 1 ms after the last message on
_WATCH_S = 1.0
_ROUND_TRIPS = 100


def _activity(pid: int, but: int = 0) -> tuple[int, int]:
    """Return (context switches, nanoseconds on a core) of all threads of a process, without thread `but`."""
    switches = nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int(task.name) == but:
            continue
        lines = (task / "status").read_text().splitlines()
        switches += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    return switches, nanoseconds


def child(role: int, control: Control, arguments: Mapping[str, Any]) -> Metrics:
    """Exchange some messages; then rank 1 awaits one more while rank 0 watches both, waking neither."""

    async def main(comm: Any, role: int) -> Metrics:
        data = np.ones(8, np.uint8)
        other = control.swap(os.getpid())
        for _ in range(_ROUND_TRIPS):
            if role == 0:
                await comm.send(data, dst=1)
                await comm.recv(data, src=1)
            else:
                await comm.recv(data, src=0)
                await comm.send(data, dst=0)
        if role == 1:
            await comm.recv(data, src=0)
            return {}
        await asyncio.sleep(_SETTLE_S)
        watcher = os.getpid()  # the main thread's own sleep is not the engine's doing
        before = _activity(other), _activity(watcher, but=watcher)
        time.sleep(_WATCH_S)  # noqa: ASYNC251 -- the loop must not run meanwhile
        after = _activity(other), _activity(watcher, but=watcher)
        await comm.send(data, dst=1)
        switches = [late[0] - early[0] for early, late in zip(before, after, strict=True)]
        nanoseconds = [late[1] - early[1] for early, late in zip(before, after, strict=True)]
        return {
            "wakeups_receiver": switches[0],
            "wakeups_engine": switches[1],
            "wakeups": sum(switches),
            "cpu_us": sum(nanoseconds) / 1e3,
        }

    return session.within(role, control, arguments, main)


def measure(name: str, options: Options) -> Metrics:
    """Take one sample."""
    return session.run(f"{__name__}:child", name, options)[0]


_COLUMNS = (
    Column("wakeups_receiver", "receiver awaiting,\nall threads", 0),
    Column("wakeups_engine", "other process,\nits engine's threads", 0),
    Column("cpu_us", "both on a core,\nµs", 1),
)
_MODES = ("aiocomm-shm", "aiocomm-shm-spin", "aiocomm-shm-uvloop", "aiocomm-tcp")

SUITE = Suite(
    "idle",
    "context switches in one second in which nothing moves",
    session.subjects(_MODES),
    measure,
    lambda options: _COLUMNS,
    tuple(Rule("wake-ups in an idle second", name, "wakeups", "<=", 0.0) for name in _MODES),
)
