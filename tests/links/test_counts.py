"""What is counted, on every link: the two ends agree, and what was submitted has ended."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from harness import LIMIT_S, messages_pass, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from conftest import Pair, Variant

    from aiocomm.statistics import LinkStatistics

pytestmark = pytest.mark.anyio
SIZES = [0, 1000, 100_000, 3 << 20]


def counted(comm: aiocomm.Communicator, link: str) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Messages and bytes by path, bytes sent, bytes received."""
    now = comm.links[link].statistics()
    paths = [{path: n for path, n in by.items() if n} for by in (now.messages_by_path, now.bytes_by_path)]
    return paths[0], paths[1], now.bytes_sent, now.bytes_received


def under_way(link: LinkStatistics) -> int:
    return link.submitted - link.completed - link.failed - link.cancelled


async def nothing_is_under_way(*comms: aiocomm.Communicator) -> None:
    with anyio.fail_after(LIMIT_S):
        for comm in comms:
            await until(lambda comm=comm: comm.statistics().in_flight == 0)
            assert {name: under_way(link) for name, link in comm.statistics().links.items()} == dict.fromkeys(
                comm.links, 0
            )


async def message(a: aiocomm.Communicator, b: aiocomm.Communicator, variant: Variant, nbytes: int) -> None:
    receiving = b.recv(variant.array(nbytes), 0)
    await a.send(variant.random(nbytes), 1)
    await receiving


async def met(a: aiocomm.Communicator, b: aiocomm.Communicator, variant: Variant, nbytes: int) -> None:
    sending = a.send(variant.random(nbytes), 1, synchronous=True)
    await b.recv_array(0)
    await sending


async def put(a: aiocomm.Communicator, b: aiocomm.Communicator, variant: Variant, nbytes: int) -> None:
    async with b.register(variant.array(nbytes)) as region:
        await a.put(variant.random(nbytes), a.remote(region.handle))


async def get(b: aiocomm.Communicator, a: aiocomm.Communicator, variant: Variant, nbytes: int) -> None:
    async with a.register(variant.random(nbytes)) as region:
        await b.get(b.remote(region.handle), variant.array(nbytes))


OPERATIONS: dict[str, Callable[..., Awaitable[None]]] = {"send": message, "met": met, "put": put, "get": get}


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kind", OPERATIONS)
async def test_both_ends_count_the_same(pair: Pair, variant: Variant, kind: str, nbytes: int) -> None:
    a, b = pair if kind != "get" else pair[::-1]
    await OPERATIONS[kind](a, b, variant, nbytes)
    source, sink = pair  # of the bytes
    if variant.link == "rdma" and kind in ("put", "get"):  # the other end does nothing
        bytes_of = [sum(counted(comm, "rdma")[2:]) for comm in (a, b)]
        assert bytes_of == [nbytes, 0]
        return
    with anyio.fail_after(LIMIT_S):
        for comm in pair:
            await until(lambda comm=comm: sum(counted(comm, variant.link)[0].values()) == 1)
    messages, by_path, sent, received = counted(source, variant.link)
    assert counted(sink, variant.link) == (messages, by_path, 0, nbytes)
    assert (sum(by_path.values()), sent, received) == (nbytes, nbytes, 0)
    await nothing_is_under_way(*pair)


@pytest.mark.parametrize("nbytes", [3000, 40_000])
@pytest.mark.parametrize("kind", ["put", "get"])
async def test_both_ends_count_the_same_of_pages(
    pair: Pair, variant: Variant, kind: str, nbytes: int
) -> None:
    if variant.link == "rdma":
        pytest.skip("the other end does nothing")
    a, b = pair if kind == "put" else pair[::-1]
    ours, theirs = (aiocomm.Pages(variant.array((200, nbytes))) for _ in range(2))
    give, take = np.random.default_rng(0).permutation(200).reshape(2, 100)
    async with await b.lease_pages(theirs) as lease:
        remote = a.remote_pages(lease.handle)
        if kind == "put":
            await a.put_pages(ours, give, remote, take)
        else:
            await a.get_pages(remote, take, ours, give)
    await messages_pass(*pair)
    source, sink = (comm.links[variant.link].statistics() for comm in pair)
    assert source.messages_by_path == sink.messages_by_path
    assert source.bytes_by_path == sink.bytes_by_path
    assert source.bytes_sent == sink.bytes_received >= 100 * nbytes  # and which they are
    await nothing_is_under_way(*pair)


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kind", OPERATIONS)
async def test_of_messages_to_itself_both_ends_are_counted(kind: str, nbytes: int) -> None:
    async with world(1) as (comm,):
        data, into = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        if kind in ("send", "met"):
            sending = comm.send(data, 0, synchronous=kind == "met")
            await comm.recv(into, 0)
            await sending
        else:
            async with comm.register(data if kind == "get" else into) as region:
                remote = comm.remote(region.handle)
                await (comm.put(data, remote) if kind == "put" else comm.get(remote, into))
        await until(lambda: sum(counted(comm, "self")[0].values()) == 2)
        messages, _, sent, received = counted(comm, "self")
        assert (len(messages), sent, received) == (1, nbytes, nbytes)
        await nothing_is_under_way(comm)


