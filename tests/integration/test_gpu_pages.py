"""Pages on GPUs: right bytes at either end, as few copies as the plan has, layers, leases, other ways."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Kind, Stream, driver
from fakes.simulated import Engine
from harness import LIMIT_S, messages_pass, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

WAYS = [("gpu", "gpu"), ("gpu", "host"), ("host", "gpu")]
LINKS = ("shm", "cuda")
LAYERS, PAGES = 3, 12


@pytest.fixture
async def pair(gpu: Driver) -> AsyncIterator[Pair]:
    """Ranks 0 and 1, with GPU memory."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        yield a, b


def other_device() -> int:
    return 1 if driver().count > 1 else 0


def on(where: str, arrays: list[np.ndarray[Any, Any]], device: int = 0) -> aiocomm.Pages:
    if where == "host":
        return aiocomm.Pages([array.copy() for array in arrays])
    return aiocomm.Pages([DeviceArray(a.shape, a.dtype, device).write(a) for a in arrays])


def back(pages: aiocomm.Pages) -> list[np.ndarray[Any, Any]]:
    return [array.numpy() if isinstance(array, DeviceArray) else array for array in pages.arrays]


def cache(seed: int | None, pages: int = PAGES) -> list[np.ndarray[Any, Any]]:
    """K and V per layer; zeros without a seed."""
    shape = (pages, 4, 2, 64)
    if seed is None:
        return [np.zeros(shape, np.float16) for _ in range(2 * LAYERS)]
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 999, shape).astype(np.float16) for _ in range(2 * LAYERS)]


@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_pages_go_there_and_back(pair: Pair, local: str, remote: str) -> None:
    a, b = pair
    data = cache(1)
    ours, theirs = on(local, data), on(remote, cache(None), other_device())
    async with await b.lease_pages(theirs, [11, 2, 7, 8]) as lease:
        target = a.remote_pages(lease.handle)
        await a.put_pages(ours, [3, 9, 4, 5], target, [11, 2, 7, 8], notify=b"req-17", deadline=LIMIT_S)
        async for note in b.notifications():
            assert note.payload == b"req-17"
            break
        for mine, other in zip(data, back(theirs), strict=True):
            assert np.array_equal(other[[11, 2, 7, 8]], mine[[3, 9, 4, 5]])
            assert not other[[0, 1, 3, 4, 5, 6, 9, 10]].any()
        again = on(local, cache(None))
        await a.get_pages(target, [2, 7, 8], again, [5, 0, 10])
        for mine, other in zip(back(again), back(theirs), strict=True):
            assert np.array_equal(mine[[5, 0, 10]], other[[2, 7, 8]])
            assert not mine[[1, 2, 3, 4, 6, 7, 8, 9, 11]].any()


@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_random_views(pair: Pair, local: str, remote: str) -> None:
    """Head ranges, other axes, pages of other size: as between host arrays."""
    a, b = pair
    rng = np.random.default_rng(5)
    for _ in range(20):
        heads, tokens = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        ratio = int(rng.integers(1, 3))
        source = rng.integers(1, 255, (10, tokens * ratio, heads + 2, 16), np.uint8)
        target = np.zeros((30, tokens, heads, 16), np.uint8)
        first = int(rng.integers(0, 3))
        give = rng.permutation(10)[: int(rng.integers(1, 10))]
        take = rng.permutation(30)[: len(give) * ratio]
        want = aiocomm.Pages(target.copy(), token_axis=1)
        host = aiocomm.Pages(source, token_axis=1).slice(2, first, first + heads)
        async with await b.lease_pages(want) as lease:
            await a.put_pages(host, give, a.remote_pages(lease.handle), take)
        ours = aiocomm.Pages(on(local, [source]).arrays, token_axis=1).slice(2, first, first + heads)
        theirs = aiocomm.Pages(on(remote, [target], other_device()).arrays, token_axis=1)
        async with await b.lease_pages(theirs) as lease:
            leased = a.remote_pages(lease.handle)
            await a.put_pages(ours, give, leased, take)
            assert np.array_equal(back(theirs)[0], want.arrays[0])
            into = aiocomm.Pages(on(local, [np.zeros_like(source)]).arrays, token_axis=1)
            await a.get_pages(leased, take, into.slice(2, first, first + heads), give)
        expected = np.zeros_like(source)
        expected[give, :, first : first + heads] = source[give, :, first : first + heads]
        assert np.array_equal(back(into)[0], expected)


