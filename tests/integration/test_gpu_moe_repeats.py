"""Dispatch and combine that are like those before, where something about them has changed, or goes wrong."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from gpu_experts import EXPERTS, LINKS, batch, layer, on_gpu
from harness import all_call, until, world

import aiocomm
from aiocomm.collectives.kernels import Scratch
from aiocomm.moe import device_quick, repeats
from aiocomm.moe.memory import Lease, Pool
from aiocomm.moe.tables import Tables

if TYPE_CHECKING:
    from fakes import simulated
    from fakes.gpu import Driver

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]


def _repeats(comm: aiocomm.Communicator) -> int:
    scope, _ = comm._members()._expert_scope(None)
    return sum(len(pool.repeats) for pool in scope.pools.values())


async def _like(
    comm: aiocomm.Communicator, ready: dict[int, bool], tokens: int = 21, hidden: int = 16, **options: Any
) -> None:
    """Calls, until all ranks would repeat the next one."""
    while not ready.get(0) or not ready.get(1):
        await layer(comm, tokens, hidden, **options)
        ready[comm.rank] = _repeats(comm) >= 2
        await comm.barrier()


@pytest.fixture
def backends(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("calls repeat on asyncio's loops")


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("linger_s", [0.0, 1e-3])
async def test_of_another_form(monkeypatch: pytest.MonkeyPatch, linger_s: float) -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}

        async def rank(comm: aiocomm.Communicator) -> None:
            await _like(comm, ready)
            monkeypatch.setattr(device_quick, "LINGER_S", linger_s)
            for dtype, tokens, hidden in (
                (np.float16, 21, 16),
                (np.float32, 21, 24),
                (np.float32, 22, 16),
                (np.float32, 21, 16),
            ):
                await layer(comm, tokens, hidden, dtype)
            await layer(comm, 21, 16, ids_on_gpu=False)
            await layer(comm, 21, 16, sm_budget=2)
            await layer(comm, 21, 16, placement=[1, 0] * (EXPERTS // 2))
            await layer(comm, 21, 16, deadline=100.0)
            for _ in range(6):
                await layer(comm, 21, 16, channel=comm.channel("another"))

        await all_call(members, rank)


@pytest.mark.usefixtures("backends")
async def test_calls_of_another_budget_are_others() -> None:
    """Their kernels take no more multiprocessors because those of calls before did."""
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}

        def budgets(comm: aiocomm.Communicator) -> list[int]:
            scope, _ = comm._members()._expert_scope(None)
            (pool,) = scope.pools.values()
            return sorted(repeat._setting.sm_budget for repeat in pool.repeats.values())

        async def rank(comm: aiocomm.Communicator) -> None:
            await _like(comm, ready, sm_budget=9)
            assert budgets(comm) == [9, 9]  # of dispatch and of combine
            await comm.barrier()
            while not ready.get(2):
                await layer(comm, 21, 16, sm_budget=2)
                ready[2] = budgets(comm) == [2, 2, 9, 9]
                await comm.barrier()

        await all_call(members, rank)
        assert ready[2]


@pytest.mark.usefixtures("backends")
async def test_a_deadline_that_calls_before_had_not() -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}

        async def rank(comm: aiocomm.Communicator) -> None:
            await _like(comm, ready)
            if comm.rank == 0:
                x, ids, weights = (on_gpu(0, one) for one in batch(0, 21, 16))
                with pytest.raises(aiocomm.DeadlineExceeded, match=r"not called within 0\.2 s by rank 1"):
                    await comm.dispatch(x, ids, weights, experts=EXPERTS, deadline=0.2)

        await all_call(members, rank)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("operation", ["dispatch", "combine"])
async def test_what_goes_wrong_while_the_own_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Memory that cannot be had then, say: the usual call goes on from there."""
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}
        await all_call(members, lambda comm: _like(comm, ready))
        kind = repeats.DispatchRepeat if operation == "dispatch" else repeats.CombineRepeat
        failed: list[object] = []

        def short(repeat: Any) -> Any:
            failed.append(repeat)
            raise aiocomm.LinkError("out of memory")

        monkeypatch.setattr(kind, "_slots", short)
        while not failed:  # of two ranks on one loop, one is kept waiting by the other
            await all_call(members, lambda comm: layer(comm, 21, 16))
        monkeypatch.undo()
        await all_call(members, lambda comm: layer(comm, 21, 16))


