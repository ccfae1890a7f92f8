"""All-reduce of GPU arrays by one kernel per rank, and by messages where not all ranks can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Kind, Stream, driver
from harness import all_call, given_up_halfway, held_up, world
from integration.test_collectives import lost_before_a_repeat, repeats_and_their_ends

import aiocomm
from aiocomm.collectives import device_shared, kernels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

LINKS = ("shm", "cuda")
COUNTS = [1, 1003, 100_000]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each other, however slow the machine is."""
    monkeypatch.setattr(device_shared, "STAYS_S", 20.0)


@pytest.fixture(params=[2, 3, 4])
async def comms(request: pytest.FixtureRequest, gpu: Driver) -> AsyncIterator[list[aiocomm.Communicator]]:
    async with world(request.param, links=LINKS, warmup=True) as members:
        yield members


def on_gpu(rank: int, values: np.ndarray[Any, Any], **how: Any) -> DeviceArray:
    return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)


def block(rank: int, turn: int, count: int, dtype: str = "f4") -> np.ndarray[Any, Any]:
    """Small whole numbers, whose sums are exact."""
    return np.random.default_rng((rank, turn)).integers(1, 9, count, np.uint8).astype(dtype)


def total(size: int, turn: int, count: int, dtype: str = "f4") -> np.ndarray[Any, Any]:
    return sum(block(rank, turn, count, dtype) for rank in range(size)).astype(dtype)  # type: ignore[union-attr]


def called(comm: aiocomm.Communicator) -> dict[str, int]:
    return dict(comm.statistics().collectives)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("count", COUNTS)
async def test_repeats(comms: list[aiocomm.Communicator], count: int) -> None:
    size, turns = len(comms), 4

    async def call(comm: aiocomm.Communicator) -> None:
        rank = comm.rank
        x, out = on_gpu(rank, block(rank, 0, count)), on_gpu(rank, np.zeros(count, "f4"))
        for turn in range(turns):
            x.write(block(rank, turn, count))
            await comm.all_reduce(x, out=out)
            assert np.array_equal(out.numpy(), total(size, turn, count))
            assert np.array_equal(x.numpy(), block(rank, turn, count))
            await comm.all_reduce(x)
            assert np.array_equal(x.numpy(), total(size, turn, count))

    await all_call(comms, call)
    assert called(comms[0]) == {"all_reduce/one_shot": 2, "all_reduce/kernels": 2 * (turns - 1)}


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        (dtype, op)
        for dtype in ("f8", "f2", "i1", "u4")
        for op in ("sum", "prod", "min", "max", *(["mean"] if dtype in ("f8", "f2") else []))
    ],
)
@pytest.mark.parametrize("offset", [0, 8])
@pytest.mark.usefixtures("patient")
async def test_operators_dtypes_and_places(gpu: Driver, dtype: str, op: str, offset: int) -> None:
    async with world(3, links=LINKS, warmup=True) as comms:
        blocks = [
            np.random.default_rng(rank).integers(1, 4, 1001, np.uint8).astype(dtype) for rank in range(3)
        ]
        ufunc = {"prod": np.multiply, "min": np.minimum, "max": np.maximum}.get(op, np.add)
        expected = ufunc.reduce(np.stack(blocks), dtype=np.dtype(dtype))
        if op == "mean":
            expected = (expected / expected.dtype.type(3)).astype(dtype)

        async def call(comm: aiocomm.Communicator) -> None:
            for _ in range(3):
                x = on_gpu(comm.rank, blocks[comm.rank], offset=offset * comm.rank)
                await comm.all_reduce(x, op)
                np.testing.assert_array_equal(x.numpy(), expected)

        await all_call(comms, call)
        assert called(comms[0])["all_reduce/kernels"] == 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("waits", [True, False])
