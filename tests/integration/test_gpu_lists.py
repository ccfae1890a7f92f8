"""Scattered pages with GPU memory at one end, or at both where no engine reaches the other's."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Stream
from fakes.simulated import Engine
from harness import LIMIT_S, messages_pass, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

# Where the caller's pages are, where the peer's are, and the links.
WAYS = {
    "gpu to host": ("gpu", "host", ("shm", "cuda")),
    "host to gpu": ("host", "gpu", ("shm", "cuda")),
    "gpu to host by tcp": ("gpu", "host", ("tcp", "cuda")),
    "host to gpu by tcp": ("host", "gpu", ("tcp", "cuda")),
    "gpu to gpu by tcp": ("gpu", "gpu", ("tcp", "cuda")),
}
PAGES = 2000


@pytest.fixture(params=WAYS)
async def way(gpu: Driver, request: pytest.FixtureRequest) -> AsyncIterator[tuple[Pair, str, str]]:
    local, remote, links = WAYS[request.param]
    async with world(2, links=links, warmup=True) as (a, b):
        yield (a, b), local, remote


def on(where: str, array: np.ndarray[Any, Any], device: int) -> aiocomm.Pages:
    if where == "host":
        return aiocomm.Pages(array.copy())
    return aiocomm.Pages(DeviceArray(array.shape, array.dtype, device).write(array))


def back(pages: aiocomm.Pages) -> np.ndarray[Any, Any]:
    (array,) = pages.arrays
    return array.numpy() if isinstance(array, DeviceArray) else array


def some(seed: int, count: int = PAGES // 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(PAGES)[:count]


def random_pages(nbytes: int, pages: int = PAGES) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, 255, (pages, nbytes), np.uint8)


def messages(*comms: aiocomm.Communicator) -> int:
    """Accesses that have ended well."""
    return sum(link.completed for comm in comms for link in comm.statistics().links.values())


@pytest.mark.parametrize("nbytes", [40, 3000, 40_000])
async def test_many_pages_are_few_messages(
    simulator: Simulator, way: tuple[Pair, str, str], nbytes: int
) -> None:
    (a, b), local, remote = way
    count = 1500 if nbytes < 40_000 else 150
    data, give, take = random_pages(nbytes), some(1, count), some(2, count)
    ours, theirs = on(local, data, 0), on(remote, np.zeros_like(data), 1)
    async with await b.lease_pages(theirs) as lease:
        target = a.remote_pages(lease.handle)
        calls, before = simulator.calls("cuMemcpyAsync"), messages(a)
        await a.put_pages(ours, give, target, take, deadline=LIMIT_S)
        few = 2 + count * (nbytes + 16) // (200 << 10)
        assert messages(a) - before <= few
        expected = np.zeros_like(data)
        expected[take] = data[give]
        assert np.array_equal(back(theirs), expected)

        into = on(local, np.zeros_like(data), 0)
        before = messages(a)
        await a.get_pages(target, take, into, give, deadline=LIMIT_S)
        assert messages(a) - before <= few + count // 512
        expected = np.zeros_like(data)
        expected[give] = data[give]
        assert np.array_equal(back(into), expected)
        assert simulator.calls("cuMemcpyAsync") - calls <= 4 * few  # the rest are batches


async def test_rows_at_equal_distances_are_one_copy(simulator: Simulator, way: tuple[Pair, str, str]) -> None:
    (a, b), local, remote = way
    data = random_pages(500)
    ours, theirs = on(local, data, 0), on(remote, np.zeros_like(data), 1)
    pages = np.arange(0, 300, 3)
    async with await b.lease_pages(theirs) as lease:
        names = ("cuMemcpyBatchAsync", "cuMemcpyAsync", "cuMemcpy2DAsync")
        before = [simulator.calls(name) for name in names]
        await a.put_pages(ours, pages, a.remote_pages(lease.handle), pages)
        ends = [local, remote].count("gpu")
        assert [simulator.calls(name) - n for name, n in zip(names, before, strict=True)] == [0, 0, ends]
    assert np.array_equal(back(theirs)[pages], data[pages])


async def test_large_pages_go_by_themselves(way: tuple[Pair, str, str]) -> None:
    """And those in pieces at one end, whole at the other, together."""
    (a, b), local, remote = way
    data = random_pages(1 << 19, 12)
    ours, theirs = on(local, data, 0), on(remote, np.zeros_like(data), 1)
    async with await b.lease_pages(theirs) as lease:
        target = a.remote_pages(lease.handle)
        await a.put_pages(ours, [3, 7, 1], target, [2, 10, 11])
        assert np.array_equal(back(theirs)[[2, 10, 11]], data[[3, 7, 1]])
    halves = np.zeros((24, 1 << 18), np.uint8)
    apart = aiocomm.Pages(on(remote, halves, 1).arrays, token_axis=1)
    whole = aiocomm.Pages(ours.arrays, token_axis=1)
    async with await b.lease_pages(apart) as lease:
        target = a.remote_pages(lease.handle)
        take = [5, 20, 0, 13, 1, 22]
        await a.put_pages(whole, [3, 7, 1], target, take)
        assert np.array_equal(back(apart)[take], data[[3, 7, 1]].reshape(6, -1))
        into = on(local, np.zeros_like(data), 0)
        await a.get_pages(target, take, aiocomm.Pages(into.arrays, token_axis=1), [0, 9, 4])
        assert np.array_equal(back(into)[[0, 9, 4]], data[[3, 7, 1]])


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_a_failing_copy_ends_the_call(
    simulator: Simulator, way: tuple[Pair, str, str], kind: str
) -> None:
    """Of either end's GPU; what follows goes well."""
    (a, b), local, remote = way
    data, give, take = random_pages(200), some(1), some(2)
    ours, theirs = on(local, data, 0), on(remote, data, 1)
    async with await b.lease_pages(theirs) as lease:
        target = a.remote_pages(lease.handle)

        async def move() -> None:
            if kind == "put":
                await a.put_pages(ours, give, target, take, deadline=LIMIT_S)
            else:
                await a.get_pages(target, take, ours, give, deadline=LIMIT_S)

        await move()
        for nth in range(1, 1 + [local, remote].count("gpu")):
            simulator.fail("cuMemcpyBatchAsync", 999, nth)
            with pytest.raises(aiocomm.LinkError):
                await move()
            assert a.statistics().in_flight == 0
            simulator.heal()
            await move()
    assert np.array_equal(back(theirs)[take], back(ours)[give])


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("kind", ["put", "get"])
async def test_cancelled_in_the_middle(simulator: Simulator, way: tuple[Pair, str, str], kind: str) -> None:
    """No engine is at either's memory any more when the call, and the lease, have ended."""
    (a, b), local, remote = way
    data, give, take = random_pages(4000), some(1), some(2)
    ours, theirs = on(local, data, 0), on(remote, data, 1)
    lease = await b.lease_pages(theirs)
    target = a.remote_pages(lease.handle)
    source = local if kind == "put" else remote
    engine = Engine.TO_HOST if source == "gpu" else Engine.TO_DEVICE
    ours_works = local == "gpu" and (remote == "host" or kind == "put")  # the first engine that does
    device = int(not ours_works)
    simulator.stop_halfway(device, engine)
    scope, ended, closed = anyio.CancelScope(), anyio.Event(), anyio.Event()

    async def move() -> None:
        with scope:
            if kind == "put":
                await a.put_pages(ours, give, target, take)
            else:
                await a.get_pages(target, take, ours, give)
        ended.set()

    async def close() -> None:
        await lease.aclose()
        closed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(move)
        await anyio.to_thread.run_sync(simulator.wait_ready, device, engine)
        tasks.start_soon(close)
        scope.cancel()
        await messages_pass(a, b)
        assert not (ended if ours_works else closed).is_set()
        simulator.resume(device, engine)
        with anyio.fail_after(LIMIT_S):
            await ended.wait()
            await closed.wait()
    assert scope.cancelled_caught
    assert a.statistics().in_flight == b.statistics().in_flight == 0
    async with await b.lease_pages(theirs) as again:
        await a.put_pages(ours, give, a.remote_pages(again.handle), take)
    assert np.array_equal(back(theirs)[take], back(ours)[give])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_pages_wait_for_their_stream(way: tuple[Pair, str, str]) -> None:
    """And a deadline that passes meanwhile leaves nothing under way."""
    (a, b), local, remote = way
    data = random_pages(300)
    ours, theirs = on(local, data, 0), on(remote, np.zeros_like(data), 1)
    if local == "host":
        pytest.skip("no stream of the caller's")
    stream = Stream()
    gate = stream.gate()
    stream.fill(ours.arrays[0], 7)
    async with await b.lease_pages(theirs) as lease:
        target = a.remote_pages(lease.handle)
        with pytest.raises(aiocomm.DeadlineExceeded):
            await a.put_pages(ours, [0, 5], target, [3, 1], stream=stream, deadline=0.05)
        assert a.statistics().in_flight == 0
        async with anyio.create_task_group() as tasks:
            done = anyio.Event()

            async def put() -> None:
                await a.put_pages(ours, [0, 5], target, [3, 1], stream=stream)
                done.set()

            tasks.start_soon(put)
            await messages_pass(a, b, times=3)
            assert not done.is_set()
            gate.open()
            with anyio.fail_after(LIMIT_S):
                await done.wait()
        assert (back(theirs)[[1, 3]] == 7).all()
        assert not back(theirs)[[0, 2, 4]].any()
    stream.close()


