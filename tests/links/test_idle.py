"""Pairs that nobody uses are closed, and connected again; nothing is lost by either."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
from harness import until, world

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = pytest.mark.anyio

LINKS = [
    "shm",
    "tcp",
    *(["rdma"] if "AIOCOMM_RDMA_GUEST" in os.environ and "rdma" in _core.available_links() else []),
]


@pytest.fixture(params=LINKS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Connected, and closed once nothing has happened for 50 ms."""
    settings = {"AIOCOMM_PAIR_IDLE_S": "50ms", "AIOCOMM_HEARTBEAT_S": "25ms"}
    if request.param == "rdma":
        settings |= {"AIOCOMM_RDMA_DEVICES": "rxea0,rxea1", "AIOCOMM_HEARTBEAT_S": "1"}
    with mock.patch.dict(os.environ, settings):
        async with world(2, links=(request.param,), warmup=True) as (a, b):
            yield a, b


async def closed(pair: Pair) -> None:
    """At both ends."""
    await until(lambda: not any(comm._engine.link_of(1 - rank) for rank, comm in enumerate(pair)))


async def swap(pair: Pair, nbytes: int) -> None:
    a, b = pair
    sent, got = np.full(nbytes, 7, np.uint8), np.zeros(nbytes, np.uint8)
    receiving = b.recv(got, 0)
    await a.send(sent, 1)
    await receiving
    np.testing.assert_array_equal(got, sent)


async def test_an_idle_pair_is_closed_and_connected_again(pair: Pair) -> None:
    a, _ = pair
    events = a.events()
    for nbytes in (10, 1 << 20):
        await closed(pair)
        await swap(pair, nbytes)
    await closed(pair)
    assert all(peer.alive for comm in pair for peer in comm.peers)
    for _ in range(2):
        assert isinstance(await anext(events), aiocomm.LinkUp)


async def test_a_receive_that_waits_keeps_its_pair(pair: Pair) -> None:
    a, b = pair
    await closed(pair)
    receiving = b.recv(bytearray(3), 0)  # it wants to hear of its peer's end
    await until(lambda: a._engine.link_of(1) and b._engine.link_of(0))
    await a.send(b"now", 1)
    await receiving


async def test_what_came_before_is_still_there(pair: Pair) -> None:
    a, b = pair
    await a.send(b"early", 1)
    await closed(pair)
    assert bytes(await b.recv_array(0)) == b"early"
    await swap(pair, 10)


async def test_regions_are_used_again(pair: Pair) -> None:
    a, b = pair
    memory = np.zeros(1 << 20, np.uint8)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        for value in (1, 2):
            await a.put(np.full(1 << 20, value, np.uint8), remote)
            assert (memory == value).all()
            await closed(pair)
    memory[:] = 3
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put(np.zeros(1 << 20, np.uint8), remote)
    assert (memory == 3).all()
