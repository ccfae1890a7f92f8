"""Conformance of links: two-sided messages."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import anyio.lowlevel
import numpy as np
import pytest
from harness import until, world

import aiocomm
from aiocomm.errors import TruncationError

if TYPE_CHECKING:
    from conftest import Pair
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

EAGER = 64 << 10
SIZES = [0, 1, 63, 64, 65, 4096, EAGER - 1, EAGER, EAGER + 1, 1 << 20, (5 << 20) + 3]


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("first", ["send", "recv"])
async def test_a_message_arrives_whole(pair: Pair, variant: Variant, nbytes: int, first: str) -> None:
    a, b = pair
    sent, got = variant.random(nbytes), variant.array(nbytes)
    if first == "send":
        sending, receiving = a.send(sent, 1, tag=5), b.recv(got, 0, tag=5)
    else:
        receiving, sending = b.recv(got, 0, tag=5), a.send(sent, 1, tag=5)
    assert await receiving == (0, 5, nbytes)
    assert await sending is None
    np.testing.assert_array_equal(got, sent)


async def test_a_large_message_takes_the_path_that_the_variant_has(pair: Pair, variant: Variant) -> None:
    a, b = pair
    sent, got = variant.random(3 << 20), variant.array(3 << 20)
    sending = a.send(sent, 1)
    await until(lambda: b.statistics().unexpected_messages)  # else an offer of the receive may be sooner
    await b.recv(got, 0)
    await sending
    ways = {"shm": "cma", "shm-stream": "stream", "shm-mapped": "mapped", "rdma": "read"}
    expected = ways.get(variant.way, "stream")
    for comm in pair if variant.link != "rdma" else (b,):
        paths = comm.links[variant.link].statistics().messages_by_path
        assert {path for path, count in paths.items() if count} == {expected}


async def test_both_directions_at_once(pair: Pair, variant: Variant) -> None:
    a, b = pair
    out = [variant.random(4 << 20, seed) for seed in range(4)]
    into = [variant.array(4 << 20) for _ in range(4)]
    running = [a.send(out[0], 1), a.send(out[1], 1), b.send(out[2], 0), b.send(out[3], 0)]
    running += [b.recv(into[0], 0), b.recv(into[1], 0), a.recv(into[2], 1), a.recv(into[3], 1)]
    for transfer in running:
        await transfer
    for sent, got in zip(out, into, strict=True):
        np.testing.assert_array_equal(got, sent)


@pytest.mark.parametrize("dtype", ["u1", "i8", "f4", "c16", "?", ">i4"])
async def test_recv_array_has_the_senders_shape_and_dtype(pair: Pair, variant: Variant, dtype: str) -> None:
    a, b = pair
    for shape in [(), (0,), (3,), (2, 3, 4), (1,) * 8, (700, 700)]:
        sent = variant.array(shape, dtype)
        sent[...] = np.random.default_rng(1).integers(0, 2, shape)
        sending = a.send(sent, 1, tag=2)
        transfer = b.recv_array(0, tag=2)
        got = await transfer
        await sending
        assert (got.shape, got.dtype) == (sent.shape, sent.dtype)
        np.testing.assert_array_equal(got, sent)
        assert transfer.status == (0, 2, sent.nbytes)


async def test_buffers_that_are_no_arrays(pair: Pair, variant: Variant) -> None:
    a, b = pair
    into = bytearray(3)
    sending = a.send(b"abc", 1)
    await b.recv(into, 0)
    await sending
    sending = a.send(memoryview(b"0abc0")[1:4], 1)
    assert bytes(await b.recv_array(0)) == b"abc"
    await sending
    assert into == b"abc"


async def test_messages_of_all_sizes_keep_their_order(pair: Pair, variant: Variant) -> None:
    a, b = pair
    sizes = [random.Random(4).choice([1, 100, EAGER, EAGER + 1, 300_000]) for _ in range(60)]
    sent = [variant.random(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    sending = [a.send(array, 1, tag=1) for array in sent]
    for array in sent:
        got = variant.array(300_000)
        status = await b.recv(got, 0, tag=1)
        assert status.nbytes == array.nbytes
        np.testing.assert_array_equal(got[: array.nbytes], array)
    for transfer in sending:
        await transfer


async def test_wildcards_take_the_oldest_that_fits(pair: Pair, variant: Variant) -> None:
    a, b = pair
    sending = [a.send(np.array([tag], "i8"), 1, tag=tag % 3) for tag in range(9)]
    sending += [b.send(np.array([9], "i8"), 1, tag=7)]
    got = np.zeros(1, "i8")
    order = []
    for source, tag in [(0, 2), (0, aiocomm.ANY_TAG), (aiocomm.ANY_SOURCE, 0), (1, aiocomm.ANY_TAG), (0, 2)]:
        await b.recv(got, source, tag=tag)
        order.append(int(got[0]))
    for _ in range(5):
        await b.recv(got, tag=aiocomm.ANY_TAG)
        order.append(int(got[0]))
    assert order == [2, 0, 3, 9, 5, 1, 4, 6, 7, 8]
    for transfer in sending:
        await transfer


async def test_receives_posted_in_the_other_order_than_the_sends(pair: Pair, variant: Variant) -> None:
    """More than the unexpected bound holds, and more than a ring: the payloads wait at the sender."""
    a, b = pair
    count, nbytes = 1000, 40_000
    sent = variant.random(nbytes * count)
    sending = [a.send(sent[i * nbytes : (i + 1) * nbytes], 1, tag=i) for i in range(count)]
    got = variant.array(nbytes * count)
    for tag in reversed(range(count)):
        await b.recv(got[tag * nbytes : (tag + 1) * nbytes], 0, tag=tag)
        if tag == count - 1:
            assert b.statistics().unexpected_bytes <= 16 << 20
    for transfer in sending:
        await transfer
    np.testing.assert_array_equal(got, sent)
    assert b.statistics().unexpected_messages == 0


async def test_thousands_in_flight(pair: Pair, variant: Variant) -> None:
    a, b = pair
    into = np.zeros(10_000, "i8")
    receiving = [b.recv(into[i : i + 1], 0, tag=i) for i in range(10_000)]
    assert b.statistics().posted_receives == 10_000
    sent = np.arange(10_000)
    sending = [a.send(sent[i : i + 1], 1, tag=i) for i in range(10_000)]
    for transfer in [*receiving, *sending]:
        await transfer
    np.testing.assert_array_equal(into, sent)
    assert b.statistics().posted_receives == b.statistics().in_flight == 0


@pytest.mark.parametrize("nbytes", [100, 1 << 20])
@pytest.mark.parametrize("first", ["send", "recv"])
async def test_truncation_fails_that_transfer_on_both_sides(
    pair: Pair, variant: Variant, nbytes: int, first: str
) -> None:
    a, b = pair
    sent, small = variant.random(nbytes), variant.array(nbytes - 1)
    if first == "send":
        sending, receiving = a.send(sent, 1, synchronous=True), b.recv(small, 0)
    else:
        receiving, sending = b.recv(small, 0), a.send(sent, 1, synchronous=True)
    with pytest.raises(TruncationError):
        await receiving
    with pytest.raises(TruncationError) as caught:
        await sending
    assert caught.value.peer == 1
    assert not small.any()
    got = variant.array(nbytes)
    again = a.send(sent, 1)
    await b.recv(got, 0)
    await again
    np.testing.assert_array_equal(got, sent)


async def test_truncation_of_a_buffered_message_is_told_as_an_event(pair: Pair, variant: Variant) -> None:
    a, b = pair
    events = a.events()
    await a.send(b"four", 1, tag=9)
    with pytest.raises(aiocomm.PeerError):
        await b.recv(bytearray(3), 0, tag=9)
    async for event in events:
        if isinstance(event, aiocomm.Undelivered):
            assert (event.rank, event.tag, event.reason) == (1, 9, "truncated")
            break


@pytest.mark.parametrize("nbytes", [100, 1 << 20])
async def test_a_synchronous_send_ends_when_it_is_received(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    sending = a.send(variant.random(nbytes), 1, synchronous=True)
    await a.send(b"x", 1, tag=1)
    await b.recv(bytearray(1), 0, tag=1)
    assert not sending.done()
    got = variant.array(nbytes)
    await b.recv(got, 0, tag=0)
    await sending


async def test_channels_are_scopes_of_their_own(pair: Pair, variant: Variant) -> None:
    a, b = pair
    channels = [
        (a.channel(name, priority=priority), b.channel(name, priority=priority))
        for name, priority in [("one", aiocomm.Priority.LOW), ("two", aiocomm.Priority.URGENT)]
    ]
    sent = [variant.random(2 << 20, seed) for seed in range(3)]
    got = [variant.array(2 << 20) for _ in range(3)]
    sending = [a.send(sent[0], 1), channels[0][0].send(sent[1], 1), channels[1][0].send(sent[2], 1)]
    receiving = [channels[1][1].recv(got[2], 0), channels[0][1].recv(got[1], 0), b.recv(got[0], 0)]
    for transfer in [*receiving, *sending]:
        await transfer
    for one, other in zip(sent, got, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_a_closed_channel_ends_its_own_operations_only(pair: Pair, variant: Variant) -> None:
    a, b = pair
    channel = b.channel("closing")
    doomed, staying = channel.recv(variant.array(10), 0), b.recv(variant.array(10), 0)
    channel.close()
    with pytest.raises(aiocomm.AiocommError, match="closed"):
        await doomed
    with pytest.raises(aiocomm.AiocommError):
        await channel.recv(variant.array(10), 0)
    await a.send(variant.random(10), 1)
    await staying


async def test_submissions_and_completions_are_iterators(pair: Pair, variant: Variant) -> None:
    a, b = pair
    submissions, completions = a.links[variant.link].submissions(), a.links[variant.link].completions()
    channel = a.channel("seen")
    sending = channel.send(variant.random(1 << 20), 1, tag=3)
    await b.channel("seen").recv(variant.array(1 << 20), 0, tag=3)
    await sending
    async for submission in submissions:
        assert (submission.kind, submission.peer, submission.channel) == ("send", 1, "seen")
        assert submission.nbytes == 1 << 20
        break
    async for completion in completions:
        assert (completion.op, completion.kind, completion.ok) == (submission.op, "send", True)
        assert completion.nbytes == 1 << 20
        assert completion.queued_s >= 0
        assert completion.moved_s >= 0
        break
    await submissions.aclose()  # type: ignore[attr-defined]
    await completions.aclose()  # type: ignore[attr-defined]


async def test_statistics_count_messages_and_bytes(pair: Pair, variant: Variant) -> None:
    a, b = pair
    for nbytes in (100, 2 << 20):
        sending = a.send(variant.random(nbytes), 1)
        await b.recv(variant.array(nbytes), 0)
        await sending
    sender, receiver = a.links[variant.link].statistics(), b.links[variant.link].statistics()
    assert sender.submitted == 2
    assert sender.completed == 2
    assert sum(receiver.messages_by_path.values()) == 2
    assert sum(receiver.bytes_by_path.values()) == 100 + (2 << 20)
    assert sender.peers == receiver.peers == 1
    assert sender.queued == sender.in_flight_bytes == receiver.in_flight_bytes == 0


async def test_send_nowait_takes_or_refuses(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    bound, nbytes = 1 << 20, 4000
    monkeypatch.setenv("AIOCOMM_UNEXPECTED_BYTES", str(bound))
    payload = variant.random(nbytes)
    async with world(2, links=(variant.link,), warmup=True) as (a, b):
        await a.send(b"x", 1, tag=5000)  # the link's own greeting may still be on its way
        accepted, refused = [], None
        for tag in range(bound // nbytes + 1):
            try:
                accepted.append(a.send_nowait(payload, 1, tag=tag))
            except aiocomm.WouldBlock as error:
                refused = error
                break
        assert accepted
        assert refused is not None, "a peer that reads nothing must be felt"
        assert a.links[variant.link].statistics().would_block == 1
        for tag in range(len(accepted)):
            got = variant.array(nbytes)
            await b.recv(got, 0, tag=tag)
            np.testing.assert_array_equal(got, payload)
        for transfer in accepted:
            await transfer


async def test_send_nowait_takes_no_more_large_ones_than_may_be_under_way(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOCOMM_QUEUE_DEPTH", "16")
    monkeypatch.setenv("AIOCOMM_EAGER_MAX", "1000")
    payload, got = variant.random(4000), variant.array(4000)
    async with world(2, links=(variant.link,), warmup=True) as (a, b):

        async def taken(tag: int) -> aiocomm.Transfer[None]:
            """Links refuse one now and then for reasons of their own."""
            while True:
                with contextlib.suppress(aiocomm.WouldBlock):
                    return a.send_nowait(payload, 1, tag=tag)
                await anyio.lowlevel.checkpoint()

        accepted = [await taken(tag) for tag in range(16)]
        for _ in range(2):
            with pytest.raises(aiocomm.WouldBlock):
                a.send_nowait(payload, 1, tag=16)
        await b.recv(got, 0, tag=0)
        await accepted[0]
        accepted.append(await taken(16))
        waiting = a.send(payload, 1, tag=17)  # which `send` is for
        for tag in range(1, 18):
            await b.recv(got, 0, tag=tag)
            np.testing.assert_array_equal(got, payload)
        for transfer in (*accepted, waiting):
            await transfer


@pytest.mark.parametrize(
    ("eager", "chunk"), [("64KiB", "4KiB"), ("2MiB", "256KiB"), ("64KiB", "1GiB")], ids=lambda size: size
)
async def test_any_sizes_that_settings_take_go_together(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, eager: str, chunk: str
) -> None:
    monkeypatch.setenv("AIOCOMM_EAGER_MAX", eager)
    monkeypatch.setenv("AIOCOMM_CHUNK_MAX", chunk)
    sent = [variant.random(size, size) for size in (100, 60_000, 1_900_000, 3_000_000) * 5]
    async with world(2, links=(variant.link,)) as (a, b):
        sending = [a.send(data, 1) for data in sent]
        for data in sent:
            got = variant.array(data.nbytes)
            await b.recv(got, 0)
            np.testing.assert_array_equal(got, data)
        for transfer in sending:
            await transfer


async def test_many_messages_leave_nothing_behind(pair: Pair, variant: Variant) -> None:
    a, b = pair
    got = variant.array(64)
    payload = variant.random(64)
    for _ in range(3000):
        sending = a.send(payload, 1)
        await b.recv(got, 0)
    await sending  # the end of the last one may be told after its message has come
    for comm in pair:
        statistics = comm.statistics()
        assert statistics.in_flight == statistics.posted_receives == statistics.unexpected_messages == 0


@pytest.mark.parametrize("seed", range(3))
async def test_random_traffic(pair: Pair, variant: Variant, seed: int) -> None:
    """Sizes, tags, directions and orders drawn at random; every byte is checked."""
    dice = random.Random(seed)
    running = []
    checks = []
    for number in range(120):
        source = dice.randrange(2)
        nbytes = dice.choice([0, 1, 1000, EAGER, EAGER + 1, 200_000, 1_500_000])
        sent, got = variant.random(nbytes, number), variant.array(nbytes)
        calls = [
            lambda s=source, x=sent, t=number: pair[s].send(x, 1 - s, tag=t, synchronous=dice.random() < 0.2),
            lambda s=source, x=got, t=number: pair[1 - s].recv(x, dice.choice([s, -1]), tag=t),
        ]
        dice.shuffle(calls)
        running += [call() for call in calls]
        checks.append((sent, got))
        if dice.random() < 0.3:
            await running[dice.randrange(len(running))]
    for transfer in running:
        await transfer
    for sent, got in checks:
        np.testing.assert_array_equal(sent, got)
