"""What a member makes of a control connection that breaks while its world is not complete yet."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from aiocomm._control.address import TcpAddress
from aiocomm._control.client import Client
from aiocomm._control.wire import ProtocolError
from aiocomm._world import World
from aiocomm.config import Settings

if TYPE_CHECKING:
    from aiocomm._control.client import Follower
    from aiocomm._control.stream import Stream


class _Breaks:
    """A connection that does."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def receive(self) -> Any:
        raise self._error


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
    async def collect(error: Exception) -> None:
        world = World("tcp://10.0.0.1:7000", 1, 3, token="ours")
        client = Client(world, TcpAddress("10.0.0.1", 7000), b"ours", Settings(), cast("Follower", None))
        client._stream = cast("Stream", _Breaks(error))
        await client.collect()

    with pytest.raises(ConnectionError, match=f"the rendezvous {how}"):
        asyncio.run(collect(OSError(number, os.strerror(number))))
    with pytest.raises(ProtocolError):
        asyncio.run(collect(ProtocolError("nonsense")))
