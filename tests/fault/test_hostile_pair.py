"""An authenticated peer that sends nonsense over its pair: that pair is closed, all others go on.

Memory stays bounded meanwhile. AIOCOMM_FUZZ_SEED and AIOCOMM_FUZZ_ROUNDS change the random cases and their
number.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from fault.fuzzing import resident, seeds
from fault.rawpeer import CONTROL_BYTES, HELLO, MAGIC, Frame, Kind, RawPeer, default_channel, memfd
from harness import LIMIT_S, held, reach_each_other, until, world

import aiocomm
from aiocomm.types import Peer
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from conftest import Pair

pytestmark = pytest.mark.anyio

CHANNEL = default_channel()
META = bytes(24)
ROWS, LISTED = 32, 64  # flags
# Of a pair, with the tests' own buffers. What a peer may leave here unasked is bounded by the runtime: at
# four times this side's bound of 16 MiB, and what another sender's may be, the pair is closed.
MEMORY_BOUND = 64 << 20
LISTS_AT_MOST = 1 << 30
HELD_AT_MOST = 4 * ((16 << 20) + (64 << 20))


@pytest.fixture
def anyio_backend() -> str:
    """One loop: what is tested here is native."""
    return "asyncio"


@pytest.fixture
def bound(request: pytest.FixtureRequest) -> int:
    """Bytes of memory that the test may cost."""
    return int(getattr(request, "param", MEMORY_BOUND))


@pytest.fixture
async def pair(bound: int) -> AsyncIterator[Pair]:
    async with world(2, warmup=True) as (a, b):
        await reach_each_other((a, b))  # either side has all of the pair by then
        before, memory = held(), resident()
        yield a, b
        with anyio.fail_after(LIMIT_S):  # the engine's thread closes them
            await until(lambda: held()["descriptors"] <= before["descriptors"])
            await until(lambda: resident() - memory < bound)  # it frees what they held after that


async def closed(comm: aiocomm.Communicator, rank: int = 2, reason: str = "violation") -> None:
    """The pair with that peer has been closed."""
    events = comm.events()
    if next(peer for peer in comm.peers if peer.rank == rank).alive:
        async for event in events:
            if isinstance(event, aiocomm.PeerLost) and event.rank == rank:
                assert reason in event.reason
                break
    with pytest.raises(aiocomm.PeerLostError):
        await comm.recv(bytearray(1), rank)


# ---------------------------------------------------------------- frames that make no sense


def ranges(*wanted: tuple[int, int]) -> bytes:
    """(offset, bytes) of each, as in core/listed.hpp."""
    return b"".join(struct.pack("<QQ", *one) for one in wanted)


NONSENSE: dict[str, Callable[[], Frame]] = {
    "no such kind": lambda: Frame(99),
    "kind 0": lambda: Frame(0),
    "negative tag": lambda: Frame(Kind.EAGER, channel=CHANNEL, tag=-5, nbytes=0),
    "eager without its bytes": lambda: Frame(Kind.EAGER, channel=CHANNEL, nbytes=10**9, meta=META),
    "eager with more": lambda: Frame(Kind.EAGER, channel=CHANNEL, nbytes=1, payload=b"xy"),
    "metadata too long": lambda: Frame(Kind.EAGER, channel=CHANNEL, nbytes=0, meta=bytes(4000)),
    "a message of 2^64 bytes": lambda: Frame(Kind.RTS, channel=CHANNEL, nbytes=2**64 - 1, sop=1, meta=META),
    "put without its bytes": lambda: Frame(Kind.PUT, nbytes=100, rop=1, sop=1),
    "a place that is none": lambda: Frame(Kind.PUT_RTS, flags=2, nbytes=10, rop=1, sop=1, payload=b"short"),
    "rows in a put": lambda: Frame(Kind.PUT, flags=ROWS, nbytes=10, rop=1, sop=1, payload=bytes(10)),
    "rows and a list": lambda: Frame(Kind.PUT_RTS, flags=ROWS | LISTED, nbytes=10, rop=1, sop=1),
    "a list in GPU memory": lambda: Frame(
        Kind.PUT_RTS, flags=2 | LISTED, nbytes=10, rop=1, payload=bytes(64)
    ),
    "a list that is too long": lambda: Frame(Kind.PUT_RTS, flags=LISTED, nbytes=2**21, rop=1, sop=1),
    "a list from somewhere": lambda: Frame(Kind.PUT, flags=LISTED, tag=1, nbytes=8, rop=1, payload=bytes(8)),
    "a list without its end": lambda: Frame(Kind.GET, flags=LISTED, nbytes=1, sop=1, payload=bytes(15)),
    "a list of other bytes": lambda: Frame(Kind.GET, flags=LISTED, nbytes=2, sop=1, payload=ranges((0, 1))),
    "a list of all there is": lambda: Frame(
        Kind.GET, flags=LISTED, nbytes=0, sop=1, payload=ranges((0, 2**63), (0, 2**63))
    ),
    "an answer without a place": lambda: Frame(Kind.GET_READY, flags=2, nbytes=10, rop=1, sop=1),
    "a notification that is too long": lambda: Frame(Kind.PUT, flags=1, nbytes=0, rop=1, meta=bytes(5000)),
    "credit for nothing": lambda: Frame(Kind.CREDIT, nbytes=2**63),
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_a_frame_that_makes_no_sense(pair: Pair, what: str) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv_array(2, tag=aiocomm.ANY_TAG)
        peer.send(NONSENSE[what]())
        with pytest.raises(aiocomm.PeerLostError):
            await receiving
        await closed(a)
        assert a.links["shm"].statistics().violations == 1
    await reach_each_other(pair)


async def test_lengths_that_reach_out_of_the_ring(pair: Pair) -> None:
    for meta, payload in [(0, 2**32 - 1), (65535, 0), (65535, 2**32 - 1), (0, 1 << 20)]:
        a, _ = pair
        rank = 2 + len(a.peers)
        with RawPeer(a, rank) as peer:
            await peer.meet()
            peer.send(Frame(Kind.EAGER, meta_bytes=meta, payload_bytes=payload), fill=False)
            await closed(a, rank)
    await reach_each_other(pair)


@pytest.mark.parametrize("tail", [1, 63, 1 << 20 | 64, (2 << 20), 2**63, 2**64 - 64])
async def test_a_tail_that_lies(pair: Pair, tail: int) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.set(0, tail)
        peer.wake()
        await closed(a)
    await reach_each_other(pair)


@pytest.mark.parametrize("head", [1 << 40, 2**64 - 64, 2**63])
async def test_a_head_that_lies_is_a_full_ring(pair: Pair, head: int) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.set(192 + 64, head)
        sending = [a.send(bytes(60_000), 2) for _ in range(40)]
        assert not sending[-1].done()
        peer.wake()
        await reach_each_other(pair)
    with pytest.raises(aiocomm.PeerLostError):
        await sending[-1]
    await reach_each_other(pair)


# ---------------------------------------------------------------- answers that nobody asked for


async def test_answers_to_operations_that_do_not_exist(pair: Pair) -> None:
    """Ids are looked up: what was never asked for, or has ended, is ignored."""
    a, _ = pair
    dice = random.Random(5)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        ids = [0, 1, 2**62, 2**63, 2**64 - 1, *(dice.getrandbits(64) for _ in range(20))]
        for kind in (Kind.CTS, Kind.FIN, Kind.CANCEL, Kind.STOP, Kind.GET_READY, Kind.GET_FAIL, Kind.DATA):
            for number in ids:
                peer.send(Frame(kind, sop=number, rop=number, nbytes=5, payload=b"x" * (kind == Kind.DATA)))
        peer.send(Frame(Kind.EAGER, channel=CHANNEL, nbytes=1, meta=META, payload=b"x"))
        await a.recv(bytearray(1), 2)
    await reach_each_other(pair)


async def test_answers_to_operations_with_somebody_else(pair: Pair) -> None:
    """A peer cannot end, or write into, what belongs to another pair."""
    a, b = pair
    buffer = np.zeros(1 << 20, np.uint8)
    with RawPeer(a, 2) as peer:
        await peer.meet()
        sending, receiving = a.send(bytes(1 << 20), 1), a.recv(buffer, 1)
        for low in range(600):
            for generation in (1, 2, 3):
                number = generation << 32 | low
                peer.send(Frame(Kind.FIN, sop=number, code=3))
                peer.send(Frame(Kind.DATA, rop=number, nbytes=1, payload=b"x"))
            await until(lambda: peer._get(64) == peer._out)
        assert not sending.done()
        assert not receiving.done()
        assert not buffer.any()
        back = b.send(np.ones(1 << 20, np.uint8), 0)
        await b.recv(bytearray(1 << 20), 0)
        await sending
        await receiving
        await back
        assert buffer.all()
    await reach_each_other(pair)


async def test_data_outside_the_buffer_is_not_written(pair: Pair) -> None:
    a, _ = pair
    memory = np.zeros(400_000, np.uint8)
    buffer = memory[100_000:300_000]
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv(buffer, 2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=150_000, sop=9, meta=META))
        cts = await peer.receive(Kind.CTS)
        for offset in (150_000, 149_999, 2**64 - 100, 2**63):
            peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=9, address=offset, payload=b"x" * 200))
        peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=9, address=0, payload=b"y" * 200))
        await until(lambda: (buffer[:200] == ord("y")).all())
        assert not buffer[200:].any()
        assert not memory[:100_000].any()
        assert not memory[300_000:].any()
        for _ in range(200):
            peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=9, payload=b"y" * 1000))
        with contextlib.suppress(aiocomm.PeerLostError):  # more bytes than it announced, or just as many
            await receiving
    await reach_each_other(pair)


async def test_object_dtypes_stay_bytes(pair: Pair) -> None:
    """A peer's bytes must never become references to Python objects."""
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        for form in (b"O", b"2O", b"i,O", b"\xff\xfe", b"T{", b"%s%n"):
            meta = bytes([1, len(form)]) + bytes(6) + form.ljust(8, b"\0") + (2).to_bytes(8, "little")
            peer.send(Frame(Kind.EAGER, channel=CHANNEL, nbytes=16, meta=meta, payload=b"A" * 16))
            got = await a.recv_array(2)
            assert not got.dtype.hasobject
            assert got.tobytes() == b"A" * 16
        for dims in ([2**63, 2], [2**32, 2**32], [10**6], [-1 & 2**64 - 1]):
            meta = bytes([len(dims), 1]) + bytes(6) + b"d".ljust(8, b"\0")
            meta += b"".join(dim.to_bytes(8, "little") for dim in dims)
            peer.send(Frame(Kind.EAGER, channel=CHANNEL, nbytes=16, meta=meta, payload=b"A" * 16))
            assert (await a.recv_array(2)).tobytes() == b"A" * 16
    await reach_each_other(pair)


