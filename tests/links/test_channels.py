"""Conformance of links: channels that are opened, closed and opened again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from harness import messages_pass, until, world

import aiocomm
from aiocomm import Priority

if TYPE_CHECKING:
    from conftest import Pair
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

LARGE = 4 << 20
REMEMBERED = 256  # by name


def known(comm: aiocomm.Communicator, link: str) -> tuple[int, int, int]:
    """Channels and flows that the native side knows, and messages that it keeps."""
    gauges = comm._engine.gauges(link)
    return int(gauges["channels"]), int(gauges["flows"]), int(gauges["unexpected_messages"])


async def passes(pair: Pair, variant: Variant, name: str, priority: Priority, nbytes: int = LARGE) -> None:
    """A message on a channel that both ends open for it and close."""
    a, b = (comm.channel(name, priority=priority) for comm in pair)
    sent, out = variant.ones(nbytes), variant.array(nbytes)
    receive = b.recv(out, 0, tag=1)
    await a.send(sent, 1, tag=1)
    assert (await receive).nbytes == nbytes
    assert out.all()
    a.close()
    b.close()


async def test_reopened_with_another_priority(pair: Pair, variant: Variant) -> None:
    for priority in (Priority.NORMAL, Priority.HIGH, Priority.LOW, Priority.URGENT, Priority.NORMAL):
        await passes(pair, variant, "again", priority)


async def test_reopened_with_another_priority_towards_another_rank(variant: Variant) -> None:
    async with world(3, links=(variant.link,), warmup=True) as (a, b, c):
        sent, out = variant.ones(LARGE), variant.array(LARGE)
        for peer, priority in ((b, Priority.NORMAL), (c, Priority.HIGH), (b, Priority.LOW)):
            channel = a.channel("again", priority=priority)
            receive = peer.channel("again", priority=priority).recv(out, 0)
            await channel.send(sent, peer.rank)
            await receive
            channel.close()
            peer.channel("again", priority=priority).close()
        await messages_pass(a, b)


async def test_reopened_while_what_was_sent_before_still_ends(pair: Pair, variant: Variant) -> None:
    """A class belongs to one opening: chunks of the one before leave in theirs."""
    a, b = pair
    for turn in range(12):
        old, new = (Priority.NORMAL, Priority.HIGH) if turn % 2 else (Priority.HIGH, Priority.LOW)
        ends = [comm.channel("again", priority=old) for comm in pair]
        sent = [ends[0].send(variant.ones(LARGE), 1, tag=turn) for _ in range(3)]
        come = [ends[1].recv(variant.array(LARGE), 0, tag=turn) for _ in range(3)]
        await anyio.lowlevel.checkpoint()
        for end in ends:
            end.close()
        ends = [comm.channel("again", priority=new) for comm in pair]
        out = variant.array(LARGE)
        receive = ends[1].recv(out, 0, tag=100 + turn)
        await ends[0].send(variant.ones(LARGE), 1, tag=100 + turn)
        await receive
        assert out.all()
        for transfer in (*sent, *come):
            with contextlib.suppress(aiocomm.AiocommError):
                await transfer
        for end in ends:
            end.close()
    await messages_pass(a, b)


async def test_bulk_is_as_before_once_an_urgent_channel_is_closed(pair: Pair, variant: Variant) -> None:
    a, _ = pair
    link = variant.link

    def limits() -> tuple[float, float]:
        gauges = a._engine.gauges(link)
        return gauges["window_bytes"], gauges["chunk_bytes"]

    await passes(pair, variant, "bulk", Priority.NORMAL)
    before = limits()
    urgent = a.channel("urgent", priority=Priority.HIGH)
    assert limits() < before
    await passes(pair, variant, "bulk", Priority.NORMAL)
    assert limits() < before
    urgent.close()
    assert limits() == before
    await passes(pair, variant, "urgent", Priority.HIGH)  # with flows of its own
    assert limits() == before


async def test_closed_channels_are_forgotten(pair: Pair, variant: Variant) -> None:
    """But not what was counted of them."""
    link, nbytes = variant.link, 256 << 10
    await passes(pair, variant, "first", Priority.NORMAL)
    before = [known(comm, link) for comm in pair]

    def scheduled() -> dict[str, int]:
        bytes_by_name: dict[str, int] = {}
        for comm in pair:
            for name, nbytes in comm.statistics().links[link].scheduled_bytes_by_channel.items():
                bytes_by_name[name] = bytes_by_name.get(name, 0) + nbytes
        return bytes_by_name

    for number in range(REMEMBERED + 44):
        await passes(pair, variant, f"request {number}", Priority.HIGH, nbytes)
    await until(lambda: [known(comm, link) for comm in pair] == before)
    counted = scheduled()
    assert len(counted) == REMEMBERED + 1
    assert "request 0" not in counted
    assert counted["\0closed"] == LARGE + 44 * nbytes
    assert counted[f"request {REMEMBERED + 43}"] == nbytes
    assert [len(comm._channels) for comm in pair] == [0, 0]


async def test_counts_of_a_name_go_on_when_it_is_opened_again(pair: Pair, variant: Variant) -> None:
    def scheduled() -> int:
        return sum(
            comm.statistics().links[variant.link].scheduled_bytes_by_channel.get("again", 0) for comm in pair
        )

    counts = []
    for _ in range(3):
        await passes(pair, variant, "again", Priority.NORMAL)
        counts.append(scheduled())
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]


async def test_a_transfer_keeps_the_name_of_its_channel(pair: Pair, variant: Variant) -> None:
    a, b = (comm.channel("gone") for comm in pair)
    done = a.send(np.ones(8), 1)
    late = b.recv(np.ones(8), 0, tag=5)
    a.close()
    b.close()
    with pytest.raises(aiocomm.ClosedError, match="'gone'"):
        await late
    for comm in pair:
        comm.channel("another")
    assert (done.channel, late.channel) == ("gone", "gone")


async def test_what_came_before_a_channel_was_closed_waits_for_the_next(pair: Pair) -> None:
    a, b = pair
    b.channel("again").close()
    await a.channel("again").send(np.arange(8), 1)
    out = np.zeros(8, int)
    await b.channel("again", weight=2.0).recv(out, 0)
    assert out.tolist() == list(range(8))


async def test_what_was_not_delivered_on_a_closed_channel_is_named(pair: Pair) -> None:
    a, b = pair
    events = a.events()
    channel = a.channel("short")
    await channel.send(np.zeros(64, np.uint8), 1)
    channel.close()
    with pytest.raises(aiocomm.TruncationError):
        await b.channel("short").recv(np.zeros(8, np.uint8), 0)
    async for event in events:
        if isinstance(event, aiocomm.Undelivered):
            assert event.channel == "short"
            break
