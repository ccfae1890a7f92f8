"""asyncio's StreamReader and StreamWriter: what most asyncio programs use."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..connected import connect
from .base import Array, Peer, Transport

if TYPE_CHECKING:
    from ..control import Control


class _Streams(Transport):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: Array) -> None:
        self._writer.write(data.data)
        await self._writer.drain()

    async def recv(self, out: Array) -> None:
        out.data[:] = await self._reader.readexactly(len(out))


async def _open(family: Literal["unix", "tcp"], role: int, control: Control) -> Transport:
    connected = connect(role, control, family)
    connected.setblocking(False)
    if family == "unix":
        return _Streams(*await asyncio.open_unix_connection(sock=connected))
    return _Streams(*await asyncio.open_connection(sock=connected))


PEERS = [
    Peer("asyncio-streams-unix", partial(_open, "unix"), "peer", "unix"),
    Peer("asyncio-streams-tcp", partial(_open, "tcp"), "peer", "tcp"),
]
