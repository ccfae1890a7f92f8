"""A listening socket in a process that has no descriptors left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from aiocomm._control.address import UnixAddress
from aiocomm._control.auth import Purpose
from aiocomm._control.listener import Listener, bind, private_unix_address

if TYPE_CHECKING:
    from pathlib import Path


class _Exhausted:
    """A socket that cannot accept for a while."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.tries = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def accept(self) -> Any:
        self.tries += 1
        if self.tries < 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._sock.accept()


def test_that_connections_wait_is_said_once_and_while_they_do(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> str:
        sock, address = bind(private_unix_address())
        starving: Any = _Exhausted(sock)
        over = asyncio.Event()

        async def serve(stream: object) -> None:
            pass

        listener = Listener(starving, None, Purpose.PAIR, 5.0, 8, serve)
        starved = []
        accept = listener._accept

        def watched() -> None:
            accept()
            starved.append(listener.starved)
            if not listener.starved:
                over.set()

        listener._accept = watched  # type: ignore[method-assign]
        asyncio.get_running_loop().add_reader(sock, watched)
        _, writer = await asyncio.open_unix_connection(address.sockaddr)  # type: ignore[union-attr]
        await over.wait()
        writer.close()
        await listener.aclose()
        await writer.wait_closed()
        assert starved[:3] == [starved[0], starved[0], ""]
        return starved[0]

    starved = asyncio.run(main())
    assert "Too many open files: raise the limit of open files (ulimit -n" in starved
    assert [record.getMessage() for record in caplog.records] == [
        f"connections to this process wait: {starved}"
    ]


def test_a_socket_whose_backlog_is_full_is_not_stale(tmp_path: Path) -> None:
    """Who listens there is stopped, say; nor is it waited for."""
    path = str(tmp_path / "socket")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        for full in (False, True):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with pytest.raises(BlockingIOError) if full else contextlib.nullcontext():
                client.connect(path)
        with pytest.raises(OSError, match="Address already in use"):
            bind(UnixAddress(path))