async def test_equal_strides_are_one_copy(simulator: Simulator, pair: Pair) -> None:
    """One page of all layers, K and V, is one 2-D copy: no batch, no single copies."""
    a, b = pair
    shape = (8, 2, PAGES, 512)  # layers, K and V, pages
    data = np.random.default_rng(0).integers(1, 255, shape, np.uint8)
    ours = aiocomm.Pages(DeviceArray(shape).write(data), page_axis=2)
    theirs = aiocomm.Pages(DeviceArray(shape, device=1).write(np.zeros(shape, np.uint8)), page_axis=2)
    calls = ("cuMemcpy2DAsync", "cuMemcpyBatchAsync", "cuMemcpyAsync")
    async with await b.lease_pages(theirs) as lease:
        remote = a.remote_pages(lease.handle)
        before = [simulator.calls(name) for name in calls]
        await a.put_pages(ours, [3, 10, 0], remote, [5, 0, 11])
        assert [simulator.calls(name) - n for name, n in zip(calls, before, strict=True)] == [3, 0, 0]
        assert np.array_equal(back(theirs)[0][:, :, [5, 0, 11]], data[:, :, [3, 10, 0]])
        before = [simulator.calls(name) for name in calls]
        into = aiocomm.Pages(DeviceArray(shape).write(np.zeros(shape, np.uint8)), page_axis=2)
        await a.get_pages(remote, [5], into, [9])
        assert [simulator.calls(name) - n for name, n in zip(calls, before, strict=True)] == [1, 0, 0]
        assert np.array_equal(back(into)[0][:, :, 9], data[:, :, 3])


async def test_scattered_pages_are_batches(simulator: Simulator, pair: Pair) -> None:
    a, b = pair
    data = [np.random.default_rng(0).integers(1, 255, (3000, 256), np.uint8)]
    ours, theirs = on("gpu", data), on("gpu", [np.zeros_like(data[0])], 1)
    give, take = (np.random.default_rng(seed).permutation(3000)[:2500] for seed in (1, 2))
    async with await b.lease_pages(theirs) as lease:
        remote = a.remote_pages(lease.handle)
        before = [simulator.calls(name) for name in ("cuMemcpyBatchAsync", "cuMemcpyAsync")]
        await a.put_pages(ours, give, remote, take)
        after = [simulator.calls(name) for name in ("cuMemcpyBatchAsync", "cuMemcpyAsync")]
        assert 3 <= after[0] - before[0] <= 10  # more, where there are cores for several threads
        assert after[1] - before[1] <= 1
        assert np.array_equal(back(theirs)[0][take], data[0][give])
        into = on("gpu", [np.zeros_like(data[0])])
        simulator.fail("cuMemcpyBatchAsync", 801)  # of a driver that has it, and refuses it: one by one
        await a.get_pages(remote, take, into, give)
        assert np.array_equal(back(into)[0][give], data[0][give])


@pytest.mark.parametrize("count", [300, 5000])  # by one thread, and by several
async def test_a_failing_copy_ends_the_call(simulator: Simulator, pair: Pair, count: int) -> None:
    a, b = pair
    data = [np.random.default_rng(0).integers(1, 255, (count, 256), np.uint8)]
    ours, theirs = on("gpu", data), on("gpu", [np.zeros_like(data[0])], 1)
    give = np.random.default_rng(1).permutation(count)
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    simulator.fail("cuMemcpyBatchAsync", 999)
    with pytest.raises(aiocomm.LinkError, match="999"):
        await a.put_pages(ours, give, remote, np.arange(count))
    await a.put_pages(ours, give, remote, np.arange(count))
    assert np.array_equal(back(theirs)[0], data[0][give])
    await lease.aclose()