async def test_work_on_the_users_stream_is_waited_for(gpu: Driver, waits: bool) -> None:
    """By the kernels of all ranks; or it is over when the call begins."""
    async with world(2, links=LINKS, warmup=True) as comms:
        streams = [Stream(device=rank % driver().count) for rank in range(2)]
        arrays = [on_gpu(rank, np.zeros(4000, "u1")) for rank in range(2)]
        ended: list[int] = []

        async def call(comm: aiocomm.Communicator) -> None:
            await comm.all_reduce(arrays[comm.rank], stream=streams[comm.rank])
            ended.append(comm.rank)

        await all_call(comms, call)
        ended.clear()
        gates = [stream.gate() for stream in streams] if waits else []
        for rank, stream in enumerate(streams):
            stream.fill(arrays[rank], rank + 1)
            if not waits:
                stream.synchronize()
        await held_up(comms, call, gates, ended)
        for array in arrays:
            assert np.array_equal(array.numpy(), np.full(4000, 3, "u1"))
        assert called(comms[0]) == {"all_reduce/one_shot": 1, "all_reduce/kernels": 1}
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("kind", [Kind.VMM, Kind.POOL])
async def test_memory_that_cannot_be_offered(gpu: Driver, kind: Kind) -> None:
    """One rank's is: all make the call by messages."""
    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn in range(3):
                how = {"kind": kind} if comm.rank == 1 else {}
                x = on_gpu(comm.rank, block(comm.rank, turn, 3000), **how)
                await comm.all_reduce(x)
                assert np.array_equal(x.numpy(), total(3, turn, 3000))

        await all_call(comms, call)
        assert called(comms[0]) == {"all_reduce/one_shot": 3}


async def test_a_rank_that_has_not_prepared_it(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, block(comm.rank, 0, 3000))
            for turn in range(4):
                x.write(block(comm.rank, turn, 3000))
                if comm.rank == 0:  # as after many other shapes
                    scope = comm._members()._scope(None)
                    for kept in (scope.prepared, scope.shared, scope.repeats):
                        kept.clear()
                await comm.all_reduce(x)
                assert np.array_equal(x.numpy(), total(2, turn, 3000))

        await all_call(comms, call)
        assert called(comms[1]) == {"all_reduce/one_shot": 4}


async def test_repeats_may_overlap(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            apart = comm.channel("apart")

            async def one(value: int, channel: Any) -> None:
                x = on_gpu(comm.rank, block(comm.rank, value, 5000))
                await comm.all_reduce(x, channel=channel)
                assert np.array_equal(x.numpy(), total(2, value, 5000))

            await one(0, comm.default)
            await one(0, apart)
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    # Calls on different channels need no common order.
                    both = (comm.default, apart) if comm.rank else (apart, comm.default)
                    for channel in both:
                        tasks.start_soon(one, 5 if channel is apart else 7, channel)

        await all_call(comms, call)


async def test_repeats_end_as_first_ones_do(gpu: Driver) -> None:
    async def call(comm: aiocomm.Communicator) -> None:
        await repeats_and_their_ends(comm, on_gpu(comm.rank, block(comm.rank, 0, 3000)))

    async with world(3, links=LINKS, warmup=True) as comms:
        await all_call(comms, call)


@pytest.mark.usefixtures("patient")
async def test_a_rank_that_is_late(gpu: Driver) -> None:
    """Those that wait for it go on without spinning, and launch their kernels then."""
    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, block(comm.rank, 0, 3000))
            await comm.all_reduce(x)
            for turn in range(3):
                x.write(block(comm.rank, turn, 3000))
                if comm.rank == 2:
                    await comm.recv(bytearray(1), src=0)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(comm.all_reduce, x)
                    if comm.rank == 0:
                        await anyio.lowlevel.checkpoint()
                        await comm.send(b"x", dst=2)
                assert np.array_equal(x.numpy(), total(3, turn, 3000))

        await all_call(comms, call)
        assert called(comms[1]) == {"all_reduce/one_shot": 1, "all_reduce/kernels": 3}


