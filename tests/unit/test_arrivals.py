"""Connections that come for a call which is being answered: somebody closes each, whoever is cancelled."""

from __future__ import annotations

import asyncio
import socket

import pytest

from aiocomm._control.calls import Arrivals
from aiocomm._control.stream import Stream


async def _collected_and_dropped(detached: bool) -> None:
    arrivals = Arrivals(lambda what: None)
    ends = [socket.socketpair() for _ in range(3)]
    collecting = asyncio.create_task(arrivals.collect("tcp", 3))
    await asyncio.sleep(0)
    for index, (here, _) in enumerate(ends):
        here.setblocking(False)
        arrivals.put(Stream(here), "tcp", index)
    streams = await collecting  # by a task that is cancelled before it has them
    taken = [socket.socket(fileno=one.detach()) for one in streams] if detached else []
    arrivals.close()
    for _, there in ends:
        there.setblocking(False)
        if detached:
            with pytest.raises(BlockingIOError):
                there.recv(1)
        else:
            assert there.recv(1) == b"", "closed"
        there.close()
    for one in taken:
        one.close()


@pytest.mark.parametrize("detached", [False, True])
def test_what_was_collected_and_not_taken_is_closed(detached: bool) -> None:
    asyncio.run(_collected_and_dropped(detached))
