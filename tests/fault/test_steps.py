"""A peer that dies at each step of the protocol, in each role: whoever waits is told, the others go on."""

from __future__ import annotations

import contextlib
import errno
import select
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from fault.rawpeer import Frame, Kind, RawPeer, connections, default_channel, introduce
from fault.victims import TcpEnd
from harness import LIMIT_S, held, others_go_on, until, world

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = pytest.mark.anyio

LARGE = 3 << 20
CHANNEL = default_channel()


@pytest.fixture
async def pair(endless: None) -> AsyncIterator[Pair]:
    async with world(2, warmup=True) as (a, b):
        await others_go_on((a, b))  # either side has all of the pair by then
        before = held()
        yield a, b
        # By the engine's thread and the control thread, in their time.
        kinds = "mappings", "descriptors", "segments", "files"
        await until(lambda: all(now[kind] <= before[kind] for now in [held()] for kind in kinds))


async def told(transfer: Any) -> None:
    """The transfer ends with PeerLostError."""
    with pytest.raises(aiocomm.PeerLostError, match="gone") as caught:
        await transfer
    assert caught.value.peer == 2


# ---------------------------------------------------------------- while connecting


async def test_before_the_greeting(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        waiting = [a.send(b"x" * 10, 2), a.send(bytes(LARGE), 2), a.recv(bytearray(1), 2), a.recv_array(2)]
        peer.die()
        for transfer in waiting:
            await told(transfer)
    await others_go_on(pair)


async def test_after_its_greeting_only(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        waiting = [a.send(bytes(LARGE), 2), a.recv(bytearray(1), 2)]
        peer.greet()
        peer.die()
        for transfer in waiting:
            await told(transfer)
    await others_go_on(pair)


# ---------------------------------------------------------------- we send


@pytest.mark.parametrize("step", ["before match", "after match", "mid-chunk", "before acknowledgement"])
async def test_the_receiver_dies(pair: Pair, step: str) -> None:
    a, _ = pair
    source = np.ones(LARGE, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        sending = a.send(source, 2)
        rts = await peer.receive(Kind.RTS)
        assert rts.nbytes == LARGE
        if step != "before match":
            peer.send(Frame(Kind.CTS, sop=rts.sop, rop=5))
        got = 0
        if step == "mid-chunk":
            got += len((await peer.receive(Kind.DATA)).payload)
            assert 0 < got < LARGE
        if step == "before acknowledgement":
            while got < LARGE:
                data = await peer.receive(Kind.DATA)
                assert data.rop == 5
                assert set(data.payload) == {1}
                got += len(data.payload)
        assert not sending.done()
        peer.die()
        await told(sending)
    with pytest.raises(aiocomm.PeerLostError):
        await a.send(b"x", 2)
    await others_go_on(pair)


async def test_the_receiver_dies_before_it_acknowledges_a_small_synchronous_send(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        sending = a.send(b"small", 2, synchronous=True)
        assert (await peer.receive(Kind.EAGER)).payload == b"small"
        peer.die()
        await told(sending)
    await others_go_on(pair)


async def test_the_receiver_dies_while_sends_wait_for_room(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2, ring_bytes=1 << 20) as peer:
        await peer.meet()
        sending = [a.send(bytes(60_000), 2) for _ in range(50)]
        peer.die()
        for transfer in sending[20:]:  # the ring holds 17 of them
            await told(transfer)
    await others_go_on(pair)


# ---------------------------------------------------------------- we receive


@pytest.mark.parametrize("step", ["before match", "half a record", "after match", "mid-chunk"])
async def test_the_sender_dies(pair: Pair, step: str) -> None:
    a, _ = pair
    buffer = np.zeros(LARGE, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(buffer, 2)
        rts = Frame(Kind.RTS, channel=CHANNEL, nbytes=LARGE, sop=9, meta=bytes(24))
        if step == "half a record":
            peer.send(rts, whole=False)
        elif step != "before match":
            peer.send(rts)
            cts = await peer.receive(Kind.CTS)
            assert cts.sop == 9
        if step == "mid-chunk":
            peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=LARGE, payload=b"\1" * 1000))
            await until(lambda: buffer[999])
        assert not receiving.done()
        peer.die()
        await told(receiving)
    buffer.fill(0xAB)
    await others_go_on(pair)
    assert (buffer == 0xAB).all()


async def test_what_a_dead_sender_had_sent_is_delivered(pair: Pair) -> None:
    a, _ = pair
    count, nbytes = 14, 60_000  # more than one turn of polling takes
    with RawPeer(a, 2) as peer:
        await peer.meet()
        for number in range(count):
            frame = Frame(Kind.EAGER, channel=CHANNEL, tag=number, nbytes=nbytes, meta=bytes(16))
            frame.payload = bytes([number]) * nbytes
            record = frame
            peer.send(record)
        peer.die()
        got = np.zeros(nbytes, np.uint8)
        for number in range(count):
            assert (await a.recv(got, 2, tag=number)).nbytes == nbytes
            assert (got == number).all()
        with pytest.raises(aiocomm.PeerLostError):
            await a.recv(got, 2, tag=count)
    await others_go_on(pair)


async def test_a_sender_that_dies_after_its_last_byte_has_sent_it(pair: Pair) -> None:
    a, _ = pair
    buffer = np.zeros(100_000, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(buffer, 2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=100_000, sop=9, meta=bytes(24)))
        cts = await peer.receive(Kind.CTS)
        peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=100_000, payload=b"\2" * 100_000))
        peer.die()
        assert (await receiving).nbytes == 100_000
        assert (buffer == 2).all()
        await told(a.recv(buffer, 2))
    await others_go_on(pair)


async def test_an_announced_message_dies_with_its_sender(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=LARGE, sop=9, meta=bytes(24)))
        await until(lambda: a.statistics().unexpected_messages)
        peer.die()
        await told(a.recv(bytearray(LARGE), 2))
        assert a.statistics().unexpected_messages == 0
    await others_go_on(pair)