async def test_an_announcement_of_more_than_there_is_memory(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        receiving = a.recv_array(2)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=2**55, sop=9, meta=META))
        with pytest.raises(aiocomm.LinkError, match="memory"):
            await receiving
        small = a.recv(bytearray(10), 2, tag=1)
        peer.send(Frame(Kind.RTS, channel=CHANNEL, tag=1, nbytes=2**55, sop=10, meta=META))
        with pytest.raises(aiocomm.PeerError, match="bytes"):
            await small
    await reach_each_other(pair)


async def test_regions_are_checked_against_any_frame(pair: Pair) -> None:
    a, _ = pair
    memory = np.zeros(3000, np.uint8)
    async with a.register(memory[1000:2000]) as region:
        with RawPeer(a, 2) as peer:
            await peer.meet()
            number = region._number
            for offset, nbytes in [(1000, 1), (2**63 - 1, 5), (-1, 1), (-(2**63), 2000), (999, 2)]:
                peer.send(
                    Frame(Kind.PUT, rop=number, sop=7, tag=offset, nbytes=nbytes, payload=b"x" * nbytes)
                )
                assert (await peer.receive(Kind.FIN)).code
                peer.send(Frame(Kind.PUT_RTS, rop=number, sop=7, tag=offset, nbytes=2**64 - 1))
                assert (await peer.receive(Kind.FIN)).code
                peer.send(Frame(Kind.GET, sop=number, rop=7, tag=offset, nbytes=nbytes))
                assert (await peer.receive(Kind.GET_FAIL)).code
            peer.send(Frame(Kind.PUT, rop=number + 1, sop=7, nbytes=1, payload=b"x"))
            assert (await peer.receive(Kind.FIN)).code
    assert not memory.any()
    await reach_each_other(pair)


