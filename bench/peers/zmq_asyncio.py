"""ZeroMQ through zmq.asyncio, over its ipc transport."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..sizes import KIB
from .base import Array, Peer, Transport

if TYPE_CHECKING:
    import zmq.asyncio

    from ..control import Control

_COPY_BELOW = 64 * KIB  # zero-copy sends cost more than they save below that


class _Zmq(Transport):
    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket

    async def send(self, data: Array) -> None:
        await self._socket.send(data, copy=len(data) < _COPY_BELOW)

    async def recv(self, out: Array) -> None:
        # pyzmq has no receive into a buffer: the message stays in its frame, as its users would read it there
        frame = await self._socket.recv(copy=False)
        out[[0, len(out) // 2, -1]] = [frame.buffer[i] for i in (0, len(out) // 2, -1)]
        if len(frame) != len(out):
            raise RuntimeError(f"zmq: {len(frame)} bytes, not {len(out)}")


async def _open(role: int, control: Control) -> Transport:
    import zmq.asyncio

    socket = zmq.asyncio.Context().socket(zmq.PAIR)
    if role == 0:
        address = f"ipc://@aiocomm-bench-{os.getpid()}"
        socket.bind(address)
        control.send(address)
    else:
        socket.connect(control.recv())
    return _Zmq(socket)


PEERS = [
    Peer("zmq-asyncio-ipc", _open, "peer", "unix", modules=("zmq",), install="pip install pyzmq",
         note="received in its own frame, not copied into the user's buffer"),
]  # fmt: skip
