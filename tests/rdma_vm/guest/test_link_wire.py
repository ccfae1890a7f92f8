"""The rdma link judged by an independent peer: what it posts, and what it lets others do to its memory."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

pytest.importorskip("pyverbs.device", reason="Debian's pyverbs needs Debian's version of Python")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fault.rawpeer import Frame, Kind, default_channel
from harness import until, world
from linkpeer import (
    AGAIN,
    BUSY,
    HELLO,
    KEY_ASK,
    KEY_IS,
    KEY_REVOKE,
    KEY_REVOKED,
    LAST_CHUNK,
    LINK_PRIVATE,
    MAGIC,
    NOTE,
    NOTE_MARK,
    OFFER,
    OFFER_META,
    VERSION,
    WITHDRAW,
    WITHDRAWN,
    WRITABLE,
    LinkPeer,
    completion_of,
)

import aiocomm
from aiocomm.types import LinkDown

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
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", "100")  # the peer by hand gives no signs of life
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "100")  # and answers when it comes to it
    async with world(2, links=("rdma",)) as (a, _):
        yield a


@pytest.fixture
async def peer(comm: aiocomm.Communicator) -> AsyncIterator[LinkPeer]:
    with LinkPeer(comm, 2) as made:
        yield await made.meet()


@contextlib.asynccontextmanager
async def peer_of_its_own(
    monkeypatch: pytest.MonkeyPatch, heartbeat_s: str = "100"
) -> AsyncIterator[LinkPeer]:
    """As the fixtures, for tests that set something before."""
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "rxea0")
    monkeypatch.setenv("AIOCOMM_HEARTBEAT_S", heartbeat_s)
    async with world(2, links=("rdma",)) as (comm, _):
        with LinkPeer(comm, 2) as made:
            yield await made.meet()


def array(nbytes: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def violations(comm: aiocomm.Communicator) -> int:
    return comm.links["rdma"].statistics().violations


async def lost(comm: aiocomm.Communicator, rank: int = 2) -> None:
    await until(lambda: not next(peer for peer in comm.peers if peer.rank == rank).alive)


async def lane_down(comm: aiocomm.Communicator) -> None:
    await until(lambda: comm.links["rdma"].statistics().device["lanes_failed"] == 1)


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


async def test_a_peer_whose_loop_looks_is_written_to_and_told_of_it_when_it_does_not(peer: LinkPeer) -> None:
    peer.offer_ring()
    peer.send(Frame(WITHDRAW, channel=CHANNEL, tag=8, rop=1), looks=True)
    await peer.receive(WITHDRAWN)  # so it has seen the offer
    x = array(100)
    await peer.comm.send(x, dst=2, tag=7)
    assert (await peer.receive_written()).frame.payload == x.tobytes()
    assert peer.has_no_frame(), "nothing completes here"
    await peer.comm.send(x, dst=2, tag=7)
    peer.send(Frame(LINK_PRIVATE))  # looks no more, and has taken in nothing of that
    done = await completion_of(peer.express)
    assert done.opcode == "received", "what was written and not taken is told of"
    assert (await peer.receive_written()).frame.payload == x.tobytes()


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
    assert peer.has_no_frame(), "no word besides the writes"


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


# ---------------------------------------------------------------- one-sided


def handle(peer: LinkPeer, region: int, nbytes: int) -> aiocomm.RemoteRegion:
    """What `comm` would have been told of a region of the peer's."""
    return aiocomm.RemoteRegion(peer.comm, peer.rank, peer.generation, region, 0, nbytes, True)


async def give_key(peer: LinkPeer, region: int, nbytes: int) -> int:
    """Answer the question for the key of `peer.bulk`; returns the address."""
    card = peer.bulk.card()
    asked = await peer.receive(KEY_ASK)
    assert asked.frame.rop == region
    answer = Frame(
        KEY_IS, flags=WRITABLE, rop=region, address=card["address"], nbytes=nbytes, segment=9, code=0
    )
    peer.send(answer, key=card["rkey"])
    return int(card["address"])


async def test_a_put_is_writes_and_no_word(peer: LinkPeer) -> None:
    x = array(BIG)
    putting = peer.comm.put(x, handle(peer, 77, BIG))
    await give_key(peer, 77, BIG)
    await putting
    assert peer.bulk.read_buffer(BIG) == x.tobytes()
    assert peer.bulk.has_none(), "no immediate"
    await peer.comm.put(x[:8], handle(peer, 77, BIG)[8:16])
    assert peer.bulk.read_buffer(16) == x[:8].tobytes() * 2
    assert peer.has_no_frame(), "the key is asked for once"