async def test_receives_that_end_without_a_message_are_their_peers_link_s(
    pair: Pair, variant: Variant
) -> None:
    a, b = pair
    submissions, completions = (b.links[variant.link].submissions(), b.links[variant.link].completions())
    for source in (0, aiocomm.ANY_SOURCE):
        before = b.links[variant.link].statistics()
        receiving = b.recv(bytearray(4), source, tag=5)
        receiving.cancel()
        await until(receiving.done)
        with pytest.raises(aiocomm.DeadlineExceeded):
            await b.recv(bytearray(4), source, tag=5, deadline=0.001)
        after = b.links[variant.link].statistics()
        assert after.submitted - before.submitted == 2
        assert (after.cancelled - before.cancelled, after.failed - before.failed) == (1, 1)
        for _ in range(2):
            assert (await anext(submissions)).op == (await anext(completions)).op
    await nothing_is_under_way(a, b)


async def test_a_receive_is_under_way_once_its_message_comes(pair: Pair, variant: Variant) -> None:
    a, b = pair
    waiting = b.recv(bytearray(4), 0, tag=5)
    await messages_pass(a, b)
    assert under_way(b.links[variant.link].statistics()) == 0
    assert b.statistics().posted_receives == 1
    await a.send(b"word", 1, tag=5)
    await waiting
    assert b.links[variant.link].statistics().submitted == 2
    await nothing_is_under_way(a, b)


@pytest.mark.parametrize("nbytes", SIZES[1:])
async def test_messages_that_did_not_fit_are_counted_as_failed(
    pair: Pair, variant: Variant, nbytes: int
) -> None:
    a, b = pair
    sending = a.send(variant.random(nbytes), 1, synchronous=True, tag=1)
    with pytest.raises(aiocomm.TruncationError):
        await b.recv(variant.array(10), 0, tag=1)
    with pytest.raises(aiocomm.TruncationError):
        await sending
    sent, received = (comm.links[variant.link].statistics() for comm in pair)
    for counts in (sent, received):
        assert not any(counts.messages_by_path.values())
        assert counts.failed == 1
    in_its_frame = nbytes if nbytes == 1000 else 0
    assert sent.bytes_sent == received.bytes_received == in_its_frame
    await nothing_is_under_way(a, b)


async def test_calls_that_were_refused_are_counted(pair: Pair, variant: Variant) -> None:
    a, b = pair
    with contextlib.suppress(aiocomm.WouldBlock):
        for _ in range(100_000):
            a.send_nowait(variant.array(4000), 1)
    sent = a.links[variant.link].statistics()
    assert (sent.would_block, sent.failed) == (1, 1)
    for _ in range(sent.completed):
        await b.recv(variant.array(4000), 0)
    await nothing_is_under_way(a, b)


async def test_what_never_had_a_link_ends_on_the_first() -> None:
    async with world(2, links=("tcp",)) as (a, b):  # not connected
        with pytest.raises(aiocomm.WouldBlock):
            a.send_nowait(b"x", 1)
        a.send(b"x", 1).cancel()
        await b.aclose()
        with pytest.raises(aiocomm.PeerLostError):
            await a.recv(bytearray(1), 1)
        counts = a.links["tcp"].statistics()
        assert (counts.submitted, counts.would_block, counts.failed, counts.cancelled) == (3, 1, 2, 1)
        assert a.links["self"].statistics().submitted == 0


async def test_accesses_of_peers_are_their_operations(pair: Pair, variant: Variant) -> None:
    a, b = pair
    before = b.links[variant.link].statistics()
    for operation in (put, get):
        await operation(a, b, variant, 100_000)
    await messages_pass(a, b)
    after = b.links[variant.link].statistics()
    assert after.completed - before.completed == 1
    assert (after.queued_s - before.queued_s).total == 1