async def test_layers_are_streamed(pair: Pair) -> None:
    a, b = pair
    data = cache(3)
    ours, theirs = on("gpu", data), on("gpu", cache(None), other_device())
    async with await b.lease_pages(theirs, [1, 2, 9]) as lease:
        remote = a.remote_pages(lease.handle)

        async def send() -> None:
            layers = ours.layers(arrays=2), remote.layers(arrays=2)
            await a.put_layers(layers[0], [5, 0, 3], layers[1], [9, 1, 2], notify=b"all", deadline=LIMIT_S)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            seen = []
            async for layer in lease.layers(deadline=LIMIT_S):
                seen.append(layer)
                for array in (2 * layer, 2 * layer + 1):
                    assert np.array_equal(theirs.arrays[array].numpy()[[9, 1, 2]], data[array][[5, 0, 3]])
            assert seen == list(range(LAYERS))


async def test_pages_wait_for_their_stream(pair: Pair) -> None:
    a, b = pair
    stream, array = Stream(), DeviceArray((4, 256))
    gate = stream.gate()
    stream.fill(array, 7)
    theirs = aiocomm.Pages(DeviceArray((4, 256), device=other_device()).write(np.zeros((4, 256), np.uint8)))
    async with await b.lease_pages(theirs) as lease, anyio.create_task_group() as tasks:
        remote, done = a.remote_pages(lease.handle), anyio.Event()

        async def put() -> None:
            await a.put_pages(aiocomm.Pages(array), [0, 2], remote, [3, 1], stream=stream)
            done.set()

        tasks.start_soon(put)
        await messages_pass(a, b, times=3)
        assert not done.is_set()
        gate.open()
        with anyio.fail_after(LIMIT_S):
            await done.wait()
        assert (back(theirs)[0][[1, 3]] == 7).all()
    stream.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kind", ["put", "get"])
async def test_a_stream_that_fails_at_the_owner_of_pages(simulator: Simulator, pair: Pair, kind: str) -> None:
    """Who asks for them moves them, and would not notice."""
    a, b = pair
    stream, array, other = Stream(1), DeviceArray((4, 4096), device=1), DeviceArray((4, 4096))
    simulator.pause(1, Engine.LOCAL)
    stream.fill(array, 7)
    lease, ours = await b.lease_pages(aiocomm.Pages(array), stream=stream), aiocomm.Pages(other)
    remote = a.remote_pages(lease.handle)

    async def access() -> None:
        calls = {
            "put": lambda: a.put_pages(ours, [0, 2], remote, [1, 3]),
            "get": lambda: a.get_pages(remote, [0, 2], ours, [1, 3]),
        }
        with pytest.raises((aiocomm.LinkError, aiocomm.PeerError)):
            await calls[kind]()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(access)
            await messages_pass(a, b, times=3)
            simulator.fail("@engine", 700)
            simulator.resume(1, Engine.LOCAL)
    simulator.heal()
    await lease.aclose()
    stream.close()


async def test_leases_and_refusals(pair: Pair) -> None:
    a, b = pair
    ours, theirs = on("gpu", cache(4)), on("gpu", cache(None), other_device())
    stale = a.remote_pages((await b.lease_pages(theirs, [1, 2])).handle)
    await b.lease_pages(theirs, [2, 3])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(ours, [0, 1], stale, [1, 2])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get_pages(stale, [1], ours, [0])
    with pytest.raises(aiocomm.UsageError, match="page 3 is not part"):
        await a.put_pages(ours, [0], stale, [3])
    assert not any(array.any() for array in back(theirs))
    with pytest.raises(aiocomm.UsageError, match="some arrays are in host memory"):
        aiocomm.Pages([ours.arrays[0], cache(None)[0]])
    with pytest.raises(aiocomm.UsageError, match="stream= belongs"):
        await a.put_pages(on("host", cache(1)), [0], stale, [1], stream=0)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_put_leaves_nothing_under_way(pair: Pair) -> None:
    a, b = pair
    stream = Stream()
    ours, theirs = on("gpu", cache(4)), on("gpu", cache(None), other_device())
    gate = stream.gate()
    busy = DeviceArray(1)
    stream.fill(busy, 1)
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    with pytest.raises(aiocomm.DeadlineExceeded):
        await a.put_pages(ours, [0, 1], remote, [1, 2], stream=stream, deadline=0.05)
    assert a.statistics().in_flight == 0
    gate.open()
    await lease.aclose()
    assert not any(array.any() for array in back(theirs))
    stream.close()


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("kind", ["put", "get"])
async def test_cancelled_in_the_middle(simulator: Simulator, pair: Pair, kind: str) -> None:
    """The call ends, and the lease, only when the engine has let go of what it was at."""
    a, b = pair
    data = [np.random.default_rng(0).integers(1, 255, (300, 4096), np.uint8)]
    ours, theirs = on("gpu", data), on("gpu", [np.zeros_like(data[0])], 1)
    give = np.random.default_rng(1).permutation(300)
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    simulator.stop_halfway(0, Engine.PEER)
    scope, ended, closed = anyio.CancelScope(), anyio.Event(), anyio.Event()

    async def move() -> None:
        with scope:
            if kind == "put":
                await a.put_pages(ours, give, remote, np.arange(300))
            else:
                await a.get_pages(remote, give, ours, np.arange(300))
        ended.set()

    async def close() -> None:
        await lease.aclose()
        closed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(move)
        await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.PEER)
        tasks.start_soon(close)
        scope.cancel()
        await messages_pass(a, b)
        assert not ended.is_set()
        assert not closed.is_set()
        simulator.resume(0, Engine.PEER)
        with anyio.fail_after(LIMIT_S):
            await ended.wait()
            await closed.wait()
    assert scope.cancelled_caught
    async with await b.lease_pages(theirs) as again:
        await a.put_pages(ours, give, a.remote_pages(again.handle), np.arange(300))


