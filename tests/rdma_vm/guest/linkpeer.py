"""The other end of an rdma pair, made by hand with pyverbs: says what a test wants, shows what comes.

To the engine under test it is another process on host b: all that the engine has of it is a socket, a card
and the numbers of three queue pairs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from fault.rawpeer import HEADER, Frame
from pyverbs import enums
from rawverbs import PATIENCE_S, Completion, RawEndpoint

from aiocomm.types import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiocomm

# seq, consumed, wake, number of keys, which words of the header, whether the sender looks into its ring
PREFIX: Final = struct.Struct("<IIBBBB")
KEY: Final = struct.Struct("<I")  # by rail
WORD: Final = 8  # of a header: those that are zero stay behind
# magic, version, rails; queue pairs: frames for the loop, other frames, bulk by level (none: 0)
HELLO: Final = struct.Struct("<III6I")
VERSION: Final = 3
MAGIC: Final = 0x52494F41
OFFER_META: Final = struct.Struct("<QII")  # messages seen, immediate, start of a count
SLOT_NBYTES: Final = 8448
LANE_WORD: Final = struct.Struct("<cI6I")  # what, lane; with some words: its queue pairs, as in HELLO
LAST_CHUNK: Final = 1 << 16
OFFER, WITHDRAW, WITHDRAWN, TOOK, QUIT, LINK_PRIVATE = range(17, 23)  # frame kinds of this link
KEY_ASK, KEY_IS, KEY_REVOKE, KEY_REVOKED, NOTE = range(25, 30)
WRITABLE: Final = 16  # flag of KEY_IS
AGAIN: Final = 1  # flag of KEY_REVOKE
BUSY: Final = 1  # flag of KEY_REVOKED
NOTE_MARK: Final = 0xFFF << 20  # in immediates, above the number of a notification
RING_SLOT_NBYTES: Final = 256
RING_SLOTS: Final = 32
_MARK: Final = struct.Struct("<II")  # at the end of a slot: checksum, length of the frame before it
_MARK_FACTOR: Final = 0x9E3779B97F4A7C15
_BEAT_S: Final = 0.05
_SLOTS: Final = 48
_RING_AT: Final = _SLOTS * SLOT_NBYTES
_WAKE_LOOP: Final = 1
_WAKE_ENGINE: Final = 2


@dataclass
class Arrival:
    """A frame, and how it came."""

    frame: Frame
    keys: tuple[int, ...]
    """By which the memory that the header names can be reached, by rail."""
    completion: Completion


class LinkPeer:
    """A peer on host b of a communicator that uses `rxea0`.

    Args:
        comm: the communicator under test.
        rank: of this peer; not known to `comm` yet.
        nbytes: size of the buffer behind `bulk`, which `comm` may reach.
        address: that its card names, other than that of its device.
    """

    def __init__(
        self, comm: aiocomm.Communicator, rank: int, nbytes: int = 4 << 20, address: str = ""
    ) -> None:
        self.comm, self.rank, self.generation = comm, rank, 1000 + rank
        self._nbytes, self._address = nbytes, address
        self._sent = self._seen = 0
        self._make_ends()
        self._early: dict[int, Arrival] = {}
        self.socket, theirs = socket.socketpair()
        comm._meet(Peer(rank, "b", os.getpid(), (), ("rdma",), True, None, self.generation))
        comm._engine.add_peer(rank, self.generation)
        try:
            comm._engine.attach(rank, self.generation, "rdma", [theirs.detach()], self._card(), False)
        except BaseException:
            self.__exit__()
            raise
        comm._engine.start_pair(rank, self.generation)

    def _make_ends(self) -> None:
        self.express = RawEndpoint("rxeb0", _RING_AT + RING_SLOTS * RING_SLOT_NBYTES)
        self.frames = RawEndpoint("rxeb0", 2 * _SLOTS * SLOT_NBYTES)
        self.bulk = RawEndpoint("rxeb0", self._nbytes)
        self._ends = (self.express, self.frames, self.bulk)
        self._slots: dict[RawEndpoint, dict[int, int]] = {self.express: {}, self.frames: {}}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        for end in self._ends:
            end.close()

    def _card(self) -> bytes:
        gid = socket.inet_pton(socket.AF_INET6, self._address or self.frames.card()["gid"])
        rest = struct.pack("<HHBBBB", 0, 0xFFFF, enums.IBV_MTU_1024, enums.IBV_LINK_LAYER_ETHERNET, 16, 0)
        return bytes((2, 1)) + gid + rest

    async def meet(self, hello: bytes | None = None) -> Self:
        """Swap greetings, connect the queue pairs, and swap words of readiness."""
        mine = HELLO.pack(MAGIC, VERSION, 1, *self._numbers())
        self.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.socket, mine if hello is None else hello)
        magic, version, rails, *numbers = HELLO.unpack(await self._exactly(HELLO.size))
        assert (magic, version, rails) == (MAGIC, VERSION, 1)
        assert all(numbers[:3])
        assert not any(numbers[3:])
        self._connect(numbers)
        await loop.sock_sendall(self.socket, b"r")
        assert await self._exactly(1) == b"r"
        return self

    def _numbers(self) -> list[int]:
        return [end.pair.qp_num for end in self._ends] + [0, 0, 0]

    def _connect(self, numbers: list[int]) -> None:
        gid = _gid_of("rxea0")
        for end, number in zip(self._ends, numbers[:3], strict=True):
            end.connect({"qpn": number, "gid": gid})
        for end, slots in self._slots.items():
            for slot in range(_SLOTS):
                slots[end.receive(SLOT_NBYTES, slot * SLOT_NBYTES)] = slot
        for _ in range(_SLOTS):
            self.bulk.receive(0)

    async def close_lane(self) -> None:
        """The engine says that the lane's queue pairs are broken: close these ends, and say so."""
        assert await self.word() == (b"b", 0)
        for end in self._ends:
            end.close()
        await asyncio.get_running_loop().sock_sendall(self.socket, LANE_WORD.pack(b"c", 0, *[0] * 6)[:5])

    async def renew(self) -> None:
        """The engine says that the lane's queue pairs are broken: swap new ones, as recovery.cpp has it."""
        await self.close_lane()
        self._make_ends()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.socket, LANE_WORD.pack(b"o", 0, *self._numbers()))
        what, lane, *numbers = LANE_WORD.unpack(await self._exactly(LANE_WORD.size, first=b"t"))
        assert (what, lane) == (b"t", 0)
        self._connect(numbers)
        await loop.sock_sendall(self.socket, LANE_WORD.pack(b"g", 0, *[0] * 6)[:5])

    async def word(self) -> tuple[bytes, int]:
        """The next word of a lane, without numbers."""
        what = await self._exactly(1)
        return what, int.from_bytes(await self._exactly(4, first=b""), "little")

    def send(
        self,
        frame: Frame,
        key: int | None = None,
        *,
        seq: int | None = None,
        nbytes: int | None = None,
        looks: bool = False,
    ) -> None:
        """Post a frame.

        Args:
            frame: its lengths are derived from what it carries.
            key: of the memory that it names.
            seq: another number than the next one.
            nbytes: another length than its own.
            looks: whether this side looks into the ring that it has offered.
        """
        frame.meta_bytes, frame.payload_bytes = len(frame.meta), len(frame.payload)
        number = self._sent if seq is None else seq
        whole = frame.pack()
        words = [whole[i : i + WORD] for i in range(0, HEADER.size, WORD)]
        mask = sum(1 << i for i, word in enumerate(words) if any(word))
        prefix = PREFIX.pack(number, self._seen, _WAKE_ENGINE, 0 if key is None else 1, mask, looks)
        keys = b"" if key is None else KEY.pack(key)
        record = prefix + keys + b"".join(filter(any, words)) + whole[HEADER.size :]
        self._sent += 1
        at = (_SLOTS + number % _SLOTS) * SLOT_NBYTES
        self.frames.write_buffer(record, at)
        self.frames.post("send", len(record) if nbytes is None else nbytes, offset=at)

    async def receive(self, *kinds: int) -> Arrival:
        """The next frame, or the next of these kinds. What completes on the way must have succeeded."""
        while True:
            while self._seen not in self._early:  # what overtook it came by the other queue pair
                self._take(*await next_of(self.express, self.frames))
            arrival = self._early.pop(self._seen)
            self._seen += 1
            if arrival.frame.kind != LINK_PRIVATE and (not kinds or arrival.frame.kind in kinds):
                return arrival

    def _take(self, end: RawEndpoint, done: Completion) -> None:
        assert done.status == "success", done
        slot = self._slots[end].pop(done.id, None)
        if slot is None:  # a frame of ours has arrived
            return
        record = end.read_buffer(done.nbytes, slot * SLOT_NBYTES)
        self._slots[end][end.receive(SLOT_NBYTES, slot * SLOT_NBYTES)] = slot
        self._parse(record, end is self.express, done)

    def offer_ring(self) -> None:
        """Small frames for the loop may be written to the end of `express`'s buffer."""
        card = self.express.card()
        self.express.write_buffer(bytes(RING_SLOTS * RING_SLOT_NBYTES), _RING_AT)
        offer = Frame(LINK_PRIVATE, segment=1, address=card["address"] + _RING_AT)
        self.send(offer, key=card["rkey"], looks=True)

    async def receive_written(self) -> Arrival:
        """The next frame, which is to stand in the ring."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._take_written():  # noqa: ASYNC110 - the adapter writes it
                await asyncio.sleep(0)
        arrival = self._early.pop(self._seen)
        self._seen += 1
        return arrival

    def _take_written(self) -> bool:
        end = _RING_AT + (self._seen % RING_SLOTS + 1) * RING_SLOT_NBYTES - _MARK.size
        found, nbytes = _MARK.unpack(self.express.read_buffer(_MARK.size, end))
        record = self.express.read_buffer(nbytes, end - nbytes) if nbytes else b""
        if not nbytes or found != mark_of(self._seen, record):
            return False
        self._parse(record, True, Completion(0, "success", "written", nbytes, None))
        return True

    def _parse(self, record: bytes, express: bool, done: Completion) -> None:
        seq, _, wake, count, mask, _ = PREFIX.unpack_from(record)
        at = PREFIX.size + count * KEY.size
        keys = tuple(key for (key,) in KEY.iter_unpack(record[PREFIX.size : at]))
        assert (wake == _WAKE_LOOP) == express, "the queue pair is that of who is to wake"
        assert seq >= self._seen, "no frame comes twice"
        header = b""
        for i in range(HEADER.size // WORD):
            there = mask >> i & 1
            word = record[at : at + WORD] if there else bytes(WORD)
            assert not there or any(word), "a word that is zero stays behind"
            header += word
            at += WORD * there
        frame = Frame(*HEADER.unpack(header))
        frame.meta = record[at : at + frame.meta_bytes]
        frame.payload = record[at + frame.meta_bytes :]
        assert len(frame.payload) == frame.payload_bytes
        self._early[seq] = Arrival(frame, keys, done)

    @contextlib.asynccontextmanager
    async def signs_of_life(self) -> AsyncIterator[None]:
        """Beat meanwhile, as a peer that is well."""

        async def beat() -> None:
            while True:
                await asyncio.get_running_loop().sock_sendall(self.socket, b"a")
                await asyncio.sleep(_BEAT_S)

        beating = asyncio.create_task(beat())
        try:
            yield
        finally:
            beating.cancel()

    def has_none(self) -> bool:
        """Whether no frame has come."""
        return self.express.has_none() and self.frames.has_none()

    def has_no_frame(self) -> bool:
        """Whether no frame has come that `receive` has not returned."""
        for end, slots in self._slots.items():
            while (done := end.poll()) is not None:
                if done.id in slots:
                    return False
        return not self._early

    async def _exactly(self, nbytes: int, first: bytes | None = None) -> bytes:
        """So many bytes; those that begin with a letter may have signs of life before them."""
        data = b""
        word = nbytes == 1 or first
        while len(data) < nbytes:
            wanted = 1 if word and not data else nbytes - len(data)
            piece = await asyncio.get_running_loop().sock_recv(self.socket, wanted)
            assert piece, "the engine closed the pair"
            data += piece.replace(b"a", b"") if word and not data else piece
        return data


def mark_of(seq: int, record: bytes) -> int:
    """The checksum of a frame in a ring."""
    most = (1 << 64) - 1
    total = (seq + 1) * _MARK_FACTOR & most
    for at in range(0, len(record), 8):
        total = (total ^ int.from_bytes(record[at : at + 8], "little")) * _MARK_FACTOR & most
        total ^= total >> 29
    return total >> 32


async def next_of(*ends: RawEndpoint) -> tuple[RawEndpoint, Completion]:
    """The next completion of one of these; the loop runs meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for end in ends:
                done = end.poll()
                if done is not None:
                    return end, done
            await asyncio.sleep(0)


async def completion_of(end: RawEndpoint) -> Completion:
    """The next completion."""
    return (await next_of(end))[1]


def _gid_of(device: str) -> str:
    with RawEndpoint(device, 64) as end:
        return str(end.card()["gid"])
