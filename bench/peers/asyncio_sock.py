"""asyncio's own socket calls, `loop.sock_sendall` and `loop.sock_recv_into`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..connected import connect
from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    import socket

    from ..control import Control


class _Sock(Transport):
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()

    async def send(self, data: Array) -> None:
        await self._loop.sock_sendall(self._socket, data.data)

    async def recv(self, out: Array) -> None:
        left = out.data
        while left:
            left = left[await self._loop.sock_recv_into(self._socket, left) :]


async def _open(family: Literal["unix", "tcp"], role: int, control: Control) -> Transport:
    connected = connect(role, control, family)
    connected.setblocking(False)
    return _Sock(connected)


def _peer(name: str, family: Literal["unix", "tcp"], loop: Loop) -> Peer:
    return Peer(name, partial(_open, family), "peer", family, loop)


PEERS = [
    _peer("asyncio-sock-unix", "unix", "asyncio"),
    _peer("asyncio-sock-tcp", "tcp", "asyncio"),
    _peer("uvloop-sock-tcp", "tcp", "uvloop"),
]