@pytest.mark.usefixtures("backends")
async def test_calls_that_are_watched_go_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}
        await all_call(members, lambda comm: _like(comm, ready))
        begun: list[int] = []
        take_over = device_quick._Quick.take_over

        def noted(call: Any, number: int, slots: Any, outcome: Any) -> None:
            begun.append(outcome[0])
            take_over(call, number, slots, outcome)

        monkeypatch.setattr(device_quick._Quick, "take_over", noted)
        watched = [comm.links["cuda"].submissions() for comm in members]
        await all_call(members, lambda comm: layer(comm, 21, 16))
        assert len(watched) == 2
        assert begun
        assert set(begun) == {device_quick.NOT_BEGUN}


@pytest.mark.usefixtures("backends")
async def test_of_thousands_of_tokens() -> None:
    """Lists are long enough to be made without the interpreter's lock."""
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}

        async def rank(comm: aiocomm.Communicator) -> None:
            await _like(comm, ready, 6001, 8)
            for _ in range(3):
                await layer(comm, 6001, 8)

        await all_call(members, rank)


@pytest.mark.usefixtures("backends")
@pytest.mark.parametrize("entry", ["cuLaunchKernel", "freed"])
async def test_what_one_rank_cannot_do(gpu: Driver, simulator: simulated.Simulator, entry: str) -> None:
    """No rank gets a result, and the next call is fine."""
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}

        async def rank(comm: aiocomm.Communicator) -> None:
            await _like(comm, ready)
            x, ids, weights = batch(comm.rank, 21, 16)
            given = on_gpu(comm.rank, x)
            small = on_gpu(comm.rank, ids), on_gpu(comm.rank, weights)
            await comm.barrier()
            if comm.rank == 1 and entry == "freed":
                given.close()
            if comm.rank == 1 and entry != "freed":
                simulator.fail(entry, 1)
            await comm.barrier()
            with pytest.raises((aiocomm.LinkError, aiocomm.TransferCancelled, aiocomm.UsageError)):
                await comm.dispatch(given, *small, experts=EXPERTS)
            await comm.barrier()
            for _ in range(3):
                await layer(comm, 21, 16)

        await all_call(members, rank)


@pytest.mark.usefixtures("backends")
async def test_cancelled() -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}
        await all_call(members, lambda comm: _like(comm, ready))
        scope = anyio.CancelScope()

        async def first(comm: aiocomm.Communicator) -> None:
            x, ids, weights = (on_gpu(comm.rank, one) for one in batch(comm.rank, 21, 16))
            with scope:
                await comm.dispatch(x, ids, weights, experts=EXPERTS)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first, members[0])
            calls = members[0]._members()._expert_scope(None)[0].calls
            await until(lambda: calls)
            scope.cancel()
        assert scope.cancelled_caught
        x, ids, weights = (on_gpu(1, one) for one in batch(1, 21, 16))
        scope_of_other, _ = members[1]._members()._expert_scope(None)
        await until(lambda: scope_of_other._failed)  # until it hears, it has all that it needs
        with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
            await members[1].dispatch(x, ids, weights, experts=EXPERTS)
        await all_call(members, lambda comm: layer(comm, 21, 16))


@pytest.mark.usefixtures("backends")
async def test_a_rank_is_lost() -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        ready: dict[int, bool] = {}
        await all_call(members, lambda comm: _like(comm, ready))
        x, ids, weights = batch(0, 21, 16)
        tokens = tuple(np.flatnonzero((ids >= EXPERTS // 2).any(1)).tolist())
        given = [on_gpu(0, one) for one in (x, ids, weights)]
        await members[1].aclose()
        with pytest.raises(aiocomm.ExpertsLostError) as caught:
            await members[0].dispatch(*given, experts=EXPERTS)
        assert caught.value.tokens == tokens
        assert caught.value.experts == tuple(range(EXPERTS // 2, EXPERTS))


class _Knot:
    """Found by the collector of cycles alone."""

    def __init__(self, *held: Any) -> None:
        self.held = held, self


async def test_memory_that_the_collector_finds_is_not_used_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.collect()  # what tests before have left would end at addresses that are used again here
    ended: list[int] = []
    end = Scratch.__del__
    monkeypatch.setattr(Scratch, "__del__", lambda memory: (ended.append(memory.address), end(memory)))
    async with world(1, links=LINKS) as (comm,):
        pool = Pool(comm._engine, 0)
        block = pool.take(1, frozenset())
        tables = Tables.of_bytes(pool, 1)
        used = {block.address, tables.address}
        _Knot(Lease(pool, block, frozenset()), block, tables, tables._block)
        del block, tables
        gc.collect()
        again = pool.take(1, frozenset()), Tables.of_bytes(pool, 1)
        assert {one.address for one in again} == used
        assert not used & set(ended)
        kept = Lease(pool, again[0], frozenset())
        pool.close()
        del again
        gc.collect()
        assert kept.address not in ended, "an array may be over it yet"
        address = kept.address
        del kept
        assert address in ended
