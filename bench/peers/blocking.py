"""Blocking sockets in plain threads of control: what a program without an event loop gets."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..connected import connect
from .base import Array, Peer, Transport

if TYPE_CHECKING:
    import socket

    from ..control import Control


class BlockingTransport(Transport):
    """For transports whose calls block: nothing suspends."""

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 -- there is no loop

    async def finish(self, control: Control | None) -> None:
        if control is not None:
            control.swap("measured")


class _Socket(BlockingTransport):
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    async def send(self, data: Array) -> None:
        self._socket.sendall(data.data)

    async def recv(self, out: Array) -> None:
        left = out.data
        while left:
            left = left[self._socket.recv_into(left) :]


async def _open(family: Literal["unix", "tcp"], role: int, control: Control) -> Transport:
    return _Socket(connect(role, control, family))


PEERS = [
    Peer("blocking-unix", partial(_open, "unix"), "peer", "unix", "blocking"),
    Peer("blocking-tcp", partial(_open, "tcp"), "peer", "tcp", "blocking"),
]