async def test_a_get_is_reads_and_no_word(peer: LinkPeer) -> None:
    x, got = array(BIG), np.zeros(BIG - 8, np.uint8)
    peer.bulk.write_buffer(x.tobytes())
    getting = peer.comm.get(handle(peer, 77, BIG)[8:], got)
    await give_key(peer, 77, BIG)
    await getting
    np.testing.assert_array_equal(got, x[8:])
    assert peer.has_no_frame()


async def test_a_notification_rides_on_the_last_write(comm: aiocomm.Communicator) -> None:
    nbytes = 12 << 20  # several chunks
    with LinkPeer(comm, 2, nbytes) as peer:
        await peer.meet()
        for number in range(2):
            x = array(nbytes, number)
            putting = comm.put(x, handle(peer, 77, nbytes), notify=b"done")
            if number == 0:
                await give_key(peer, 77, nbytes)
            done = await completion_of(peer.bulk)
            assert (done.opcode, done.immediate) == ("written with immediate", NOTE_MARK | number)
            assert peer.bulk.read_buffer(nbytes) == x.tobytes(), "nothing comes after it"
            note = (await peer.receive(NOTE)).frame
            assert (note.rop, note.nbytes, note.meta, note.channel) == (number, nbytes, b"done", CHANNEL)
            await putting
            assert peer.bulk.has_none()


async def test_a_notification_without_bytes_is_an_immediate(peer: LinkPeer) -> None:
    putting = peer.comm.put(b"", handle(peer, 77, BIG)[8:8], notify=b"now")
    await give_key(peer, 77, BIG)
    done = await completion_of(peer.bulk)
    assert (done.nbytes, done.immediate) == (0, NOTE_MARK)
    assert (await peer.receive(NOTE)).frame.meta == b"now"
    await putting


async def test_what_the_key_does_not_open_is_refused_here(peer: LinkPeer) -> None:
    remote = handle(peer, 77, 2 * BIG)
    putting = peer.comm.put(array(16), remote[BIG - 8 : BIG + 8])
    await give_key(peer, 77, BIG)
    with pytest.raises(aiocomm.UsageError, match="outside"):
        await putting
    with pytest.raises(aiocomm.UsageError, match="outside"):
        await peer.comm.get(remote[BIG - 8 : BIG + 8], bytearray(16))
    assert peer.bulk.read_buffer(BIG) == bytes(BIG)


async def test_a_revoked_key_is_given_back_and_not_used_again(peer: LinkPeer) -> None:
    remote = handle(peer, 77, BIG)
    putting = peer.comm.put(array(BIG), remote)
    await give_key(peer, 77, BIG)
    await putting
    peer.send(Frame(KEY_REVOKE, rop=77))
    assert (await peer.receive(KEY_REVOKED)).frame.rop == 77
    peer.bulk.write_buffer(bytes(BIG))
    putting = peer.comm.put(array(BIG), remote)
    await peer.receive(KEY_ASK)
    peer.send(Frame(KEY_IS, rop=77, code=6))
    with pytest.raises(aiocomm.StaleHandleError):
        await putting
    assert peer.bulk.read_buffer(BIG) == bytes(BIG)


async def test_what_devices_cannot_reach_is_served_by_its_owner(peer: LinkPeer) -> None:
    x = array(BIG)
    putting = peer.comm.put(x, handle(peer, 77, BIG), notify=b"done")
    await peer.receive(KEY_ASK)
    peer.send(Frame(KEY_IS, rop=77, code=8))
    announced = await peer.receive(Kind.PUT_RTS)
    assert (announced.frame.rop, announced.frame.address, announced.frame.meta) == (
        77,
        x.ctypes.data,
        b"done",
    )
    peer.bulk.post("read", BIG, to=(announced.frame.address, announced.keys[0]))
    assert (await completion_of(peer.bulk)).status == "success"
    assert peer.bulk.read_buffer(BIG) == x.tobytes()
    peer.send(Frame(Kind.FIN, sop=announced.frame.sop, nbytes=BIG))
    await putting
    peer.comm.put(x[:8], handle(peer, 77, BIG)[:8])
    assert (await peer.receive()).frame.kind == Kind.PUT, "it is not asked for again"