async def test_lists_of_ranges_are_checked_before_a_byte_moves(pair: Pair) -> None:
    a, _ = pair
    memory = np.zeros(3000, np.uint8)
    async with a.register(memory[1000:2000]) as region:
        with RawPeer(a, 2) as peer:
            await peer.meet()
            number = region._number

            async def put(message: bytes) -> int:
                frame = Frame(Kind.PUT, flags=LISTED, rop=number, sop=7, nbytes=len(message), payload=message)
                peer.send(frame)
                return (await peer.receive(Kind.FIN)).code

            good = (0, 2)
            for bad in [(1000, 1), (999, 2), (2**64 - 1, 1), (2**64 - 1, 2), (0, 1001)]:
                count, nbytes = struct.pack("<Q", 2), 2 + bad[1]
                assert await put(count + ranges(good, bad) + b"x" * nbytes)
                peer.send(
                    Frame(Kind.GET, flags=LISTED, sop=number, rop=7, nbytes=nbytes, payload=ranges(good, bad))
                )
                assert (await peer.receive(Kind.GET_FAIL)).code
            for count in (0, 2, 3, 2**60 + 1, 2**64 - 1):  # where there is one
                assert await put(struct.pack("<Q", count) + ranges(good) + b"xx")
            for message in (b"", b"short", struct.pack("<Q", 1) + ranges(good) + b"x"):
                assert await put(message)
            assert not memory.any()
            assert not await put(struct.pack("<Q", 2) + ranges((998, 2), (0, 1)) + b"xyz")
            assert bytes(memory[1998:2000]) == b"xy"
            assert memory[1000] == ord("z")
            assert np.count_nonzero(memory) == 3
    await reach_each_other(pair)


