"""Dispatch and combine of GPU arrays: what host arrays give, byte by byte, on every path; and their ends."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import ml_dtypes
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import Address, DeviceArray, Driver, Handle, Kind, Stream, driver
from harness import all_call, held_up, world
from integration.test_gpu_gather import EVERY, as_library
from integration.test_gpu_reductions import assert_it_compiles

import aiocomm
from aiocomm.collectives import kernels
from aiocomm.launch import WorkerError
from aiocomm.moe import device_exchange, sources
from aiocomm.moe.placement import place
from aiocomm.moe.routing import arrange, route
from aiocomm.moe.weighting import add_up, weigh

if TYPE_CHECKING:
    from pathlib import Path

    Array = np.ndarray[Any, Any]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

LINKS = ("shm", "cuda")
EXPERTS = 10


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the simulated driver loads is the source."""
    if simulated.choose() is not None:
        monkeypatch.setattr(kernels, "compiled", lambda source, architecture: source.encode() + b"\0")
        kernels.kernels_of.cache_clear()


def on_gpu(rank: int, values: Array, **how: Any) -> DeviceArray:
    """A copy on this rank's GPU; of a dtype that the interface has no name for, its bytes."""
    shown = values if values.dtype.kind != "V" else values.view(np.uint16)
    return DeviceArray(shown.shape, shown.dtype, device=rank % driver().count, **how).write(shown)


def to_host(array: Any, dtype: Any) -> Array:
    """What a GPU array holds, row by row."""
    found = np.empty(array.shape, np.dtype(array.__cuda_array_interface__["typestr"]))
    if found.nbytes:
        driver().use(array.device)
        driver()(
            "cuMemcpyDtoH", Handle(found.ctypes.data), Address(array.address), ctypes.c_size_t(found.nbytes)
        )
    return found.view(dtype)


class Rows:
    """The first rows of a GPU array."""

    def __init__(self, whole: DeviceArray, count: int) -> None:
        self._whole = whole
        self.__cuda_array_interface__ = whole.__cuda_array_interface__ | {"shape": (count, *whole.shape[1:])}


def batch(rank: int, tokens: int, hidden: int, dtype: Any = np.float32) -> tuple[Array, Array, Array]:
    """What a rank dispatches: no other rank has it."""
    seeded = np.random.default_rng((rank, tokens))
    x = seeded.normal(size=(tokens, hidden)).astype(dtype)
    return x, seeded.integers(-1, EXPERTS, (tokens, 3)), seeded.random((tokens, 3), np.float32)


async def layer(
    group: Any,
    tokens: int,
    hidden: int,
    dtype: Any = np.float32,
    placement: Any = None,
    wire: Any = None,
    ids_on_gpu: bool = True,
    **options: Any,
) -> None:
    """A dispatch and a combine of GPU arrays beside those of host arrays."""
    rank = group._comm.rank if hasattr(group, "_comm") else group.rank
    x, ids, weights = batch(rank, tokens, hidden, dtype)
    common = {"experts": EXPERTS, "placement": placement}
    expected = await group.dispatch(x, ids, weights, **common)
    small = (on_gpu(rank, ids), on_gpu(rank, weights)) if ids_on_gpu else (ids, weights)
    came = await group.dispatch(on_gpu(rank, x), *small, **common, **options)
    assert isinstance(came.tokens, aiocomm.DeviceArray)
    assert np.array_equal(to_host(came.tokens, dtype), expected.tokens)
    for name in ("rows", "weights", "offsets", "starts", "experts"):
        assert np.array_equal(getattr(came, name), getattr(expected, name))
    outputs = (expected.inputs * 1.7).astype(dtype)
    wanted = await group.combine(outputs, expected, wire=wire)
    out = None if tokens % 2 else on_gpu(rank, np.zeros((tokens, hidden), np.float32))
    if out is not None:
        wanted = await group.combine(outputs, expected, wire=wire, out=np.empty((tokens, hidden), np.float32))
    else:
        await group.combine(outputs, expected, wire=wire)
    result = await group.combine(on_gpu(rank, outputs), came, wire=wire, out=out, **options)
    found = to_host(result, dtype) if out is None else out.numpy()
    assert found.tobytes() == wanted.tobytes()


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
    from aiocomm.moe import exchange

    for name in ("_SLOT_BYTES", "_SLOTS_BYTES", "_RIDE_BYTES"):
        monkeypatch.setattr(exchange, name, 1024)
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            await layer(comm, 301, 8)
            await layer(comm, 2, 8)

        await all_call(members, rank)


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


