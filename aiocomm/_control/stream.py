"""A connection of the control plane: a plain non-blocking socket, read no further than asked.

asyncio's own streams read ahead; here the socket may go to a link afterwards, with whatever the peer's link
has already sent still in it. So reads take exactly the bytes of the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from aiocomm._control.auth import HELLO_SIZE, PROOF_SIZE, VERDICT_SIZE, Called, Caller
from aiocomm._control.host import numeric_host
from aiocomm._control.wire import FrameParser, ProtocolError, encode
from aiocomm._forked import tell_of_fork
from aiocomm.errors import AuthenticationError

if TYPE_CHECKING:
    from aiocomm._control.auth import Purpose, Seal
    from aiocomm._control.limit import Step
    from aiocomm._control.messages import Message

__all__ = ["ConnectionClosedError", "Stream", "how_it_broke"]

_UNREACHABLE: Final = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN))
_TURN: Final = 16
"""Messages after which others have their turn, however many more have come."""
_CREDENTIALS: Final = struct.Struct("iII")


class ConnectionClosedError(ConnectionError):
    """The other end closed the connection, between two frames."""


class Stream:
    """One connection. Not for concurrent readers, nor for concurrent writers."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        # Both exist once the connection is authenticated: there is no talk before.
        self._seal: Seal | None = None
        self._parser: FrameParser | None = None
        self._failure: OSError | None = None  # of a write
        self._received = 0
        tell_of_fork(self)

    def _on_fork(self) -> None:
        """Leave the connection to the parent: it has to end with that, also where the child lives on."""
        self.close()

    @property
    def is_unix(self) -> bool:
        """Whether both ends are on one host by construction."""
        return self._sock.family == socket.AF_UNIX

    @property
    def local_host(self) -> str:
        """This side's numeric address; empty for a Unix socket."""
        return "" if self.is_unix else numeric_host(self._sock.getsockname())

    @property
    def remote_host(self) -> str:
        """The other side's numeric address; empty for a Unix socket."""
        return "" if self.is_unix else numeric_host(self._sock.getpeername())

    def check_user(self) -> None:
        """Let only this process's own user be at the other end.

        Raises:
            AuthenticationError: it is another user, or the connection cannot tell.
        """
        if not self.is_unix:
            raise AuthenticationError(
                "without a token only this host's processes are accepted, by Unix socket; set AIOCOMM_TOKEN"
            )
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(raw)
        if uid != os.getuid():
            raise AuthenticationError(f"the other end belongs to user {uid}, this process to {os.getuid()}")

    def watch_silence(self, heartbeat_s: float) -> None:
        """Let the connection fail once what was sent stays unacknowledged for three heartbeats (TCP only).

        The other kernel acknowledges, so a peer that computes for long, or holds its GIL, is not taken for
        dead.
        """
        if not self.is_unix:
            milliseconds = max(1, int(3000 * heartbeat_s))
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def keep_alive(self, heartbeat_s: float) -> None:
        """Let the kernels exchange signs of life, where nothing else is sent (TCP only): every heartbeat, but
        not more often than once in a second.
        """
        if not self.is_unix:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                self._sock.setsockopt(socket.IPPROTO_TCP, option, math.ceil(heartbeat_s))

    async def authenticate_called(self, key: bytes | None, purpose: Purpose, step: Step) -> None:
        """Take the accepting side of the handshake. The caller bounds each step of it.

        Raises:
            AuthenticationError: the other end is not of this group.
            OSError: the connection failed.
        """
        if key is None:
            self.check_user()
        side = Called(key, purpose)
        hello = await self._read(HELLO_SIZE)
        try:
            side.challenge(hello)
        except AuthenticationError:
            await self._write(side.hello())
            raise
        await self._write(side.hello())
        step("waiting for its proof of the token")
        accepted, verdict = side.verdict(await self._read(PROOF_SIZE))
        await self._write(verdict)
        if not accepted:
            raise AuthenticationError("the other end does not know this group's token")
        self._agree(side.seals())

    async def authenticate_caller(self, key: bytes | None, purpose: Purpose, step: Step) -> None:
        """Take the connecting side of the handshake. The caller bounds each step of it.

        Raises:
            AuthenticationError: the other end is not of this group.
            OSError: the connection failed.
        """
        if key is None:
            self.check_user()
        side = Caller(key, purpose)
        step("waiting for its hello")
        await self._write(side.hello())
        hello = await self._read(HELLO_SIZE)
        step("waiting for its verdict on the token")
        await self._write(side.answer(hello))
        side.finish(await self._read(VERDICT_SIZE))
        self._agree(side.seals())

    def _agree(self, seals: tuple[Seal, Seal]) -> None:
        self._seal = seals[0]
        self._parser = FrameParser(seals[1])

    async def receive(self) -> Message:
        """The next message. Only after authentication.

        Cancelling loses the bytes of a message that was partly read: close the stream then.

        Raises:
            ProtocolError: the other end broke the protocol, or closed within a frame.
            ConnectionClosedError: it closed between two frames.
            AuthenticationError: the frame is not the other end's.
            OSError: the connection failed.
        """
        assert self._parser is not None
        self._received += 1
        if self._received % _TURN == 0:  # reading does not wait for what is there already
            await asyncio.sleep(0)
        while True:
            data = await self._loop.sock_recv(self._sock, self._parser.wanted)
            if not data:
                if self._failure is not None:
                    raise self._failure  # the kernel tells it once, to whoever asks first
                if self._parser.idle:
                    raise ConnectionClosedError("the other end closed the connection")
                raise ProtocolError("the connection ended within a frame")
            messages = self._parser.feed(data)
            if messages:
                return messages[0]

    async def send(self, message: Message) -> None:
        """Write one message.

        Raises:
            OSError: the connection failed.
        """
        await self.send_frames([encode(message)])

    async def send_frames(self, frames: list[bytes]) -> None:
        """Write frames that are encoded already.

        Raises:
            OSError: the connection failed.
        """
        assert self._seal is not None
        await self._write(b"".join(part for frame in frames for part in (frame, self._seal.tag(frame))))

    def take_over(self) -> Stream:
        """The same connection in a new stream, which its holder has to close; this one counts as closed."""
        return Stream(socket.socket(fileno=self._sock.detach()))

    def detach(self) -> int:
        """Give the descriptor away. Only between operations."""
        return self._sock.detach()

    def close(self) -> None:
        """Close; idempotent, also after `detach`."""
        with contextlib.suppress(OSError):
            self._sock.close()

    async def _read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            portion = await self._loop.sock_recv(self._sock, nbytes - len(data))
            if not portion:
                raise ConnectionClosedError("the other end closed the connection during the handshake")
            data += portion
        return data

    async def _write(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._sock, data)
        except OSError as error:
            self._failure = error
            raise


def how_it_broke(error: OSError, heartbeat_s: float) -> str:
    """What a broken control connection says about the other end, to follow its name."""
    if isinstance(error, TimeoutError):
        return f"did not answer for {3 * heartbeat_s:g} s"
    if error.errno in _UNREACHABLE:
        return f"cannot be reached any more ({error.strerror})"
    return "died: its control connection broke"