def rows(*wanted: tuple[int, int, int, int, int, int]) -> bytes:
    """(from, to, step there, step here, bytes of each, number) of each, as in core/rows.hpp."""
    return b"".join(struct.pack("<QQqqQQ", *one) for one in wanted)


@pytest.mark.parametrize("cma", [False, True])
async def test_rows_are_checked_before_a_byte_moves(pair: Pair, cma: bool) -> None:
    a, _ = pair
    memory, theirs = np.zeros(3000, np.uint8), np.arange(1000, dtype=np.uint8)
    where = theirs.ctypes.data
    async with a.register(memory[1000:2000]) as region, a.register(b"read only") as fixed:
        with RawPeer(a, 2, cma=cma) as peer:
            await peer.meet()
            number = region._number

            async def put(payload: bytes, nbytes: int, tag: int = 0, into: int = number) -> int:
                peer.send(
                    Frame(
                        Kind.PUT_RTS, flags=ROWS, rop=into, sop=7, tag=tag, nbytes=nbytes, address=where,
                        payload=payload,
                    )
                )  # fmt: skip
                return (await peer.receive(Kind.FIN)).code

            good = (0, 0, 0, 0, 2, 1)
            for bad in (
                (0, 999, 0, 0, 2, 1), (0, 0, 0, -1, 1, 2), (0, 0, 0, 500, 2, 3), (0, 2**64 - 1, 0, 0, 2, 1),
                (0, 0, 0, 2**62, 1, 3), (0, 0, 0, 0, 2**63, 2), (0, 0, 0, 0, 1, 2**63),
                (2**63, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 1, 2000),
            ):  # fmt: skip
                for nbytes in (2, 4, 2 + bad[4] * bad[5]):
                    assert await put(rows(good, bad), nbytes % 2**64)
            for payload in (b"", b"x", rows(good)[:-1], rows(good) + b"x"):
                assert await put(payload, 2)
            assert await put(rows(good), 1)
            assert await put(rows(good), 2, tag=999)
            assert await put(rows(good), 2, into=number + 99)
            assert await put(rows(good), 2, into=fixed._number)
            for reach, nbytes in [(1001, 2), (2**64 - 1, 2), (2**63, 2**63)]:
                ask = Frame(Kind.GET, flags=ROWS, sop=number, rop=7, nbytes=nbytes, address=reach)
                ask.code = int(cma)
                peer.send(ask)
                assert (await peer.receive(Kind.GET_FAIL)).code
            assert not memory.any()
            code = await put(rows((5, 997, 10, -997, 3, 2)), 6)
            assert bool(code) is not cma  # memory that cannot be read is not asked for
            model = np.zeros_like(memory)
            if cma:
                model[1997:2000], model[1000:1003] = theirs[5:8], theirs[15:18]
            assert np.array_equal(memory, model)
    await reach_each_other(pair)


