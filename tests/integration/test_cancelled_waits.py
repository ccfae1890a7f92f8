"""Waits that are no transfers, cancelled at each of their steps: they release what they hold.

A sweep cancels after 0, 1, 4, 16, … turns of the loop, until the wait has ended by itself before that: so
every suspension is met, those of one turn and those that wait for a thread or a process.
"""

from __future__ import annotations

import contextlib
import gc
import math
import secrets
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import held, until, world

import aiocomm
from aiocomm.region import Region

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from conftest import Pair

pytestmark = pytest.mark.anyio

LARGE = 64 << 20
POISON = 0xAB


def sweep(last: float = math.inf) -> Iterator[int]:
    """Turns after which to cancel."""
    yield 0
    turns = 1
    while turns <= last:
        yield turns
        turns *= 4


async def cancelled_after(turns: int, wait: Callable[[], Awaitable[Any]], ended: list[Any]) -> bool:
    """Whether the wait was cancelled; else `ended` has its result, which came within so many turns."""
    gone = False

    async def run() -> None:
        nonlocal gone
        try:
            ended.append(await wait())
        except anyio.get_cancelled_exc_class():
            gone = True
            raise

    async with anyio.create_task_group() as group:
        group.start_soon(run)
        for _ in range(turns):
            if ended:
                break
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    return gone


async def both(one: Callable[[], Awaitable[Any]], other: Callable[[], Awaitable[Any]]) -> list[Any]:
    results: list[Any] = [None, None]

    async def run(index: int, wait: Callable[[], Awaitable[Any]]) -> None:
        results[index] = await wait()

    async with anyio.create_task_group() as group:
        group.start_soon(run, 0, one)
        group.start_soon(run, 1, other)
    return results


async def talk(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    got = bytearray(5)
    receiving = b.recv(got, a.rank, tag=99)
    await a.send(b"hello", b.rank, tag=99)
    await receiving
    assert bytes(got) == b"hello"


async def works(a: aiocomm.Communicator, b: aiocomm.Communicator) -> None:
    await talk(a, b)
    for comm in (a, b):
        await until(lambda comm=comm: comm.statistics().in_flight == 0)  # type: ignore[misc]


async def test_connect() -> None:
    """The world is told that the member has left, if it had come; descriptors are given back."""
    address = f"unix://@aiocomm-test-{secrets.token_hex(8)}"
    host = await aiocomm.connect(address, rank=0)

    async def join() -> aiocomm.Communicator:
        return await aiocomm.connect(address, warmup=True)

    await (await join()).aclose()  # what is made once is there
    await until(lambda: not any(peer.alive for peer in host.peers))
    before = held()
    outcomes = set()
    for turns in sweep():
        joined: list[aiocomm.Communicator] = []
        gone = await cancelled_after(turns, join, joined)
        outcomes.add(gone)
        for member in joined:
            await works(host, member)
            await member.aclose()
        del joined
        await until(lambda: not any(peer.alive for peer in host.peers))
        await until(lambda: held()["descriptors"] <= before["descriptors"])
        if not gone:
            break
    assert outcomes == {True, False}
    await host.aclose()


async def test_aclose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it waits for when it is cancelled, all is released, and the peer is told in good order."""
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "100")  # it is not this that ends the wait
    for turns in sweep(64):
        async with world(2, warmup=True) as (a, b):
            events = b.events()
            sending, waiting = a.send(bytes(1 << 20), 1), a.recv(bytearray(1), 1)
            assert await cancelled_after(turns, a.aclose, []), "nobody has fetched what was sent"
            assert a.closed
            for transfer in (sending, waiting):
                assert isinstance(transfer.exception(), aiocomm.ClosedError)
            await a.aclose()  # idempotent
            with pytest.raises(aiocomm.PeerLostError):
                await b.recv(bytearray(1), 0, tag=1)  # of another tag than what a had announced
            async for event in events:
                if isinstance(event, aiocomm.PeerLost):
                    assert (event.rank, event.reason) == (0, "left")
                    break


@pytest.mark.parametrize("cancels", [None, 0, 1])
async def test_several_calls_of_aclose_have_one_end(
    cancels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is cancelled takes nothing from the other: what was sent is still waited for."""
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "100")
    async with world(2, warmup=True) as (a, b):
        sending, region = a.send(bytes(1 << 20), 1), a.register(bytearray(8))
        scopes = [anyio.CancelScope() for _ in range(3)]

        async def close(number: int) -> None:
            with scopes[number]:
                await a.aclose()
                assert a._plane.ended.done()
                assert sending.done()
                await region.aclose()

        async with anyio.create_task_group() as tasks:
            for number in range(2):
                tasks.start_soon(close, number)
            await anyio.wait_all_tasks_blocked()
            if cancels is not None:
                scopes[cancels].cancel()
                await anyio.wait_all_tasks_blocked()
            assert not a.closed
            await b.recv(bytearray(1 << 20), 0)
            await until(lambda: a.closed)
            tasks.start_soon(close, 2)
        assert not sending.exception()
        assert [scope.cancelled_caught for scope in scopes] == [number == cancels for number in range(3)]


