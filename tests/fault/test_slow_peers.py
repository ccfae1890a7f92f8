"""A peer that lives and reads nothing: it holds up nobody else, nor is it lost for what is given up."""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING, NamedTuple

import anyio
import numpy as np
import pytest
from fault.rawpeer import Frame, Kind, connections, introduce
from fault.victims import TcpEnd
from harness import LIMIT_S, until, world

from aiocomm_native import _core

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator

    from conftest import Pair

    import aiocomm

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif("tcp" not in _core.available_links(), reason="this build has no tcp link"),
]

LARGE = 64 << 20  # more than the sockets, and any window, hold
URGENT = 3


class Slow(NamedTuple):
    """Rank 2, which reads only what the test does."""

    frames: TcpEnd
    payloads: list[socket.socket]  # the last are the urgent ones


@contextlib.contextmanager
def slow_peer(comm: aiocomm.Communicator) -> Iterator[Slow]:
    ours, theirs = connections(comm, "tcp")
    introduce(comm, 2, "tcp", [sock.detach() for sock in ours])
    with contextlib.ExitStack() as stack:
        for lane in theirs:
            stack.enter_context(lane)
        yield Slow(TcpEnd(theirs[:1]), theirs[2:])


async def asked_for(comm: aiocomm.Communicator, peer: Slow, data: np.ndarray) -> tuple[object, int]:
    """A send that is under way, and its number."""
    sending = comm.send(data, 2)
    rts = await peer.frames.receive(Kind.RTS)
    peer.frames.send(Frame(Kind.CTS, sop=rts.sop, rop=5))
    await until(lambda: comm.links["tcp"].statistics().in_flight_bytes)
    return sending, rts.sop


@pytest.fixture
async def pair(endless: None) -> AsyncIterator[Pair]:
    async with world(2, links=("tcp",), warmup=True) as (a, b):
        yield a, b


async def test_it_holds_up_no_other(pair: Pair) -> None:
    a, b = pair
    with slow_peer(a) as peer:
        sending, _ = await asked_for(a, peer, np.ones(LARGE, np.uint8))
        out = np.zeros(LARGE, np.uint8)
        with anyio.fail_after(LIMIT_S):
            receiving = b.recv(out, 0)
            await a.send(np.ones(LARGE, np.uint8), 1)
            await receiving
        assert out.all()
        assert not sending.done()


async def test_what_is_given_up_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer is the caller's again, what was posted arrives as it was, and the peer is still there."""
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "600")
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "0.01")
    monkeypatch.setenv("AIOCOMM_CHUNK_MAX", "256KiB")
    monkeypatch.setenv("AIOCOMM_TCP_SPLICE", "off")  # as between hosts: the kernel has no pages of ours
    async with world(1, links=("tcp",)) as (a,):
        with slow_peer(a) as peer:
            data = np.ones(LARGE, np.uint8)
            sending, number = await asked_for(a, peer, data)
            sending.cancel()
            with anyio.fail_after(LIMIT_S):
                await until(sending.done)
            assert sending.cancelled()
            data[:] = 2
            assert (await peer.frames.receive(Kind.CANCEL)).sop == number
            peer.frames.send(Frame(Kind.FIN, sop=number, code=1))  # too late, and does no harm
            left = a.links["tcp"].statistics().scheduled_bytes_by_channel[""]
            assert left
            payloads = TcpEnd(peer.payloads)
            while left:
                came = await payloads.receive(Kind.DATA)
                assert came.payload == b"\1" * came.payload_bytes
                left -= came.payload_bytes
            await a.send(b"x", 2)
            assert (await peer.frames.receive(Kind.EAGER)).payload == b"x"


async def test_an_access_is_as_urgent_as_it_says(pair: Pair) -> None:
    """Also where the region's owner has not opened the channel."""
    a, _ = pair
    async with a.register(np.ones(LARGE, np.uint8)) as region:
        with slow_peer(a) as peer:
            for cls in (1, URGENT):
                frame = Frame(Kind.GET, sop=region._number, rop=cls, nbytes=LARGE, channel=99 + cls, cls=cls)
                peer.frames.send(frame)
            with anyio.fail_after(LIMIT_S):
                await until(lambda: select.select(peer.payloads[-1:], [], [], 0)[0])
            assert (await TcpEnd(peer.payloads[-1:]).receive(Kind.DATA)).rop == URGENT
