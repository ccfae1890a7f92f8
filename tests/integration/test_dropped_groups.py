"""Groups that nobody has any more: they close by themselves, and not too early."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, all_call, held, until

import aiocomm

if TYPE_CHECKING:
    from aiocomm.group import Group

    Pair = tuple[aiocomm.Communicator, aiocomm.Communicator]

pytestmark = pytest.mark.anyio


async def use(comm: aiocomm.Communicator) -> weakref.ref[Group]:
    """Make a group and call it by all that it keeps something for."""
    group = await comm.group([0, 1])
    for channel in (None, comm.channel("beside")):
        await group.barrier(channel=channel)
        await group.all_reduce(np.ones(3), channel=channel)
        await group.all_reduce(np.ones(100_000), channel=channel)
    return weakref.ref(group)


@pytest.mark.parametrize("by_thread", [False, True])
async def test_dropped_groups_give_all_back(by_thread: bool, pair: Pair) -> None:
    dropped: list[weakref.ref[Group]] = []

    async def call(comm: aiocomm.Communicator) -> None:
        dropped.append(await use(comm))

    def collected() -> bool:
        if by_thread:  # on which the collector may run just as well
            collecting = threading.Thread(target=gc.collect)
            collecting.start()
            collecting.join()
        else:
            gc.collect()
        return all(group() is None for group in dropped)

    await all_call([*pair], call)
    await until(collected)
    before = held()
    for _ in range(10):
        await all_call([*pair], call)
    await until(collected)
    await until(lambda: held()["descriptors"] <= before["descriptors"])
    await until(lambda: not any(comm._scopes for comm in pair))  # their last words have gone
    await all_call([*pair], call)  # later ones are not mistaken for them


async def test_a_call_keeps_its_group(pair: Pair) -> None:
    groups: dict[int, Any] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    await all_call([*pair], make)
    sums = [np.full(1000, 1.0 + rank) for rank in range(2)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(groups.pop(0).all_reduce, sums[0])
        for _ in range(3):
            receiving = pair[0].recv(bytearray(1), 1)
            await pair[1].send(b"x", 0)
            await receiving
            gc.collect()
        tasks.start_soon(groups.pop(1).all_reduce, sums[1])
    assert all((one == 3).all() for one in sums)


async def test_others_hear_of_a_failed_call_whose_group_was_dropped(pair: Pair) -> None:
    groups: dict[int, Any] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    await all_call([*pair], make)
    with pytest.raises(aiocomm.DeadlineExceeded):
        await groups.pop(0).all_reduce(np.ones(1_000_000), deadline=0.05)
    gc.collect()
    with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
        await groups[1].all_reduce(np.ones(1_000_000))


async def test_a_communicator_goes_with_its_groups() -> None:
    comm = await aiocomm.connect()
    group = await comm.group([0])
    await group.barrier()
    await comm.aclose()
    gone = weakref.ref(comm)
    del comm, group
    await until(lambda: gc.collect() >= 0 and gone() is None)


async def test_closed_groups_leave_nothing(pair: Pair) -> None:
    """Neither channels, one of them urgent, nor words that came when this rank had closed its end."""

    def known() -> list[dict[str, float]]:
        names = ("channels", "flows", "unexpected_messages", "posted_receives", "window_bytes")
        return [
            {name: comm._engine.gauges(link)[name] for name in names}
            for comm in pair
            for link in comm._engine.link_names()
        ]

    async def call(comm: aiocomm.Communicator) -> None:
        group = await comm.group([0, 1])
        rest = await group.shrink()
        await rest.barrier()
        group.close()
        rest.close()

    before = known()
    for _ in range(20):
        await all_call(pair, call)
    await until(lambda: known() == before)


async def test_a_shrink_ends_with_its_group(pair: Pair) -> None:
    groups: dict[int, Group] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    def channels() -> int:
        return int(pair[0]._engine.gauges("self")["channels"])

    async def shrink() -> None:
        with pytest.raises(aiocomm.ClosedError, match=r"shrink: group \[0, 1\] was closed"):
            await groups[0].shrink()

    before = channels()
    await all_call(pair, make)
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shrink)
            await anyio.wait_all_tasks_blocked()
            groups[0].close()
    with pytest.raises(aiocomm.ClosedError, match=r"group \[0, 1\] was closed"):
        await groups[0].shrink()
    groups[1].close()
    await until(lambda: channels() == before)


async def test_a_shrink_that_is_given_up_closes_with_its_group(pair: Pair) -> None:
    groups: dict[int, Group] = {}

    async def make(comm: aiocomm.Communicator) -> None:
        groups[comm.rank] = await comm.group([0, 1])

    def channels() -> int:
        return int(pair[0]._engine.gauges("self")["channels"])

    before = channels()
    for closes in (True, False):
        await all_call(pair, make)
        with pytest.raises(aiocomm.DeadlineExceeded):
            await groups[0].shrink(deadline=0.0)
        assert channels() == before + 2
        groups.pop(1).close()
        left = groups.pop(0)
        if closes:
            left.close()
        del left
        await until(lambda: gc.collect() >= 0 and channels() == before)  # what ends may keep it for a while