async def test_a_region_ends_with_its_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was under way in it; its memory is let go."""
    async with world(2, warmup=True) as (a, _):
        memory = np.zeros(8, np.uint8)
        kept = weakref.ref(memory)
        regions = [a.register(memory), a.register(memory)]
        del memory
        monkeypatch.setattr(Region, "_refuse", lambda region: None)  # accesses are under way, and do not end
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(regions[0].aclose)
            await anyio.wait_all_tasks_blocked()
            await a.aclose()
        monkeypatch.undo()
        with pytest.raises(aiocomm.ClosedError):
            regions[1].handle  # noqa: B018
        gc.collect()
        assert kept() is None


async def test_exchange(pair: Pair) -> None:
    a, b = pair
    memories = [np.full(100, 1 + rank, np.uint8) for rank in (0, 1)]
    got = np.zeros(100, np.uint8)
    async with a.register(memories[0]) as one, b.register(memories[1]) as other:
        for turns in sweep(64):
            assert await cancelled_after(turns, lambda: a.exchange(one, 1), []), "the other has not called"
            # The other side's call of this number may end by what has been sent.
            await cancelled_after(turns, lambda: b.exchange(other, 0), [])
            remotes = await both(lambda: a.exchange(one, 1), lambda: b.exchange(other, 0))
            await a.get(remotes[0], got)
            assert (got == 2).all()
            await b.get(remotes[1], got)
            assert (got == 1).all()
    await works(a, b)


async def test_barrier(pair: Pair) -> None:
    """One side gives it up once it has begun: the other is told, or has what it needs; the next works."""
    a, b = pair
    for turns in sweep(64):
        if turns == 0:
            continue  # not begun, it is not a call, and the other side would wait for one
        assert await cancelled_after(turns, a.barrier, []), "the other has not called"
        with contextlib.suppress(aiocomm.TransferCancelled):
            await b.barrier()
        await both(a.barrier, b.barrier)
        await talk(a, b)


@pytest.mark.parametrize("cma", ["auto", "off"])
async def test_region_aclose(cma: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region is closed all the same; a second call waits for the accesses that are under way."""
    monkeypatch.setenv("AIOCOMM_CMA", cma)
    async with world(2, warmup=True) as (a, b):
        local, memory = np.ones(LARGE, np.uint8), np.zeros(LARGE, np.uint8)
        for turns in sweep(16):
            memory.fill(0)
            region = b.register(memory)
            putting = a.put(local, a.remote(region.handle))
            await until(lambda: memory[0])
            await cancelled_after(turns, region.aclose, [])
            with pytest.raises(aiocomm.ClosedError):
                region.handle  # noqa: B018
            await region.aclose()
            memory.fill(POISON)
            try:
                await putting
            except (aiocomm.StaleHandleError, aiocomm.TransferCancelled):
                pass
            else:
                assert putting.done()
            await works(a, b)
            assert (memory == POISON).all()