async def test_a_region_is_reached_by_its_key_until_it_is_closed(peer: LinkPeer) -> None:
    memory = np.zeros(BIG, np.uint8)
    region = peer.comm.register(memory)
    peer.send(Frame(KEY_ASK, rop=region._number))
    arrival = await peer.receive(KEY_IS)
    (key,) = arrival.keys
    assert (arrival.frame.address, arrival.frame.nbytes) == (memory.ctypes.data, BIG)
    x = array(BIG).tobytes()
    peer.bulk.write_buffer(x)
    peer.bulk.post("write", BIG, to=(memory.ctypes.data, key))
    assert (await completion_of(peer.bulk)).status == "success"
    assert memory.tobytes() == x
    async with anyio.create_task_group() as group:
        group.start_soon(region.aclose)
        asked = await peer.receive(KEY_REVOKE)
        assert asked.frame.rop == region._number
        memory_before = memory.copy()
        peer.bulk.post("write", 8, offset=8, to=(memory.ctypes.data, key))  # it is not ours to refuse yet
        assert (await completion_of(peer.bulk)).status == "success"
        assert not region._free.is_set()
        peer.send(Frame(KEY_REVOKED, rop=region._number))
    assert memory[8:].tobytes() == memory_before[8:].tobytes()
    memory[:] = 7
    peer.bulk.post("write", 8, to=(memory.ctypes.data, key))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    assert (memory == 7).all()


async def test_whoever_uses_a_closing_region_is_asked_until_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "4")  # within which this peer must say that it is busy
    async with peer_of_its_own(monkeypatch) as peer:
        region = peer.comm.register(np.zeros(BIG, np.uint8))
        peer.send(Frame(KEY_ASK, rop=region._number))
        await peer.receive(KEY_IS)
        closing = asyncio.create_task(region.aclose())
        assert (await peer.receive(KEY_REVOKE)).frame.flags == 0
        for _ in range(2):
            peer.send(Frame(KEY_REVOKED, flags=BUSY, rop=region._number))
            assert (await peer.receive(KEY_REVOKE)).frame.flags == AGAIN
            assert not closing.done()
        peer.send(Frame(KEY_REVOKED, rop=region._number))
        await closing
        assert next(other for other in peer.comm.peers if other.rank == peer.rank).alive


async def test_a_peer_that_lives_but_does_not_give_a_key_back_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "0.3")
    async with peer_of_its_own(monkeypatch) as peer:
        memory = np.zeros(BIG, np.uint8)
        region = peer.comm.register(memory)
        peer.send(Frame(KEY_ASK, rop=region._number))
        arrival = await peer.receive(KEY_IS)
        closing = asyncio.create_task(region.aclose())
        await peer.receive(KEY_REVOKE)
        await closing
        await lost(peer.comm)
        peer.bulk.post("write", 8, to=(arrival.frame.address, arrival.keys[0]))
        assert (await completion_of(peer.bulk)).status != "success"
        assert not memory.any()


async def test_a_key_asked_back_twice_is_answered_once(peer: LinkPeer) -> None:
    putting = peer.comm.put(array(BIG), handle(peer, 77, BIG))
    await give_key(peer, 77, BIG)
    await putting
    peer.send(Frame(KEY_REVOKE, rop=77))
    peer.send(Frame(KEY_REVOKE, flags=AGAIN, rop=77))  # before the answer to the first had come
    assert (await peer.receive(KEY_REVOKED)).frame.flags == 0
    peer.send(Frame(KEY_ASK, rop=1 << 40))
    assert (await peer.receive()).frame.kind == KEY_IS, "no word besides, and the pair goes on"


async def put_that_is_refused(peer: LinkPeer) -> aiocomm.Transfer:
    """The key that it was given opens nothing."""
    card = peer.bulk.card()
    putting = peer.comm.put(array(BIG), handle(peer, 77, BIG))
    await peer.receive(KEY_ASK)
    answer = Frame(KEY_IS, flags=WRITABLE, rop=77, address=card["address"], nbytes=BIG, segment=9, code=0)
    peer.send(answer, key=card["rkey"] ^ 0x5A00)
    return putting


