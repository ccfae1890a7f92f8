"""A member dies once it has sent its part: who waits for others, which do not call any more, hears of it."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import numpy as np
import pytest
from harness import LIMIT_S, all_call, until, world

import aiocomm
from aiocomm.collectives import flight
from aiocomm.launch import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness import Child

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

MEMBER = """
import asyncio
import aiocomm

async def main():
    async with aiocomm.connect(rank=2, size=3) as comm:
        await asyncio.to_thread(input)
        await comm.group([0, 1, 2])
        await asyncio.sleep(100)

asyncio.run(main())
"""


async def _call(group: aiocomm.Group, what: str) -> None:
    x = np.ones(100)
    match what:
        case "barrier":
            await group.barrier()
        case "all_reduce":
            await group.all_reduce(x)
        case "ring":
            await group.all_reduce(np.ones(300_000), algorithm="ring")
        case "broadcast":
            await group.broadcast(x, root=2)
        case "dispatch":
            ids = np.arange(24).reshape(8, 3) % 6
            await group.dispatch(np.ones((8, 16), np.float32), ids, experts=6)


async def _one_shrinks(comm: aiocomm.Communicator, what: str, before: int) -> None:
    """Rank 2 dies in a call that rank 0 has begun, too; rank 1 knows of that, and does not begin it."""
    group = await comm.group(range(comm.size))
    for _ in range(before):
        await _call(group, what)
    await group.barrier()
    if comm.rank == 2:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_call, group, what)
            await comm.recv(bytearray(1), src=0)
            await comm.send(b"x", dst=0)
            await comm.recv(bytearray(1), src=0)
            os.kill(os.getpid(), signal.SIGKILL)
    if comm.rank == 0:

        async def kill() -> None:
            for _ in range(2):
                await comm.send(b"x", dst=2)
            await comm.recv(bytearray(1), src=2)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone") as caught:
                await _call(group, what)
        assert caught.value.peer == 2
    else:
        with pytest.raises(aiocomm.PeerLostError):
            await comm.recv(bytearray(1), src=2)
    left = await group.shrink()
    assert left.ranks == (0, 1)
    await _call(left, what if what != "broadcast" else "barrier")


@pytest.mark.parametrize("links", ["shm", "tcp"])
@pytest.mark.parametrize("before", [0, 1, 4])
@pytest.mark.parametrize("what", ["barrier", "all_reduce", "ring", "broadcast", "dispatch"])
async def test_who_waits_for_one_that_shrinks(what: str, before: int, links: Any) -> None:
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_one_shrinks, 2, what, before, links=links) as comm:
            await _one_shrinks(comm, what, before)
    assert (caught.value.rank, caught.value.exit_code) == (2, -signal.SIGKILL)


async def test_who_waits_for_one_that_has_lost_another() -> None:
    """Of a pair that does not reach each other only one side may be heard by the third rank."""
    async with world(3) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([0, 1, 2])
            if comm.rank == 1:  # which has the call before fail, as a cut cable would have it
                await comm.recv(bytearray(1), src=0)
                group._scope(None).abort(1, aiocomm.PeerLostError("rank 2 is gone", 2))
            elif comm.rank == 2:
                with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone"):  # as rank 0 says
                    await group.barrier()
            else:
                sending = comm.send(b"x", 1)
                with pytest.raises(aiocomm.PeerLostError, match=r"call 2 .*rank 2 is gone"):
                    await group.barrier()
                await sending
                with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone"):
                    await group.all_reduce(np.ones(5))

        await all_call(members, rank)


async def test_one_that_comes_back_is_not_the_member_it_was(child: Callable[..., Child]) -> None:
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    found: dict[int, aiocomm.Communicator] = {}

    async def join(rank: int) -> None:
        found[rank] = await aiocomm.connect(address, rank=rank, size=3)

    third = child(MEMBER, AIOCOMM_ADDRESS=address)
    third.tell("make")
    async with anyio.create_task_group() as tasks:
        for rank in (0, 1):
            tasks.start_soon(join, rank)
    groups: dict[aiocomm.Communicator, aiocomm.Group] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm] = await comm.group([0, 1, 2])

    members = [found[0], found[1]]  # by rank: 0 is where the others are registered
    await all_call(members, make)
    before = {comm.peers[-1].generation for comm in members}
    third.kill()
    third.process.wait()  # who lives has the rank, and is told so to whoever comes for it
    again = child(MEMBER, AIOCOMM_ADDRESS=address)
    await until(lambda: all(comm.peers[-1].generation not in before for comm in members))
    assert all(comm.peers[-1].alive for comm in members)

    async def call(comm: aiocomm.Communicator) -> None:
        for channel in (None, comm.channel("new")):
            with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone"):
                await groups[comm].barrier(channel=channel)
        left = await groups[comm].shrink()
        assert left.ranks == (0, 1)
        await left.barrier()

    await all_call(members, call)
    again.tell("make")
    await all_call(members, make)  # with the new one
    for comm in members[::-1]:
        await comm.aclose()


class Withdrawn:
    """A transfer that its peer has cancelled."""

    kind = "recv"

    def done(self) -> bool:
        return True

    def cancelled(self) -> bool:
        return False

    def exception(self) -> BaseException:
        return aiocomm.TransferCancelled("the peer cancelled its side")


@pytest.mark.parametrize("explained", [True, False])
@pytest.mark.parametrize("what", ["all_reduce", "dispatch"])
async def test_why_comes_after_what_was_withdrawn(
    what: str, explained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's word of why it gave a call up may come after its transfers have ended."""
    monkeypatch.setattr(flight, "_EXPLANATION_S", LIMIT_S if explained else 0.0)
    async with world(2, warmup=True) as (comm, other):

        async def call() -> None:
            groups.append(await comm.group([0, 1]))
            said = "rank 1 gave the call up: cancelled" if explained else "the peer cancelled its side"
            with pytest.raises(aiocomm.TransferCancelled, match=said):
                await _call(groups[0], what)

        groups: list[aiocomm.Group] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            group = await other.group([0, 1])
            await until(lambda: groups)
            mine, theirs = (
                one._expert_scope(None)[0] if what == "dispatch" else one._scope(None)
                for one in (groups[0], group)
            )
            await until(lambda: mine.calls)
            ((number, begun),) = mine.calls.items()
            key = (True, 1)  # the header of rank 1
            await until(lambda: key in begun._flying)
            receive, begun._flying[key] = begun._flying[key], Withdrawn()  # type: ignore[assignment]
            begun._ended(key, begun._flying[key])
            receive.cancel()
            await anyio.lowlevel.checkpoint()
            if explained:
                assert number in mine.calls
                theirs.abort(number, anyio.get_cancelled_exc_class()())
