"""An engine without traffic sleeps: its threads do not wake."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from harness import LIMIT_S, world

if TYPE_CHECKING:
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

QUIET_S = 0.002  # after which an engine must sleep
WINDOW_S = 0.3


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the threads that are watched are the engines'."""
    return "asyncio"


def wake_ups() -> dict[str, int]:
    """By thread of the engines, how often it has run until now: each time ends in a switch."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text().startswith("aiocomm"):
                lines = (task / "status").read_text().splitlines()
                found[task.name] = sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return found


async def during(seconds: float) -> int:
    """Wake-ups within a window. That something does not happen can only be seen over time."""
    before = wake_ups()
    with anyio.move_on_after(seconds):
        await anyio.sleep_forever()
    # Threads of earlier tests may end meanwhile: those that give GPU memory back live for a moment.
    return sum(count - before.get(thread, 0) for thread, count in wake_ups().items())


async def test_it_does_not_wake(variant: Variant) -> None:
    if variant.link == "rdma":
        pytest.skip("its heartbeats go on")
    async with world(2, links=(variant.link,), warmup=True) as (a, b):
        for nbytes in (8, 1 << 20):
            for _ in range(20):
                sending = a.send(variant.ones(nbytes), 1)
                await b.recv(variant.array(nbytes), 0)
                await sending
            with anyio.fail_after(LIMIT_S):
                while await during(QUIET_S):  # a busy machine lets it come to its sleep late
                    pass
            assert await during(WINDOW_S) == 0
