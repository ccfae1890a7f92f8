"""Threads that copy, links that share them, and memory that they cannot reach."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from fakes import secret
from harness import LIMIT_S, world

import aiocomm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
COUNT = 8_000_000  # elements that take many chunks


async def test_a_link_gets_its_turn_when_another_link_s_copies_have_taken_all_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOCOMM_COPY_THREADS", "1")
    async with world(2, links=("shm",)) as (a, b):
        far, here = np.full(COUNT, 1.0), np.full(COUNT, 2.0)
        for _ in range(5):
            from_far, from_here = np.zeros(COUNT), np.zeros(COUNT)
            with anyio.fail_after(LIMIT_S):
                sends = [b.send(far, dst=0), a.send(here, dst=0)]
                receives = [a.recv(from_here, src=0), a.recv(from_far, src=1)]
                for transfer in (*sends, *receives):
                    await transfer
            assert (from_far == 1).all()
            assert (from_here == 2).all()


@pytest.mark.skipif(secret.MISSING is not None, reason=str(secret.MISSING))
@pytest.mark.parametrize("nbytes", [100_000, 6_000_000])
async def test_what_no_other_process_can_read_is_sent(nbytes: int) -> None:
    """Memory of devices that is mapped here, for one."""
    data = np.arange(nbytes, dtype=np.uint8)
    async with world(2, links=("shm",)) as (a, b):
        mine, into = secret.secret_array(nbytes), np.zeros(nbytes, np.uint8)
        mine[:] = data
        with anyio.fail_after(LIMIT_S):
            sending = a.send(mine, 1)
            await b.recv(into, 0)
            await sending
            assert (into == data).all()
            mine[:] = 0
            sending = b.send(data, 0)
            await a.recv(mine, 1)  # that it is written to is no matter
            await sending
            assert (mine == data).all()
            target = np.zeros(nbytes, np.uint8)
            async with b.register(target) as region:
                await a.put(mine, a.remote(region.handle))
            assert (target == data).all()
        by_path = a.statistics().links["shm"].messages_by_path
        assert (by_path["stream"], by_path["cma"]) == (2, 1)  # the message and the put; what came from `b`


async def test_memory_that_nobody_can_read_is_a_link_error(tmp_path: Path) -> None:
    """A file that is mapped and cut off: whoever touched that would be killed."""
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    async with world(2, links=("shm",)) as (a, b):
        data = np.memmap(file, np.uint8, "r+")
        os.truncate(file, 4096)
        sending, receiving = a.send(data, 1), b.recv(bytearray(1 << 20), 0)
        with pytest.raises(aiocomm.LinkError, match="Bad address"):
            await sending
        with pytest.raises(aiocomm.TransferCancelled):
            await receiving
        sending, into = a.send(np.ones(100_000, np.uint8), 1), np.zeros(100_000, np.uint8)
        await b.recv(into, 0)
        await sending
        assert into.all()
