"""Dispatch and combine of GPU arrays that end otherwise: refused, cancelled, late, lost, or failed."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import anyio
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Stream, driver
from gpu_experts import EXPERTS, LINKS, batch, layer, on_gpu, to_host
from harness import LIMIT_S, all_call, until, world

import aiocomm
from aiocomm.collectives import kernels

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

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
                ({"expert_ids": [[0], [3, 4], [4]]}, "expert_ids cannot be made an array"),
                ({"weights": [[0], [3, 4], [4]]}, "weights cannot be made an array"),
                ({"deadline": -1}, "rank 1 refused its call: deadline=-1"),
                ({"sm_budget": 0}, "sm_budget=0"),
                ({"sm_budget": 1 << 32}, "1 to 65536"),
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
            with pytest.raises(aiocomm.UsageError, match=r"expert_ids lies on a GPU, .*\.cpu\(\)"):
                await comm.dispatch(x, on_gpu(comm.rank, np.array([0, 3, 4])), experts=6)
            await layer(comm, 20, 8)
            await until(lambda: comm.statistics().in_flight == 0)  # the words to the others, too

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
                scope, _ = comm._members()._expert_scope(None)
                await until(lambda: scope._failed)  # channels are independent; and it has all that it needs
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
            await layer(await group.shrink(deadline=LIMIT_S), 30, 16)

        await all_call(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tokens_of_a_lost_rank_where_another_has_found_it_lost() -> None:
    """The call is over before it has begun, and its experts' numbers are still on the GPU."""
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([0, 1, 2])
            if comm.rank == 2:
                await comm.aclose()
                return
            x = on_gpu(comm.rank, np.ones((4, 8), np.float32))
            ids = on_gpu(comm.rank, np.array([[0, 4], [1, 5], [2, 3], [4, 5]]))
            if comm.rank == 0:
                scope, _ = group._expert_scope(None)
                await until(lambda: scope.is_given_up(1))
            with pytest.raises(aiocomm.ExpertsLostError) as caught:
                await group.dispatch(x, ids, experts=6)
            assert (caught.value.peer, caught.value.tokens, caught.value.experts) == (2, (0, 1, 3), (4, 5))

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


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_words_of_others_that_come_while_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others ask, or answer, as one is told: sending takes what has come."""

    class Lends:
        def lent(self) -> list[tuple[int, set[int]]]:
            return [(0, readers)]

    async with world(3) as members:
        scope = members[0]._members()._scope(None)
        readers: set[int] = set()
        told: list[int] = []

        def tell(message: bytes, rank: int) -> None:
            told.append(rank)
            readers.discard(rank)
            scope.answer()

        monkeypatch.setattr(scope, "_tell", tell)
        monkeypatch.setattr(scope, "pools", {0: Lends()})
        scope._asked += [(0, 1), (0, 2)]
        scope.answer()
        assert told == [1, 2]
        assert not scope._asked
        readers |= {1, 2}
        scope.ask()
        assert told == [1, 2, 1, 2]


@pytest.mark.parametrize("under_way", [False, True])
async def test_closed_groups_give_memory_back(simulator: simulated.Simulator, under_way: bool) -> None:
    """Also what others may still read, as soon as they say that they do not."""

    async def close_once_told(group: aiocomm.Group) -> None:
        calls: Any = group._expert_scope(None)[0].calls
        await until(lambda: any(call._told for call in calls.values()))
        group.close()

    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group = await comm.group([0, 1])
            await layer(group, 21, 16)
            if under_way and comm.rank == 0:
                x, ids, _ = batch(0, 21, 16)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(close_once_told, group)
                    with pytest.raises(aiocomm.ClosedError):
                        await group.dispatch(on_gpu(0, x), ids, experts=EXPERTS)
                await comm.send(b"", 1)
            elif under_way:
                await comm.recv(bytearray(1), 0)
            group.close()

        def held() -> dict[str, int]:
            gc.collect()
            return {kind: simulator.held(kind) for kind in ("allocations", "pinned")}

        await all_call(members, rank)
        pools = [pool for comm in members for scope in comm._lenders for pool in scope.pools.values()]
        await until(lambda: not any(pool.lent() for pool in pools))
        before = held()
        for _ in range(3):
            await all_call(members, rank)
        await until(lambda: all(count <= before[kind] for kind, count in held().items()))


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


async def test_only_ranks_out_of_reach_are_read_by_copies(
    gpu: Driver, simulator: simulated.Simulator
) -> None:
    """Two ranks on one GPU reach each other; that on another is named, and then no kernel is tried on it."""
    simulator.fail("cuCtxEnablePeerAccess", 217, forever=True)
    async with world(3, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            group, device = await comm.group([0, 1, 2]), comm.rank // 2
            x = np.full((5, 8), comm.rank, np.float32)
            given = DeviceArray(x.shape, x.dtype, device=device).write(x)
            for _ in range(8):
                came = await group.dispatch(given, np.tile([0, 1, 2], (5, 1)), experts=3)
                assert to_host(came.tokens, np.float32)[:, 0].tolist() == [0] * 5 + [1] * 5 + [2] * 5
            missed = set(group._expert_scope(None)[0].pools[device].missed)
            assert missed == ({0, 1} if comm.rank == 2 else {2})

        await all_call(members, rank)


@pytest.mark.parametrize("path", ["auto", "bandwidth"])
async def test_beside_tcp(path: str) -> None:
    async with world(2, links=("tcp", "cuda"), warmup=True) as members:
        await all_call(members, lambda comm: layer(comm, 21, 16, path=path))