@pytest.mark.parametrize("nbytes", [32, 1 << 19])  # in the frame, and fetched
async def test_lists_that_reach_out_of_the_region(gpu: Driver, nbytes: int) -> None:
    """Are refused by the owner, before a byte moves."""
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        array = DeviceArray(1 << 21).write(np.zeros(1 << 21, np.uint8))
        region = b.register(array)
        theirs = a.remote(region.handle)
        for start in (-1, (1 << 21) - nbytes + 1, 1 << 62):
            for count in (2, 1):  # what the message says to have; its own list has two ranges
                message = np.zeros(5 + nbytes * 2 // 8, np.int64)
                message[:5] = count, 0, nbytes, start, nbytes
                message[5:] = -1
                with pytest.raises(aiocomm.UsageError):
                    await a._engine.put_listed(message, 1, 0, theirs._number, LIMIT_S)
            wanted, into = np.array([0, nbytes, start, nbytes]), np.zeros(2 * nbytes, np.uint8)
            with pytest.raises(aiocomm.UsageError):
                await a._engine.get_listed(into, wanted, 1, 0, theirs._number, LIMIT_S)
        assert not array.numpy().any()
        message[:5] = 2, 8, nbytes, (1 << 21) - nbytes, nbytes
        await a._engine.put_listed(message, 1, 0, theirs._number, LIMIT_S)
        assert array.numpy().sum() == 255 * 2 * nbytes
        await region.aclose()


async def test_the_owner_killed_in_the_middle(simulator: Simulator) -> None:
    shape = (PAGES, 4096)

    async def worker(comm: aiocomm.Communicator) -> None:
        async with await comm.lease_pages(aiocomm.Pages(np.zeros(shape, np.uint8))) as lease:
            await comm.send(lease.handle, 0)
            await comm.recv(bytearray(1), 0)

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(worker, n=1, links=("shm", "cuda")) as comm:
            remote = comm.remote_pages((await comm.recv_array(1)).tobytes())
            ours = aiocomm.Pages(DeviceArray(shape))
            await comm.put_pages(ours, some(1), remote, some(2))
            simulator.stop_halfway(0, Engine.TO_HOST)
            async with anyio.create_task_group() as tasks:

                async def put() -> None:
                    with pytest.raises(aiocomm.PeerLostError):
                        await comm.put_pages(ours, some(1), remote, some(2))

                events = comm.events()
                tasks.start_soon(put)
                await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
                os.kill(comm.peers[0].pid, signal.SIGKILL)
                async for event in events:
                    if isinstance(event, aiocomm.PeerLost):
                        break
                simulator.resume(0, Engine.TO_HOST)
            assert comm.statistics().in_flight == 0
