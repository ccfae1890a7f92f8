"""Collectives of GPU arrays that compute nothing; test_gpu_reductions.py has the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Kind, Stream, driver
from harness import all_call, held_up, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

LINKS = ("shm", "cuda")
SIZES = [1, 1000, (3 << 20) + 5]  # elements of a block


@pytest.fixture(params=[1, 2, 3, 4])
async def comms(request: pytest.FixtureRequest, gpu: Driver) -> AsyncIterator[list[aiocomm.Communicator]]:
    """Ranks with GPU memory, each on a device of its own where there are as many."""
    async with world(request.param, links=LINKS, warmup=True) as members:
        yield members


def block(rank: int, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, rank)).integers(0, 1 << 15, count, np.int16)


def on_gpu(rank: int, values: np.ndarray[Any, Any], **how: Any) -> DeviceArray:
    return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)


def empty(rank: int, count: int) -> DeviceArray:
    return on_gpu(rank, np.zeros(count, np.int16))


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("algorithm", [None, "direct", "ring"])
async def test_all_gather(comms: list[aiocomm.Communicator], count: int, algorithm: str | None) -> None:
    size = len(comms)
    expected = np.concatenate([block(rank, count) for rank in range(size)])

    async def call(comm: aiocomm.Communicator) -> None:
        out = empty(comm.rank, size * count)
        await comm.all_gather(out, on_gpu(comm.rank, block(comm.rank, count)), algorithm=algorithm)
        assert np.array_equal(out.numpy(), expected)
        inside = np.zeros(size * count, np.int16)
        inside[comm.rank * count : (comm.rank + 1) * count] = block(comm.rank, count)
        whole = on_gpu(comm.rank, inside)
        own = whole.part(comm.rank * count * 2, count * 2)
        view = type(
            "View",
            (),
            {
                "__cuda_array_interface__": own.__cuda_array_interface__
                | {"typestr": "<i2", "shape": (count,)}
            },
        )()
        await comm.all_gather(whole, view, algorithm=algorithm)
        assert np.array_equal(whole.numpy(), expected)

    await all_call(comms, call)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("algorithm", [None, "direct", "binomial", "chain", "pipelined"])
async def test_broadcast(comms: list[aiocomm.Communicator], count: int, algorithm: str | None) -> None:
    root = len(comms) - 1

    async def call(comm: aiocomm.Communicator) -> None:
        array = on_gpu(root, block(7, count)) if comm.rank == root else empty(comm.rank, count)
        await comm.broadcast(array, root, algorithm=algorithm)
        assert np.array_equal(array.numpy(), block(7, count))

    await all_call(comms, call)


@pytest.mark.parametrize("count", SIZES)
async def test_scatter_gather_and_all_to_all(comms: list[aiocomm.Communicator], count: int) -> None:
    size, root = len(comms), 0
    all_of = np.concatenate([block(rank, count) for rank in range(size)])

    async def call(comm: aiocomm.Communicator) -> None:
        rank = comm.rank
        mine = empty(rank, count)
        await comm.scatter(mine, on_gpu(rank, all_of) if rank == root else None, root)
        assert np.array_equal(mine.numpy(), block(rank, count))
        whole = empty(rank, size * count) if rank == root else None
        await comm.gather(whole, mine, root)
        if whole is not None:
            assert np.array_equal(whole.numpy(), all_of)
        give = on_gpu(rank, np.concatenate([block(size * rank + to, count) for to in range(size)]))
        take = empty(rank, size * count)
        await comm.all_to_all(take, give)
        expected = np.concatenate([block(size * source + rank, count) for source in range(size)])
        assert np.array_equal(take.numpy(), expected)

    await all_call(comms, call)


async def test_blocks_of_different_size(comms: list[aiocomm.Communicator]) -> None:
    size = len(comms)
    counts = [100 * (rank % 3) for rank in range(size)]
    blocks = [block(rank, counts[rank]) for rank in range(size)]

    async def call(comm: aiocomm.Communicator) -> None:
        rank = comm.rank
        out = empty(rank, sum(counts))
        await comm.all_gatherv(out, on_gpu(rank, blocks[rank]), counts)
        assert np.array_equal(out.numpy(), np.concatenate(blocks))
        into, mine = empty(rank, sum(counts)), empty(rank, counts[rank])
        await comm.gatherv(into if rank == 0 else None, on_gpu(rank, blocks[rank]), counts)
        await comm.scatterv(mine, into if rank == 0 else None, counts)
        assert np.array_equal(mine.numpy(), blocks[rank])
        give = on_gpu(rank, np.concatenate([block(rank, counts[to], to) for to in range(size)]))
        take = empty(rank, counts[rank] * size)
        await comm.all_to_allv(take, give, [counts[rank]] * size, counts)
        expected = np.concatenate([block(source, counts[rank], rank) for source in range(size)])
        assert np.array_equal(take.numpy(), expected)

    await all_call(comms, call)


async def test_a_call_waits_for_its_stream(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        streams = [Stream(rank % driver().count) for rank in range(2)]
        gates = [stream.gate() for stream in streams]
        outs, ended = [empty(rank, 2000) for rank in range(2)], []

        async def call(comm: aiocomm.Communicator) -> None:
            mine = empty(comm.rank, 1000)
            streams[comm.rank].fill(mine, comm.rank + 1)
            await comm.all_gather(outs[comm.rank], mine, stream=streams[comm.rank])
            ended.append(comm.rank)

        await held_up(comms, call, gates, ended)
        for out in outs:
            assert np.array_equal(out.numpy(), np.repeat(np.array([0x0101, 0x0202], np.int16), 1000))
        for stream in streams:
            stream.close()


async def test_what_differs_or_cannot_be_is_refused_on_all_ranks(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        refused: list[str] = []

        def gpu_and(other: Callable[[int], Any]) -> Callable[[aiocomm.Communicator], Any]:
            async def call(comm: aiocomm.Communicator) -> None:
                with pytest.raises(aiocomm.UsageError) as caught:
                    await other(comm.rank)(comm)
                refused.append(str(caught.value))

            return call

        def arrays(rank: int) -> tuple[Any, Any]:
            if rank == 0:
                return empty(0, 20), empty(0, 10)
            return np.zeros(20, np.int16), np.zeros(10, np.int16)

        def mixed(rank: int) -> Any:
            return lambda comm: comm.all_gather(*arrays(rank))

        await all_call(comms, gpu_and(mixed))
        assert len(set(refused)) == 1
        assert "on GPUs" in refused[0]
        refused.clear()
        half = gpu_and(lambda rank: lambda comm: comm.all_gather(empty(rank, 20), np.zeros(10, np.int16)))
        await all_call(comms, half)
        assert "one on a GPU" in refused[0]
        refused.clear()
        scratch = gpu_and(
            lambda rank: lambda comm: comm.all_gather(empty(rank, 20), empty(rank, 10), algorithm="bruck")
        )
        await all_call(comms, scratch)
        assert "scratch memory" in refused[0]
        refused.clear()

        def managed(rank: int) -> Any:
            one = on_gpu(rank, np.zeros(10, np.int16), kind=Kind.MANAGED if rank else Kind.MALLOC)
            return lambda comm: comm.all_gather(empty(rank, 20), one)

        await all_call(comms, gpu_and(managed))
        assert len(set(refused)) == 1
        assert "managed" in refused[0]


async def test_between_processes(gpu: Driver, anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    count = 100_000

    async def work(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver

        here = comm.rank % driver().count
        out = DeviceArray(3 * count, np.int16, device=here)
        mine = DeviceArray(count, np.int16, device=here).write(np.full(count, comm.rank + 1))
        for _ in range(3):
            await comm.all_gather(out, mine)
            assert np.array_equal(out.numpy(), np.repeat(np.arange(1, 4, dtype=np.int16), count))
            await comm.broadcast(out, 2)

    async with aiocomm.spawn(work, n=2, links=LINKS) as comm:
        await work(comm)
