"""A communicator is closed while tasks wait in everything that waits: each of them ends, and is told why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import LIMIT_S, all_call, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiocomm.types import Feed

pytestmark = pytest.mark.anyio

FEEDS = {"notifications", "events", "completions", "submissions"}
# What the messages say; of a group, what it does first.
TOLD = {
    "recv": "recv of 1 bytes from rank 1 on channel '', tag 0: ",
    "recv of any": "recv of 1 bytes from any rank on channel '', tag 0: ",
    "recv on a channel": "recv of 1 bytes from rank 1 on channel 'c', tag 0: ",
    "recv_array": "recv from rank 1 on channel '', tag 0: ",
    "send": "send of 8388608 bytes to rank 1 on channel '', tag 0 (link shm): ",
    "synchronous send": "send of 1 bytes to rank 1 on channel '', tag 0 (link shm): ",
    "barrier": "barrier (call ",
    "broadcast": "broadcast (call ",
    "all_reduce": "all_reduce (call ",
    "dispatch": "dispatch (call ",
    "split": "split (call ",
    "group": "group (call 1 of group [0, 1]): the communicator was closed",
    "shrink": "shrink: ",
    "exchange": "exchange with rank 1: ",
    "layers of one": "the communicator was closed, and no layer has come from rank 1",
    "layers of any": "the communicator was closed, and no layer has come",
    "thread": "",  # it may come to its wait too late
}


async def to_the_end(feed: Feed[Any]) -> None:
    async for _ in feed:
        pass


async def dispatch(comm: aiocomm.Communicator) -> None:
    await comm.dispatch(np.zeros((2, 4), np.float32), np.array([[0], [1]]), experts=2)


async def repeated(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    """Calls that repeat go by shorter ways."""
    for _ in range(4):
        await all_call([a, b], lambda comm: comm.barrier())
        await all_call([a, b], lambda comm: comm.broadcast(np.zeros(10), root=1))
        await all_call([a, b], lambda comm: comm.all_reduce(np.zeros(1 << 18)))
        await all_call([a, b], dispatch)


async def waits(comm: aiocomm.Communicator) -> dict[str, Callable[[], Awaitable[Any]]]:
    """By name, what rank 1 does nothing for."""
    lease = await comm.lease_pages(aiocomm.Pages([np.zeros((4, 64), np.uint8) for _ in range(2)]))
    region, group, channel = comm.register(np.zeros(8)), comm._members(), comm.channel("c")
    return {
        "recv": lambda: comm.recv(bytearray(1), src=1),
        "recv of any": lambda: comm.recv(bytearray(1)),
        "recv on a channel": lambda: channel.recv(bytearray(1), src=1),
        "recv_array": lambda: comm.recv_array(src=1),
        "send": lambda: comm.send(np.zeros(1 << 20), dst=1),
        "synchronous send": lambda: comm.send(b"x", dst=1, synchronous=True),
        "barrier": lambda: comm.barrier(),
        "broadcast": lambda: comm.broadcast(np.zeros(10), root=1),
        "all_reduce": lambda: comm.all_reduce(np.zeros(1 << 18)),
        "dispatch": lambda: dispatch(comm),
        "split": lambda: comm.split(0),
        "group": lambda: comm.group([0, 1]),
        "shrink": lambda: group.shrink(),
        "exchange": lambda: comm.exchange(region, 1),
        "layers of one": lambda: anext(lease.layers(1)),
        "layers of any": lambda: anext(lease.layers(deadline=100.0)),
        "notifications": lambda: to_the_end(comm.notifications()),
        "events": lambda: to_the_end(comm.events()),
        "completions": lambda: to_the_end(comm.links["tcp"].completions()),
        "submissions": lambda: to_the_end(comm.links["tcp"].submissions()),
        "thread": lambda: anyio.to_thread.run_sync(comm.from_thread.recv_array, 1, abandon_on_cancel=True),
    }


@pytest.mark.parametrize("repeats", [False, True], ids=["first", "repeated"])
async def test_every_wait_ends_with_the_communicator(repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "0.01")  # nobody receives what is sent
    async with world(2, warmup=True) as (a, b):
        if repeats:
            await repeated(a, b)
        ended: dict[str, BaseException | None] = {}

        async def wait(name: str, call: Callable[[], Awaitable[Any]]) -> None:
            try:
                await call()
                ended[name] = None
            except aiocomm.AiocommError as error:
                ended[name] = error

        every = await waits(a)
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                for name, call in every.items():
                    tasks.start_soon(wait, name, call)
                for _ in range(30):  # by when each has come to where it waits
                    await anyio.lowlevel.checkpoint()
                await a.aclose()
        assert ended.keys() == every.keys()
        assert {name for name, error in ended.items() if error is None} == FEEDS
        assert {type(error) for error in ended.values() if error is not None} == {aiocomm.ClosedError}
        for name, error in ended.items():
            assert name in FEEDS or str(error).startswith(TOLD[name]), name