async def test_calls_that_repeat_get_no_memory_from_the_driver(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """Memory that was read comes back by the headers of later calls; that of arrays, with them."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 40, 32)
            given, outputs = on_gpu(comm.rank, x), on_gpu(comm.rank, np.zeros((240, 32), np.float32))
            for turn in range(12):
                await comm.barrier()
                made = simulator.calls("cuMemAlloc"), simulator.calls("cuMemHostAlloc")
                await comm.barrier()
                came = await comm.dispatch(given, ids, weights, experts=EXPERTS)
                await comm.combine(Rows(outputs, len(came.rows)), came)
                del came
                await comm.barrier()
                if turn >= 6:
                    assert (simulator.calls("cuMemAlloc"), simulator.calls("cuMemHostAlloc")) == made

        await all_call(members, rank)


async def test_memory_goes_back_to_the_driver(gpu: Driver, simulator: simulated.Simulator) -> None:
    for device in range(2):
        kernels.kernels_of(device)
    gc.collect()
    before = {kind: simulator.held(kind) for kind in ("allocations", "events")}
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            await layer(comm, 37, 64)
            await layer(comm, 37, 64, path="bandwidth")

        await all_call(members, rank)
    del members
    gc.collect()
    assert {kind: simulator.held(kind) for kind in before} == before


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


# ------------------------------------------------------------ bad calls


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_bad_calls_are_named_on_all() -> None:
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x = np.ones((3, 8), np.float32)
            good: dict[str, Any] = {"tokens": on_gpu(comm.rank, x), "expert_ids": [0, 3, 4], "experts": 6}
            cases: list[tuple[dict[str, Any], str]] = [
                ({"tokens": x}, "rank . called dispatch float32 hidden 8, 6 experts, and"),
                ({"tokens": on_gpu(comm.rank, x.reshape(-1))}, "rank 1 refused its call: tokens has shape"),
                ({"tokens": on_gpu(comm.rank, x[:, :4].copy())}, "rank 1 called .* hidden 4"),
                ({"expert_ids": on_gpu(comm.rank, np.array([0, 3, 6]))}, "token 2 names expert 6"),
                ({"expert_ids": on_gpu(comm.rank, np.array([0, 3]))}, "for 3 tokens"),
                ({"expert_ids": on_gpu(comm.rank, np.zeros(3, np.float32))}, "not integers"),
                ({"weights": on_gpu(comm.rank, np.zeros((3, 2), np.float32))}, "weights has shape"),
                ({"sm_budget": 0}, "sm_budget=0"),
                ({"path": "fast"}, "unknown path"),
            ]
            for change, text in cases:
                call = good | change if comm.rank == 1 else good
                with pytest.raises(aiocomm.UsageError, match=text):
                    await comm.dispatch(**call)
            came = await comm.dispatch(**good)
            outputs = np.ones((len(came.rows), 8), np.float32)
            on = on_gpu(comm.rank, outputs)
            wrong: list[tuple[Any, dict[str, Any], str]] = [
                (outputs, {}, "rank 1 refused its call: outputs is in host memory"),
                (on_gpu(comm.rank, outputs[1:]), {}, "for .* assignments"),
                (on_gpu(comm.rank, outputs.astype(np.int32)), {}, "int32"),
                (on, {"out": np.zeros((3, 8), np.float32)}, "out in host memory"),
                (on, {"out": on_gpu(comm.rank, np.zeros((3, 5), np.float32))}, "out has shape"),
                (on, {"wire": np.int8}, "wire is of dtype int8"),
                (on, {"wire": "float16"}, "rank 1 called combine .* as float16"),
            ]
            for given, options, text in wrong:
                values, more = (given, options) if comm.rank == 1 else (on, {})
                with pytest.raises(aiocomm.UsageError, match=text):
                    await comm.combine(values, came, **more)
            await comm.combine(on, came)
            with pytest.raises(aiocomm.UsageError, match=r"belongs to GPU arrays"):
                await comm.dispatch(x, [0, 3, 4], experts=6, stream=0)
            await layer(comm, 20, 8)
            assert comm.statistics().in_flight == 1  # it listens for what others give up

        await all_call(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_kernel_that_does_not_compile_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(2, links=LINKS, warmup=True) as members:

        def refuse(source: str, architecture: str) -> bytes:
            raise aiocomm.UsageError("NVRTC is not there")

        monkeypatch.setattr(kernels, "compiled", refuse)
        for device in range(driver().count):
            kernels.kernels_of(device)._functions.clear()

        async def rank(comm: aiocomm.Communicator) -> None:
            with pytest.raises(aiocomm.UsageError, match="NVRTC is not there"):
                await comm.dispatch(on_gpu(comm.rank, np.ones((2, 4), "f4")), [0, 1], experts=2)

        await all_call(members, rank)


# ------------------------------------------------------------ ends


@pytest.mark.parametrize("path", ["latency", "bandwidth"])
async def test_a_cancelled_rank_ends_the_call_on_all(path: str) -> None:
    """While its stream is busy: what it would have given is not touched afterwards."""
    async with world(3, links=LINKS, warmup=True) as members:
        stream = Stream(device=0)
        scope = anyio.CancelScope()

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, _ = batch(comm.rank, 30, 16)
            given = on_gpu(comm.rank, x)
            await layer(comm, 11, 8, path=path)
            if comm.rank == 0:
                gate = stream.gate()
                with scope:
                    await comm.dispatch(given, ids, experts=EXPERTS, path=path, stream=stream)
                assert scope.cancelled_caught
                gate.open()
            elif comm.rank == 1:
                with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up: cancelled"):
                    await comm.dispatch(given, ids, experts=EXPERTS, path=path)
            else:
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
                with pytest.raises(aiocomm.TransferCancelled):
                    await comm.dispatch(given, ids, experts=EXPERTS, path=path)
            await layer(comm, 11, 8, path=path)

        await all_call(members, rank)
        stream.close()


@pytest.mark.parametrize(("turn", "drain_s"), [(0, 2.0), (1, 2.0), (1, 0.5)])
async def test_cancelled_while_its_kernel_runs(
    gpu: Driver,
    simulator: simulated.Simulator,
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
    drain_s: float,
) -> None:
    """The await ends when the kernel has, however late; with what it gives under way, or what it gets."""
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", str(drain_s))
    async with world(2, links=LINKS, warmup=True) as members:
        scope = anyio.CancelScope()
        ended: list[int] = []

        async def call(comm: aiocomm.Communicator) -> None:
            x, ids, _ = batch(comm.rank, 30, 16)
            given = on_gpu(comm.rank, x)
            if comm.rank == 0:
                with scope:
                    await comm.dispatch(given, ids, experts=EXPERTS)
            else:
                with contextlib.suppress(aiocomm.TransferCancelled):  # or it has all by then
                    await comm.dispatch(given, ids, experts=EXPERTS)
            ended.append(comm.rank)

        await all_call(members, lambda comm: layer(comm, 11, 8))
        gc.collect()  # freeing memory waits for what the GPU does
        simulator.pause(0, simulated.Engine.LOCAL)
        async with anyio.create_task_group() as tasks:
            for comm in members:
                tasks.start_soon(call, comm)
            await anyio.to_thread.run_sync(simulator.wait_ready, 0, simulated.Engine.LOCAL)
            if turn == 1:
                then = simulator.executed(0, simulated.Engine.LOCAL) + 1
                simulator.step(0, simulated.Engine.LOCAL)
                await anyio.to_thread.run_sync(simulator.wait_executed, 0, simulated.Engine.LOCAL, then)
                await anyio.to_thread.run_sync(simulator.wait_ready, 0, simulated.Engine.LOCAL)
            scope.cancel()
            for _ in range(5):
                receiving = members[1].recv(bytearray(1), 0)
                await members[0].send(b"x", 1)
                await receiving
            with pytest.raises(aiocomm.DeadlineExceeded):  # meanwhile the shorter time passes
                await members[0].recv(bytearray(1), 1, tag=1, deadline=max(0.1, 1.2 - drain_s))
            sent = members[0].send(b"to oneself", 0, tag=1)
            await members[0].recv(bytearray(10), 0, tag=1)
            await sent
            assert 0 not in ended
            simulator.resume(0, simulated.Engine.LOCAL)
        assert sorted(ended) == [0, 1]
        assert scope.cancelled_caught
        await all_call(members, lambda comm: layer(comm, 11, 8))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_rank_that_never_calls_is_named() -> None:
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, np.ones((3, 8), np.float32))
            await layer(comm, 11, 8)
            if comm.rank == 0:
                with pytest.raises(aiocomm.DeadlineExceeded, match=r"not called within 0\.2 s by rank 1"):
                    await comm.dispatch(x, [0, 1, 0], experts=2, deadline=0.2)
                await comm.send(b"go", 1)
            else:
                await comm.recv(bytearray(2), 0)
                with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
                    await comm.dispatch(x, [0, 1, 0], experts=2)
            await layer(comm, 11, 8)

        await all_call(members, rank)


async def test_a_lost_rank_is_reported_with_its_experts_and_tokens() -> None:
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([0, 1, 2])
            x = on_gpu(comm.rank, np.ones((4, 8), np.float32))
            ids = on_gpu(comm.rank, np.array([[0, 4], [1, 5], [2, 3], [4, 5]]))
            came = await group.dispatch(x, ids, experts=6)
            if comm.rank == 2:
                await comm.aclose()
                return
            outputs = on_gpu(comm.rank, np.ones((len(came.rows), 8), np.float32))
            with pytest.raises(aiocomm.ExpertsLostError, match="with 2 experts, to which 3 tokens") as caught:
                await group.combine(outputs, came)
            assert (caught.value.peer, caught.value.tokens, caught.value.experts) == (2, (0, 1, 3), (4, 5))
            await layer(await group.shrink(deadline=5.0), 30, 16)

        await all_call(members, rank)


@pytest.mark.parametrize("how", ["leaves", "closes its group", "gives up"])
async def test_who_leaves_first(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until the others have read what it gave, and not for what nobody will read."""
    monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "3600")
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([0, 1, 2])
            await layer(group, 21, 16)
            x, ids, weights = batch(comm.rank, 21, 16)
            given = on_gpu(comm.rank, x)
            if how == "gives up":
                if comm.rank == 0:
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        await group.dispatch(given, ids, weights, experts=EXPERTS)
                else:
                    # Who has all that it needs by then does not mind.
                    with contextlib.suppress(aiocomm.TransferCancelled, aiocomm.ExpertsLostError):
                        await group.dispatch(given, ids, weights, experts=EXPERTS)
            else:
                came = await group.dispatch(given, ids, weights, experts=EXPERTS)
                for source in range(3):
                    there, chosen, _ = batch(source, 21, 16)
                    mine = there[np.isin(chosen, came.experts).any(1)]
                    rows = to_host(came.tokens, np.float32)[came.starts[source] : came.starts[source + 1]]
                    assert np.array_equal(rows, mine)
            if how == "closes its group":
                group.close()
            if comm.rank == 0:
                await comm.aclose()

        await all_call(members, rank)


