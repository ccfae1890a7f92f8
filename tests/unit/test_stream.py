"""Control connections that break."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from aiocomm._control.messages import Heartbeat
from aiocomm._control.stream import Stream, how_it_broke
from aiocomm._control.wire import FrameParser, encode


class _Broken:
    """A loop whose kernel tells the writer what is wrong, and the reader only that the connection is over."""

    def __init__(self, code: int) -> None:
        self._code = code

    async def sock_sendall(self, sock: Any, data: bytes) -> None:
        raise OSError(self._code, os.strerror(self._code))

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENETUNREACH, "cannot be reached any more"),
        (errno.ETIMEDOUT, "did not answer for 3 s"),
        (errno.EPIPE, "died: its control connection broke"),
    ],
)
def test_what_is_wrong_is_told_to_the_reader_too(code: int, says: str) -> None:
    async def broken() -> OSError:
        here, there = socket.socketpair()
        with here, there:
            stream: Any = Stream(here)
            stream._loop, stream._parser = _Broken(code), SimpleNamespace(wanted=1, idle=True)
            with pytest.raises(OSError, match=os.strerror(code)):
                await stream._write(b"heartbeat")
            with pytest.raises(OSError) as caught:  # noqa: PT011  (what it is is looked at)
                await stream.receive()
            return caught.value

    assert how_it_broke(asyncio.run(broken()), 1.0).startswith(says)


def test_what_comes_without_end_leaves_others_their_turn() -> None:
    async def flooded() -> int:
        here, there = socket.socketpair()
        with here, there:
            stream = Stream(here)
            stream._parser = FrameParser()
            there.sendall(encode(Heartbeat()) * 1000)
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            for received in range(1000):
                await stream.receive()
                if turn.is_set():
                    return received
            return 1000

    assert asyncio.run(flooded()) < 100
