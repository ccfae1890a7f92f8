"""Conformance of links: cancels and deadlines in every state; buffers are poisoned afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import until

import aiocomm
from aiocomm.errors import TransferCancelled

if TYPE_CHECKING:
    from conftest import Pair
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

LARGE = 24 << 20
LONG = LARGE if "AIOCOMM_RDMA_GUEST" in os.environ else 4 * LARGE  # an emulated device takes seconds for it
POISON = 0xAB
# asyncio's own; trio's can only come from a scope
OWN_CANCEL = (asyncio.CancelledError, TransferCancelled)


async def settle(pair: Pair) -> None:
    """Returns once everything that was on its way between the two has been handled."""
    token = bytearray(1)
    for one, other in [(0, 1), (1, 0)]:
        for nbytes in (1, 1 << 20):
            sending = pair[one].send(bytes(nbytes), other, tag=991)
            receiving = pair[other].recv(token if nbytes == 1 else bytearray(nbytes), one, tag=991)
            await receiving
            await sending


async def assert_works(pair: Pair, variant: Variant, nbytes: int = 1 << 20) -> None:
    a, b = pair
    sent, got = variant.random(nbytes, 77), variant.array(nbytes)
    sending = a.send(sent, 1, tag=992)
    await b.recv(got, 0, tag=992)
    await sending
    np.testing.assert_array_equal(got, sent)
    for comm in pair:
        assert comm.statistics().in_flight == 0


@pytest.mark.parametrize("nbytes", [100, LARGE])
async def test_a_posted_receive(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    buffer = variant.array(nbytes)
    receiving = b.recv(buffer, 0)
    assert receiving.cancel()
    with pytest.raises(OWN_CANCEL):
        await receiving
    assert receiving.cancelled()
    buffer.fill(POISON)
    sent, got = variant.random(nbytes), variant.array(nbytes)
    sending = a.send(sent, 1)
    await b.recv(got, 0)  # the message is not lost to the cancelled one
    await sending
    np.testing.assert_array_equal(got, sent)
    assert (buffer == POISON).all()
    await assert_works(pair, variant)


async def test_a_receive_under_way(pair: Pair, variant: Variant) -> None:
    a, b = pair
    buffer = variant.array(LARGE)
    sending = a.send(variant.random(LARGE), 1)
    await until(lambda: b.statistics().unexpected_messages)
    receiving = b.recv(buffer, 0)
    if not receiving.cancel():
        await receiving
        await sending
        return
    with pytest.raises(OWN_CANCEL):
        await receiving
    buffer.fill(POISON)
    with pytest.raises(TransferCancelled) as caught:
        await sending
    assert caught.value.peer == 1
    await settle(pair)
    assert (buffer == POISON).all()
    await assert_works(pair, variant)


async def test_a_receive_that_has_moved_some_bytes(pair: Pair, variant: Variant) -> None:
    a, b = pair
    buffer = variant.array(LARGE * 4)
    sending = a.send(variant.ones(LARGE * 4), 1)
    receiving = b.recv(buffer, 0)
    await until(lambda: buffer[0] or receiving.done())
    if receiving.cancel():
        with pytest.raises(OWN_CANCEL):
            await receiving
        buffer.fill(POISON)
        # A device may have written all of it, and its sender heard so, before the receiver's word came.
        by_device = contextlib.suppress(TransferCancelled) if variant.link == "rdma" else None
        with by_device or pytest.raises(TransferCancelled):
            await sending
        await settle(pair)
        assert (buffer == POISON).all()
    else:
        await receiving
        await sending
    await assert_works(pair, variant)


async def test_a_send_that_nobody_receives(pair: Pair, variant: Variant) -> None:
    a, b = pair
    first, second = variant.random(LARGE, 1), variant.random(LARGE, 2)
    sending = a.send(first, 1, tag=1)
    assert sending.cancel()
    with pytest.raises(OWN_CANCEL):
        await sending
    first.fill(POISON)
    again, got = a.send(second, 1, tag=1), variant.array(LARGE)
    await b.recv(got, 0, tag=1)
    await again
    np.testing.assert_array_equal(got, second)
    assert b.statistics().unexpected_messages == 0
    await assert_works(pair, variant)


async def test_a_send_under_way(pair: Pair, variant: Variant) -> None:
    a, b = pair
    source, buffer = variant.ones(LARGE), variant.array(LARGE)
    receiving = b.recv(buffer, 0)
    sending = a.send(source, 1)
    await until(lambda: buffer[0] or sending.done())
    if sending.cancel():
        with pytest.raises(OWN_CANCEL):
            await sending
        source.fill(POISON)
        try:
            await receiving
        except TransferCancelled as error:
            assert error.peer == 0  # noqa: PT017  (either end is right)
        else:  # the last byte had come before the cancel did
            assert (buffer == 1).all()
        buffer.fill(POISON)
        await settle(pair)
        assert (buffer == POISON).all()
    else:
        await sending
        await receiving
        assert (buffer == 1).all()
    await assert_works(pair, variant)


async def test_a_synchronous_small_send(pair: Pair, variant: Variant) -> None:
    a, b = pair
    sending = a.send(b"never mind", 1, tag=1, synchronous=True)
    assert sending.cancel()
    with pytest.raises(OWN_CANCEL):
        await sending
    await settle(pair)
    assert b.statistics().unexpected_messages == 0
    await assert_works(pair, variant)


async def test_sends_that_wait_behind_a_full_ring(pair: Pair, variant: Variant) -> None:
    a, b = pair
    payload = variant.random(60_000)
    sending = [a.send(payload, 1, tag=tag) for tag in range(500)]
    queued = [tag for tag, transfer in enumerate(sending) if not transfer.done()]
    cancelled = [tag for tag in queued if tag % 2 and sending[tag].cancel()]
    assert cancelled
    for tag in cancelled:
        with pytest.raises(OWN_CANCEL):
            await sending[tag]
    for tag in range(500):
        if tag in cancelled:
            continue
        got = variant.array(60_000)
        await b.recv(got, 0, tag=tag)
        await sending[tag]
        np.testing.assert_array_equal(got, payload)
    await settle(pair)
    assert b.statistics().unexpected_messages == 0
    await assert_works(pair, variant)


async def test_both_sides_at_once(pair: Pair, variant: Variant) -> None:
    a, b = pair
    source, buffer = variant.random(LARGE), variant.array(LARGE)
    sending, receiving = a.send(source, 1), b.recv(buffer, 0)
    ended = [transfer.cancel() for transfer in (sending, receiving)]
    for transfer, own in zip((sending, receiving), ended, strict=True):
        # One that had ended before has its outcome by then, and its memory is free only once it is told.
        with pytest.raises(OWN_CANCEL) if own else contextlib.suppress(TransferCancelled):
            await transfer
    buffer.fill(POISON)
    await settle(pair)
    assert (buffer == POISON).all()
    await assert_works(pair, variant)


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_one_sided(pair: Pair, variant: Variant, kind: str) -> None:
    a, b = pair
    memory, local = variant.random(LARGE, 1), variant.random(LARGE, 2)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        transfer = a.put(local, remote) if kind == "put" else a.get(remote, local)
        with pytest.raises(OWN_CANCEL) if transfer.cancel() else contextlib.nullcontext():
            await transfer
        local.fill(POISON)
        await settle(pair)
        assert (local == POISON).all()
    memory.fill(POISON)
    await settle(pair)
    assert (memory == POISON).all()
    await assert_works(pair, variant)


@pytest.mark.parametrize("state", ["posted receive", "moving receive", "waiting send", "moving send"])
async def test_cancelling_the_task(pair: Pair, variant: Variant, state: str) -> None:
    """The await ends only when the buffer is free; the other side learns of it."""
    a, b = pair
    source, buffer = variant.ones(LARGE), variant.array(LARGE)
    receives, moves = "receive" in state, "moving" in state
    ours: Any = None
    other: Any = None
    if receives:
        other = a.send(source, 1, tag=3) if moves else None
        ours = b.recv(buffer, 0, tag=3)
    else:
        other = b.recv(buffer, 0, tag=3) if moves else None
        ours = a.send(source, 1, tag=3)
    seen = []

    async def wait() -> None:
        try:
            await ours
        except anyio.get_cancelled_exc_class():
            seen.append(ours.cancelled())
            (buffer if receives else source).fill(POISON)
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        if moves:
            await until(lambda: buffer[0] or ours.done())
        group.cancel_scope.cancel()
    assert ours.done()
    if other is not None and seen == [True]:
        try:
            await other
        except TransferCancelled as error:
            assert error.peer == (1 if receives else 0)  # noqa: PT017  (either end is right)
        else:
            # A device may have written all of it, and its sender heard so, before the receiver's word came.
            assert not receives or variant.link == "rdma", "what was given up cannot have been fetched"
            assert receives or (buffer == 1).all()
    elif other is not None:
        await other
    await settle(pair)
    if receives and seen:
        assert (buffer == POISON).all()
    await assert_works(pair, variant)


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_cancelling_the_task_of_a_one_sided_transfer(pair: Pair, variant: Variant, kind: str) -> None:
    """In its middle: then nothing touches the local memory, nor the remote once its region is closed."""
    a, b = pair
    nbytes = LONG
    memory = variant.array(nbytes) if kind == "put" else variant.ones(nbytes)
    local = variant.ones(nbytes) if kind == "put" else variant.array(nbytes)
    target = memory if kind == "put" else local
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        transfer = a.put(local, remote) if kind == "put" else a.get(remote, local)
        cancelled = []

        async def wait() -> None:
            try:
                await transfer
            except anyio.get_cancelled_exc_class():
                cancelled.append(transfer.done())  # cancelled, or over in that very moment
                local.fill(POISON)
                raise

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.lowlevel.checkpoint()
            await until(lambda: target[0] or transfer.done())
            group.cancel_scope.cancel()
        assert transfer.done()
        assert cancelled in ([], [True]), "an await that is cancelled ends when its transfer has"
        await settle(pair)
        if cancelled:
            assert (local == POISON).all()
    memory.fill(POISON)
    await settle(pair)
    assert (memory == POISON).all()
    await assert_works(pair, variant)


async def test_cancelling_the_task_of_a_recv_array(pair: Pair, variant: Variant) -> None:
    """The array that was made for it is nobody's; the sender is told."""
    a, b = pair
    sending = a.send(variant.ones(LONG), 1)
    await until(lambda: b.statistics().unexpected_messages)
    receiving = b.recv_array(0)

    async def wait() -> None:
        await receiving

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert receiving.done()
    if receiving.cancelled():
        with pytest.raises(TransferCancelled) as caught:
            await sending
        assert caught.value.peer == 1
    else:
        await sending
    await settle(pair)
    await assert_works(pair, variant)