@pytest.mark.parametrize("entry", ["cuLaunchKernel", "cuMemAlloc"])
async def test_a_driver_that_fails(gpu: Driver, simulator: simulated.Simulator, entry: str) -> None:
    """The rank has the driver's error, the other hears of it, and the next call is fine."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 21, 16)
            given = on_gpu(comm.rank, x)
            if entry == "cuLaunchKernel":
                await layer(comm, 21, 16)
            await comm.barrier()
            if comm.rank == 0:
                simulator.fail(entry, 2)
            await comm.barrier()
            with pytest.raises((aiocomm.LinkError, aiocomm.TransferCancelled, aiocomm.UsageError)):
                await comm.dispatch(given, ids, weights, experts=EXPERTS)
            await comm.barrier()
            await layer(comm, 21, 16)

        await all_call(members, rank)


async def test_gpus_without_access_to_each_other(gpu: Driver, simulator: simulated.Simulator) -> None:
    """Copies go by way of the host, then; the kernels work on what they have brought."""
    simulator.fail("cuCtxEnablePeerAccess", 217, forever=True)
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            for _ in range(2):
                await layer(comm, 21, 16)

        await all_call(members, rank)


@pytest.mark.parametrize("path", ["auto", "bandwidth"])
async def test_beside_tcp(path: str) -> None:
    async with world(2, links=("tcp", "cuda"), warmup=True) as members:
        await all_call(members, lambda comm: layer(comm, 21, 16, path=path))


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
    left = await group.shrink(deadline=5.0)
    await layer(left, 30, 16)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_survivors_of_a_killed_rank_go_on() -> None:
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_die_in_the_middle, 2, links=LINKS) as comm:
            await _die_in_the_middle(comm)
    assert caught.value.exit_code == -signal.SIGKILL


# ------------------------------------------------------------ the sources, as C++


def test_the_source_that_moves_rows(tmp_path: Path) -> None:
    run = (
        'extern "C" void run(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "move_rows(*(const Move*)all); }"
    )
    library = as_library(sources.MOVE_SOURCE, run, tmp_path)
    rng = np.random.default_rng(0)
    for width, blocks, threads in ((16, 1, 32), (10_000, 3, 64), (7, 2, 512), (4096, 2, 64)):
        given = [rng.integers(0, 255, (20, width)).astype(np.uint8) for _ in range(3)]
        count = 50
        table = np.zeros((count, 4), np.uint32)
        table[:, 0], table[:, 1] = rng.integers(0, 3, count), rng.integers(0, 20, count)
        table[:, 2] = rng.permutation(count)
        target, plain = np.zeros((count, width), np.uint8), [np.zeros(5001, np.uint8) for _ in range(2)]
        base = [one.ctypes.data for one in given] + [0] * (sources.MOST_RANKS - 3)
        more = rng.integers(0, 255, 5001).astype(np.uint8)
        runs = [plain[0].ctypes.data, more.ctypes.data, 5001, plain[1].ctypes.data, more.ctypes.data, 16]
        rest = [target.ctypes.data, table.ctypes.data, count, width, *runs, *([0] * 6)]
        argument = np.array([*base, *rest], np.uint64).tobytes()
        library.run(ctypes.c_char_p(argument), blocks, threads)
        expected = np.zeros_like(target)
        for source, index, where, _ in table.tolist():
            expected[where] = given[source][index]
        assert np.array_equal(target, expected)
        assert np.array_equal(plain[0], more)
        assert np.array_equal(plain[1][:16], more[:16])
        assert not plain[1][16:].any()


ROUNDED = """
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
"""


@pytest.mark.parametrize("hidden", [8, 21, 1500, 1504])
@pytest.mark.parametrize(
    "names", ["f2 f4 f2", "f2 f2 f4", "bf bf bf", "f4 bf f4", "f4 f4 f2", "f8 f8 f8", "f8 f4 f8"]
)
def test_the_sources_of_sums_are_those_of_the_host(tmp_path: Path, names: str, hidden: int) -> None:
    dtypes = [np.dtype(ml_dtypes.bfloat16 if name == "bf" else name) for name in names.split()]
    terms, wire, result = dtypes
    wide = np.dtype(np.float64 if terms == np.float64 else np.float32)
    run = (
        'extern "C" void weigh(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "weigh_rows(*(const Weigh*)all); }\n"
        + 'extern "C" void add(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "add_rows(*(const Add*)all); }"
    )
    source = ROUNDED + sources.sums_source(*(dtype.name for dtype in dtypes)).replace(
        "__device__ static", "static"
    )
    library = as_library(source, run, tmp_path)
    rng = np.random.default_rng(hidden)
    size, tokens, me = 3, 9, 1
    placement = place(EXPERTS, None, size)
    routed = [
        route(
            rng.integers(-1, EXPERTS, (tokens, 4)), rng.normal(size=(tokens, 4)).astype(np.float32), placement
        )
        for _ in range(size)
    ]
    found = arrange([parts[me] for parts in routed], placement, me)
    outputs = rng.normal(size=(len(found.rows), hidden)) * np.exp2(
        rng.integers(-30, 14, (len(found.rows), 1))
    )
    outputs = outputs.astype(terms)
    starts = found.starts.tolist()
    total, own = starts[-1], slice(starts[me], starts[me + 1])
    sums, mine = np.zeros((total, hidden), wire), np.zeros((own.stop - own.start, hidden), wide)
    order, first = found.order.astype(np.uint32), found.first.astype(np.uint32)
    weights = found.weights[found.order]
    whole = int(hidden % 8 == 0)
    argument = np.array(
        [
            *(a.ctypes.data for a in (outputs, order, first, weights, sums, mine)),
            *(own.start, own.stop, total, hidden, whole, 0, 0),
        ],
        np.uint64,
    ).tobytes()
    library.weigh(ctypes.c_char_p(argument), 2, 64)
    for peer in range(size):
        part = np.zeros((starts[peer + 1] - starts[peer], hidden), wide if peer == me else wire)
        weigh(outputs, found, starts[peer], starts[peer + 1], part)
        made = mine if peer == me else sums[starts[peer] : starts[peer + 1]]
        assert part.tobytes() == made.tobytes()
    parts = [
        rng.normal(size=(part.rows, hidden)).astype(wide if rank == me else wire)
        for rank, part in enumerate(routed[me])
    ]
    table = np.full((tokens, size), -1, np.int32)
    for rank, part in enumerate(routed[me]):
        table[part.tokens, rank] = np.arange(part.rows)
    out, expected = np.zeros((tokens, hidden), result), np.zeros((tokens, hidden), result)
    base = [part.ctypes.data for part in parts] + [0] * (sources.MOST_RANKS - size)
    rest = [out.ctypes.data, table.ctypes.data, tokens, hidden, size | me << 32, whole]
    library.add(ctypes.c_char_p(np.array([*base, *rest], np.uint64).tobytes()), 2, 64)
    add_up(
        [(part.tokens, rows) for part, rows in zip(routed[me], parts, strict=True)],
        wide == np.float64,
        expected,
    )
    assert out.tobytes() == expected.tobytes()


def test_the_sources_compile() -> None:
    assert_it_compiles(sources.MOVE_SOURCE)
    for terms in sources.KINDS:
        assert_it_compiles(sources.sums_source(terms, "float32", "bfloat16"))
