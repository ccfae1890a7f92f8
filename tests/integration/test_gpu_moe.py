"""Dispatch and combine of GPU arrays: what host arrays give, byte by byte, on every path."""

from __future__ import annotations

import gc
import os
import signal
import struct
import sys
from typing import Any

import anyio
import cloudpickle
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Kind, Stream, driver
from gpu_experts import EXPERTS, LINKS, Rows, batch, layer, on_gpu, to_host
from harness import LIMIT_S, all_call, held_up, world

import aiocomm
from aiocomm.collectives import kernels
from aiocomm.launch import WorkerError
from aiocomm.moe import device_exchange, exchange, memory, sources
from aiocomm_native import _core

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

# ------------------------------------------------------------ what comes back


@pytest.mark.parametrize("path", ["auto", "latency", "bandwidth"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_a_layer_is_that_of_host_arrays(size: int, path: str) -> None:
    async with world(size, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            for tokens, hidden in ((0, 8), (1, 8), (37, 64), (200, 300), (20, 1), (3, 5)):
                await layer(comm, tokens, hidden, path=path, ids_on_gpu=tokens != 20)

        await all_call(members, rank)
        calls = members[0].statistics().collectives
        if size > 1:
            assert ("combine/bandwidth" in calls) == (path == "bandwidth")
            assert ("dispatch/bandwidth" in calls) == (path == "bandwidth")


@pytest.mark.parametrize("wire", [None, "float32", "float16"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
async def test_dtypes(dtype: Any, wire: Any) -> None:
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            for tokens, hidden in ((31, 64), (30, 7)):
                await layer(comm, tokens, hidden, dtype, wire=wire)

        await all_call(members, rank)


async def test_each_source_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.kernels_of.cache_clear()
    known, compiled = [], kernels.compiled

    def noted(source: str, architecture: str) -> bytes:
        known.append(source)
        return compiled(source, architecture)

    monkeypatch.setattr(kernels, "compiled", noted)
    async with world(1, links=LINKS) as (comm,):
        for _ in range(2):
            await layer(comm, 5, 16)
    assert len(known) == 2  # rows moved, and sums


async def test_a_kernel_is_launched_by_the_call_itself() -> None:
    """Waking the copy thread takes longer than a launch; it may be awake, though, and come first."""
    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 5, 16)
        pool = memory.Pool(comm._engine, 0)
        function = pool.kernels.entry(sources.MOVE_SOURCE, "move_rows")
        argument = bytes(struct.calcsize(sources.MOVE))  # nothing to do

        def issued() -> int:
            return comm.links["cuda"].statistics().device["gpu0.by_loop"]

        at_once = 0
        while not at_once:  # in time, or the test has taken too long
            before = issued()
            where = pool.home, [], [], comm.rank, 0
            launched, _ = comm._engine.launch(function, 1, kernels.THREADS, argument, *where, 0, -1.0)
            at_once = issued() - before
            await launched
            await anyio.sleep(1e-3)  # in which that thread falls asleep
        assert at_once == 1


async def test_larger_than_kernels_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large is packed and got, by each rank as it decides."""
    monkeypatch.setattr(device_exchange, "_LATENCY_BYTES", 10_000)
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            tokens = [3, 40, 90][comm.rank]
            for _ in range(3):
                await layer(comm, tokens, 64)

        await all_call(members, rank)
        assert members[0].statistics().collectives["dispatch/bandwidth"] == 3


async def test_lists_that_do_not_ride(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SLOT_BYTES", "_SLOTS_BYTES", "_RIDE_BYTES"):
        monkeypatch.setattr(exchange, name, 1024)
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            await layer(comm, 301, 8)
            await layer(comm, 2, 8)

        await all_call(members, rank)


async def test_slots_of_an_odd_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a group of 33 would be: lists in them lie where their elements may."""
    monkeypatch.setattr(exchange, "_SLOT_BYTES", 65_537)
    async with world(3, links=LINKS, warmup=True) as members:
        await all_call(members, lambda comm: layer(comm, 37, 16))


async def test_placements_groups_and_bytes() -> None:
    """Tokens of any dtype, quantised ones among them; experts anywhere; a group that is not the world."""
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([2, 0, 1])
            await layer(group, 30, 16, placement=[2, 0, 1, 1, 0, 2, 0, 1, 2, 0])
            x = np.arange(12, dtype=np.uint8).reshape(4, 3) + comm.rank
            came = await group.dispatch(on_gpu(comm.rank, x), [0, 1, 2, 0], experts=3)
            rows = [np.arange(12, dtype=np.uint8).reshape(4, 3) + r for r in group.ranks]
            mine = [x[np.array([0, 1, 2, 0]) == group.rank] for x in rows]
            assert np.array_equal(to_host(came.tokens, np.uint8), np.concatenate(mine))
            assert came.routed_to(0).tolist() == [0, 3]
            with pytest.raises(aiocomm.UsageError, match=r"torch\.as_tensor"):
                _ = came.inputs

        await all_call(members, rank)


async def test_a_rank_without_rows_stays_on_its_gpu() -> None:
    """Empty arrays do not say where they are: then it is the GPU that the caller's library works on."""
    last = driver().count - 1
    async with world(1, links=LINKS) as (comm,):
        driver().use(last)
        came = await comm.dispatch(
            DeviceArray((0, 8), np.float32, device=last), np.zeros((0, 2), np.int64), experts=2
        )
        assert came.tokens.device == last
        driver().use(0)
        result = await comm.combine(DeviceArray((0, 8), np.float32, device=last), came)
        assert result.device == last


async def test_a_combine_without_rows_on_another_channel() -> None:
    last = driver().count - 1
    async with world(1, links=LINKS) as (comm,):
        x = DeviceArray((3, 8), np.float32, device=last).write(np.ones((3, 8), np.float32))
        came = await comm.dispatch(x, np.full((3, 2), -1), experts=2)
        driver().use(0)
        outputs = DeviceArray((0, 8), np.float32, device=last)
        result = await comm.combine(outputs, came, channel=comm.channel("other"))
        assert not to_host(result, np.float32).any()


async def test_calls_that_repeat_get_no_memory_from_the_driver(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """Memory that was read comes back by the headers of later calls; that of arrays, with them."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 40, 32)
            given, outputs = on_gpu(comm.rank, x), on_gpu(comm.rank, np.zeros((240, 32), np.float32))
            in_a_row = 0
            while in_a_row < 6:  # soon: how far apart ranks are differs from call to call
                await comm.barrier()
                made = simulator.calls("cuMemAlloc"), simulator.calls("cuMemHostAlloc")
                await comm.barrier()
                came = await comm.dispatch(given, ids, weights, experts=EXPERTS)
                await comm.combine(Rows(outputs, len(came.rows)), came)
                del came
                await comm.barrier()
                same = (simulator.calls("cuMemAlloc"), simulator.calls("cuMemHostAlloc")) == made
                in_a_row = in_a_row + 1 if same else 0

        await all_call(members, rank)


async def test_memory_goes_back_to_the_driver(gpu: Driver, simulator: simulated.Simulator) -> None:
    for device in range(2):
        kernels.kernels_of(device)

    def kept() -> dict[str, int]:
        gc.collect()
        assert _core.given_back(LIMIT_S)  # by a thread of its own
        return {kind: simulator.held(kind) for kind in ("allocations", "events")}

    before = kept()
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            await layer(comm, 37, 64)
            await layer(comm, 37, 64, path="bandwidth")

        await all_call(members, rank)
    del members
    assert kept() == before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_where_memory_is_short_that_which_is_kept_goes_back(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    async with world(1, links=LINKS) as (comm,):
        await layer(comm, 37, 64)
        (pool,) = comm._members()._expert_scope(None)[0].pools.values()
        for block in [pool.take(1 << 20, frozenset()) for _ in range(2)]:
            pool.give_back(block)
        del block
        held = simulator.held("allocations")
        simulator.fail("cuMemAlloc", 2)
        pool.take(2 << 20, frozenset())
        assert simulator.held("allocations") < held
        pool.give_back(pool.take(1 << 20, frozenset()))
        for _ in range(2):  # where that is not enough, and where nothing is kept
            simulator.fail("cuMemAlloc", 2, forever=True)
            with pytest.raises(
                aiocomm.LinkError, match=r"GPU 0 has no 2097152 bytes left .*empty_cache"
            ) as caught:
                pool.take(2 << 20, frozenset())
            assert caught.value.code == 2
            assert not pool._kept
            simulator.heal()
        simulator.fail("cuMemAlloc", 1)
        with pytest.raises(aiocomm.LinkError, match="gives CUDA_ERROR_INVALID_VALUE"):
            pool.take(2 << 20, frozenset())
        await layer(comm, 37, 64)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio starts tasks in any order
async def test_micro_batches_overlap() -> None:
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            async def one(turn: int) -> None:
                x, ids, weights = batch(comm.rank, 20 + turn, 16)
                came = await comm.dispatch(on_gpu(comm.rank, x), ids, weights, experts=EXPERTS)
                held = to_host(came.tokens, np.float32)
                expected = np.concatenate(
                    [
                        batch(r, 20 + turn, 16)[0][np.isin(batch(r, 20 + turn, 16)[1], came.experts).any(1)]
                        for r in range(comm.size)
                    ]
                )
                assert np.array_equal(held, expected)

            async with anyio.create_task_group() as tasks:
                for turn in range(6):
                    tasks.start_soon(one, turn)

        await all_call(members, rank)


@pytest.mark.parametrize("kind", [Kind.VMM, Kind.POOL])
async def test_arrays_of_any_allocator(kind: Kind) -> None:
    """They are read by this rank's own GPU only."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 21, 16)
            expected = await comm.dispatch(x, ids, weights, experts=EXPERTS)
            came = await comm.dispatch(on_gpu(comm.rank, x, kind=kind), ids, weights, experts=EXPERTS)
            assert np.array_equal(to_host(came.tokens, np.float32), expected.tokens)

        await all_call(members, rank)


# ------------------------------------------------------------ streams


async def test_queued_work_is_waited_for() -> None:
    """Of the stream that is named, by the GPU: the loop goes on meanwhile."""
    async with world(2, links=LINKS, warmup=True) as members:
        streams = [Stream(device=rank % driver().count) for rank in range(2)]
        arrays = [on_gpu(rank, np.zeros((4, 8), np.uint8)) for rank in range(2)]
        came: dict[int, Any] = {}
        ids = np.array([[0], [1], [0], [1]])

        async def dispatch(comm: aiocomm.Communicator) -> None:
            stream = streams[comm.rank]
            came[comm.rank] = await comm.dispatch(arrays[comm.rank], ids, experts=2, stream=stream)
            ended.append(comm.rank)

        async def combine(comm: aiocomm.Communicator) -> None:
            stream = streams[comm.rank]
            results[comm.rank] = await comm.combine(outputs[comm.rank], came[comm.rank], stream=stream)
            ended.append(comm.rank)

        ended: list[int] = []
        gates = [stream.gate() for stream in streams]
        for rank, stream in enumerate(streams):
            stream.fill(arrays[rank], rank + 1)
        await held_up(members, dispatch, gates, ended)
        for rank in range(2):
            expected = np.repeat(np.array([1, 2], np.uint8), 2)[:, None] * np.ones(8, np.uint8)
            assert np.array_equal(to_host(came[rank].tokens, np.uint8), expected)
        ended.clear()
        results: dict[int, Any] = {}
        outputs = [on_gpu(rank, np.ones((4, 8), np.float32)) for rank in range(2)]
        gates = [stream.gate() for stream in streams]
        for rank, stream in enumerate(streams):
            stream.fill(outputs[rank], 0)
        await held_up(members, combine, gates, ended)
        for rank in range(2):
            assert not to_host(results[rank], np.float32).any()
        for stream in streams:
            stream.close()


async def test_a_stream_may_be_destroyed_before_its_tokens_go() -> None:
    """Nobody touches it afterwards, and its memory serves no other stream."""
    async with world(2, links=LINKS, warmup=True) as comms:
        ids = np.zeros((64, 1), np.int64)
        arrays = [on_gpu(rank, np.full((64, 16), rank + 1, np.float32)) for rank in range(2)]
        came: list[Any] = [None, None]

        async def dispatch(comm: aiocomm.Communicator) -> None:
            stream = Stream(device=comm.rank % driver().count)
            came[comm.rank] = await comm.dispatch(arrays[comm.rank], ids, experts=2, stream=stream)
            stream.close()

        for _ in range(3):
            await all_call(comms, dispatch)
            assert (to_host(came[0].tokens, np.float32)[:64] == 1).all()
            assert (to_host(came[0].tokens, np.float32)[64:] == 2).all()
            came[:] = [None, None]
            gc.collect()


async def test_expert_ids_of_a_busy_stream() -> None:
    """They are read once what computes them is done."""
    async with world(2, links=LINKS, warmup=True) as members:
        streams = [Stream(device=rank % driver().count) for rank in range(2)]
        ids = [on_gpu(rank, np.full((5, 1), 1, np.uint8)) for rank in range(2)]
        tokens = [on_gpu(rank, np.full((5, 4), rank, np.float32)) for rank in range(2)]
        ended: list[int] = []

        async def dispatch(comm: aiocomm.Communicator) -> None:
            rank = comm.rank
            came = await comm.dispatch(tokens[rank], ids[rank], experts=2, stream=streams[rank])
            assert came.starts.tolist() == ([0, 5, 10] if rank == 0 else [0, 0, 0])
            ended.append(rank)

        gates = [stream.gate() for stream in streams]
        for rank, stream in enumerate(streams):
            stream.fill(ids[rank], 0)
        await held_up(members, dispatch, gates, ended)
        for stream in streams:
            stream.close()


# ------------------------------------------------------------ processes


@pytest.mark.parametrize("mapped", [True, False])
async def test_between_processes(
    gpu: Driver, anyio_backend_name: str, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    if not mapped:
        if simulated.choose() is None:
            pytest.skip("needs a driver that refuses to map")
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuIpcOpenMemHandle:1+:1")
    async with aiocomm.spawn(_layers, n=2, links=LINKS) as comm:
        await _layers(comm)
        assert ("dispatch/bandwidth" in comm.statistics().collectives) is True


async def _layers(comm: aiocomm.Communicator) -> None:
    if simulated.choose() is not None:
        kernels.compiled = lambda source, architecture: source.encode() + b"\0"
    for path in ("auto", "latency", "bandwidth"):
        for tokens in (37, 200):
            await layer(comm, tokens, 64, path=path)


async def _die_in_the_middle(comm: aiocomm.Communicator) -> None:
    if simulated.choose() is not None:
        kernels.compiled = lambda source, architecture: source.encode() + b"\0"
    group = await comm.group(range(comm.size))
    x, ids, weights = batch(comm.rank, 40, 64)
    given = on_gpu(comm.rank, x)

    async def layers() -> None:
        for number in range(100_000):
            if comm.rank == 0 and number == 5:
                await comm.send(b"x", dst=2)
            came = await group.dispatch(given, ids, weights, experts=EXPERTS)
            outputs = on_gpu(comm.rank, np.ones((len(came.rows), 64), np.float32))
            await group.combine(outputs, came)

    if comm.rank == 2:

        async def kill() -> None:
            await comm.recv(bytearray(1), src=0)
            os.kill(os.getpid(), signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            await layers()
    with pytest.raises(aiocomm.ExpertsLostError, match="rank 2 is gone") as caught:
        await layers()
    assert caught.value.peer == 2
    left = await group.shrink(deadline=LIMIT_S)
    await layer(left, 30, 16)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_survivors_of_a_killed_rank_go_on() -> None:
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_die_in_the_middle, 2, links=LINKS) as comm:
            await _die_in_the_middle(comm)
    assert caught.value.exit_code == -signal.SIGKILL
