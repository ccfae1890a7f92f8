"""Iterators that are fed: for as long as somebody has them, and not any longer."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from harness import until

import aiocomm
from aiocomm._queues import Broadcast, Mailbox, Share

if TYPE_CHECKING:
    from aiocomm.types import Feed

pytestmark = pytest.mark.anyio


async def _leave(feed: Feed[int]) -> None:
    async for _ in feed:
        break


async def _all_of(feed: Feed[int], into: list[int]) -> None:
    into.extend([item async for item in feed])


async def test_one_that_was_left_is_not_fed() -> None:
    emptied: list[int] = []
    news: Broadcast[int] = Broadcast(lambda: emptied.append(1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_leave, news.subscribe())
        tasks.start_soon(_all_of, news.subscribe(), [])
        await until(lambda: len(news._waited_for) == 2)
        assert len(news) == 2
        news.publish(1)
        await until(lambda: len(news) == 1)  # by the one that took one item
        tasks.cancel_scope.cancel()
    gc.collect()  # the traceback of the one that was cancelled
    assert (len(news), emptied) == (0, [])
    news.publish(2)
    assert emptied == [1]
    assert not news._subscribers
    assert not news._waited_for


async def test_those_that_were_let_go_do_not_add_up_while_nothing_is_published() -> None:
    news: Broadcast[int] = Broadcast()
    kept = [news.subscribe() for _ in range(40)]
    for _ in range(1000):
        news.subscribe()
    assert len(news._subscribers) <= 2 * len(kept) + 1
    news.publish(7)
    assert [await anext(box) for box in kept] == [7] * 40


async def test_one_that_is_slow_keeps_everything() -> None:
    news: Broadcast[int] = Broadcast()
    slow, got = news.subscribe(), []
    for number in range(100):
        news.publish(number)
        gc.collect(0)
    news.close()
    async for number in slow:
        await anyio.lowlevel.checkpoint()
        got.append(number)
    assert got == list(range(100))


async def test_closing_one_leaves_the_others() -> None:
    emptied: list[int] = []
    news: Broadcast[int] = Broadcast(lambda: emptied.append(1))
    one, other = news.subscribe(), news.subscribe()
    await one.aclose()
    news.publish(1)
    assert (len(one), len(other), emptied) == (0, 1, [])
    await other.aclose()
    await other.aclose()
    assert emptied == [1]


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_task_that_waits_is_kept_by_what_it_waits_for() -> None:
    """asyncio keeps tasks weakly: `create_task` whose result nobody keeps."""
    news: Broadcast[int] = Broadcast()
    got: list[int] = []

    async def watch() -> None:
        async for number in news.subscribe():
            got.append(number)  # noqa: PERF401 -- as they come

    asyncio.create_task(watch())  # noqa: RUF006
    await until(lambda: len(news) == 1)
    for number in range(3):
        gc.collect()
        news.publish(number)
        await until(lambda number=number: got == list(range(number + 1)))  # type: ignore[misc]
    news.close()
    await until(lambda: not news._waited_for)


async def test_a_share_that_is_closed_leaves_its_items_to_the_others() -> None:
    box: Mailbox[int] = Mailbox()
    one, other = Share(box), Share(box)
    got: dict[str, list[int]] = {"one": [], "other": []}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_all_of, one, got["one"])
        tasks.start_soon(_all_of, other, got["other"])
        await until(lambda: len(box._waiters) == 2)
        await one.aclose()
        await until(lambda: len(box._waiters) == 1)
        for number in range(3):
            box.put(number)
        await until(lambda: not box)
        box.close()
    assert got == {"one": [], "other": [0, 1, 2]}
    with pytest.raises(StopAsyncIteration):
        await anext(one)


async def test_a_link_is_observed_while_somebody_looks() -> None:
    async with aiocomm.connect(size=1) as comm:
        link = comm.links["self"]

        async def one_message() -> None:
            sent = comm.send(b"x", 0)
            await comm.recv(bytearray(1), 0)
            await sent

        seen: list[str] = []

        async def watch() -> None:
            async for done in link.completions():
                seen.append(done.kind)  # noqa: PERF401 -- as they come

        submitted = link.submissions()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await until(lambda: len(link._completions) == 1)
            await one_message()
            await until(lambda: sorted(seen) == ["recv", "send"])
            tasks.cancel_scope.cancel()
        assert (await anext(submitted)).kind == "send"
        del submitted
        gc.collect()
        for _ in range(2):
            await one_message()
        for feeds in (link._submissions, link._completions):
            assert not feeds._subscribers
        assert len(seen) == 2
        events = comm.events()
        del events
        comm._on_event(aiocomm.LinkUp("self", 0))
        assert not comm._events._subscribers


async def test_closing_notifications_loses_none() -> None:
    async with aiocomm.connect(size=1) as comm, comm.register(bytearray(4)) as region:
        await comm.notifications().aclose()
        await comm.put(b"1234", comm.remote(region.handle), notify=b"n")
        assert (await anext(comm.notifications())).payload == b"n"