@pytest.mark.parametrize("streams", [True, False])
async def test_memory_that_cannot_be_read_from_here_is_asked_for(pair: Pair, streams: bool) -> None:
    """Its owner may be able to, or says that it is not."""
    a, _ = pair
    with RawPeer(a, 2, cma=True) as peer:
        await peer.meet()
        buffer = np.zeros(100_000, np.uint8)
        receiving = a.recv(buffer, 2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=100_000, sop=9, address=4096, meta=bytes(24)))
        cts = await peer.receive(Kind.CTS)
        if streams:
            peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=100_000, payload=b"\2" * 100_000))
            assert (await receiving).nbytes == 100_000
            assert (buffer == 2).all()
            assert (await peer.receive(Kind.FIN)).code == 0
        else:
            peer.send(Frame(Kind.CANCEL, sop=9))
            with pytest.raises(aiocomm.TransferCancelled):
                await receiving
    await others_go_on(pair)


# ---------------------------------------------------------------- one-sided


async def test_the_owner_dies_under_a_put(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        remote = aiocomm.RemoteRegion(a, 2, peer.generation, 1, 0, LARGE, True)
        small, large = a.put(b"x" * 100, remote), a.put(bytes(LARGE), remote)
        await peer.receive(Kind.PUT)
        await peer.receive(Kind.PUT_RTS)
        peer.die()
        await told(small)
        await told(large)
    await others_go_on(pair)


@pytest.mark.parametrize("step", ["before the answer", "after the answer", "mid-chunk"])
async def test_the_owner_dies_under_a_get(pair: Pair, step: str) -> None:
    a, _ = pair
    buffer = np.zeros(LARGE, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        getting = a.get(aiocomm.RemoteRegion(a, 2, peer.generation, 1, 0, LARGE, True), buffer)
        asked = await peer.receive(Kind.GET)
        if step != "before the answer":
            peer.send(Frame(Kind.GET_READY, rop=asked.rop, sop=3, nbytes=LARGE))
        if step == "mid-chunk":
            peer.send(Frame(Kind.DATA, rop=asked.rop, sop=3, nbytes=LARGE, payload=b"\1" * 1000))
            await until(lambda: buffer[999])
        peer.die()
        await told(getting)
    buffer.fill(0xAB)
    await others_go_on(pair)
    assert (buffer == 0xAB).all()


async def test_what_is_shared_and_cannot_be_mapped_here_is_asked_for(pair: Pair) -> None:
    """Its owner takes it for read: nobody would send it."""
    a, _ = pair
    buffer = np.zeros(1000, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        getting = a.get(aiocomm.RemoteRegion(a, 2, peer.generation, 1, 0, 1000, True), buffer)
        asked = await peer.receive(Kind.GET)
        peer.send(Frame(Kind.GET_READY, rop=asked.rop, sop=3, nbytes=1000, segment=77, code=1))
        assert (await peer.receive(Kind.CTS)).sop == 3
        peer.send(Frame(Kind.DATA, rop=asked.rop, sop=3, nbytes=1000, payload=b"\1" * 1000))
        await getting
        assert (buffer == 1).all()
    await others_go_on(pair)


@pytest.mark.parametrize("answer", ["a segment", "a refusal", "data", "no segment"])
async def test_rows_that_cannot_be_read_are_got_in_another_way(pair: Pair, answer: str) -> None:
    a, _ = pair
    buffer = np.zeros(8192, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        rows = _core.Rows(*(np.array([n]) for n in (0, 5000, 4096, -4096, 4096, 2)))
        getting = a._engine.get_rows(buffer, 2, 0, 1, 0, rows, -1.0, None)
        asked = await peer.receive(Kind.GET)
        assert (asked.flags, asked.nbytes, asked.address) == (32, 8192, 9096)
        if answer == "a refusal":
            peer.send(Frame(Kind.GET_FAIL, rop=asked.rop, code=12))
        elif answer == "data":
            peer.send(Frame(Kind.DATA, rop=asked.rop, sop=3, nbytes=8192, payload=b"\1" * 8192))
            peer.send(Frame(Kind.GET_FAIL, rop=asked.rop, code=12))
        else:
            segment = 77 if answer == "a segment" else 0
            peer.send(
                Frame(Kind.GET_READY, rop=asked.rop, sop=3, nbytes=8192, segment=segment, code=bool(segment))
            )
        if answer == "no segment":
            with pytest.raises(aiocomm.PeerLostError, match="violation"):
                await getting
        else:
            with pytest.raises(aiocomm.LinkError) as told_of:
                await getting
            assert told_of.value.code == errno.EXDEV
        if answer == "a segment":
            assert (await peer.receive(Kind.FIN)).sop == 3
        assert not buffer.any()
    await others_go_on(pair)


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_rows_are_not_sent(pair: Pair, kind: str) -> None:
    """What they lie in may be more than the peer may see, and be less than they are in all."""
    a, _ = pair
    memory = np.zeros(4096, np.uint8)
    async with a.register(memory) as region:
        with RawPeer(a, 2, cma=True) as peer:
            rows = _core.Rows(*(np.array([n]) for n in (0, 0, 0, 4096, 4096, 9)))
            if kind == "put":  # it waits for the greeting
                putting = a._engine.put_rows(memory, 2, 0, 1, 0, rows, None, -1.0, None)
            await peer.meet()
            if kind == "put":
                asked = await peer.receive(Kind.PUT_RTS)
                assert (asked.flags, asked.nbytes, len(asked.payload)) == (32, 9 * 4096, 48)
                number = asked.sop
            else:
                peer.send(
                    Frame(Kind.GET, flags=32, sop=region._number, rop=4, nbytes=1 << 40, address=4096, code=1)
                )
                number = (await peer.receive(Kind.GET_READY)).sop
            peer.send(Frame(Kind.CTS, sop=number, rop=4))
            with pytest.raises(aiocomm.PeerLostError, match="violation"):
                await a.recv(bytearray(1), 2)
            if kind == "put":
                await told(putting)
    await others_go_on(pair)


async def test_data_that_overtakes_the_answer_to_a_get(pair: Pair) -> None:
    """On links with lanes it may come first."""
    a, _ = pair
    buffer = np.zeros(200_000, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        getting = a.get(aiocomm.RemoteRegion(a, 2, peer.generation, 1, 0, 200_000, True), buffer)
        asked = await peer.receive(Kind.GET)
        half = Frame(Kind.DATA, rop=asked.rop, sop=3, nbytes=200_000, payload=b"\1" * 100_000)
        peer.send(half)
        await until(lambda: buffer[99_999])
        peer.send(Frame(Kind.GET_READY, rop=asked.rop, sop=3, nbytes=200_000))
        half.address = 100_000
        peer.send(half)
        await getting
        assert (buffer == 1).all()
        assert (await peer.receive(Kind.FIN)).sop == 3
    await others_go_on(pair)


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_a_region_is_free_once_its_user_is_dead(pair: Pair, kind: str) -> None:
    a, _ = pair
    memory = np.zeros(LARGE, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        region = a.register(memory)
        if kind == "put":
            peer.send(Frame(Kind.PUT_RTS, rop=region._number, sop=4, nbytes=LARGE))
            await peer.receive(Kind.CTS)
        else:
            peer.send(Frame(Kind.GET, sop=region._number, rop=4, nbytes=LARGE))
            await peer.receive(Kind.GET_READY)
        peer.die()
        await region.aclose()
    await others_go_on(pair)


# ---------------------------------------------------------------- a peer that lives, and does not answer


async def test_a_cancel_that_the_peer_does_not_answer_ends_with_the_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only so nothing of the buffer can be touched later."""
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "0.05")
    async with world(2, warmup=True) as members:
        a = members[0]
        with RawPeer(a, 2) as peer:
            await peer.meet()
            sending, other = a.send(bytes(LARGE), 2), a.recv(bytearray(1), 2)
            await peer.receive(Kind.RTS)
            assert sending.cancel()
            assert not sending.done()
            await peer.receive(Kind.CANCEL)
            with pytest.raises(aiocomm.PeerLostError):
                await other
            await until(sending.done)
            assert sending.cancelled()
        await others_go_on((a, members[1]))


@pytest.mark.parametrize("what", ["recv", "get"])
async def test_a_cancelled_fetch_discards_what_still_comes(pair: Pair, what: str) -> None:
    a, _ = pair
    buffer = np.zeros(LARGE, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        transfer: Any
        if what == "recv":
            transfer = a.recv(buffer, 2)
            peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=LARGE, sop=9, meta=bytes(24)))
            target = (await peer.receive(Kind.CTS)).rop
        else:
            transfer = a.get(aiocomm.RemoteRegion(a, 2, peer.generation, 1, 0, LARGE, True), buffer)
            target = (await peer.receive(Kind.GET)).rop
            peer.send(Frame(Kind.GET_READY, rop=target, sop=9, nbytes=LARGE))
        peer.send(Frame(Kind.DATA, rop=target, sop=9, nbytes=LARGE, payload=b"\1" * 1000))
        await until(lambda: buffer[999])
        assert transfer.cancel()
        await until(transfer.done)
        buffer.fill(0xAB)
        assert (await peer.receive(Kind.STOP)).sop == 9
        peer.send(Frame(Kind.DATA, rop=target, sop=9, nbytes=LARGE, address=1000, payload=b"\1" * 1000))
        peer.send(Frame(Kind.EAGER, channel=CHANNEL, tag=1, nbytes=1, meta=bytes(24), payload=b"x"))
        await a.recv(bytearray(1), 2, tag=1)
        assert (buffer == 0xAB).all()
    await others_go_on(pair)


async def test_a_goodbye_is_a_lost_peer_at_once(pair: Pair) -> None:
    a, _ = pair
    events = a.events()
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(bytearray(1), 2)
        peer.send(Frame(Kind.GOODBYE))
        await told(receiving)
        async for event in events:
            if isinstance(event, aiocomm.PeerLost):
                assert (event.rank, event.generation, event.reason) == (2, peer.generation, "left")
                break
    await others_go_on(pair)


@pytest.mark.skipif("tcp" not in _core.available_links(), reason="this build has no tcp link")
async def test_bytes_that_are_acknowledged_early_are_counted_once(pair: Pair) -> None:
    """The acknowledgement goes over another lane than the bytes, and may be handled before their last is."""
    a, _ = pair
    ours, theirs = connections(a, "tcp")
    before = held()
    introduce(a, 2, "tcp", [sock.detach() for sock in ours])
    with contextlib.ExitStack() as stack:
        for lane in theirs:
            stack.enter_context(lane)
        peer = TcpEnd(theirs)
        completions = a.links["tcp"].completions()
        nbytes = 64 << 20  # more than the sockets hold
        sending = a.send(np.ones(nbytes, np.uint8), 2)
        rts = await peer.receive(Kind.RTS)
        peer.send(Frame(Kind.CTS, sop=rts.sop, rop=5))
        await until(lambda: a.links["tcp"].statistics().in_flight_bytes)
        peer.send(Frame(Kind.FIN, sop=rts.sop, nbytes=nbytes))
        with anyio.fail_after(LIMIT_S):
            while not sending.done():
                await anyio.lowlevel.checkpoint()
                for lane in select.select(theirs, [], [], 0)[0]:
                    lane.recv(1 << 20)
        await sending
        done = await anext(completions)
        assert (done.kind, done.ok, done.nbytes) == ("send", True, nbytes)
        assert sum(a.links["tcp"].statistics().bytes_by_path.values()) == nbytes
    # Both ends' sockets, which were there before, and the link's own.
    await until(lambda: held()["descriptors"] <= before["descriptors"] - len(ours) - len(theirs))
    await others_go_on(pair)