async def test_an_access_that_is_refused_breaks_its_lane_which_is_made_anew(peer: LinkPeer) -> None:
    putting = await put_that_is_refused(peer)
    await lane_down(peer.comm)
    sending = peer.comm.send(array(100), dst=2, tag=7)  # with no lane up: it waits
    assert not putting.done(), "the peer may be dying"
    await peer.renew()
    with pytest.raises(aiocomm.StaleHandleError):
        await putting
    assert (await peer.receive()).frame.payload == array(100).tobytes()
    await sending
    assert next(other for other in peer.comm.peers if other.rank == 2).alive
    counted = peer.comm.links["rdma"].statistics().device
    assert (counted["lanes_failed"], counted["lanes_recovered"]) == (1, 1)
    out = np.zeros(BIG, np.uint8)
    receiving = peer.comm.recv(out, src=2, tag=8)
    arrival = await peer.receive(OFFER)
    peer.bulk.write_buffer(array(BIG).tobytes())
    immediate = OFFER_META.unpack(arrival.frame.meta)[1] | LAST_CHUNK
    peer.bulk.post("write", BIG, to=(arrival.frame.address, arrival.keys[0]), immediate=immediate)
    assert (await receiving).nbytes == BIG
    np.testing.assert_array_equal(out, array(BIG))


async def test_a_peer_that_does_not_make_a_broken_lane_anew_ends_by_its_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOCOMM_RDMA_RETRY_S", "4")
    # Its link is given up with a heartbeat; by the third one without a sign of life it would be lost.
    async with peer_of_its_own(monkeypatch, heartbeat_s="3") as peer, peer.signs_of_life():
        putting = await put_that_is_refused(peer)
        sending = peer.comm.send(array(BIG), dst=2, tag=7)
        await peer.close_lane()
        with pytest.raises(aiocomm.StaleHandleError):
            await putting
        with pytest.raises(aiocomm.LinkError):
            await sending


async def test_a_peer_whose_memory_goes_before_its_connection_is_lost(peer: LinkPeer) -> None:
    """Of a process that is killed: its device refuses what is under way, and it says nothing."""
    putting = await put_that_is_refused(peer)
    await lane_down(peer.comm)
    assert not putting.done()
    peer.socket.close()
    with pytest.raises(aiocomm.PeerLostError):
        await putting


async def test_a_peer_to_whom_there_is_no_way_is_refused_by_name(comm: aiocomm.Communicator) -> None:
    words = r"rxea0 port 1: the peer \(10\.99\.0\.1\) is on another subnet than 10\.20\.0\.1.*ip route get"
    with pytest.raises(aiocomm.LinkError, match=words):
        LinkPeer(comm, 2, address="::ffff:10.99.0.1")


async def test_a_closed_region_has_no_key(peer: LinkPeer) -> None:
    region = peer.comm.register(np.zeros(100, np.uint8))
    await region.aclose()
    peer.send(Frame(KEY_ASK, rop=region._number))
    assert (await peer.receive(KEY_IS)).frame.code == 6


@pytest.mark.parametrize("writable", [True, False])
async def test_a_regions_key_opens_that_region_only(peer: LinkPeer, writable: bool) -> None:
    whole = aiocomm.empty(BIG, np.uint8)
    whole.fill(3)
    region = peer.comm.register(whole[4096 : 4096 + 100], writable=writable)
    peer.send(Frame(KEY_ASK, rop=region._number))
    arrival = await peer.receive(KEY_IS)
    (key,) = arrival.keys
    assert bool(arrival.frame.flags & WRITABLE) == writable
    peer.bulk.post("read", 100, to=(arrival.frame.address, key))
    assert (await completion_of(peer.bulk)).status == "success"
    assert peer.bulk.read_buffer(100) == b"\3" * 100
    address = arrival.frame.address + (50 if writable else 0)
    peer.bulk.post("write", 100, to=(address, key))
    assert (await completion_of(peer.bulk)).status == "remote access error"
    assert (whole == 3).all()


async def test_notifications_of_a_peer_are_told_once_when_both_halves_are_there(peer: LinkPeer) -> None:
    memory = np.zeros(BIG, np.uint8)
    notes = peer.comm.notifications()
    async with peer.comm.register(memory) as region:
        peer.send(Frame(KEY_ASK, rop=region._number))
        arrival = await peer.receive(KEY_IS)
        to = arrival.frame.address, arrival.keys[0]
        for number in (1, 0, 1, 0):  # early, and repeated
            peer.bulk.post("write", 8, to=to, immediate=NOTE_MARK | number)
            assert (await completion_of(peer.bulk)).status == "success"
        for number in range(2):
            peer.send(Frame(NOTE, channel=CHANNEL, rop=number, nbytes=8, meta=bytes((number,))))
        peer.send(Frame(NOTE, channel=CHANNEL, rop=2, nbytes=0, meta=b"last"))
        peer.bulk.post("write", 0, to=to, immediate=NOTE_MARK | 2)
        told = [(await anext(notes)).payload for _ in range(3)]
        assert told == [b"\0", b"\1", b"last"]
        closing = asyncio.create_task(region.aclose())
        await peer.receive(KEY_REVOKE)
        peer.send(Frame(KEY_REVOKED, rop=region._number))
        await closing


