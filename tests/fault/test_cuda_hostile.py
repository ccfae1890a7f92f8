"""A peer that lies about GPU memory: its pair is closed, and nothing outside what it may reach is touched."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fakes.gpu import DeviceArray
from fault.rawpeer import Frame, Kind, RawPeer
from harness import world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

DEVICE, ROWS = 2, 32  # flags
NBYTES = 100_000
PLACE = struct.Struct("<6Q16s64sH6x")


def place(base: int, nbytes: int) -> bytes:
    """A DevicePlace, as in core/device.hpp: of another process, whose memory cannot be mapped."""
    return PLACE.pack(99, base, base, nbytes, 1, 0, bytes(16), bytes(64), 0)


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here is native."""
    return "asyncio"


@pytest.fixture
async def comm(gpu: object) -> AsyncIterator[aiocomm.Communicator]:
    async with world(1, links=("shm", "cuda")) as (one,):
        yield one


async def lost(comm: aiocomm.Communicator) -> str:
    """Why the peer was cut off."""
    with pytest.raises(aiocomm.PeerLostError) as caught:
        await comm.recv(bytearray(1), 2)
    return str(caught.value)


async def test_bounds_of_a_region(comm: aiocomm.Communicator) -> None:
    whole = DeviceArray(NBYTES).write(np.full(NBYTES, 3, np.uint8))
    async with comm.register(whole.part(1000, 2000)) as region:
        with RawPeer(comm, 2) as peer:
            await peer.meet()
            number = region._number
            there = place(0x7000_0000_0000, 4096)
            for offset, nbytes in [(2000, 1), (2**63 - 1, 5), (-1, 1), (1999, 2), (0, 2001)]:
                peer.send(
                    Frame(Kind.PUT, rop=number, sop=7, tag=offset, nbytes=nbytes, payload=b"x" * nbytes)
                )
                assert (await peer.receive(Kind.FIN)).code
                for flags, address in ((DEVICE, 0), (DEVICE | ROWS, nbytes)):
                    frame = Frame(Kind.PUT_RTS, rop=number, sop=7, tag=offset, nbytes=nbytes, payload=there)
                    frame.flags, frame.address = flags, address
                    peer.send(frame)
                    assert (await peer.receive(Kind.FIN)).code
                for flags in (0, DEVICE, DEVICE | ROWS):
                    frame = Frame(Kind.GET, sop=number, rop=7, tag=offset, nbytes=nbytes, address=nbytes)
                    frame.flags = flags
                    peer.send(frame)
                    assert (await peer.receive(Kind.GET_FAIL)).code
    assert (whole.numpy() == 3).all()


async def test_more_rows_than_they_lie_in(comm: aiocomm.Communicator) -> None:
    async with comm.register(DeviceArray(NBYTES)) as region:
        with RawPeer(comm, 2) as peer:
            await peer.meet()
            frame = Frame(Kind.PUT_RTS, flags=DEVICE | ROWS, rop=region._number, sop=7, nbytes=101)
            frame.address, frame.payload = 100, place(0x7000_0000_0000, 4096)
            peer.send(frame)
            assert "rows" in await lost(comm)


async def test_rows_are_moved_by_whoever_asked_for_them(comm: aiocomm.Communicator) -> None:
    """A reader of few bytes that then asks to be sent many."""
    async with comm.register(DeviceArray(NBYTES)) as region:
        with RawPeer(comm, 2) as peer:
            await peer.meet()
            frame = Frame(Kind.GET, flags=DEVICE | ROWS, sop=region._number, rop=7, nbytes=2**40)
            frame.address = 100
            peer.send(frame)
            answer = await peer.receive(Kind.GET_READY)
            assert answer.flags & DEVICE
            peer.send(Frame(Kind.CTS, sop=answer.sop, rop=7))
            assert "rows are moved" in await lost(comm)


async def test_bytes_in_the_place_of_rows_are_not_written(comm: aiocomm.Communicator) -> None:
    whole = DeviceArray(NBYTES).write(np.full(NBYTES, 3, np.uint8))
    async with comm.register(whole) as region:
        with RawPeer(comm, 2) as peer:
            await peer.meet()
            frame = Frame(Kind.PUT_RTS, flags=DEVICE | ROWS, rop=region._number, sop=7, nbytes=50)
            frame.address, frame.payload = 100, place(0x7000_0000_0000, 4096)
            peer.send(frame)
            answer = await peer.receive(Kind.CTS)
            assert answer.flags & DEVICE
            peer.send(Frame(Kind.DATA, rop=answer.rop, sop=7, nbytes=50, payload=b"x" * 50))
            peer.send(Frame(Kind.MOVED, rop=answer.rop, nbytes=51))
            assert "another size" in await lost(comm)
    assert (whole.numpy() == 3).all()


async def test_what_describes_refused_memory_is_given_back(comm: aiocomm.Communicator) -> None:
    class NoMemory:
        __cuda_array_interface__ = DeviceArray(NBYTES).__cuda_array_interface__ | {
            "shape": (shape := tuple([1, 2, 3])),
            "data": (8, False),
        }

    counts = []
    for _ in range(5):
        with pytest.raises(aiocomm.AiocommError):
            await comm.send(NoMemory(), 0)
        counts.append(sys.getrefcount(NoMemory.shape))
    assert counts == counts[:1] * 5
