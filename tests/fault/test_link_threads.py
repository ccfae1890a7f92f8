"""What a thread of a link's own throws ends its engine's operations, with the reason, and not the process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from harness import world

from aiocomm.errors import LinkError, PeerLostError

if TYPE_CHECKING:
    import aiocomm

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"),
]

LARGE = 8 << 20
WHY = "a thread of the rdma link: std::bad_alloc"


async def send_on(*ways: tuple[aiocomm.Communicator, int]) -> None:
    """Until one of the engines fails; the other one loses its peer by that."""
    while True:
        for comm, rank in ways:
            with contextlib.suppress(PeerLostError):
                await comm.send(b"after", rank)


@pytest.mark.parametrize("thread", [b"aiocomm-poll", b"aiocomm-post"])
async def test_an_adapters_thread(monkeypatch: pytest.MonkeyPatch, thread: bytes) -> None:
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        with Adapters().breaking(thread):
            receiving = b.recv(np.zeros(LARGE, np.uint8), 0)
            sending = a.send(np.ones(LARGE, np.uint8), 1)
            for transfer in (sending, receiving):
                with contextlib.suppress(LinkError, PeerLostError):  # or other threads were the first to look
                    await transfer
            with pytest.raises(LinkError, match=WHY):
                await send_on((a, 1), (b, 0))


async def test_the_thread_that_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        with Adapters().breaking(b"aiocomm-unpin"):
            receiving = b.recv(np.zeros(LARGE, np.uint8), 0)
            await a.send(np.ones(LARGE, np.uint8), 1)
            with pytest.raises(LinkError, match=WHY):
                await send_on((a, 1))
    assert receiving.done()
