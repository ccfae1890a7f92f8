"""GPU memory and host arrays of `aiocomm.empty()`: copy engines reach them in the other process."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Kind
from fakes.simulated import Engine
from harness import LIMIT_S, held_at_rest, messages_pass, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

BLOCK = 16 << 20  # of what is pinned at a time: no copy goes over the end of one
SIZES = [1, 4096, (1 << 20) + 3, 2 * BLOCK + 77]


@pytest.fixture
async def pair(gpu: object) -> AsyncIterator[Pair]:
    """Two ranks of a host."""
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        yield a, b


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def shared(nbytes: int, offset: int = 0) -> np.ndarray[Any, Any]:
    array = aiocomm.empty(nbytes + offset, np.uint8)
    array[:] = 0
    return array[offset:]


def directly(comm: aiocomm.Communicator) -> int:
    """Messages that a copy engine brought to their place, or took from there."""
    return sum(link.messages_by_path.get("device", 0) for link in comm.statistics().links.values())


def carried(source: aiocomm.Communicator, sink: aiocomm.Communicator) -> int:
    """Bytes that both ends say have gone this way, and which are said to have gone by the same link."""
    sent = {name: link.bytes_sent for name, link in source.statistics().links.items()}
    received = {name: link.bytes_received for name, link in sink.statistics().links.items()}
    assert sent == received
    return sum(sent.values())


async def once_pinned(comm: aiocomm.Communicator, move: Callable[[], Awaitable[object]]) -> None:
    """Move the same until its memory is pinned: what asks for that is staged, and does not wait."""
    before = directly(comm)
    with anyio.fail_after(LIMIT_S):
        while directly(comm) == before:
            await move()


async def message(pair: Pair, source: Any, into: Any) -> None:
    """A message from rank 0 to rank 1."""
    a, b = pair
    receiving = b.recv(into, 0)
    await a.send(source, 1)
    await receiving


@pytest.mark.parametrize("offset", [0, 12345])
@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kind", ["send", "put", "get"])
async def test_gpu_to_shared(pair: Pair, kind: str, nbytes: int, offset: int) -> None:
    a, b = pair
    source, into = DeviceArray(nbytes), shared(nbytes, offset)
    turns = 0

    async def move() -> None:
        nonlocal turns
        turns += 1
        data = random(nbytes, turns)
        source.write(data)
        into[:] = 0
        if kind == "send":
            await message(pair, source, into)
        elif kind == "put":
            await a.put(source, a.remote(region.handle), notify=b"there")
        else:
            await b.get(b.remote(region.handle), into)
        np.testing.assert_array_equal(into, data)

    async with (a if kind == "get" else b).register(source if kind == "get" else into) as region:
        await once_pinned(a, move)
        if kind == "put":
            notes = b.notifications()
            for _ in range(turns):
                note = await anext(notes)
                assert (note.payload, note.nbytes) == (b"there", nbytes)
            await notes.aclose()
    assert directly(a) == directly(b)
    assert carried(a, b) == turns * nbytes


@pytest.mark.parametrize("offset", [0, 12345])
@pytest.mark.parametrize("nbytes", [(1 << 20) + 3, 2 * BLOCK + 77])
@pytest.mark.parametrize("kind", ["send", "put", "get"])
async def test_shared_to_gpu(pair: Pair, kind: str, nbytes: int, offset: int) -> None:
    a, b = pair
    source, into = shared(nbytes, offset), DeviceArray(nbytes)
    turns = 0

    async def move() -> None:
        nonlocal turns
        turns += 1
        source[:] = random(nbytes, turns)
        if kind == "send":
            await message(pair, source, into)
        elif kind == "put":
            await a.put(source, a.remote(region.handle))
        else:
            await b.get(b.remote(region.handle), into)
        np.testing.assert_array_equal(into.numpy(), source)

    async with (a if kind == "get" else b).register(source if kind == "get" else into) as region:
        await once_pinned(b, move)
    assert carried(a, b) == turns * nbytes


async def test_many_at_once_to_parts_of_one_array(pair: Pair) -> None:
    a, b = pair
    into = shared(64 * 100_003)
    sources = [DeviceArray(100_003).write(random(100_003, i)) for i in range(64)]
    parts = into.reshape(64, -1)

    async def move() -> None:
        into[:] = 0
        receiving = [b.recv(part, 0, tag=i) for i, part in enumerate(parts)]
        sending = [a.send(source, 1, tag=i) for i, source in enumerate(sources)]
        for transfer in [*sending, *receiving]:
            await transfer
        for i, part in enumerate(parts):
            np.testing.assert_array_equal(part, random(100_003, i))

    before = directly(a)
    with anyio.fail_after(LIMIT_S):
        while directly(a) - before < 64:
            before = directly(a)
            await move()


@pytest.mark.parametrize("way", ["to_host", "to_device"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_a_cancelled_one_is_over_before_its_memory_is_free(
    pair: Pair, simulator: Simulator, way: str, side: str
) -> None:
    a, b = pair
    nbytes = 3 * BLOCK
    ours, theirs = (DeviceArray(nbytes).write(random(nbytes)), shared(nbytes))
    source, into = (ours, theirs) if way == "to_host" else (theirs, ours)
    engine = Engine.TO_HOST if way == "to_host" else Engine.TO_DEVICE
    gpu = a if way == "to_host" else b

    move = partial(message, pair, source, into)
    await once_pinned(gpu, move)
    simulator.pause(0, engine)
    sending, receiving = a.send(source, 1), b.recv(into, 0)
    await anyio.to_thread.run_sync(simulator.wait_ready, 0, engine)
    given_up, other = (sending, receiving) if side == "sender" else (receiving, sending)
    given_up.cancel()
    await messages_pass(a, b, times=3)
    assert not given_up.done()  # an engine is at its memory
    simulator.resume(0, engine)
    with anyio.fail_after(LIMIT_S):
        await until(lambda: given_up.done() and other.done())
    assert given_up.cancelled()
    with pytest.raises(aiocomm.TransferCancelled):
        await other
    before = np.array(theirs)
    await messages_pass(a, b, times=3)
    np.testing.assert_array_equal(theirs, before)
    await once_pinned(gpu, move)
    assert not simulator.violations()


async def test_a_deadline_ends_it_once_the_engine_has(pair: Pair, simulator: Simulator) -> None:
    a, b = pair
    source, into = DeviceArray(1 << 20), shared(1 << 20)

    move = partial(message, pair, source, into)
    await once_pinned(a, move)
    simulator.pause(0, Engine.TO_HOST)
    sending, receiving = a.send(source, 1), b.recv(into, 0, deadline=0.01)
    await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
    simulator.resume(0, Engine.TO_HOST)
    with anyio.fail_after(LIMIT_S):
        await until(lambda: sending.done() and receiving.done())
    assert (sending.exception() is None) == (receiving.exception() is None)


async def test_a_failing_copy_is_told_to_both(pair: Pair, simulator: Simulator) -> None:
    a, b = pair
    source, into = DeviceArray(1 << 20), shared(1 << 20)

    move = partial(message, pair, source, into)
    await once_pinned(a, move)
    simulator.fail("cuMemcpyAsync", 719)
    sending, receiving = a.send(source, 1), b.recv(into, 0)
    with anyio.fail_after(LIMIT_S):
        await until(lambda: sending.done() and receiving.done())
    for transfer in (sending, receiving):
        with pytest.raises(aiocomm.LinkError):
            transfer.result()
    simulator.heal()


@pytest.mark.parametrize("way", ["to_host", "to_device"])
async def test_where_pinning_is_refused_messages_are_staged(
    pair: Pair, simulator: Simulator, way: str
) -> None:
    a, b = pair
    nbytes = (1 << 20) + 3
    simulator.fail("cuMemHostRegister", 801, forever=True)
    data = random(nbytes)
    device, host = DeviceArray(nbytes).write(data), shared(nbytes)
    source, into = (device, host) if way == "to_host" else (host, device)
    host[:] = data
    for _ in range(3):
        await message(pair, source, into)
        np.testing.assert_array_equal(host, data)
        np.testing.assert_array_equal(device.numpy(), data)
    assert directly(a) == directly(b) == 0
    simulator.heal()


async def test_no_more_is_pinned_than_is_allowed(gpu: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_GPU_PINNED_BYTES", str(BLOCK))
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        move = partial(message, (a, b))
        small, large = (DeviceArray(1 << 20), shared(1 << 20)), (DeviceArray(2 * BLOCK), shared(2 * BLOCK))
        await once_pinned(a, lambda: move(*small))
        before = directly(a)
        for _ in range(3):
            await move(*large)
        assert directly(a) == before
        await move(*small)
        assert directly(a) == before + 1


async def test_what_its_owner_frees_is_not_kept(pair: Pair, simulator: Simulator) -> None:
    a, b = pair
    source = DeviceArray(1 << 20)

    async def round_trip() -> None:
        into = shared(1 << 20)

        move = partial(message, pair, source, into)
        await once_pinned(a, move)

    await round_trip()
    await messages_pass(a, b)
    with anyio.fail_after(LIMIT_S):
        before = await held_at_rest()
    registered = simulator.held("registered")
    for _ in range(5):
        await round_trip()
    await messages_pass(a, b)
    with anyio.fail_after(LIMIT_S):
        await until(lambda: simulator.held("registered") <= registered)
        assert (await held_at_rest())["mappings"] <= before["mappings"]


async def test_a_region_closes_once_the_engine_is_done_with_it(pair: Pair, simulator: Simulator) -> None:
    a, b = pair
    source, into = DeviceArray(1 << 20), shared(1 << 20)
    region = b.register(into)
    remote = a.remote(region.handle)
    await once_pinned(a, lambda: a.put(source, remote))
    simulator.pause(0, Engine.TO_HOST)
    putting = a.put(source, remote)
    await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
    closed = anyio.Event()

    async def close() -> None:
        await region.aclose()
        closed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        await messages_pass(a, b, times=3)
        assert not closed.is_set()
        simulator.resume(0, Engine.TO_HOST)
    await putting
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put(source, remote)


async def test_a_pool_array_goes_the_same_way(pair: Pair) -> None:
    a, _ = pair
    data = random(1 << 20)
    source, into = DeviceArray(1 << 20, kind=Kind.POOL).write(data), shared(1 << 20)

    async def move() -> None:
        into[:] = 0
        await message(pair, source, into)
        np.testing.assert_array_equal(into, data)

    await once_pinned(a, move)


class Cache:
    """Paged memory of two arrays, each on a GPU or in shared host memory."""

    def __init__(self, where: str, count: int, page: tuple[int, ...], axis: int, apart: bool) -> None:
        shape = (*page[:axis], count, *page[axis:])
        self._axis = axis
        make = (lambda: DeviceArray(shape)) if where == "gpu" else (lambda: aiocomm.empty(shape, np.uint8))
        self.arrays = [make() for _ in range(1 + apart)]
        self.pages = (
            aiocomm.Pages(self.arrays, page_axis=axis)
            if apart
            else aiocomm.Pages(self.arrays[0], page_axis=axis)
        )

    def write(self, seed: int) -> None:
        for number, array in enumerate(self.arrays):
            data = random(array.nbytes, seed + number).reshape(array.shape)
            if isinstance(array, DeviceArray):
                array.write(data)
            else:
                array[:] = data

    def read(self) -> list[np.ndarray[Any, Any]]:
        """With the pages first."""
        arrays = [a.numpy() if isinstance(a, DeviceArray) else np.array(a) for a in self.arrays]
        return [np.moveaxis(array, self._axis, 0) for array in arrays]


@pytest.mark.parametrize("kind", ["put", "get"])
@pytest.mark.parametrize(
    ("count", "page", "axis", "apart"),
    [
        (200, (3000,), 0, False),
        (60, (16, 2048), 1, True),  # a row of each layer
        (9, (5 << 20,), 0, False),  # some lie over the end of a block
        (3, (2, (17 << 20) + 5), 1, False),  # all do, and over two
    ],
)
@pytest.mark.parametrize("sm_budget", [None, 4])
async def test_pages(
    pair: Pair,
    kind: str,
    count: int,
    page: tuple[int, ...],
    axis: int,
    apart: bool,
    sm_budget: int | None,
) -> None:
    a, b = pair
    ours, theirs = (Cache(where, count, page, axis, apart) for where in ("gpu", "shared"))
    give, take = (
        np.random.default_rng(3).permutation(count)[: count // 2 + 1],
        np.arange(count)[-(count // 2 + 1) :],
    )
    source, sink = (ours, theirs) if kind == "put" else (theirs, ours)
    turns = 0
    async with await b.lease_pages(theirs.pages) as lease:
        remote = a.remote_pages(lease.handle)

        async def move() -> None:
            nonlocal turns
            turns += 1
            source.write(turns)
            sink.write(turns + 100)
            expected = sink.read()
            for array, data in zip(expected, source.read(), strict=True):
                array[take] = data[give]
            if kind == "put":
                await a.put_pages(ours.pages, give, remote, take, notify=b"all", sm_budget=sm_budget)
            else:
                await a.get_pages(remote, give, ours.pages, take, sm_budget=sm_budget)
            for array, wanted in zip(sink.read(), expected, strict=True):
                np.testing.assert_array_equal(array, wanted)

        await once_pinned(a, move)


async def test_small_rows_are_packed(pair: Pair) -> None:
    a, b = pair
    ours, theirs = Cache("gpu", 100, (1000,), 0, False), Cache("shared", 100, (1000,), 0, False)
    give = np.arange(0, 100, 2)
    ours.write(1)
    async with await b.lease_pages(theirs.pages) as lease:
        await a.put_pages(ours.pages, give, a.remote_pages(lease.handle), give)
    np.testing.assert_array_equal(theirs.read()[0][give], ours.read()[0][give])
    counted = a.statistics().links["cuda"].messages_by_path
    assert (counted["staged"], counted["device"]) == (1, 0)


async def test_pages_of_private_memory_go_by_lists(pair: Pair) -> None:
    a, b = pair
    ours = aiocomm.Pages(DeviceArray((100, 3000)).write(random(300_000).reshape(100, 3000)))
    memory = np.zeros((100, 3000), np.uint8)
    async with await b.lease_pages(aiocomm.Pages(memory)) as lease:
        remote = a.remote_pages(lease.handle)
        for _ in range(3):
            memory[:] = 0
            await a.put_pages(ours, range(0, 100, 2), remote, range(50))
            np.testing.assert_array_equal(memory[:50], random(300_000).reshape(100, 3000)[::2])
    assert directly(a) == 0


async def test_pages_whose_lease_ends_meanwhile_are_refused(pair: Pair, simulator: Simulator) -> None:
    a, b = pair
    ours, theirs = Cache("gpu", 50, (4096,), 0, False), Cache("shared", 50, (4096,), 0, False)
    give = np.arange(0, 50, 2)
    lease = await b.lease_pages(theirs.pages)
    remote = a.remote_pages(lease.handle)
    await once_pinned(a, lambda: a.put_pages(ours.pages, give, remote, give))
    simulator.pause(0, Engine.TO_HOST)
    closed = anyio.Event()

    async def close() -> None:
        await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            await messages_pass(a, b, times=3)
            assert not closed.is_set()
            simulator.resume(0, Engine.TO_HOST)

    async def end() -> None:
        await lease.aclose()
        closed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(close)
        await a.put_pages(ours.pages, give, remote, give)
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(ours.pages, give, remote, give)
