"""Which of several addresses is taken, and what is said of those that were not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import LIMIT_S

from aiocomm._control import dialing
from aiocomm._control.address import TcpAddress
from aiocomm._control.client import read_address_file, remove_address_file, write_address_file
from aiocomm._control.dialing import UnansweredError, reach
from aiocomm.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aiocomm._control.stream import Stream


def address_of(sock: socket.socket) -> TcpAddress:
    host, port = sock.getsockname()[:2]
    return TcpAddress(host, port)


@pytest.fixture
def listening() -> Iterator[TcpAddress]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield address_of(server)


@pytest.fixture
def silent() -> Iterator[TcpAddress]:
    """Whose backlog is full, so that the kernel drops what comes, as firewalls do."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        client = stack.enter_context(socket.socket())
        client.connect(server.getsockname())
        select.select([server], [], [])  # it is in the backlog, which has room for one
        yield address_of(server)


@pytest.fixture
def refusing() -> Iterator[TcpAddress]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield address_of(bound)


async def welcome(stream: Stream) -> None:
    """Is content with anyone."""


def taken(*addresses: TcpAddress, greet: object = welcome, limit_s: float = LIMIT_S) -> object:
    async def main() -> object:
        stream, found = await reach(addresses, greet, limit_s)  # type: ignore[arg-type]
        stream.close()
        return found

    return asyncio.run(main())


def test_the_first_that_connects_is_taken(
    silent: TcpAddress, refusing: TcpAddress, listening: TcpAddress
) -> None:
    # Without a limit of its own, the silent one would be waited for.
    assert taken(silent, refusing, listening, limit_s=1000.0) == listening


def test_who_is_not_of_the_group_is_got_past(listening: TcpAddress) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        alien = address_of(server)

        async def greet(stream: Stream) -> None:
            if stream._sock.getpeername()[1] == alien.port:
                raise AuthenticationError("an alien")

        assert taken(alien, listening, greet=greet) == listening
        with pytest.raises(AuthenticationError, match="an alien"):
            taken(alien, greet=greet)


def test_who_is_cancelled_as_the_slower_ones_end_leaves_no_connection(
    listening: TcpAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialing, "_STAGGER_S", 0.0)
    streams: list[Stream] = []
    gone_by = asyncio.Event()

    async def greet(stream: Stream) -> None:
        streams.append(stream)
        if len(streams) == 1:
            try:
                await asyncio.Event().wait()
            finally:
                gone_by.set()
                await asyncio.Event().wait()

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            dialing_both = asyncio.create_task(reach([listening, address_of(server)], greet, LIMIT_S))
            await gone_by.wait()
            dialing_both.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dialing_both

    asyncio.run(main())
    assert [stream._sock.fileno() for stream in streams] == [-1, -1]


def test_silence_is_not_told_as_a_refusal(
    silent: TcpAddress, refusing: TcpAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnansweredError, match=f"no answer from {silent}: is a firewall between"):
        taken(silent, limit_s=0.1)
    with pytest.raises(ConnectionRefusedError):
        taken(refusing)
    connect, refused = dialing._connect, asyncio.Event()

    async def in_turn(family: int, sockaddr: tuple[str, int]) -> Stream:
        """The limit of the silent one ends once the other has refused, however long that takes."""
        if sockaddr[1] == silent.port:
            await refused.wait()
            raise TimeoutError
        try:
            return await connect(family, sockaddr)
        finally:
            refused.set()

    monkeypatch.setattr(dialing, "_connect", in_turn)
    with pytest.raises(UnansweredError, match=rf"no answer from {silent}.*; {refusing}: Connection refused"):
        taken(silent, refusing)


def test_a_name_that_no_host_can_have_is_got_past(listening: TcpAddress) -> None:
    """A peer may tell any."""
    nobody = TcpAddress("a" * 64, 7000)
    assert taken(nobody, listening) == listening
    with pytest.raises(OSError, match="no host can have that name"):
        taken(nobody)


def test_a_file_holds_all_addresses(tmp_path: Path) -> None:
    path = str(tmp_path / "address")
    addresses = (TcpAddress("10.0.0.1", 7000), TcpAddress("fd00::1", 7000))
    for token in (b"secret", None):
        write_address_file(path, addresses, token)
        assert read_address_file(path) == (addresses, token)
    remove_address_file(path, TcpAddress("10.0.0.1", 7001))
    assert read_address_file(path)[0] == addresses
    remove_address_file(path, addresses[0])
    assert not (tmp_path / "address").exists()


KILLED = """
import os, signal, sys
from aiocomm._control.address import TcpAddress
from aiocomm._control.client import write_address_file

os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_address_file(sys.argv[1], (TcpAddress("10.0.0.1", 7000),), None)
"""


def test_what_a_killed_process_left_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their process ids may be the same: in a container they always are."""
    path, addresses = str(tmp_path / "address"), (TcpAddress("10.0.0.1", 7000),)
    killed = subprocess.Popen([sys.executable, "-c", KILLED, path])
    assert killed.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "getpid", lambda: killed.pid)
    write_address_file(path, addresses, None)
    assert read_address_file(path) == (addresses, None)
    assert {file.name for file in tmp_path.iterdir()} == {"address", left.name}
