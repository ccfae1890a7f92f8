"""Calls that make groups, or swap handles, given up before the other side has come: later ones meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import Pair

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["shm", "tcp"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with world(2, links=(request.param,)) as (a, b):
        yield a, b


async def together(*calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    async def run(index: int) -> None:
        results[index] = await calls[index]()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            for index in range(len(calls)):
                tasks.start_soon(run, index)
    return results


async def give_up(how: str, call: Callable[[float | None], Awaitable[Any]]) -> None:
    """Begin a call that nobody answers, and end it."""
    if how == "deadline":
        with pytest.raises(aiocomm.DeadlineExceeded):
            await call(0.02)
        return
    with anyio.move_on_after(0.02) as scope:
        await call(None)
    assert scope.cancelled_caught


async def news_has_come(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    """What `a` has sent before is at `b`."""
    await together(lambda: a.send(b"x", 1, tag=77), lambda: b.recv(bytearray(1), 0, tag=77))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_group(pair: Pair, how: str, times: int) -> None:
    a, b = pair
    for _ in range(times):
        await give_up(how, lambda limit: a.group([0, 1], deadline=limit))
    await news_has_come(a, b)

    async def make(comm: aiocomm.Communicator) -> aiocomm.Group:
        group = await comm.group([0, 1], deadline=LIMIT_S)
        await group.barrier(deadline=LIMIT_S)
        return group

    for _ in range(2):
        groups = await together(lambda: make(a), lambda: make(b))
        assert groups[0]._digest == groups[1]._digest


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_an_exchange(pair: Pair, how: str, times: int) -> None:
    """What was offered in a call that was given up is not what the next call finds."""
    a, b = pair
    old, new, theirs = np.zeros(8), np.zeros(8), np.zeros(8)
    first, second, other = a.register(old), a.register(new), b.register(theirs)
    for _ in range(times):
        await give_up(how, lambda limit: a.exchange(first, 1, deadline=limit))
    await news_has_come(a, b)
    await first.aclose()
    for value in (5.0, 6.0):
        found, remote = await together(
            lambda: a.exchange(second, 1, deadline=LIMIT_S), lambda: b.exchange(other, 0, deadline=LIMIT_S)
        )
        await b.put(np.full(8, value), remote)
        await a.put(np.full(8, -value), found)
        assert (new == value).all()
        assert (theirs == -value).all()
    assert not old.any()


async def test_an_exchange_that_the_other_waits_in(pair: Pair) -> None:
    """It goes on in the next one when it hears that."""
    a, b = pair
    first, second, other = a.register(np.zeros(1)), a.register(np.zeros(2)), b.register(np.zeros(3))
    for _ in range(2):
        await give_up("deadline", lambda limit: a.exchange(first, 1, deadline=limit))
    await news_has_come(a, b)
    await give_up("deadline", lambda limit: b.exchange(other, 0, deadline=limit))
    found, remote = await together(
        lambda: a.exchange(second, 1, deadline=LIMIT_S), lambda: b.exchange(other, 0, deadline=LIMIT_S)
    )
    assert (found.nbytes, remote.nbytes) == (24, 16)


async def test_nothing_is_left_of_exchanges(pair: Pair) -> None:
    """Of calls that both gave up, one after the other, and of such that met in the end."""
    a, b = pair
    ours, theirs = a.register(np.zeros(1)), b.register(np.zeros(2))
    for _ in range(3):
        await give_up("deadline", lambda limit: a.exchange(ours, 1, deadline=limit))
        await news_has_come(a, b)
        await give_up("cancel", lambda _: b.exchange(theirs, 0))
    await together(lambda: a.exchange(ours, 1), lambda: b.exchange(theirs, 0))
    await news_has_come(a, b)
    await together(lambda: b.send(b"x", 0, tag=77), lambda: a.recv(bytearray(1), 1, tag=77))
    assert [comm.statistics().unexpected_messages for comm in pair] == [0, 0]


@pytest.mark.parametrize("setting", ["AIOCOMM_EAGER_MAX", "AIOCOMM_UNEXPECTED_BYTES"])
@pytest.mark.parametrize("link", ["shm", "tcp"])
async def test_an_exchange_whose_messages_wait_at_their_sender(
    setting: str, link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent for a call that the other has given up is taken by nobody, and is not waited for."""
    monkeypatch.setenv(setting, "0")
    async with world(2, links=(link,)) as (a, b):
        ours, theirs = a.register(np.zeros(1)), b.register(np.zeros(2))
        await give_up("deadline", lambda limit: a.exchange(ours, 1, deadline=limit))
        await give_up("cancel", lambda _: a.exchange(ours, 1))
        for _ in range(2):
            found, remote = await together(
                lambda: a.exchange(ours, 1, deadline=LIMIT_S), lambda: b.exchange(theirs, 0, deadline=LIMIT_S)
            )
            assert (found.nbytes, remote.nbytes) == (16, 8)