async def test_the_owner_killed_in_the_middle(simulator: Simulator) -> None:
    shape = (300, 4096)

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        async with await comm.lease_pages(aiocomm.Pages(DeviceArray(shape, device=1))) as lease:
            await comm.send(lease.handle, 0)
            await comm.recv(bytearray(1), 0)

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            remote = comm.remote_pages((await comm.recv_array(1)).tobytes())
            ours = aiocomm.Pages(DeviceArray(shape))
            give, take = (np.random.default_rng(seed).permutation(300) for seed in (1, 2))
            await comm.put_pages(ours, give, remote, take)
            simulator.stop_halfway(0, Engine.PEER)
            async with anyio.create_task_group() as tasks:

                async def put() -> None:
                    with pytest.raises(aiocomm.PeerLostError):
                        await comm.put_pages(ours, give, remote, take)

                events = comm.events()
                tasks.start_soon(put)
                await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.PEER)
                os.kill(comm.peers[0].pid, signal.SIGKILL)
                async for event in events:
                    if isinstance(event, aiocomm.PeerLost):
                        break
                simulator.resume(0, Engine.PEER)
            with pytest.raises(aiocomm.AiocommError):
                await comm.get_pages(remote, take, ours, give)


@pytest.mark.parametrize("kind", [Kind.MALLOC, Kind.POOL])
async def test_between_two_processes(gpu: Driver, kind: Kind) -> None:
    """Memory that no engine of the other process reaches goes another way, and that is told once."""
    shape = (40, 1000)

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver

        array = DeviceArray(shape, device=driver().count > 1, kind=kind)
        async with await comm.lease_pages(aiocomm.Pages(array)) as lease:
            await comm.send(lease.handle, 0)
            for _ in range(2):
                async for note in comm.notifications():
                    await comm.send(array.numpy(), note.source)
                    break
            await comm.recv(bytearray(1), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        data = np.random.default_rng(0).integers(1, 255, shape, np.uint8)
        remote = comm.remote_pages((await comm.recv_array(1)).tobytes())
        ours = aiocomm.Pages(DeviceArray(shape, kind=kind).write(data))
        give, take = (np.random.default_rng(seed).permutation(40) for seed in (1, 2))
        for _ in range(2):
            await comm.put_pages(ours, give, remote, take, notify=b"here")
            got = await comm.recv_array(1)
            assert np.array_equal(got[take], data[give])
        into = aiocomm.Pages(DeviceArray(shape, kind=kind).write(np.zeros(shape, np.uint8)))
        await comm.get_pages(remote, take[:30], into, give[:30])
        assert np.array_equal(back(into)[0][give[:30]], data[give[:30]])
        assert remote.by_rows == (kind is Kind.MALLOC)
        await comm.send(b"x", 1)
