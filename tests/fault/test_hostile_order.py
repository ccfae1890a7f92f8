"""An authenticated peer whose frames make sense, but not now: its pair is closed, and nothing is left behind.

The same where two threads are at work at once is in tests/native/engine_test.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from fault.rawpeer import Frame, Kind, RawPeer, default_channel
from harness import reach_each_other, until, world

import aiocomm
from aiocomm.region import _HANDLE, _MAGIC, _VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = pytest.mark.anyio

CHANNEL = default_channel()
META = bytes(24)
NBYTES = 1 << 20
DEVICE = 2  # a flag


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here is native."""
    return "asyncio"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with world(2, warmup=True) as (a, b):
        yield a, b


def region_of(comm: aiocomm.Communicator, peer: RawPeer) -> aiocomm.RemoteRegion:
    """What a peer may call a region of its own."""
    return comm.remote(_HANDLE.pack(_MAGIC, _VERSION, peer.rank, peer.generation, 1, 0, NBYTES, True))


async def violated(comm: aiocomm.Communicator) -> None:
    """The pair has been closed for what came over it."""
    with pytest.raises(aiocomm.PeerLostError, match="violation"):
        await comm.recv(bytearray(1), 2)


async def test_a_get_is_refused_that_has_been_answered(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        getting = a.get(region_of(a, peer), np.empty(NBYTES, np.uint8))
        asked = await peer.receive(Kind.GET)
        peer.send(Frame(Kind.GET_READY, sop=9, rop=asked.rop, nbytes=NBYTES))
        peer.send(Frame(Kind.DATA, sop=9, rop=asked.rop, nbytes=NBYTES, payload=b"x" * 1000))
        peer.send(Frame(Kind.GET_FAIL, rop=asked.rop, code=6))
        with pytest.raises(aiocomm.PeerLostError):
            await getting
        await violated(a)
    await reach_each_other(pair)


async def test_a_get_is_refused_at_once(pair: Pair) -> None:
    """That is the owner's right, and no violation."""
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        getting = a.get(region_of(a, peer), np.empty(NBYTES, np.uint8))
        asked = await peer.receive(Kind.GET)
        peer.send(Frame(Kind.GET_FAIL, rop=asked.rop, code=6))
        with pytest.raises(aiocomm.StaleHandleError):
            await getting
        assert a.peers[-1].alive


async def test_more_bytes_than_are_left(pair: Pair) -> None:
    """They are not written either."""
    a, _ = pair
    buffer = np.zeros(NBYTES, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(buffer, 2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=150_000, sop=9, meta=META))
        cts = await peer.receive(Kind.CTS)
        peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, address=0, payload=b"x" * 100_000))
        peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, address=99_000, payload=b"y" * 51_000))
        with pytest.raises(aiocomm.PeerLostError):
            await receiving
        await violated(a)
    assert set(buffer[:100_000]) == {ord("x")}
    assert not buffer[100_000:].any()
    await reach_each_other(pair)


async def test_a_receive_is_stopped_as_if_it_were_a_message(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(np.empty(NBYTES, np.uint8), 2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=NBYTES, sop=9, meta=META))
        cts = await peer.receive(Kind.CTS)
        peer.send(Frame(Kind.STOP, sop=cts.rop))
        with pytest.raises(aiocomm.PeerLostError):
            await receiving
        await violated(a)
    await reach_each_other(pair)


async def test_what_was_in_its_frame_is_asked_for(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        sending = a.send(b"few", 2, synchronous=True)
        sent = await peer.receive(Kind.EAGER)
        peer.send(Frame(Kind.CTS, sop=sent.sop, rop=5))
        with pytest.raises(aiocomm.PeerLostError):
            await sending
        await violated(a)
    await reach_each_other(pair)


async def test_bytes_are_sent_and_then_staged(pair: Pair) -> None:
    """Of GPU memory one or the other: together they would be more than the message."""
    a, _ = pair
    staged = np.ones(NBYTES, np.uint8)
    with RawPeer(a, 2, cma=True) as peer:
        await peer.meet()
        receiving = a.recv(np.empty(NBYTES, np.uint8), 2)
        place = bytes(136)
        peer.send(Frame(Kind.RTS, flags=DEVICE, channel=CHANNEL, nbytes=NBYTES, sop=9, meta=META + place))
        cts = await peer.receive(Kind.CTS)
        peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, payload=b"x" * 1000))
        peer.send(Frame(Kind.STAGED, rop=cts.rop, sop=9, nbytes=NBYTES, address=staged.ctypes.data))
        with pytest.raises(aiocomm.PeerLostError):
            await receiving
        await violated(a)
    await reach_each_other(pair)


async def test_a_pair_is_closed_as_idle_under_what_was_begun(pair: Pair) -> None:
    a, _ = pair
    region = a.register(np.zeros(NBYTES, np.uint8))
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.send(Frame(Kind.REST))
        assert not (await peer.receive(Kind.RESTING)).code
        peer.send(Frame(Kind.PUT_RTS, rop=region._number, sop=9, nbytes=NBYTES))
        await peer.receive(Kind.CTS)
        peer.send(Frame(Kind.RESTING))
        with anyio.fail_after(10):
            await region.aclose()  # nobody writes there any more
        await violated(a)
    await reach_each_other(pair)


@pytest.mark.parametrize("closed_first", [False, True])
async def test_a_region_that_is_read_when_all_is_closed(pair: Pair, closed_first: bool) -> None:
    """Its reader stands still: a chunk is at the ring, and stays there."""
    a, _ = pair
    region = a.register(np.zeros(16 << 20, np.uint8))
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.send(Frame(Kind.GET, sop=region._number, rop=7, nbytes=16 << 20))
        await peer.receive(Kind.GET_READY)
        async with anyio.create_task_group() as group:
            if not closed_first:
                group.start_soon(region.aclose)
                await until(lambda: region._closed)
            await a.aclose()
            with anyio.fail_after(10):
                await region.aclose()