@pytest.mark.parametrize("bound", [LISTS_AT_MOST + MEMORY_BOUND], indirect=True, ids=["lists"])
@pytest.mark.parametrize("kind", [Kind.PUT_RTS, Kind.GET])
async def test_lists_without_end(pair: Pair, kind: Kind) -> None:
    a, _ = pair
    memory = np.zeros(1 << 20, np.uint8)
    async with a.register(memory) as region:
        with RawPeer(a, 2) as peer:
            await peer.meet()
            number = region._number
            frame = Frame(kind, flags=LISTED, sop=7, rop=number, nbytes=1 << 20)
            if kind is Kind.GET:
                frame.sop, frame.rop, frame.payload = number, 7, ranges((0, 1 << 20))
            for _ in range(LISTS_AT_MOST >> 20):  # none of them is ever ended
                peer.send(frame)
            await until(lambda: peer._get(64) == peer._out)
            assert a.peers[-1].alive
            peer.send(frame)
            await closed(a)
    assert not memory.any()
    await reach_each_other(pair)


@pytest.mark.parametrize("bound", [HELD_AT_MOST + MEMORY_BOUND], indirect=True, ids=["held"])
async def test_unexpected_messages_without_end(pair: Pair) -> None:
    """A peer that ignores its credit is cut off before memory runs out."""
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        frame = Frame(Kind.EAGER, channel=CHANNEL, nbytes=200_000, meta=META, payload=bytes(200_000))
        for _ in range(3000):
            if not a.peers[-1].alive:
                break
            peer.send(frame)
            peer.send(frame)
            await until(lambda: peer._get(64) == peer._out or not a.peers[-1].alive)
        else:
            pytest.fail("600 MB were taken")
    await reach_each_other(pair)


