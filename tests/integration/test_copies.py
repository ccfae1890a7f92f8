"""Threads that copy, and links that share them."""

from __future__ import annotations

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, world

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
