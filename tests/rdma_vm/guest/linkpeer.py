"""The other end of an rdma pair, made by hand with pyverbs: says what a test wants, shows what comes.

To the engine under test it is another process on host b: all that the engine has of it is a socket, a card
and the numbers of two queue pairs.
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
HELLO: Final = struct.Struct("<IIIII")  # magic, version, rails, queue pairs of frames and of bulk
MAGIC: Final = 0x52494F41
OFFER_META: Final = struct.Struct("<QII")  # messages seen, immediate, start of a count
SLOT_NBYTES: Final = 8448
LAST_CHUNK: Final = 1 << 16
OFFER, WITHDRAW, WITHDRAWN, TOOK, QUIT, LINK_PRIVATE = range(17, 23)  # frame kinds of this link
KEY_ASK, KEY_IS, KEY_REVOKE, KEY_REVOKED, NOTE = range(25, 30)
WRITABLE: Final = 16  # flag of KEY_IS
NOTE_MARK: Final = 0xFFF << 20  # in immediates, above the number of a notification
_SLOTS: Final = 48
_WAKE_LOOP: Final = 2


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
        self.frames = RawEndpoint("rxeb0", 2 * _SLOTS * SLOT_NBYTES)
        self.bulk = RawEndpoint("rxeb0", nbytes)
        self._sent = self._seen = 0
        self._slots: dict[int, int] = {}
        self.socket, theirs = socket.socketpair()
        comm._meet(Peer(rank, "b", os.getpid(), (), ("rdma",), True, None, self.generation))
        comm._engine.add_peer(rank, self.generation)
        comm._engine.attach(rank, self.generation, "rdma", [theirs.detach()], self._card(), False)
        comm._engine.start_pair(rank, self.generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        for end in (self.frames, self.bulk):
            end.close()

    def _card(self) -> bytes:
        gid = socket.inet_pton(socket.AF_INET6, self.frames.card()["gid"])
        rest = struct.pack("<HHBB2x", 0, 0xFFFF, enums.IBV_MTU_1024, enums.IBV_LINK_LAYER_ETHERNET)
        return bytes((1, 1)) + gid + rest

    async def meet(self, hello: bytes | None = None) -> Self:
        """Swap greetings, connect both queue pairs, and swap words of readiness."""
        mine = HELLO.pack(MAGIC, 1, 1, self.frames.pair.qp_num, self.bulk.pair.qp_num)
        self.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.socket, mine if hello is None else hello)
        magic, version, rails, frames, bulk = HELLO.unpack(await self._exactly(HELLO.size))
        assert (magic, version, rails) == (MAGIC, 1, 1)
        gid = _gid_of("rxea0")
        self.frames.connect({"qpn": frames, "gid": gid})
        self.bulk.connect({"qpn": bulk, "gid": gid})
        for slot in range(_SLOTS):
            self._slots[self.frames.receive(SLOT_NBYTES, slot * SLOT_NBYTES)] = slot
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
        prefix = PREFIX.pack(number, self._seen, _WAKE_LOOP, 0 if key is None else 1, 0, *keys, 0)
        record = prefix + frame.pack()
        self._sent += 1
        at = (_SLOTS + number % _SLOTS) * SLOT_NBYTES
        self.frames.write_buffer(record, at)
        self.frames.post("send", len(record) if nbytes is None else nbytes, offset=at)

    async def receive(self, *kinds: int) -> Arrival:
        """The next frame, or the next of these kinds. What completes on the way must have succeeded."""
        while True:
            done = await next_of(self.frames)
            assert done.status == "success", done
            slot = self._slots.pop(done.id, None)
            if slot is None:  # a frame of ours has arrived
                continue
            record = self.frames.read_buffer(done.nbytes, slot * SLOT_NBYTES)
            self._slots[self.frames.receive(SLOT_NBYTES, slot * SLOT_NBYTES)] = slot
            self._seen += 1
            seq, _, _, count, _, *keys, _ = PREFIX.unpack_from(record)
            assert seq == self._seen - 1, "frames come in order"
            frame = Frame(*HEADER.unpack_from(record, PREFIX.size))
            at = PREFIX.size + HEADER.size
            frame.meta = record[at : at + frame.meta_bytes]
            frame.payload = record[at + frame.meta_bytes :]
            assert len(frame.payload) == frame.payload_bytes
            if frame.kind != LINK_PRIVATE and (not kinds or frame.kind in kinds):
                return Arrival(frame, tuple(keys[:count]), done)

    def has_no_frame(self) -> bool:
        """Whether no frame has come that `receive` has not returned."""
        while (done := self.frames.poll()) is not None:
            if done.id in self._slots:
                return False
        return True

    async def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = await asyncio.get_running_loop().sock_recv(self.socket, nbytes - len(data))
            assert piece, "the engine closed the pair"
            data += piece.replace(b"a", b"") if nbytes == 1 else piece  # signs of life may come between
        return data


async def next_of(end: RawEndpoint) -> Completion:
    """The next completion; the loop runs meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            done = end.poll()
            if done is not None:
                return done
            await asyncio.sleep(0)


def _gid_of(device: str) -> str:
    with RawEndpoint(device, 64) as end:
        return str(end.card()["gid"])
