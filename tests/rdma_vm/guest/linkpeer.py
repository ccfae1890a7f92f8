"""The other end of an rdma pair, made by hand with pyverbs: says what a test wants, shows what comes.

To the engine under test it is another process on host b: all that the engine has of it is a socket, a card
and the numbers of three queue pairs.
"""

from __future__ import annotations

import asyncio
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
    import aiocomm

PREFIX: Final = struct.Struct("<IIBBH4II")  # seq, consumed, wake, keys, reserved, key by rail, reserved
# magic, version, rails; queue pairs: frames for the loop, other frames, bulk by level (none: 0)
HELLO: Final = struct.Struct("<III6I")
VERSION: Final = 2
MAGIC: Final = 0x52494F41
OFFER_META: Final = struct.Struct("<QII")  # messages seen, immediate, start of a count
SLOT_NBYTES: Final = 8448
LAST_CHUNK: Final = 1 << 16
OFFER, WITHDRAW, WITHDRAWN, TOOK, QUIT, LINK_PRIVATE = range(17, 23)  # frame kinds of this link
KEY_ASK, KEY_IS, KEY_REVOKE, KEY_REVOKED, NOTE = range(25, 30)
WRITABLE: Final = 16  # flag of KEY_IS
NOTE_MARK: Final = 0xFFF << 20  # in immediates, above the number of a notification
_SLOTS: Final = 48
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
    """

    def __init__(self, comm: aiocomm.Communicator, rank: int, nbytes: int = 4 << 20) -> None:
        self.comm, self.rank, self.generation = comm, rank, 1000 + rank
        self.express = RawEndpoint("rxeb0", _SLOTS * SLOT_NBYTES)
        self.frames = RawEndpoint("rxeb0", 2 * _SLOTS * SLOT_NBYTES)
        self.bulk = RawEndpoint("rxeb0", nbytes)
        self._sent = self._seen = 0
        self._slots: dict[RawEndpoint, dict[int, int]] = {self.express: {}, self.frames: {}}
        self._early: dict[int, Arrival] = {}
        self.socket, theirs = socket.socketpair()
        comm._meet(Peer(rank, "b", os.getpid(), (), ("rdma",), True, None, self.generation))
        comm._engine.add_peer(rank, self.generation)
        comm._engine.attach(rank, self.generation, "rdma", [theirs.detach()], self._card(), False)
        comm._engine.start_pair(rank, self.generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        for end in (self.express, self.frames, self.bulk):
            end.close()

    def _card(self) -> bytes:
        gid = socket.inet_pton(socket.AF_INET6, self.frames.card()["gid"])
        rest = struct.pack("<HHBB2x", 0, 0xFFFF, enums.IBV_MTU_1024, enums.IBV_LINK_LAYER_ETHERNET)
        return bytes((1, 1)) + gid + rest

    async def meet(self, hello: bytes | None = None) -> Self:
        """Swap greetings, connect the queue pairs, and swap words of readiness."""
        ends = (self.express, self.frames, self.bulk)
        mine = HELLO.pack(MAGIC, VERSION, 1, *(end.pair.qp_num for end in ends), 0, 0, 0)
        self.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.socket, mine if hello is None else hello)
        magic, version, rails, *numbers = HELLO.unpack(await self._exactly(HELLO.size))
        assert (magic, version, rails) == (MAGIC, VERSION, 1)
        assert all(numbers[:3])
        assert not any(numbers[3:])
        gid = _gid_of("rxea0")
        for end, number in zip(ends, numbers[:3], strict=True):
            end.connect({"qpn": number, "gid": gid})
        for end, slots in self._slots.items():
            for slot in range(_SLOTS):
                slots[end.receive(SLOT_NBYTES, slot * SLOT_NBYTES)] = slot
        for _ in range(_SLOTS):
            self.bulk.receive(0)
        await loop.sock_sendall(self.socket, b"r")
        assert await self._exactly(1) == b"r"
        return self

    def send(
        self, frame: Frame, key: int | None = None, *, seq: int | None = None, nbytes: int | None = None
    ) -> None:
        """Post a frame.

        Args:
            frame: its lengths are derived from what it carries.
            key: of the memory that it names.
            seq: another number than the next one.
            nbytes: another length than its own.
        """
        frame.meta_bytes, frame.payload_bytes = len(frame.meta), len(frame.payload)
        number = self._sent if seq is None else seq
        keys = (0 if key is None else key, 0, 0, 0)
        prefix = PREFIX.pack(number, self._seen, _WAKE_ENGINE, 0 if key is None else 1, 0, *keys, 0)
        record = prefix + frame.pack()
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
        seq, _, wake, count, _, *keys, _ = PREFIX.unpack_from(record)
        assert (wake == _WAKE_LOOP) == (end is self.express), "the queue pair is that of who is to wake"
        assert seq >= self._seen, "no frame comes twice"
        frame = Frame(*HEADER.unpack_from(record, PREFIX.size))
        at = PREFIX.size + HEADER.size
        frame.meta = record[at : at + frame.meta_bytes]
        frame.payload = record[at + frame.meta_bytes :]
        assert len(frame.payload) == frame.payload_bytes
        self._early[seq] = Arrival(frame, tuple(keys[:count]), done)

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

    async def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = await asyncio.get_running_loop().sock_recv(self.socket, nbytes - len(data))
            assert piece, "the engine closed the pair"
            data += piece.replace(b"a", b"") if nbytes == 1 else piece  # signs of life may come between
        return data


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
