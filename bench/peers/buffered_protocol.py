"""asyncio.BufferedProtocol: received straight into the waiting buffer, asyncio's fastest way for bulk."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

from ..connected import connect
from ..sizes import KIB, MIB
from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    from ..control import Control

_WRITE = 256 * KIB  # bytes written at once, so that the transport's buffer stays small
_STASH = MIB  # bytes that may arrive before anyone asked for them


class _Protocol(asyncio.BufferedProtocol, Transport):
    """Receives into the buffer of the pending `recv`, or into a stash while none is pending."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._small = memoryview(bytearray(64 * KIB))
        self._stash = bytearray()
        self._target: memoryview | None = None
        self._filled: asyncio.Future[None] | None = None
        self._direct = False  # what get_buffer() handed out last is the target itself
        self._reading = True
        self._writable: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def get_buffer(self, sizehint: int) -> memoryview:
        self._direct = self._target is not None
        return self._target if self._target is not None else self._small

    def buffer_updated(self, nbytes: int) -> None:
        if self._direct:
            assert self._target is not None
            self._target = self._target[nbytes:]
            if not self._target:
                self._target = None
                assert self._filled is not None
                self._filled.set_result(None)
            return
        self._stash += self._small[:nbytes]
        if len(self._stash) > _STASH:
            self._transport.pause_reading()
            self._reading = False

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        waiting, self._writable = self._writable, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def recv(self, out: Array) -> None:
        left = out.data
        if self._stash:
            ready = min(len(left), len(self._stash))
            left[:ready] = self._stash[:ready]
            del self._stash[:ready]
            left = left[ready:]
            if not self._reading and not self._stash:
                self._reading = True
                self._transport.resume_reading()
        if left:
            self._target = left
            self._filled = self._loop.create_future()
            await self._filled

    async def send(self, data: Array) -> None:
        view = data.data
        for start in range(0, len(view), _WRITE):
            self._transport.write(view[start : start + _WRITE])
            if self._writable is not None:
                await self._writable


async def _open(family: Literal["unix", "tcp"], role: int, control: Control) -> Transport:
    connected = connect(role, control, family)
    connected.setblocking(False)
    loop = asyncio.get_running_loop()
    create = loop.create_unix_connection if family == "unix" else loop.create_connection
    _, protocol = await create(_Protocol, sock=connected)
    return protocol


def _peer(name: str, family: Literal["unix", "tcp"], loop: Loop) -> Peer:
    return Peer(name, partial(_open, family), "peer", family, loop)


PEERS = [
    _peer("buffered-protocol-unix", "unix", "asyncio"),
    _peer("buffered-protocol-tcp", "tcp", "asyncio"),
    _peer("buffered-protocol-tcp-uvloop", "tcp", "uvloop"),
]
