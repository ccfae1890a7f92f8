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


async def fails(*ways: tuple[aiocomm.Communicator, int]) -> None:
    """Send until one of the engines has failed; the other one loses its peer by that, or first its rails."""
    while True:
        for comm, rank in ways:
            try:
                await comm.send(b"after", rank)
            except PeerLostError:
                pass
            except LinkError as error:
                if WHY in str(error):
                    return


@pytest.mark.parametrize("thread", [b"aiocomm-poll", b"aiocomm-post", b"aiocomm-unpin"])
async def test_a_thread_of_the_link(monkeypatch: pytest.MonkeyPatch, thread: bytes) -> None:
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        with Adapters().breaking(thread):
            receiving = b.recv(np.zeros(LARGE, np.uint8), 0)
            sending = a.send(np.ones(LARGE, np.uint8), 1)
            for transfer in (sending, receiving):
                with contextlib.suppress(LinkError, PeerLostError):  # or other threads were the first to look
                    await transfer
            await fails((a, 1), (b, 0))
