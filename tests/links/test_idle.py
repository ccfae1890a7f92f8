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


def engines() -> dict[str, tuple[int, bool]]:
    """By thread of the engines, how often it has run until now (each ends in a switch), and if it sleeps."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text().startswith("aiocomm"):
                told = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
                runs = sum(int(number) for name, number in told.items() if "ctxt_switches" in name)
                found[task.name] = runs, told["State"].split()[0] == "S"
    return found


async def woke(threads: set[str], seconds: float) -> bool:
    """Whether any of these ran within a window. That something does not happen can only be seen over time.

    One that waits for its core has not run, and will: it counts as one that did. One that has ended was of an
    earlier test.
    """
    before = engines()
    with anyio.move_on_after(seconds):
        await anyio.sleep_forever()
    after = engines()
    return any(
        not before[one][1] or after[one] != before[one] for one in threads & before.keys() & after.keys()
    )


async def test_it_does_not_wake(variant: Variant) -> None:
    if variant.link == "rdma":
        pytest.skip("its heartbeats go on")
    others = set(engines())  # of earlier tests, which may end meanwhile, or run
    async with world(2, links=(variant.link,), warmup=True) as (a, b):
        for nbytes in (8, 1 << 20):
            for _ in range(20):
                sending = a.send(variant.ones(nbytes), 1)
                await b.recv(variant.array(nbytes), 0)
                await sending
            ours = set(engines()) - others
            assert len(ours) >= 2, "one of each"
            with anyio.fail_after(LIMIT_S):
                while await woke(ours, QUIET_S):  # a busy machine lets it come to its sleep late
                    pass
            assert not await woke(ours, WINDOW_S)
            assert len(ours & engines().keys()) >= 2, "one of each is still there"