async def test_a_peer_that_dies_has_no_key_any_more(peer: LinkPeer) -> None:
    memory = np.zeros(BIG, np.uint8)
    region = peer.comm.register(memory)
    peer.send(Frame(KEY_ASK, rop=region._number))
    arrival = await peer.receive(KEY_IS)
    closing = asyncio.create_task(region.aclose())
    await peer.receive(KEY_REVOKE)
    assert not closing.done()
    peer.socket.close()
    await closing
    memory[:] = 7
    peer.bulk.post("write", 8, to=(arrival.frame.address, arrival.keys[0]))
    assert (await completion_of(peer.bulk)).status != "success"
    assert (memory == 7).all()


IMMEDIATES = {
    "a slot that was never offered": 77 << 20 | LAST_CHUNK,
    "slot 0": LAST_CHUNK,
}


@pytest.mark.parametrize("name", IMMEDIATES)
async def test_a_malformed_immediate_ends_that_pair_only(peer: LinkPeer, name: str) -> None:
    _, _, address, key, _ = await offered(peer)
    peer.bulk.post("write", 8, to=(address, key), immediate=IMMEDIATES[name])
    await lost(peer.comm)
    assert violations(peer.comm) == 1
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
    "key that nobody asked for": (Frame(KEY_IS, rop=1, nbytes=8, segment=1), {"key": 1}),
    "key revoked that was never given": (Frame(KEY_REVOKE, rop=1), {}),
    "key given back unasked": (Frame(KEY_REVOKED, rop=1), {}),
    "notification out of order": (Frame(NOTE, rop=1), {}),
    "notification without a number": (Frame(NOTE, rop=1 << 20), {}),
    "offer without a key": (Frame(OFFER, tag=7, nbytes=8, meta=OFFER_META.pack(0, 1 << 20, 1)), {}),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_a_malformed_frame_ends_that_pair_only(peer: LinkPeer, name: str) -> None:
    frame, options = FRAMES[name]
    peer.send(frame, **options)
    await lost(peer.comm)
    assert violations(peer.comm) == 1
    assert next(other for other in peer.comm.peers if other.rank == 1).alive


_PAIRS = (2, 3, 4, 0, 0, 0)


@pytest.mark.parametrize(
    "hello",
    [
        HELLO.pack(1, VERSION, 1, *_PAIRS),
        HELLO.pack(MAGIC, 9, 1, *_PAIRS),
        HELLO.pack(MAGIC, VERSION, 4, *_PAIRS),
    ],
)
async def test_a_greeting_of_another_kind_is_refused(comm: aiocomm.Communicator, hello: bytes) -> None:
    with LinkPeer(comm, 2) as stranger:
        stranger.socket.sendall(hello)
        await lost(comm)
        assert violations(comm) == 1


async def test_more_service_levels_than_here_end_the_link_with_their_remedy(
    comm: aiocomm.Communicator,
) -> None:
    events = comm.events()
    with LinkPeer(comm, 2) as stranger:
        stranger.socket.sendall(HELLO.pack(MAGIC, VERSION, 1, *_PAIRS[:4], 5, 0))
        async for event in events:
            if isinstance(event, LinkDown):
                break
        assert (event.link, event.rank) == ("rdma", 2)
        assert "rxea0 port 1" in event.reason
        assert "AIOCOMM_RDMA_SERVICE_LEVEL" in event.reason
    assert violations(comm) == 0


async def test_a_peer_that_dies_ends_its_receives_and_its_keys(peer: LinkPeer) -> None:
    receiving, out, address, key, _ = await offered(peer)
    peer.socket.close()
    with pytest.raises(aiocomm.PeerLostError):
        await receiving
    out[:] = 7
    peer.bulk.post("write", 8, to=(address, key))
    assert (await completion_of(peer.bulk)).status != "success"
    assert (out == 7).all()
