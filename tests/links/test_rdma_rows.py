"""Pages over RDMA: rows of host and GPU memory, gathered and scattered by the adapter. Simulated adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from fakes.gpu import DeviceArray, Stream
from harness import until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"),
]

PIECES, READ_PIECES = 5, 3  # of a request of these adapters


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Adapters:
    """The simulated adapters."""
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    return Adapters()


@pytest.fixture
async def pair(adapters: Adapters) -> AsyncIterator[Pair]:
    """Two ranks over two rails."""
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        yield a, b
    assert adapters.regions(0) == 0, "every registration is given back"


def blocks(count: int, nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 255, (count, nbytes), np.uint8)


def some(count: int, of: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).permutation(of)[:count]


def work(comm: aiocomm.Communicator, rails: int = 2) -> tuple[int, int, int]:
    """Operations, writes and reads."""
    found = comm.links["rdma"].statistics()
    posted = [
        sum(found.device[f"fake{rail}.{kind}"] for rail in range(rails)) for kind in ("writes", "reads")
    ]
    return found.submitted, posted[0], posted[1]


def grown(before: tuple[int, int, int], after: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(before, after, strict=True))


async def test_one_request_for_rows_that_are_close_together_there(pair: Pair) -> None:
    a, b = pair
    data = blocks(100, 4096)
    ours, target = aiocomm.Pages(data), np.zeros_like(data)
    give = some(32, 100, 1)
    async with await b.lease_pages(aiocomm.Pages(target)) as lease:
        remote = a.remote_pages(lease.handle)
        await a.put_pages(ours, give[:1], remote, [0])  # the key
        before = work(a)
        await a.put_pages(ours, give, remote, np.arange(40, 72))
        assert grown(before, work(a)) == (1, -(-32 // PIECES), 0)
        assert np.array_equal(target[40:72], data[give])
        into, before = np.zeros_like(data), work(a)
        await a.get_pages(remote, np.arange(40, 72), aiocomm.Pages(into), give)
        assert grown(before, work(a)) == (1, 0, -(-32 // READ_PIECES))
        assert np.array_equal(into[give], data[give])


@pytest.mark.parametrize(("count", "nbytes"), [(1, 1 << 20), (6000, 700), (300, 40_000), (4000, 100)])
async def test_scattered_on_both_sides(pair: Pair, count: int, nbytes: int) -> None:
    """More than the queues take at a time, and rows that are better packed."""
    a, b = pair
    data = blocks(count + 7, nbytes)
    ours, target = aiocomm.Pages(data), np.zeros_like(data)
    give, take, back = (some(count, count + 7, seed) for seed in (1, 2, 3))
    async with await b.lease_pages(aiocomm.Pages(target)) as lease:
        remote = a.remote_pages(lease.handle)
        before = work(a)[0]
        await a.put_pages(ours, give, remote, take, notify=b"done")
        assert nbytes < 512 or work(a)[0] - before == 2  # with the notification
        model = np.zeros_like(data)
        model[take] = data[give]
        assert np.array_equal(target, model)
        async for note in b.notifications():
            assert note.payload == b"done"
            break
        into = np.zeros_like(data)
        await a.get_pages(remote, take, aiocomm.Pages(into), back)
        model[:] = 0
        model[back] = data[give]
        assert np.array_equal(into, model)


@pytest.mark.parametrize("ours_on", ["gpu", "host"])
@pytest.mark.parametrize("theirs_on", ["gpu", "host"])
@pytest.mark.usefixtures("gpu", "simulator")
async def test_host_and_gpu(adapters: Adapters, ours_on: str, theirs_on: str) -> None:
    def on(where: str, data: np.ndarray[Any, Any], device: int = 0) -> Any:
        return DeviceArray(data.shape, device=device).write(data) if where == "gpu" else data.copy()

    def numpy(array: Any) -> Any:
        return array.numpy() if isinstance(array, DeviceArray) else array

    data = blocks(50, 4096)
    give, take = some(30, 50, 1), some(30, 50, 2)
    async with world(2, links=("rdma", "cuda"), warmup=True) as (a, b):
        ours, target = on(ours_on, data), on(theirs_on, np.zeros_like(data), 1)
        async with await b.lease_pages(aiocomm.Pages(target)) as lease:
            remote = a.remote_pages(lease.handle)
            before = a.links["rdma"].statistics().submitted
            await a.put_pages(aiocomm.Pages(ours), give, remote, take)
            assert a.links["rdma"].statistics().submitted - before <= 1
            assert np.array_equal(numpy(target)[take], data[give])
            into = on(ours_on, np.zeros_like(data))
            await a.get_pages(remote, take, aiocomm.Pages(into), give)
            assert np.array_equal(numpy(into)[give], data[give])
    assert adapters.regions(0) == 0


@pytest.mark.usefixtures("gpu", "simulator")
async def test_gpu_memory_behind_work_of_its_stream(adapters: Adapters) -> None:
    data = blocks(50, 4096)
    async with world(2, links=("rdma", "cuda"), warmup=True) as (a, b):
        stream = Stream()
        ours, target = DeviceArray(data.shape), DeviceArray(data.shape, device=1).write(np.zeros_like(data))
        async with await b.lease_pages(aiocomm.Pages(target)) as lease:
            remote = a.remote_pages(lease.handle)
            ours.write(data)
            gate = stream.gate()
            stream.fill(ours, 7)
            async with anyio.create_task_group() as tasks:

                async def put() -> None:
                    await a.put_pages(aiocomm.Pages(ours), [3, 1], remote, [0, 1], stream=stream)

                before = adapters.requests
                tasks.start_soon(put)
                await anyio.wait_all_tasks_blocked()
                assert not target.numpy()[:2].any()
                gate.open()
            assert adapters.requests > before
            assert (target.numpy()[:2] == 7).all()
            assert not target.numpy()[2:].any()
    assert adapters.regions(0) == 0


async def test_memory_that_no_adapter_reaches_goes_in_messages(pair: Pair, adapters: Adapters) -> None:
    a, b = pair
    data = blocks(2000, 600)
    ours, target = aiocomm.Pages(data), np.zeros_like(data)
    give, take = some(1500, 2000, 1), some(1500, 2000, 2)
    with adapters.refusing(1 << 20, 12):
        async with await b.lease_pages(aiocomm.Pages(target)) as lease:
            remote = a.remote_pages(lease.handle)
            await a.put_pages(ours, give, remote, take)
            assert np.array_equal(target[take], data[give])
            before = work(a)[0]
            into = np.zeros_like(data)
            await a.get_pages(remote, take, aiocomm.Pages(into), give)
            assert work(a)[0] - before < 100  # many in a message
            assert np.array_equal(into[give], data[give])


async def test_a_lease_that_has_ended_is_refused(pair: Pair) -> None:
    a, b = pair
    data = blocks(100, 4096)
    ours, target = aiocomm.Pages(data), np.zeros_like(data)
    lease = await b.lease_pages(aiocomm.Pages(target))
    remote = a.remote_pages(lease.handle)
    await a.put_pages(ours, [1, 5], remote, [2, 4])
    await lease.aclose()
    target[:] = 0
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(ours, [1, 5], remote, [2, 4])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get_pages(remote, [2, 4], aiocomm.Pages(np.zeros_like(data)), [1, 5])
    assert not target.any()


@pytest.mark.parametrize("way", ["put", "get"])
async def test_no_more_are_posted_than_a_queue_takes(
    way: str, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "fake0")
    data = blocks(1010, 512)  # so small that they are posted at once, by whoever holds the token
    give, take = some(1000, 1010, 1), some(1000, 1010, 2)
    rows = [(give[:1], take[:1]), (give, take)]
    async with world(2, links=("rdma",), warmup=True) as (a, b):
        there = np.zeros_like(data) if way == "put" else data
        here = data if way == "put" else np.zeros_like(data)
        async with await b.lease_pages(aiocomm.Pages(there)) as lease:
            remote, ours = a.remote_pages(lease.handle), aiocomm.Pages(here)
            if way == "put":  # the first gets the key
                calls = [(a.put_pages, (ours, here_at, remote, there_at)) for here_at, there_at in rows]
            else:
                calls = [(a.get_pages, (remote, there_at, ours, here_at)) for here_at, there_at in rows]
            await calls[0][0](*calls[0][1])
            before = sum(work(a, 1)[1:])
            async with anyio.create_task_group() as tasks:
                with adapters.stalled():
                    tasks.start_soon(calls[1][0], *calls[1][1])
                    await until(lambda: sum(work(a, 1)[1:]) > before)
                    assert sum(work(a, 1)[1:]) - before <= 64
            assert np.array_equal(there[take], here[give])


async def test_rows_among_other_transfers(pair: Pair) -> None:
    """They leave room in the queues for others."""
    a, b = pair
    data = blocks(9000, 600)
    ours, target = aiocomm.Pages(data), np.zeros_like(data)
    give, take = some(8000, 9000, 1), some(8000, 9000, 2)
    small, memory = blocks(64, 1000, 7), np.zeros((64, 1000), np.uint8)
    async with await b.lease_pages(aiocomm.Pages(target)) as lease, b.register(memory) as region:
        remote, there = a.remote_pages(lease.handle), a.remote(region.handle)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.put_pages, ours, give, remote, take)
            sending = b.send(small, 0)
            for row in range(64):
                await a.put(small[row], there[row * 1000 : (row + 1) * 1000])
            got = np.zeros_like(small)
            await a.recv(got, 1)
            await sending
        assert np.array_equal(memory, small)
        assert np.array_equal(got, small)
        assert np.array_equal(target[take], data[give])
