"""A channel that one rank closes: collective operations end on all ranks, and meet again once it is open."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, all_call, world

import aiocomm
from aiocomm import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "barrier": lambda g, channel: g.barrier(channel=channel),
    "small": lambda g, channel: g.all_reduce(np.zeros(10), channel=channel),
    "large": lambda g, channel: g.all_reduce(np.zeros(1 << 20), channel=channel),
    "experts": lambda g, channel: g.dispatch(np.zeros((2, 4)), [[0], [1]], experts=2, channel=channel),
    "many rows": lambda g, channel: g.dispatch(
        np.zeros((4000, 200)), np.zeros((4000, 1), int), experts=2, channel=channel
    ),
}


async def give_up(call: Callable[[], Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match="channel 'x' was closed"):
        await call()


@pytest.mark.parametrize("priority", [Priority.NORMAL, Priority.URGENT])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("repeats", [0, 3])
@pytest.mark.parametrize("case", CALLS)
async def test_waiting_calls_end_on_all(case: str, repeats: int, grouped: bool, priority: Priority) -> None:
    call = CALLS[case]

    async def rank(comm: aiocomm.Communicator) -> None:
        group: Any = await comm.group([1, 0, 2]) if grouped else comm
        channel = comm.channel("x")
        for closing in (0, 1):
            for _ in range(repeats):
                await call(group, channel)
            await comm.barrier()
            if comm.rank < 2:  # the third one comes to it later
                kind = aiocomm.ClosedError if comm.rank == closing else aiocomm.TransferCancelled
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(give_up, partial(call, group, channel), kind)
                    await anyio.wait_all_tasks_blocked()
                    if comm.rank == closing:
                        channel.close()
            await comm.barrier()
            if comm.rank == 2:
                await give_up(partial(call, group, channel), aiocomm.TransferCancelled)
            if comm.rank != closing:  # what was not begun there when it was closed
                await give_up(partial(call, group, channel), aiocomm.TransferCancelled)
            else:
                channel = comm.channel("x", priority=priority)
            for _ in range(repeats + 2):
                await call(group, channel)

    async with world(3) as members:
        await all_call(members, rank)


async def test_calls_tried_on_a_closed_channel_end_on_all() -> None:
    """Also where the channel was not used before; whatever is tried, calls stay in step."""
    async with world(2) as (a, b):
        for tried in (1, 3):
            channels = [comm.channel("x") for comm in (a, b)]
            if tried > 1:
                await all_call([a, b], lambda comm: comm.barrier(channel=comm.channel("x")))
            channels[1].close()
            for _ in range(tried):
                kinds = (aiocomm.TransferCancelled, aiocomm.ClosedError)

                async def call(
                    comm: aiocomm.Communicator, kinds: Any = kinds, channels: Any = channels
                ) -> None:
                    await give_up(lambda: comm.barrier(channel=channels[comm.rank]), kinds[comm.rank])

                await all_call([a, b], call)
            x = [np.ones(3), np.ones(3)]
            await all_call([a, b], lambda comm, x=x: comm.all_reduce(x[comm.rank], channel=comm.channel("x")))
            assert (x[0] == 2).all()


async def test_each_close_of_a_channel_gives_up_a_call() -> None:
    """Also where nothing was called on it between two of them."""
    async with world(2) as (a, b):
        channels = [comm.channel("x") for comm in (a, b)]
        await all_call([a, b], lambda comm: comm.barrier(channel=channels[comm.rank]))
        for closes in (1, 2, 3):
            for _ in range(closes):
                a.channel("x").close()
            with anyio.fail_after(LIMIT_S):
                for _ in range(closes):
                    await give_up(lambda: b.barrier(channel=channels[1]), aiocomm.TransferCancelled)
                x = [np.ones(3), np.ones(3)]
                channels[0] = a.channel("x")
                await all_call(
                    [a, b], lambda comm, x=x: comm.all_reduce(x[comm.rank], channel=channels[comm.rank])
                )
            assert (x[1] == 2).all()


async def test_all_calls_that_another_waits_in_end() -> None:
    """It may wait in several at once; also the rank that closes it, and opens it again, is in step then."""
    async with world(2) as (a, b):
        channels = [comm.channel("x") for comm in (a, b)]
        await all_call([a, b], lambda comm: comm.barrier(channel=channels[comm.rank]))
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(give_up, lambda: b.barrier(channel=channels[1]), aiocomm.TransferCancelled)
            await anyio.wait_all_tasks_blocked()
            channels[0].close()
        x = [np.ones(3), np.ones(3)]
        await b.send(b"x", 0)  # what it has given up is told before
        await a.recv(bytearray(1), 1)
        channels[0] = a.channel("x")
        await all_call([a, b], lambda comm: comm.all_reduce(x[comm.rank], channel=channels[comm.rank]))
        assert (x[1] == 2).all()


async def test_closed_by_all_is_no_failure() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        for turn in range(20):
            channel = comm.channel("x", weight=1.0 + turn % 2)
            await comm.all_reduce(np.zeros(10), channel=channel)
            came = await comm.dispatch(np.ones((2, 4)), [[0], [1]], experts=3, channel=channel)
            await comm.combine(np.ones((len(came.rows), 4)), came, channel=channel)
            channel.close()

    async with world(3) as members:
        await all_call(members, rank)


async def test_messages_and_other_channels_do_not_notice() -> None:
    async with world(2) as (a, b):
        others = [comm.channel("y") for comm in (a, b)]
        x = [np.ones(3), np.ones(3)]

        async def call(comm: aiocomm.Communicator) -> None:
            await comm.barrier(channel=comm.channel("x"))
            await comm.all_reduce(x[comm.rank], channel=others[comm.rank])

        await all_call([a, b], call)
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: a.all_reduce(x[0], channel=others[0]))
                await anyio.wait_all_tasks_blocked()
                a.channel("x").close()
                await b.all_reduce(x[1], channel=others[1])
        assert (x[0] == 4).all()


async def test_memory_of_calls_is_not_kept_for_channels_that_are_closed() -> None:
    """Who has a channel for each request would keep it for every request there was."""

    def kept(scope: Any) -> bool:
        """Memory for the next call of any shape, or of one: where it lies depends on who came first."""
        return bool(scope._spare) or any(one._frames for one in scope.prepared.values() if one is not None)

    async def rank(comm: aiocomm.Communicator) -> None:
        channel = comm.channel("x")
        for _ in range(2):
            await comm.all_reduce(np.zeros(3000), channel=channel)
        (scope,) = [one for one in comm._scopes if one.channel is channel]
        assert kept(scope)
        await comm.barrier()
        call = partial(comm.all_reduce, np.zeros(3000), channel=channel)
        if comm.rank == 0:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up, call, aiocomm.ClosedError)
                await anyio.wait_all_tasks_blocked()
                channel.close()
        await comm.barrier()
        if comm.rank:
            await give_up(call, aiocomm.TransferCancelled)
            channel.close()
        assert not kept(scope)
        await comm.barrier()
        for _ in range(2):
            x = np.ones(3000)
            await comm.all_reduce(x, channel=comm.channel("x"))
            assert x[0] == 2

    async with world(2) as members:
        await all_call(members, rank)
