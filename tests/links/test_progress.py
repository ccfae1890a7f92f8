"""Posted transfers move while the other side's event loop runs no code but its own computation."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np
import pytest

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

NBYTES = 64 << 20

BUSY = f"""
import asyncio, os, select, sys
import numpy as np
import aiocomm

def compute():
    # In Python, so with the GIL, until the other process says that it has what it waits for.
    while not select.select([0], [], [], 0)[0]:
        sum(range(10_000))
    assert os.read(0, 10) == b"go on\\n"

async def main():
    async with aiocomm.connect(warmup=True) as comm:
        array = aiocomm.empty({NBYTES}, "u1") if sys.argv[1] == "shared" else np.empty({NBYTES}, "u1")
        receiving = comm.recv(array, 0)
        print("posted a receive", flush=True)
        compute()
        await receiving
        assert (array == 7).all()
        array.fill(9)
        sending = comm.send(array, 0)
        print("posted a send", flush=True)
        compute()
        await sending

asyncio.run(main())
"""


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the busy one is in a process of its own."""
    return "asyncio"


async def test_while_the_other_loop_is_blocked(child: Callable[..., Child], variant: Variant) -> None:
    """Each await here ends before the other loop runs again: only then it is told to."""
    if variant.simulated:
        pytest.skip("its two ends are in one process")
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    world = {"AIOCOMM_ADDRESS": address, "AIOCOMM_SIZE": "2", "AIOCOMM_RANK": "1"}
    busy = child(BUSY, "shared" if variant.shared else "plain", AIOCOMM_LINKS=variant.link, **world)
    async with aiocomm.connect(address, rank=0, size=2, links=(variant.link,), warmup=True) as comm:
        assert await busy.line() == "posted a receive", busy.close()
        array = variant.array(NBYTES)
        array.fill(7)
        await comm.send(array, 1)
        busy.tell("go on")
        assert await busy.line() == "posted a send", busy.close()
        await comm.recv(array, 1)
        assert np.all(array == 9)
        busy.tell("go on")
        status, errors = busy.close()
        assert status == 0, errors
