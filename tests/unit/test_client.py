"""What a member makes of a rendezvous that is lost, or says what makes no sense."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest

from aiocomm._control import messages
from aiocomm._control.address import TcpAddress
from aiocomm._control.client import Client
from aiocomm._control.stream import ConnectionClosedError
from aiocomm._control.wire import ProtocolError
from aiocomm._world import World
from aiocomm.config import Settings

if TYPE_CHECKING:
    from aiocomm._control.client import Follower
    from aiocomm._control.stream import Stream


class _Line:
    """A connection to a rendezvous that says this, and then breaks."""

    is_unix, remote_host = True, ""

    def __init__(self, *said: messages.Message, breaks: Exception | None = None) -> None:
        self._said = list(said)
        self._breaks = breaks or ConnectionClosedError("it has ended")

    async def send(self, message: messages.Message) -> None:
        pass

    def watch_silence(self, heartbeat_s: float) -> None:
        pass

    keep_alive = watch_silence

    def close(self) -> None:
        pass

    async def receive(self) -> messages.Message:
        if self._said:
            return self._said.pop(0)
        raise self._breaks


class _Alone:
    """Hears of nobody."""

    def on_joined(self, card: messages.PeerCard) -> None:
        raise AssertionError(card)


CARD = messages.PeerCard(2, 1, None, "there", "there", 7, 1, 1, (), ("tcp",), ())
WELCOME = messages.Welcome(1, 3, 1, 0, "world", b"")


def client(line: _Line, rank: int | None = 1, size: int | None = 3) -> Client:
    world = World("tcp://10.0.0.1:7000", rank, size, token="ours")
    found = Client(world, TcpAddress("10.0.0.1", 7000), b"ours", Settings(), cast("Follower", _Alone()))
    found._stream = cast("Stream", line)
    return found


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (errno.ETIMEDOUT, "did not answer for 3 s"),  # to Python a TimeoutError
        (errno.EHOSTUNREACH, "cannot be reached any more"),
        (errno.ECONNRESET, "died"),
    ],
    ids=["timed out", "unreachable", "reset"],
)
def test_a_rendezvous_that_is_lost_before_all_have_come_is_no_time_limit(number: int, how: str) -> None:
    async def collect() -> None:
        await client(_Line(breaks=OSError(number, os.strerror(number)))).collect()

    with pytest.raises(ConnectionError, match=f"the rendezvous {how}"):
        asyncio.run(collect())


@pytest.mark.parametrize(
    ("welcome", "fits"),
    [
        (WELCOME, True),
        (replace(WELCOME, rank=2), False),
        (replace(WELCOME, size=4), False),
        (replace(WELCOME, size=None), False),
        (replace(WELCOME, size=2**40), False),
    ],
    ids=str,
)
def test_a_place_that_was_not_asked_for_is_not_taken(welcome: messages.Welcome, fits: bool) -> None:
    async def ask() -> object:
        line = _Line(welcome)
        member = client(line)
        found = await member._ask(cast("Stream", line), lambda _: CARD)
        assert found is not None or member.trouble == "it broke the protocol"
        return found

    assert asyncio.run(ask()) == (welcome if fits else None)


@pytest.mark.parametrize(("rank", "fits"), [(0, True), (5, True), (2**20 - 1, True), (2**20, False)])
def test_a_rank_that_engines_do_not_know_is_not_taken(rank: int, fits: bool) -> None:
    async def ask() -> object:
        line = _Line(welcome)
        return await client(line, None, None)._ask(cast("Stream", line), lambda _: CARD)

    async def collect() -> None:
        await client(_Line(messages.Joined((replace(CARD, rank=2**40),)))).collect()

    welcome = replace(WELCOME, rank=rank, size=None)
    assert asyncio.run(ask()) == (welcome if fits else None)
    with pytest.raises(ProtocolError, match="a peer of rank 1099511627776"):
        asyncio.run(collect())