@pytest.mark.usefixtures("patient")
async def test_who_gives_up_stays_until_all_kernels_are_over(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """Its array is read and written by them."""
    async with world(2, links=LINKS, warmup=True) as comms:
        arrays = [on_gpu(rank, block(rank, 0, 3000)) for rank in range(2)]

        async def call(comm: aiocomm.Communicator) -> None:
            await comm.all_reduce(arrays[comm.rank])

        for _ in range(2):
            await all_call(comms, call)
        await given_up_halfway(comms, call, simulator, simulated.Engine.LOCAL)
        for rank, array in enumerate(arrays):
            array.write(block(rank, 1, 3000))
        await all_call(comms, call)
        assert np.array_equal(arrays[0].numpy(), total(2, 1, 3000))


async def test_a_rank_is_lost(gpu: Driver) -> None:
    async def call(comm: aiocomm.Communicator) -> None:
        x = on_gpu(comm.rank, block(comm.rank, 0, 3000))
        if (rest := await lost_before_a_repeat(comm, x)) is None:
            return
        for turn in range(2):
            x.write(block(comm.rank, turn, 3000))
            await rest.all_reduce(x)
            assert np.array_equal(x.numpy(), total(2, turn, 3000))

    async with world(3, links=LINKS, warmup=True) as comms:
        await all_call(comms, call)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("code", [2, 701])  # 701: the kernel asks for too much; the device goes on
async def test_a_launch_that_fails(gpu: Driver, simulator: simulated.Simulator, code: int) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, block(comm.rank, 0, 3000))
            for _ in range(2):
                await comm.all_reduce(x)
            await comm.barrier()
            if comm.rank == 0:
                simulator.fail("cuLaunchKernel", code)
            await comm.barrier()
            with pytest.raises((aiocomm.LinkError, aiocomm.TransferCancelled)):
                await comm.all_reduce(x)
            await comm.barrier()
            x.write(block(comm.rank, 1, 3000))
            await comm.all_reduce(x)
            assert np.array_equal(x.numpy(), total(2, 1, 3000))

        await all_call(comms, call)


@pytest.mark.parametrize(
    "lacking", ["", "FAKE_CUDA_FAIL=cuIpcOpenMemHandle:1+:1", "FAKE_CUDA_PEERS=0"], ids=["", "maps", "access"]
)
async def test_between_processes(
    gpu: Driver, anyio_backend_name: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some cannot map the others' memory, or have no access to other GPUs."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    simulates = simulated.choose() is not None
    mapped = not lacking
    monkeypatch.setattr(device_shared, "STAYS_S", device_shared.STAYS_S)  # to be restored
    if lacking:
        if not simulates:
            pytest.skip("needs a driver that refuses to map")
        monkeypatch.setenv(*lacking.split("=", 1))

    async def work(comm: aiocomm.Communicator) -> None:
        import numpy as np
        from fakes.gpu import DeviceArray, driver

        from aiocomm.collectives import device_shared

        if mapped:  # ranks wait for each other, however slow the machine is
            device_shared.STAYS_S = 20.0
        if simulates:
            kernels.compiled = lambda source, architecture: source.encode() + b"\0"
        for turn in range(6):
            # Memory that the others have not mapped yet, in some turns.
            if turn % 2 == 0:
                x = DeviceArray(5000, np.float32, device=comm.rank % driver().count)
            x.write(np.arange(5000, dtype=np.float32) * (comm.rank + 1) + turn)
            await comm.all_reduce(x)
            assert np.array_equal(x.numpy(), 6 * np.arange(5000, dtype=np.float32) + 3 * turn)
        ways = dict(comm.statistics().collectives)
        if mapped or comm.rank:  # the parent's driver was there before it was to fail
            # Nothing is prepared for the first call; one whose stream is busy for long goes by messages, too.
            assert (0 < ways.get("all_reduce/kernels", 0) <= 5) is mapped, ways

    async with aiocomm.spawn(work, n=2, links=LINKS) as comm:
        await work(comm)
