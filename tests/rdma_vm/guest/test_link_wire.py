"""The rdma link judged by an independent peer: what it posts, and what it lets others do to its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("pyverbs.device", reason="Debian's pyverbs needs Debian's version of Python")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fault.rawpeer import Frame, Kind, default_channel
from harness import until, world
from linkpeer import (
    HELLO,
    LAST_CHUNK,
    LINK_PRIVATE,
    MAGIC,
    OFFER,
    OFFER_META,
    VERSION,
    WITHDRAW,
    WITHDRAWN,
    LinkPeer,
    completion_of,
)

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio
CHANNEL = default_channel()
BIG = 1 << 20


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here is native."""
    return "asyncio"


@pytest.fixture
async def comm(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiocomm.Communicator]:
    """Rank 0 on host a, over its first rail; the other member of its world says nothing."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "rxea0")
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "10")  # the peer by hand gives no signs of life
    async with world(2, links=("rdma",)) as (a, _):
        yield a


@pytest.fixture
async def peer(comm: aiocomm.Communicator) -> AsyncIterator[LinkPeer]:
    with LinkPeer(comm, 2) as made:
        yield await made.meet()


def array(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


async def lost(comm: aiocomm.Communicator, rank: int = 2) -> None:
    await until(lambda: not next(peer for peer in comm.peers if peer.rank == rank).alive)


async def offered(peer: LinkPeer, nbytes: int = BIG) -> tuple[aiocomm.Transfer, np.ndarray, int, int, int]:
    """A receive of `comm`, and the address, key and immediate that it offers."""
    out = np.zeros(nbytes, np.uint8)
    receiving = peer.comm.recv(out, src=peer.rank, tag=7)
    arrival = await peer.receive(OFFER)
    _, immediate, _ = OFFER_META.unpack(arrival.frame.meta)
    (key,) = arrival.keys
    return receiving, out, arrival.frame.address, key, immediate


async def test_a_small_message_is_one_send_with_its_bytes(peer: LinkPeer) -> None:
    x = array(1000)
    sending = peer.comm.send(x, dst=2, tag=7)
    arrival = await peer.receive()
    await sending
    assert (arrival.completion.opcode, arrival.completion.immediate) == ("received", None)
    assert (arrival.frame.kind, arrival.frame.tag, arrival.frame.nbytes) == (Kind.EAGER, 7, 1000)
    assert arrival.frame.payload == x.tobytes()
    assert peer.has_none()
    assert peer.bulk.has_none()


async def test_a_posted_receive_says_where_to_write_and_is_written(peer: LinkPeer) -> None:
    receiving, out, address, key, immediate = await offered(peer)
    assert address == out.ctypes.data
    x = array(BIG).tobytes()
    peer.bulk.write_buffer(x)
    half = BIG // 2
    for number, last in ((0, 0), (1, LAST_CHUNK)):
        to = address + number * half, key
        peer.bulk.post("write", half, offset=number * half, to=to, immediate=immediate | last | number)
        assert (await completion_of(peer.bulk)).status == "success"
    status = await receiving
    assert status.nbytes == BIG
    assert out.tobytes() == x


async def test_an_offer_is_written_into_in_chunks_whose_immediates_count(peer: LinkPeer) -> None:
    slot, generation = 5, 3
    immediate = slot << 20 | generation << 17
    card = peer.bulk.card()
    offer = Frame(
        OFFER, channel=CHANNEL, tag=7, nbytes=BIG, sop=1 << 32, rop=99, address=card["address"], segment=1
    )
    offer.meta = OFFER_META.pack(0, immediate, 1)
    peer.send(offer, key=card["rkey"])
    x = array(BIG)
    # The engine looks at its frames before it sends; one that must be answered shows that it has.
    peer.send(Frame(WITHDRAW, channel=CHANNEL, tag=8, rop=1))
    await peer.receive(WITHDRAWN)
    sending = peer.comm.send(x, dst=2, tag=7)
    moved, number = 0, 0
    while moved < BIG:
        done = await completion_of(peer.bulk)
        assert done.opcode == "written with immediate", "nothing is read, nothing is written in silence"
        assert done.immediate is not None
        moved += done.nbytes
        assert done.immediate == immediate | (LAST_CHUNK if moved == BIG else 0) | number
        number += 1
    await sending
    assert peer.bulk.read_buffer(BIG) == x.tobytes()
    assert peer.bulk.has_none()
    assert peer.has_none(), "no word besides the writes"


async def test_a_message_that_nobody_offered_for_is_announced_and_read(peer: LinkPeer) -> None:
    x = array(BIG)
    sending = peer.comm.send(x, dst=2, tag=7)
    arrival = await peer.receive(Kind.RTS)
    (key,) = arrival.keys
    assert (arrival.frame.address, arrival.frame.nbytes) == (x.ctypes.data, BIG)
    peer.bulk.post("read", BIG, to=(arrival.frame.address, key))
    assert (await completion_of(peer.bulk)).status == "success"
    assert peer.bulk.read_buffer(BIG) == x.tobytes()
    assert not sending.done(), "the sender keeps its buffer until it is told"
    peer.send(Frame(Kind.FIN, sop=arrival.frame.sop, nbytes=BIG))
    await sending


async def test_a_key_is_refused_once_its_operation_has_ended(peer: LinkPeer) -> None:
    receiving, out, address, key, immediate = await offered(peer)
    peer.bulk.write_buffer(b"x" * BIG)
    peer.bulk.post("write", BIG, to=(address, key), immediate=immediate | LAST_CHUNK)
    assert (await completion_of(peer.bulk)).status == "success"
    await receiving
    out[:] = 7
    peer.bulk.post("write", 8, to=(address, key))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    assert (out == 7).all()


async def test_a_cancelled_receive_takes_its_key_back_before_it_ends(peer: LinkPeer) -> None:
    receiving, out, address, key, _ = await offered(peer)
    receiving.cancel()
    asked = await peer.receive(WITHDRAW)
    assert not receiving.done(), "the buffer is not free before the sender has dropped the offer"
    peer.send(Frame(WITHDRAWN, channel=CHANNEL, tag=7, rop=asked.frame.rop))
    await until(receiving.done)
    assert receiving.cancelled()
    peer.bulk.post("write", 8, to=(address, key))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    assert not out.any()


@pytest.mark.parametrize(("before", "nbytes"), [(-8, 16), (BIG - 4, 8), (BIG, 1)])
async def test_outside_of_what_is_offered_nothing_is_reached(
    peer: LinkPeer, before: int, nbytes: int
) -> None:
    buffer = np.zeros(BIG + 8192, np.uint8)
    out = buffer[4096 : 4096 + BIG]
    peer.comm.recv(out, src=2, tag=7)
    arrival = await peer.receive(OFFER)
    (key,) = arrival.keys
    peer.bulk.write_buffer(b"!" * 16)
    peer.bulk.post("write", nbytes, to=(arrival.frame.address + before, key))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    assert not buffer.any()


async def test_what_is_offered_for_writing_cannot_be_read_and_the_other_way_round(peer: LinkPeer) -> None:
    x = array(BIG)
    peer.comm.send(x, dst=2, tag=7)
    arrival = await peer.receive(Kind.RTS)
    before = x.copy()
    peer.bulk.post("write", 8, to=(arrival.frame.address, arrival.keys[0]))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    np.testing.assert_array_equal(x, before)


IMMEDIATES = {
    "a slot that was never offered": 77 << 20 | LAST_CHUNK,
    "slot 0": LAST_CHUNK,
}


@pytest.mark.parametrize("name", IMMEDIATES)
async def test_a_malformed_immediate_ends_that_pair_only(peer: LinkPeer, name: str) -> None:
    _, _, address, key, _ = await offered(peer)
    peer.bulk.post("write", 8, to=(address, key), immediate=IMMEDIATES[name])
    await lost(peer.comm)
    assert next(other for other in peer.comm.peers if other.rank == 1).alive
    with LinkPeer(peer.comm, 3) as other:
        await other.meet()
        await peer.comm.send(array(100), dst=3, tag=1)
        assert (await other.receive()).frame.nbytes == 100


FRAMES = {
    "unknown kind": (Frame(200), {}),
    "kind of another link": (Frame(Kind.HEARTBEAT), {}),
    "longer than it is": (Frame(Kind.EAGER, nbytes=4, payload=b"four"), {"nbytes": 98}),
    "shorter than a header": (Frame(Kind.EAGER), {"nbytes": 40}),
    "beyond its credits": (Frame(LINK_PRIVATE), {"seq": 500}),
    "offer without a slot": (
        Frame(OFFER, tag=7, nbytes=8, sop=1 << 32, segment=1, meta=bytes(16)),
        {"key": 1},
    ),
    "offer without a key": (Frame(OFFER, tag=7, nbytes=8, meta=OFFER_META.pack(0, 1 << 20, 1)), {}),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_a_malformed_frame_ends_that_pair_only(peer: LinkPeer, name: str) -> None:
    frame, options = FRAMES[name]
    peer.send(frame, **options)
    await lost(peer.comm)
    assert next(other for other in peer.comm.peers if other.rank == 1).alive


_PAIRS = (2, 3, 4, 0, 0, 0)


@pytest.mark.parametrize(
    "hello",
    [
        HELLO.pack(1, VERSION, 1, *_PAIRS),
        HELLO.pack(MAGIC, 9, 1, *_PAIRS),
        HELLO.pack(MAGIC, VERSION, 4, *_PAIRS),
        HELLO.pack(MAGIC, VERSION, 1, *_PAIRS[:4], 5, 0),  # more levels of bulk than there are here
    ],
)
async def test_a_greeting_of_another_kind_is_refused(comm: aiocomm.Communicator, hello: bytes) -> None:
    with LinkPeer(comm, 2) as stranger:
        stranger.socket.sendall(hello)
        await lost(comm)


async def test_a_peer_that_dies_ends_its_receives_and_its_keys(peer: LinkPeer) -> None:
    receiving, out, address, key, _ = await offered(peer)
    peer.socket.close()
    with pytest.raises(aiocomm.PeerLostError):
        await receiving
    out[:] = 7
    peer.bulk.post("write", 8, to=(address, key))
    assert (await completion_of(peer.bulk)).status != "success"
    assert (out == 7).all()