@pytest.mark.parametrize("seed", seeds(8))
async def test_random_frames(pair: Pair, seed: int) -> None:
    """Whatever comes, the process lives and other pairs go on."""
    a, _ = pair
    dice = random.Random(seed)
    words = [0, 1, 2, 64, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
    memory = np.zeros(10_000, np.uint8)
    async with a.register(memory) as region:
        rank = 2
        for _ in range(20):
            with RawPeer(a, rank, cma=dice.random() < 0.5) as peer:
                await peer.meet()
                mine = [
                    a.recv(np.zeros(100_000, np.uint8), rank),
                    a.recv_array(rank),
                    a.send(bytes(1 << 20), rank),
                ]
                for _ in range(30):
                    number = [*words, region._number, 1 << 32 | dice.randrange(40), dice.getrandbits(64)]
                    frame = Frame(
                        dice.choice([*Kind, 0, 200]),
                        flags=dice.randrange(dice.choice([4, 128])),
                        channel=dice.choice([CHANNEL, CHANNEL, 5]),
                        tag=dice.choice([0, 0, 1, -1, 2**62]),
                        nbytes=dice.choice(number),
                        sop=dice.choice(number),
                        rop=dice.choice(number),
                        address=dice.choice(number),
                        segment=dice.choice([0, 0, 1, 2**32 - 1]),
                        code=dice.randrange(256),
                        meta=dice.randbytes(dice.choice([0, 16, 24, 80, 81])),
                        payload=dice.randbytes(dice.choice([0, 0, 1, 48, 64, 5000])),
                    )
                    if dice.random() < 0.5:
                        frame.nbytes = len(frame.payload)
                    peer.send(frame)
                await until(lambda: peer._get(64) == peer._out or not a.peers[-1].alive)
            for transfer in mine:
                await until(transfer.done)
                if not transfer.cancelled():
                    transfer.exception()
            rank += 1
    await reach_each_other(pair)


# ---------------------------------------------------------------- the pair's socket


@pytest.mark.parametrize(
    "hello",
    [
        b"x" * HELLO.size,
        HELLO.pack(MAGIC, 2, 1 << 20, 0, 0),
        HELLO.pack(MAGIC, 1, 3 << 20, 0, 0),
        HELLO.pack(MAGIC, 1, 1 << 40, 0, 0),
        HELLO.pack(MAGIC, 1, 0, 0, 0),
        HELLO.pack(MAGIC, 1, 1 << 30, 0, 0),
        HELLO.pack(MAGIC, 1, 1 << 20, 0, 0)[:-1],
    ],
    ids=["garbage", "version", "odd ring", "huge ring", "no ring", "ring beyond the segment", "short"],
)
async def test_a_greeting_that_makes_no_sense(pair: Pair, hello: bytes) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        peer.greet(hello)
        await closed(a, reason="")
    await reach_each_other(pair)


@pytest.mark.parametrize("what", ["none", "too few", "too many", "no memory", "small page"])
async def test_a_greeting_with_other_descriptors(pair: Pair, what: str) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        good = [peer.page_fd, *peer.eventfds, peer.segment_fd]
        small = memfd(100)
        fds = {
            "none": [],
            "too few": good[:3],
            "too many": [*good, *good],
            "no memory": [*good[:3], peer.eventfds[0]],
            "small page": [small, *good[1:]],
        }[what]
        if fds:
            peer.greet(fds=fds)
        else:
            peer.socket.send(HELLO.pack(MAGIC, 1, peer.ring_bytes, 0, 0))
        os.close(small)
        await closed(a, reason="")
    await reach_each_other(pair)


async def test_memory_that_could_shrink_is_not_mapped(pair: Pair) -> None:
    """Touching what a peer has cut off would be SIGBUS."""
    a, _ = pair
    with RawPeer(a, 2, sealed=False) as peer:
        peer.greet()
        await closed(a, reason="shrink")
    await reach_each_other(pair)


async def test_segments_that_are_none(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        loose, tight = memfd(1 << 20, sealed=False), memfd(1 << 20)
        for number, nbytes, fd in [(1, 1 << 20, loose), (2, 2 << 20, tight), (3, 2**63, tight), (4, 4096, 0)]:
            peer.note_segment(number, nbytes, [fd])
            receiving = a.recv(bytearray(100_000), 2)
            peer.send(Frame(Kind.RTS, channel=CHANNEL, nbytes=100_000, sop=9, segment=number, meta=META))
            cts = await peer.receive(Kind.CTS)  # it cannot be read there: please send
            peer.send(Frame(Kind.DATA, rop=cts.rop, sop=9, nbytes=100_000, payload=bytes(100_000)))
            await receiving
        peer.note_segment(5, 1 << 20, [tight])
        receiving = a.recv(bytearray(100_000), 2)
        lie = Frame(
            Kind.RTS, channel=CHANNEL, nbytes=100_000, sop=9, segment=5, address=2**64 - 50, meta=META
        )
        peer.send(lie)
        with pytest.raises(aiocomm.LinkError):
            await receiving
        os.close(loose)
        os.close(tight)
    await reach_each_other(pair)


async def test_garbage_on_the_pairs_socket(pair: Pair) -> None:
    a, _ = pair
    with RawPeer(a, 2) as peer:
        await peer.meet()
        peer.socket.send(b"\xff" * 1000)
        await closed(a)
    await reach_each_other(pair)


# ---------------------------------------------------------------- tcp


@pytest.mark.skipif("tcp" not in _core.available_links(), reason="this build has no tcp link")
@pytest.mark.parametrize("seed", seeds(12))
async def test_garbage_on_tcp_lanes(pair: Pair, seed: int) -> None:
    a, _ = pair
    dice = random.Random(seed)
    kind, count = a._engine.link_streams("tcp")
    assert kind == "tcp"
    ours, theirs = [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            theirs.append(socket.create_connection(server.getsockname()))
            ours.append(server.accept()[0])
    a._meet(Peer(2, "there", 1, (), ("tcp",), True, None, 7))
    a._engine.add_peer(2, 7)
    a._engine.attach(2, 7, "tcp", [one.detach() for one in ours], a._engine.link_card("tcp"), bool(seed % 2))
    a._engine.start_pair(2, 7)
    receiving, sending = a.recv_array(2), a.send(bytes(3 << 20), 2)
    for lane in theirs:
        for _ in range(5):
            frame = Frame(
                dice.choice([*Kind]), nbytes=dice.getrandbits(64), payload_bytes=dice.getrandbits(32)
            )
            with contextlib.suppress(ConnectionError):
                lane.send(frame.pack() if dice.random() < 0.5 else dice.randbytes(500))
    for lane in theirs:
        lane.close()
    for transfer in (receiving, sending):
        with pytest.raises(aiocomm.AiocommError):
            await transfer
    await reach_each_other(pair)


def test_the_header_is_as_in_the_core() -> None:
    assert len(Frame(1).pack()) == 64
    assert CONTROL_BYTES == 4096