@pytest.mark.parametrize("nbytes", [100, LARGE])
async def test_a_receives_deadline(pair: Pair, variant: Variant, nbytes: int) -> None:
    _, b = pair
    buffer = variant.array(nbytes)
    with pytest.raises(aiocomm.DeadlineExceeded, match=r"recv of .* from rank 0"):
        await b.recv(buffer, 0, deadline=0.01)
    with pytest.raises(TimeoutError):
        await b.recv(buffer, 0, deadline=0)
    buffer.fill(POISON)
    await settle(pair)
    assert (buffer == POISON).all()
    await assert_works(pair, variant)


async def test_a_sends_deadline(pair: Pair, variant: Variant) -> None:
    a, b = pair
    with pytest.raises(aiocomm.DeadlineExceeded, match=r"send of .* to rank 1"):
        await a.send(variant.random(LARGE), 1, deadline=0.01)
    await settle(pair)
    assert b.statistics().unexpected_messages == 0
    await assert_works(pair, variant)


async def test_a_deadline_under_way_is_the_peers_cancel(pair: Pair, variant: Variant) -> None:
    a, b = pair
    source, buffer = variant.random(LARGE), variant.array(LARGE)
    sending = a.send(source, 1)
    await until(lambda: b.statistics().unexpected_messages)
    receiving = b.recv(buffer, 0, deadline=0)
    try:
        await receiving
    except aiocomm.DeadlineExceeded:
        buffer.fill(POISON)
        try:
            await sending
        except TransferCancelled:
            pass
        else:
            pytest.fail("a send whose receiver gave up must not succeed")
        await settle(pair)
        assert (buffer == POISON).all()
    else:
        await sending
    await assert_works(pair, variant)


async def test_deadlines_of_many_end_in_time_order(pair: Pair, variant: Variant) -> None:
    _, b = pair
    order: list[int] = []
    transfers: list[aiocomm.Transfer] = []
    ends: list[tuple[float, float]] = []  # no earlier than, and no later than: a call may take its time, too
    for tag in range(8):
        deadline, before = (8 - tag) * 0.02, time.monotonic()
        transfer = b.recv(bytearray(1), 0, tag=tag, deadline=deadline)
        ends.append((before + deadline, time.monotonic() + deadline))
        transfer.add_done_callback(lambda _, tag=tag: order.append(tag))
        transfers.append(transfer)
    for transfer in transfers:
        with pytest.raises(aiocomm.DeadlineExceeded):
            await transfer
    await until(lambda: len(order) == 8)
    for earlier, later in itertools.combinations(order, 2):
        assert ends[earlier][0] <= ends[later][1], (order, ends)
