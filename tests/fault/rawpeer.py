"""A peer made by hand: speaks the shm link's protocol frame by frame; stops, dies or lies as a test wants.

A `RawPeer` lives in the test's own process. To the engine under test it is another process: all that the
engine has of it is a Unix socket, a segment and eventfds; its end is the socket's hang-up, as it is after
`kill -9`.
victims.py has its `RawEnd` in processes of their own, which are killed.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import mmap
import os
import random
import socket
import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from harness import until

from aiocomm.types import Peer

if TYPE_CHECKING:
    import aiocomm

HELLO: Final = struct.Struct("<IIQQQ")  # magic, version, ring_bytes, probe_address, probe_value
NOTE: Final = struct.Struct("<IIQQ")  # id, reserved, nbytes, base
MAGIC: Final = 0x61696F63
HEADER: Final = struct.Struct("<BBHIQqQQQQIBBH")
CONTROL_BYTES: Final = 4096
LINE: Final = 64
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Kind(enum.IntEnum):
    """As `enum class FrameKind` in core/frame.hpp."""

    EAGER = 1
    RTS = 2
    CTS = 3
    DATA = 4
    FIN = 5
    CANCEL = 6
    STOP = 7
    PUT = 8
    PUT_RTS = 9
    GET = 10
    GET_READY = 11
    GET_FAIL = 12
    CREDIT = 13
    UNDELIVERED = 14
    HEARTBEAT = 15
    GOODBYE = 16
    OFFER = 17
    WITHDRAW = 18
    WITHDRAWN = 19
    TOOK = 20
    QUIT = 21
    LINK_PRIVATE = 22
    MOVED = 23
    STAGED = 24
    SOON = 30
    FREED = 31
    REST = 32
    RESTING = 33


@dataclass
class Frame:
    """One frame; the fields of the header in their order on the wire, then what follows it."""

    kind: int
    flags: int = 0
    meta_bytes: int = 0
    payload_bytes: int = 0
    channel: int = 0
    tag: int = 0
    nbytes: int = 0
    sop: int = 0
    rop: int = 0
    address: int = 0
    segment: int = 0
    cls: int = 1
    code: int = 0
    weight: int = 16
    meta: bytes = b""
    payload: bytes = b""

    def pack(self) -> bytes:
        """As it lies in the ring, without padding."""
        values = [getattr(self, field.name) for field in fields(self)[:14]]
        return HEADER.pack(*values) + self.meta + self.payload


def default_channel() -> int:
    """The id of the channel without a name."""
    return 1469598103934665603


def memfd(nbytes: int, sealed: bool = True) -> int:
    """Shared memory of that size."""
    fd = os.memfd_create("aiocomm-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


class RawEnd:
    """One end of a pair over shm.

    Args:
        sock: the pair's Unix socket.
        cma: whether the other end finds that it can read this process's memory.
        sealed: whether the memory that is passed cannot shrink.
    """

    def __init__(
        self, sock: socket.socket, *, cma: bool = False, sealed: bool = True, ring_bytes: int = 1 << 20
    ) -> None:
        self.socket = sock
        self.ring_bytes = ring_bytes
        self._probe = ctypes.c_uint64(random.Random(4).getrandbits(64))
        self.probe_address = ctypes.addressof(self._probe) if cma else 8
        self._out = self._in = 0
        self.segment_fd = memfd(CONTROL_BYTES + 2 * ring_bytes, sealed)
        self.page_fd = memfd(4096, sealed)
        self.page = mmap.mmap(self.page_fd, 4096)
        self.segment = mmap.mmap(self.segment_fd, CONTROL_BYTES + 2 * ring_bytes)
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
        self.their_fds: list[int] = []
        self._dead = False

    # ------------------------------------------------------------ greeting

    def greet(self, hello: bytes | None = None, fds: list[int] | None = None) -> None:
        """Send the greeting, or something else in its place."""
        if hello is None:
            hello = HELLO.pack(MAGIC, 1, self.ring_bytes, self.probe_address, self._probe.value)
        if fds is None:
            fds = [self.page_fd, *self.eventfds, self.segment_fd]
        socket.send_fds(self.socket, [hello], fds)

    async def meet(self) -> Self:
        """Greet, and take the other's greeting."""
        self.greet()
        self.socket.setblocking(True)
        _, self.their_fds, _, _ = socket.recv_fds(self.socket, HELLO.size, 4)
        return self

    def note_segment(self, number: int, nbytes: int, fds: list[int]) -> None:
        """Announce a segment of arrays."""
        socket.send_fds(self.socket, [NOTE.pack(number, 0, nbytes, 0)], fds)

    # ------------------------------------------------------------ the rings

    # By ctypes, whose accesses to a word are whole; struct's are byte by byte.

    def _get(self, at: int) -> int:
        return int(ctypes.c_uint64.from_buffer(self.segment, at).value)

    def set(self, at: int, value: int) -> None:
        """Write a word of the control page: ours are tail 0 and head 192 + 64."""
        ctypes.c_uint64.from_buffer(self.segment, at).value = value

    def wake(self) -> None:
        """Ring the other's doorbells."""
        for fd in self.their_fds[1:]:
            os.eventfd_write(fd, 1)

    def send(self, frame: Frame, *, whole: bool = True, fill: bool = True) -> None:
        """Post a frame.

        Args:
            frame: it.
            whole: else the sender stops half-way, and nobody is told.
            fill: derive the lengths from what it carries.
        """
        if fill:
            frame.meta_bytes, frame.payload_bytes = len(frame.meta), len(frame.payload)
        record = frame.pack()
        extent = -(-len(record) // LINE) * LINE
        at = self._out % self.ring_bytes
        if self.ring_bytes - at < extent:
            skip = Frame(Kind.LINK_PRIVATE, payload_bytes=self.ring_bytes - at - LINE)
            start = CONTROL_BYTES + at
            self.segment[start : start + LINE] = skip.pack()
            self._out += self.ring_bytes - at
            at = 0
        start = CONTROL_BYTES + at
        written = record if whole else record[: len(record) // 2]
        self.segment[start : start + len(written)] = written
        if whole:
            self._out += extent
            self.set(0, self._out)
            self.wake()

    async def receive(self, *kinds: int) -> Frame:
        """The next frame, or the next of these kinds."""
        control = 192
        while True:
            await until(lambda: self._get(control) != self._in)
            at = CONTROL_BYTES + self.ring_bytes + self._in % self.ring_bytes
            frame = Frame(*HEADER.unpack_from(self.segment, at))
            at += HEADER.size
            frame.meta = self.segment[at : at + frame.meta_bytes]
            at += frame.meta_bytes
            if frame.kind != Kind.LINK_PRIVATE:
                frame.payload = self.segment[at : at + frame.payload_bytes]
            self._in += -(-(HEADER.size + frame.meta_bytes + frame.payload_bytes) // LINE) * LINE
            self.set(control + 64, self._in)
            ctypes.c_uint32.from_buffer(self.segment, control + 128).value = 0
            self.wake()  # it may wait for room
            if frame.kind != Kind.LINK_PRIVATE and (not kinds or frame.kind in kinds):
                return frame

    # ------------------------------------------------------------ the end

    def die(self) -> None:
        """What is left of a killed process: nothing."""
        if self._dead:
            return
        self._dead = True
        self.socket.close()
        self.segment.close()
        self.page.close()
        for fd in [self.segment_fd, self.page_fd, *self.eventfds, *self.their_fds]:
            os.close(fd)


class RawPeer(RawEnd):
    """The other end of a pair of `comm`, in its process.

    Args:
        comm: the communicator under test.
        rank: of this peer; not known to `comm` yet.
    """

    def __init__(self, comm: aiocomm.Communicator, rank: int, **options: Any) -> None:
        mine, theirs = socket.socketpair()
        super().__init__(mine, **options)
        self.comm = comm
        self.rank = rank
        self.generation = introduce(comm, rank, "shm", [theirs.detach()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.die()

    async def meet(self) -> Self:
        """Greet, and take the other's greeting; returns once the pair is up."""
        await super().meet()
        await until(lambda: self.comm.links["shm"].statistics().peers >= 1)
        return self


def introduce(comm: aiocomm.Communicator, rank: int, link: str, fds: list[int]) -> int:
    """Give `comm` a peer that is reached by these descriptors; returns the peer's generation."""
    generation = 1000 + rank
    comm._meet(Peer(rank, "here", os.getpid(), (), (link,), True, None, generation))
    comm._engine.add_peer(rank, generation)
    comm._engine.attach(rank, generation, link, fds, comm._engine.link_card(link), False)
    comm._engine.start_pair(rank, generation)
    return generation


def connections(comm: aiocomm.Communicator, link: str) -> tuple[list[socket.socket], list[socket.socket]]:
    """What a pair over that link needs: our ends, and theirs."""
    kind, count = comm._engine.link_streams(link)
    ours, theirs = [], []
    if kind == "unix":
        for _ in range(count):
            one, other = socket.socketpair()
            ours.append(one)
            theirs.append(other)
        return ours, theirs
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            theirs.append(socket.create_connection(server.getsockname()))
            ours.append(server.accept()[0])
    return ours, theirs