async def test_exchanges_with_who_comes_and_goes() -> None:
    """Nothing is kept for a peer that has left, whether or not a call with it was under way."""
    async with world(2) as (a, b):
        ours, theirs = a.register(np.zeros(1)), b.register(np.zeros(2))
        await together(lambda: a.exchange(ours, 1), lambda: b.exchange(theirs, 0))
        events = a.events()

        async def waits() -> None:
            with pytest.raises(aiocomm.PeerLostError, match="exchange with rank 1"):
                await a.exchange(ours, 1)

        await together(waits, b.aclose)
        async for event in events:
            if isinstance(event, aiocomm.PeerLost):
                break
        with pytest.raises(aiocomm.PeerLostError):
            await a.exchange(ours, 1)
        assert not a._exchanges


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_shrink(how: str, times: int) -> None:
    """Who gave it up goes on with the same one, also when the others have ended it meanwhile."""
    async with world(3) as (a, b, c):
        groups = await together(*(lambda comm=comm: comm.group([0, 1, 2]) for comm in (a, b, c)))
        for _ in range(times):
            await give_up(how, lambda limit: groups[0].shrink(deadline=limit))
        await news_has_come(a, b)
        left: list[Any] = [None] * 3

        async def shrink(rank: int) -> None:
            left[rank] = await groups[rank].shrink(deadline=LIMIT_S)

        await together(lambda: shrink(1), lambda: shrink(2))
        await shrink(0)
        assert len({group._digest for group in left}) == 1
        await together(*(lambda group=group: group.barrier(deadline=LIMIT_S) for group in left))
        again = await together(*(lambda group=group: group.shrink(deadline=LIMIT_S) for group in groups))
        assert len({group._digest for group in [*again, *left]}) == 2


@pytest.mark.parametrize("call", ["barrier", "all_reduce", "dispatch", "split"])
async def test_the_first_call_of_a_group(pair: Pair, call: str) -> None:
    """It fails at who comes late, as any other call does; the next one meets."""
    a, b = pair
    groups = await together(lambda: a.group([0, 1]), lambda: b.group([0, 1]))
    channels = [comm.channel("other") for comm in pair]

    async def make(rank: int, limit: float) -> None:
        group, channel = groups[rank], channels[rank]
        if call == "barrier":
            await group.barrier(channel=channel, deadline=limit)
        elif call == "all_reduce":
            await group.all_reduce(np.ones(3), channel=channel, deadline=limit)
        elif call == "dispatch":
            await group.dispatch(
                np.ones((1, 4)), np.zeros((1, 1), int), experts=2, channel=channel, deadline=limit
            )
        else:
            await group.split(0, deadline=limit)

    with pytest.raises(aiocomm.DeadlineExceeded):
        await make(0, 0.02)
    await news_has_come(a, b)
    with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up"), anyio.fail_after(LIMIT_S):
        await make(1, LIMIT_S)
    await together(lambda: make(0, LIMIT_S), lambda: make(1, LIMIT_S))


async def test_calls_that_were_given_up_before(pair: Pair) -> None:
    a, b = pair
    groups = await together(lambda: a.group([0, 1]), lambda: b.group([0, 1]))
    for _ in range(400):
        with pytest.raises(aiocomm.DeadlineExceeded):
            await groups[0].barrier(deadline=0.0)
    await news_has_come(a, b)
    for _ in range(400):
        with pytest.raises(aiocomm.TransferCancelled):
            await groups[1].barrier(deadline=LIMIT_S)
    await together(lambda: groups[0].barrier(), lambda: groups[1].barrier())


async def test_splits_after_one_that_was_given_up(pair: Pair) -> None:
    a, b = pair
    groups = await together(lambda: a.group([0, 1]), lambda: b.group([0, 1]))
    await give_up("deadline", lambda limit: groups[0].split(0, deadline=limit))
    await news_has_come(a, b)
    with pytest.raises(aiocomm.TransferCancelled):
        await groups[1].split(0, deadline=LIMIT_S)
    halves = await together(lambda: groups[0].split(0), lambda: groups[1].split(0))
    assert halves[0]._digest == halves[1]._digest
    await together(lambda: halves[0].barrier(), lambda: halves[1].barrier())
