"""Collectives and groups: every operation by every algorithm, bad calls, failures, survivors that go on."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import numpy as np
import pytest
from harness import LIMIT_S, until, world

import aiocomm
from aiocomm.collectives import headers, shared
from aiocomm.collectives.algorithms import ALGORITHMS, BETWEEN_HOSTS, applicable
from aiocomm.collectives.flight import Flight
from aiocomm.group import Group
from aiocomm.launch import WorkerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Rank = Callable[[aiocomm.Communicator], Awaitable[None]]

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
SIZES = {"tiny": 3, "small": 700, "large": 90_001}  # elements of a block


async def everyone(members: list[aiocomm.Communicator], rank: Rank) -> None:
    """Run a coroutine for every member at once."""
    async with anyio.create_task_group() as group:
        for member in members:
            group.start_soon(rank, member)


def block(rank: int, count: int, dtype: Any = np.float64) -> np.ndarray[Any, Any]:
    """What a rank contributes: no other rank has it, and sums of a few are exact."""
    return ((np.arange(count) * 7 + rank * 13) % 50).astype(dtype)


async def do(comm: Any, operation: str, algorithm: str | None, n: int) -> None:
    """Call an operation and check its result."""
    size, me = comm.size, comm.rank
    root = size - 1
    every = np.concatenate([block(r, n) for r in range(size)])
    total = sum(block(r, n) for r in range(size))
    forced = {"algorithm": algorithm}
    match operation:
        case "broadcast":
            x = block(me, n)
            await comm.broadcast(x, root, **forced)
            assert np.array_equal(x, block(root, n))
        case "scatter":
            out = np.empty(n)
            await comm.scatter(out, every if me == root else None, root, **forced)
            assert np.array_equal(out, block(me, n))
        case "gather":
            gathered = np.empty((size, n)) if me == root else None
            await comm.gather(gathered, block(me, n), root, **forced)
            assert gathered is None or np.array_equal(gathered.reshape(-1), every)
        case "all_gather":
            out = np.empty((size, n))
            await comm.all_gather(out, block(me, n), **forced)
            assert np.array_equal(out.reshape(-1), every)
            out[:] = -1
            out[me] = block(me, n)
            await comm.all_gather(out, out[me], **forced)
            assert np.array_equal(out.reshape(-1), every)
        case "all_to_all":
            out = np.empty((size, n))
            await comm.all_to_all(out, np.stack([block(me * size + r, n) for r in range(size)]), **forced)
            assert np.array_equal(out, [block(r * size + me, n) for r in range(size)])
        case "reduce":
            x = block(me, n)
            await comm.reduce(x, root, **forced)
            assert np.array_equal(x, total if me == root else block(me, n))
        case "reduce_scatter":
            out, x = np.empty(n), np.concatenate([block(me + r, n) for r in range(size)])
            await comm.reduce_scatter(out, x, **forced)
            assert np.array_equal(out, sum(block(r + me, n) for r in range(size)))
        case "all_reduce":
            x, apart = block(me, n), np.empty(n)
            await comm.all_reduce(x, out=apart, **forced)
            assert np.array_equal(apart, total)
            assert np.array_equal(x, block(me, n))
            await comm.all_reduce(x, **forced)
            assert np.array_equal(x, total)


UNIFORM = [name for name in ALGORITHMS if not name.endswith("v")]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_every_operation_by_every_algorithm(size: int) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        for operation in UNIFORM:
            for algorithm in [None, *applicable(operation, size)]:
                for n in (0, *SIZES.values()):
                    await do(comm, operation, algorithm, n)

    async with world(size) as members:
        await everyone(members, rank)
        calls = members[0].statistics().collectives
        assert calls["broadcast/binomial"] >= 4
        assert "all_reduce/ring" in calls


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 0)])
async def test_groups_on_several_hosts_may_go_by_host(
    hosts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "hosts", hosts)

    async def rank(comm: aiocomm.Communicator) -> None:
        for operation in BETWEEN_HOSTS:
            for algorithm in (None, "hierarchical"):
                for n in (0, *SIZES.values()):
                    await do(comm, operation, algorithm, n)
        with pytest.raises(aiocomm.UsageError, match="no algorithm 'hierarchical' for all_to_all"):
            await do(comm, "all_to_all", "hierarchical", 4)

    async with world(4) as members:
        await everyone(members, rank)
        assert members[0].statistics().collectives["all_reduce/hierarchical"] >= 4


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_counts_that_differ() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        me, counts = comm.rank, [2, 0, 70_000]
        out = np.empty(sum(counts), np.int32)
        every = np.concatenate([block(r, n, np.int32) for r, n in enumerate(counts)])
        for algorithm in ("direct", "ring", "bruck"):
            await comm.all_gatherv(out, block(me, counts[me], np.int32), counts, algorithm=algorithm)
            assert np.array_equal(out, every)
        root = 1
        await comm.gatherv(out if me == root else None, block(me, counts[me], np.int32), counts, root)
        mine = np.empty(counts[me], np.int32)
        await comm.scatterv(mine, every if me == root else None, counts if me == root else None, root)
        assert np.array_equal(mine, block(me, counts[me], np.int32))
        give = [[0, 5, 1], [2, 3, 0], [90_000, 0, 4]]
        take = [give[r][me] for r in range(3)]
        out = np.empty(sum(take), np.int32)
        await comm.all_to_allv(out, block(me, sum(give[me]), np.int32), take, give[me])
        parts = [np.split(block(r, sum(give[r]), np.int32), np.cumsum(give[r])[:-1])[me] for r in range(3)]
        assert np.array_equal(out, np.concatenate(parts))
        own = np.empty(counts[me])
        await comm.reduce_scatter(own, np.arange(sum(counts), dtype=float), counts=counts)
        start = sum(counts[:me])
        assert np.array_equal(own, 3.0 * np.arange(start, start + counts[me]))

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8"])
async def test_reductions(dtype: str) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        parts = [(np.arange(5000) % 3 + r + 1).astype(dtype) for r in range(3)]
        for op, function in {
            "sum": np.add,
            "prod": np.multiply,
            "min": np.minimum,
            "max": np.maximum,
        }.items():
            for _ in range(3):  # repeats are reduced by the extension, where it can
                x = parts[comm.rank].copy()
                await comm.all_reduce(x, op)
                assert np.array_equal(x, function(function(parts[0], parts[1]), parts[2])), op
        x = parts[comm.rank].copy()
        if dtype[0] in "fc":
            await comm.all_reduce(x, "mean")
            np.testing.assert_allclose(x, sum(parts) / 3, rtol=1e-2)

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
async def test_float8_is_reduced_in_float32_and_rounded_once(name: str, size: int) -> None:
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    many = 5 << 19  # several chunks of a block, between two

    def part(rank: int, count: int) -> Any:
        return np.random.default_rng(rank).normal(scale=3, size=count).astype(np.float32).astype(dtype)

    def wanted(op: str, parts: list[Any]) -> Any:
        function = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum, "mean": np.add}[
            op
        ]
        total = parts[0].astype(np.float32)
        for one in parts[1:]:
            total = function(total, one.astype(np.float32))
        return (total / np.float32(size if op == "mean" else 1)).astype(dtype)

    def same(got: Any, expected: Any) -> None:
        assert np.array_equal(got.view(np.uint8), expected.view(np.uint8))

    async def rank(comm: aiocomm.Communicator) -> None:
        me = comm.rank
        for op in ("sum", "prod", "min", "max", "mean"):
            for count in (700, many) if op == "sum" else (700,):
                parts = [part(r, count) for r in range(size)]
                total = wanted(op, parts)
                for again in range(2):  # the second call of a shape is prepared
                    x = parts[me].copy()
                    await comm.all_reduce(x, op)
                    same(x, total)
                    out = np.empty(count, dtype)
                    await comm.all_reduce(parts[me], op, out=out, algorithm=("one_shot", "direct")[again])
                    same(out, total)
        parts = [part(r, size * 5000) for r in range(size)]
        block = np.empty(5000, dtype)
        await comm.reduce_scatter(block, parts[me], "mean")
        same(block, wanted("mean", parts)[me * 5000 : (me + 1) * 5000])
        x = parts[me].copy()
        await comm.reduce(x, size - 1)
        same(x, wanted("sum", parts) if me == size - 1 else parts[me])
        with pytest.raises(aiocomm.UsageError, match="'ring' would round every partial result"):
            await comm.all_reduce(x, algorithm="ring")

    async with world(size) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_float8_sums_beyond_its_range_are_not_lost_in_a_mean() -> None:
    dtype = np.dtype(pytest.importorskip("ml_dtypes").float8_e4m3fn)

    async def rank(comm: aiocomm.Communicator) -> None:
        for count in (8, 100_000):
            x = np.full(count, 400, dtype)  # 448 is the greatest number there is
            await comm.all_reduce(x, "mean")
            assert (x.astype(np.float32) == np.float32(dtype.type(400))).all()

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "float8_e5m2"])
async def test_what_overflows_is_infinite_whatever_numpy_is_told_to_raise(dtype: str) -> None:
    kind = np.dtype(dtype if dtype[1:].isdigit() else getattr(pytest.importorskip("ml_dtypes"), dtype))
    large = np.array([6e4, 6e4, 6e-5] if kind.itemsize < 4 else [3e38, 3e38, 2e-38]).astype(kind)

    async def rank(comm: aiocomm.Communicator) -> None:
        for op in ("sum", "mean", "prod"):
            for algorithm in ("direct", None, None, None):
                x = large.copy()
                await comm.all_reduce(x, op, algorithm=algorithm)
                if op != "mean" or kind.itemsize > 1:
                    assert np.isinf(x[:2].astype(np.float64)).all()
        if kind.itemsize > 1:
            x = np.array([np.inf if comm.rank else -np.inf], kind)
            await comm.reduce(x, root=1)
            assert np.isnan(x[0]) if comm.rank == 1 else np.isinf(x[0])

    with np.errstate(all="raise"):
        async with world(3) as members:
            await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_ranks_get_the_same_bits() -> None:
    results: dict[tuple[str, int], bytes] = {}

    async def rank(comm: aiocomm.Communicator) -> None:
        x = np.random.default_rng(comm.rank).normal(size=40_000).astype(np.float32)
        for algorithm in applicable("all_reduce", 4):
            mine = x.copy()
            await comm.all_reduce(mine, algorithm=algorithm)
            results[algorithm, comm.rank] = mine.tobytes()

    async with world(4) as members:
        await everyone(members, rank)
        first = dict(results)
        await everyone(members, rank)
    assert results == first
    for algorithm in applicable("all_reduce", 4):
        assert len({results[algorithm, r] for r in range(4)}) == 1


async def test_calls_overlap_on_one_channel_and_on_several() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        channels = [comm.channel("a"), comm.channel("b", weight=2.0), None]
        order = channels if comm.rank else channels[::-1]  # no common order across channels

        async def several(channel: aiocomm.Channel | None) -> None:
            async def one(value: int) -> None:
                x = np.full(30_000, value + comm.rank, np.int64)
                await comm.all_reduce(x, channel=channel)
                assert (x == 3 * value + 3).all()

            async with anyio.create_task_group() as group:
                for value in range(3):
                    group.start_soon(one, 5)
                    del value

        async with anyio.create_task_group() as group:
            for channel in order:
                group.start_soon(several, channel)

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_channel_may_have_any_name_in_a_group_that_shrinks() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        group, channel = await comm.group([0, 1]), comm.channel("shrink 1")
        for _ in range(2):
            await group.barrier(channel=channel)
            assert (await group.shrink()).ranks == (0, 1)

    async with world(2) as members:
        await everyone(members, rank)


async def test_groups_overlap_and_split() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        me = comm.rank
        groups = [await comm.group(ranks) for ranks in ([0, 1, 2], [3, 2]) if me in ranks]
        for group in reversed(groups):
            x = np.array([me])
            await group.all_reduce(x)
            assert x[0] == sum(group.ranks)
            assert group.ranks[group.rank] == me
        half = await groups[0].split(0, key=-me) if me < 3 else None
        if half is not None:
            assert half.ranks == (2, 1, 0)
            out = np.empty(3, np.int64)
            await half.all_gather(out, np.array([me]))
            assert out.tolist() == [2, 1, 0]
        odd = await (await comm.group(range(4))).split(None if me == 1 else me % 2)
        assert (odd is None) == (me == 1)
        if odd is not None and odd.size == 2:
            await odd.barrier()
            assert odd.ranks == (0, 2)
            odd.close()
            odd.close()
            with pytest.raises(aiocomm.ClosedError):
                await odd.barrier()

    async with world(4) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_large_groups_exchange_headers_by_dissemination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "DIRECT_MEMBERS", 2)
    said = []

    async def rank(comm: aiocomm.Communicator) -> None:
        for operation in UNIFORM:
            await do(comm, operation, None, 700)
        await comm.barrier()
        try:
            await comm.barrier() if comm.rank != 3 else await comm.broadcast(np.zeros(1))
        except aiocomm.UsageError as error:
            said.append(str(error).partition(": ")[2])

    async with world(5) as members:
        await everyone(members, rank)
    assert len(said) == 5
    assert len(set(said)) == 1
    assert said[0].startswith("rank 3 called broadcast float64 (1) root 0")


# ---------------------------------------------------------------- repeated calls


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shape", [(4, 6), (250, 200)], ids=["small", "large"])
async def test_repeats_give_the_right_results(size: int, shape: tuple[int, int]) -> None:
    n = shape[0] * shape[1]

    async def rank(comm: aiocomm.Communicator) -> None:
        for call in range(4):
            parts = [(np.arange(n) % 1000.0).reshape(shape) * (r + 1) + call for r in range(size)]
            mine = parts[comm.rank]
            x = mine.copy()
            await comm.all_reduce(x)
            assert np.array_equal(x, sum(parts))
            out = np.empty(shape)
            await comm.all_reduce(mine, "mean", out=out)
            np.testing.assert_allclose(out, sum(parts) / size)
            gathered = np.empty((size, *shape))
            await comm.all_gather(gathered, mine)
            assert np.array_equal(gathered, parts)
            swapped = np.empty((size, *shape), np.int32)
            await comm.all_to_all(
                swapped, np.stack([np.full(shape, 10 * comm.rank + r + call, np.int32) for r in range(size)])
            )
            assert swapped[:, 0, 0].tolist() == [10 * r + comm.rank + call for r in range(size)]
            block = np.empty(n)
            await comm.reduce_scatter(block, np.concatenate([p.reshape(-1) for p in parts]) + comm.rank)
            assert np.array_equal(block, size * parts[comm.rank].reshape(-1) + sum(range(size)))
            x = mine.copy()
            await comm.broadcast(x, root=size - 1)
            assert np.array_equal(x, parts[-1])
            await rooted(comm, parts, call)
            await comm.barrier()

    async def rooted(comm: aiocomm.Communicator, parts: list[Any], call: int) -> None:
        mine = parts[comm.rank]
        for root in (0, size - 1):
            here = comm.rank == root
            block = np.empty_like(mine)
            await comm.scatter(block, np.stack(parts) + call if here else None, root)
            assert np.array_equal(block, mine + call)
            gathered = np.empty((size, *mine.shape)) if here else None
            await comm.gather(gathered, mine, root)
            assert not here or np.array_equal(gathered, parts)
            total = mine.copy()
            await comm.reduce(total, root)
            assert np.array_equal(total, sum(parts) if here else mine)
            out = np.empty_like(mine) if here else None
            await comm.reduce(mine, root, "mean", out=out)
            if here:
                np.testing.assert_allclose(out, sum(parts) / size)

    async with world(size) as members:
        await everyone(members, rank)
        called = members[0].statistics().collectives
        assert sum(called[key] for key in called if key.startswith("all_reduce/")) == 8


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("mode", ["shared", "messages"])
async def test_repeats_keep_no_array(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "messages":
        monkeypatch.setattr(shared, "prepare", lambda *_: None)
    async with world(2) as members:
        kept: list[Any] = []

        async def rank(comm: aiocomm.Communicator) -> None:
            for count in (10, 30_000):
                for _ in range(3):
                    x, out, whole = (np.ones(n, np.float32) for n in (count, count, 2 * count))
                    kept.extend(weakref.ref(array) for array in (x, out, whole))
                    await comm.all_gather(whole, x)
                    await comm.broadcast(whole)
                    await comm.all_reduce(x, op="mean")
                    await comm.all_reduce(x, op="mean", out=out)
                    await comm.reduce_scatter(out, whole, op="max")

        await everyone(members, rank)
        del rank
        gc.collect()
        assert not [ref for ref in kept if ref() is not None]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("count", [3, 30_000])
async def test_repeats_may_be_in_place_or_not(count: int) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        me = comm.rank
        for turn, in_place in enumerate([True, True, False, False, True, False]):
            every = np.stack([block(turn + r, count) for r in range(3)])
            for call in (comm.all_gather, partial(comm.gather, root=1)):
                out = np.full((3, count), -1.0)
                if in_place:
                    out[me] = every[me]
                await call(out, out[me] if in_place else every[me].copy())
                if call == comm.all_gather or me == 1:
                    assert np.array_equal(out, every)

    async with world(3) as members:
        await everyone(members, rank)


async def test_repeats_look_at_their_arrays_again() -> None:
    """What was prepared for arrays that are contiguous, apart and writable is not used for others."""

    async def rank(comm: aiocomm.Communicator) -> None:
        x, out = np.full(4, comm.rank + 1.0), np.empty(8)
        for _ in range(2):
            await comm.all_gather(out, x)
        out[4 * comm.rank :][:4] = x
        await comm.all_gather(out, out[4 * comm.rank :][:4])  # in place
        assert out.tolist() == [1.0] * 4 + [2.0] * 4
        fixed = np.empty(8)
        fixed.flags.writeable = False
        with pytest.raises(aiocomm.UsageError, match="read-only"):
            await comm.all_gather(fixed, x)
        with pytest.raises(aiocomm.UsageError, match="not contiguous"):
            await comm.all_gather(np.empty(16)[::2], x)
        skewed = np.frombuffer(bytes(1) + x.tobytes(), np.uint8)[1:].view(np.float64)
        await comm.all_gather(out, skewed)
        assert out.tolist() == [1.0] * 4 + [2.0] * 4
        constant = np.arange(4.0)
        constant.flags.writeable = False
        for _ in range(3):
            copy = np.empty(4)
            await comm.broadcast(constant if comm.rank == 0 else copy)
            assert comm.rank == 0 or np.array_equal(copy, constant)

    async with world(2) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("count", [16, 100_000])
async def test_repeats_may_overlap(count: int) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        async def one(value: int) -> None:
            x = np.full(count, value + comm.rank)
            await comm.all_reduce(x)
            assert (x == 2 * value + 1).all()

        await one(0)
        async with anyio.create_task_group() as tasks:
            for _ in range(12):
                tasks.start_soon(one, 7)

    async with world(2) as members:
        await everyone(members, rank)


async def not_called_by_rank_2(call: Callable[[float], Awaitable[Any]]) -> type[Exception]:
    """Ranks 0 and 1 begin a call in vain; gives how that ends. The time of one may be over before the other
    has begun: that one is named, too, and hears of it instead, in the same words.
    """
    kinds = (aiocomm.DeadlineExceeded, aiocomm.TransferCancelled)
    with pytest.raises(kinds, match=r"not called within 0\.1 s by .*rank 2") as caught:
        await call(0.1)
    return caught.type


async def repeats_and_their_ends(comm: aiocomm.Communicator, x: Any) -> type[Exception] | None:
    """Calls of three ranks that repeat, and then differ, are late, and are given up; gives how the late one
    ends.
    """
    told = None
    for _ in range(2):
        await comm.all_reduce(x)
        await comm.all_reduce(x, "max")
    with pytest.raises(aiocomm.UsageError, match="rank 1 called all_reduce max"):
        await comm.all_reduce(x, "max" if comm.rank == 1 else "sum")
    if comm.rank == 2:  # never calls in time
        for other in (0, 1):
            await comm.recv(bytearray(2), src=other)
        # Either it hears of that first, or it has all that it needs: messages that came before.
        with contextlib.suppress(aiocomm.TransferCancelled):
            await comm.all_reduce(x)
    else:
        told = await not_called_by_rank_2(lambda limit: comm.all_reduce(x, deadline=limit))
        await comm.send(b"go", dst=2)
    await comm.barrier()
    if comm.rank == 0:
        with anyio.move_on_after(0.05) as scope:
            await comm.all_reduce(x)
        assert scope.cancelled_caught
        await comm.send(b"go", dst=2)
    elif comm.rank == 1:
        with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up: cancelled"):
            await comm.all_reduce(x)
    else:
        await comm.recv(bytearray(2), src=0)
    await comm.barrier(channel=comm.channel("apart"))
    return told


@pytest.mark.parametrize("count", [8, 100_000])
async def test_repeats_end_as_first_ones_do(count: int) -> None:
    told = []

    async def rank(comm: aiocomm.Communicator) -> None:
        told.append(await repeats_and_their_ends(comm, np.ones(count)))

    async with world(3, warmup=True) as members:
        await everyone(members, rank)
    assert aiocomm.DeadlineExceeded in told


async def lost_before_a_repeat(comm: aiocomm.Communicator, x: Any) -> Any:
    """Rank 2 leaves; the others are told at their next call, and get the group that is left."""
    group = await comm.group([0, 1, 2])
    for _ in range(2):
        await group.all_reduce(x)
    if comm.rank == 2:
        await comm.aclose()
        return None
    with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone"):
        await group.all_reduce(x)
    return await group.shrink(deadline=LIMIT_S)


@pytest.mark.parametrize("count", [8, 100_000])
async def test_a_repeat_fails_at_once_where_a_rank_is_lost(count: int) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        x = np.ones(count)
        rest = await lost_before_a_repeat(comm, x)
        if rest is not None:
            await rest.all_reduce(x)

    async with world(3, warmup=True) as members:
        await everyone(members, rank)


# ---------------------------------------------------------------- bad calls

F4 = np.zeros(6, np.float32)
MANY = np.dtype([(f"a long name {i}", ">i4", (2, 3)) for i in range(20)])
MORE = np.dtype([(f"a long name {i}", ">i4" if i < 19 else "<i4", (2, 3)) for i in range(20)])
WRONG: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "shape": (lambda c: c.all_reduce(F4.copy()), lambda c: c.all_reduce(np.zeros(5, np.float32)), "(5)"),
    "shape of large": (
        lambda c: c.all_reduce(np.zeros(1 << 20)),
        lambda c: c.all_reduce(np.zeros(1 << 19)),
        "(524288)",
    ),
    "small and large": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(np.zeros(1 << 20, np.float32)),
        "(1048576)",
    ),
    "root of a reduction": (
        lambda c: c.reduce(np.zeros(1 << 19), 0),
        lambda c: c.reduce(np.zeros(1 << 19), 2),
        "root 2",
    ),
    "root that there is not": (
        lambda c: c.broadcast(F4.copy()),
        lambda c: c.broadcast(F4.copy(), 3),
        "root=3",
    ),
    "dtype": (lambda c: c.broadcast(F4.copy()), lambda c: c.broadcast(np.zeros(3)), "float64"),
    "root": (lambda c: c.broadcast(F4.copy(), 0), lambda c: c.broadcast(F4.copy(), 1), "root 1"),
    "op": (lambda c: c.all_reduce(F4.copy()), lambda c: c.all_reduce(F4.copy(), "max"), "max"),
    "operation": (lambda c: c.barrier(), lambda c: c.reduce(F4.copy()), "reduce"),
    "counts": (
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [2, 2, 2]),
        lambda c: c.all_gatherv(np.zeros(7), np.zeros(2), [2, 2, 3][::-1] if c.rank else [2, 2, 3]),
        "(3, 2, 2)",
    ),
    "algorithm": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), algorithm="ring"),
        "by ring",
    ),
    "read-only": (lambda c: c.all_reduce(F4.copy()), lambda c: c.all_reduce(b"abc"), "read-only"),
    "no array": (lambda c: c.all_reduce(F4.copy()), lambda c: c.all_reduce(object()), "is not an array"),
    "size of out": (
        lambda c: c.all_gather(np.zeros(6), np.zeros(2)),
        lambda c: c.all_gather(np.zeros(5), np.zeros(2)),
        "out has 5 elements",
    ),
    "unknown": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), algorithm="magic"),
        "choose from",
    ),
    "fields": (
        lambda c: c.broadcast(np.zeros(3, "i4, f4")),
        lambda c: c.broadcast(np.zeros(3, "f4, i4")),
        "void64 of {0 'f0' float32, 4 'f1' int32}",
    ),
    "names of many fields": (
        lambda c: c.all_gather(np.zeros(3, MANY), np.zeros(1, MANY)),
        lambda c: c.all_gather(np.zeros(3, MORE), np.zeros(1, MORE)),
        f"void{8 * MANY.itemsize} of ",
    ),
    "counts that are none": (
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [2, 2, 2]),
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), 5),
        "counts=5: pass one integer per rank",
    ),
    "counts that are not whole": (
        lambda c: c.all_to_allv(np.zeros(3), np.zeros(3), [1, 1, 1], [1, 1, 1]),
        lambda c: c.all_to_allv(np.zeros(3), np.zeros(3), [1.9, 1.1, 1.0], np.ones(3, int)),
        "recv_counts=[1.9, 1.1, 1.0]",
    ),
    "counts that are no numbers": (
        lambda c: c.reduce_scatter(np.zeros(2), np.zeros(6), counts=[2, 2, 2]),
        lambda c: c.reduce_scatter(np.zeros(2), np.zeros(6), counts=[2, 2, float("nan")]),
        "one integer per rank",
    ),
    "a negative count": (
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [2, 2, 2]),
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [6, 2, -2]),
        "counts has a negative entry",
    ),
    "more counts than ranks": (
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [2, 2, 2]),
        lambda c: c.all_gatherv(np.zeros(6), np.zeros(2), [2, 2, 2, 0]),
        "counts has 4 entries for 3 ranks",
    ),
    "missing counts": (
        lambda c: c.gatherv(None, np.zeros(2), root=1),
        lambda c: c.gatherv(np.zeros(6), np.zeros(2), root=1),
        "counts is missing",
    ),
    "a list for a root": (lambda c: c.reduce(F4.copy()), lambda c: c.reduce(F4.copy(), [0]), "root=[0]"),
    "an array for a root": (
        lambda c: c.scatter(np.zeros(2), np.zeros(6)),
        lambda c: c.scatter(np.zeros(2), np.zeros(6), np.array([0, 1])),
        "root=array([0, 1])",
    ),
    "a list for an op": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), ["sum"]),
        "op=['sum'] is not a name",
    ),
    "an op with a hash": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), "#sum"),
        "unknown reduction '#sum': choose from",
    ),
    "a list for an algorithm": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), algorithm=["ring"]),
        "algorithm=['ring']",
    ),
    "a mask": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(np.ma.masked_array(F4.copy())),
        "masked array",
    ),
    "elements of no bytes": (
        lambda c: c.broadcast(F4.copy()),
        lambda c: c.broadcast(np.zeros(4, "V0")),
        "whose elements have no bytes",
    ),
    "a deadline that has passed": (
        lambda c: c.all_reduce(F4.copy()),
        lambda c: c.all_reduce(F4.copy(), deadline=-1),
        "deadline=-1",
    ),
    "a negative color": (lambda c: c.split(0), lambda c: c.split(-1), "color=-1"),
    "a color that is none": (lambda c: c.split(0), lambda c: c.split("red"), "color='red'"),
    "a long key": (lambda c: c.split(0), lambda c: c.split(0, 1 << 70), "more than 64 bits"),
}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("case", WRONG)
async def test_a_rank_that_calls_differently_is_named_on_all(case: str) -> None:
    right, wrong, text = WRONG[case]
    said: list[str] = []

    async def rank(comm: aiocomm.Communicator) -> None:
        with pytest.raises(aiocomm.UsageError) as caught:
            await (wrong if comm.rank == 1 else right)(comm)
        said.append(str(caught.value).partition(": ")[2])
        await comm.barrier()  # the group is as good as before

    async with world(3) as members:
        await everyone(members, rank)
    assert len(set(said)) == 1, said
    assert "rank 1 " in said[0]
    assert text in said[0]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_calls_that_take_many_words_are_compared_to_the_last() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        counts = [10**5 + 1] * 14 + ([0, 1, 0] if comm.rank == 16 else [1, 0, 0])
        kind = np.dtype([("the name of a field", "u1")])
        every, own = np.zeros(sum(counts), kind), np.zeros(counts[comm.rank], kind)
        with pytest.raises(aiocomm.UsageError, match=r"1,…, and the others all_gather .*1,…: all ranks"):
            await comm.all_gatherv(every, own, counts, algorithm="ring")

    async with world(17) as members:
        await everyone(members, rank)


class Broken:
    """An array library's own mistake."""

    @property
    def dtype(self) -> Any:
        raise RuntimeError("no dtype today")

    def __buffer__(self, flags: int) -> memoryview:
        raise RuntimeError("no memory today")

    @property
    def __array_interface__(self) -> Any:
        raise RuntimeError("no memory today")


@pytest.mark.parametrize("algorithm", [None, *applicable("all_reduce", 3)])
async def test_flags_of_all_ranks_and_of_any(algorithm: str | None) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        mine = np.array([True, comm.rank == 1, False] * 500)
        for _ in range(4):  # later ones are prepared
            for op, wanted in (("min", [True, False, False]), ("max", [True, True, False])):
                out = np.empty_like(mine)
                await comm.all_reduce(mine, op, out=out, algorithm=algorithm)
                assert out.tolist() == wanted * 500
        with pytest.raises(aiocomm.UsageError, match=r"sum of bool is not of bool: use min \(of all\)"):
            await comm.all_reduce(mine)

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({0, 1, 2}, "^all_reduce: all ranks refused their calls: x is None: pass an array$"),
        ({0, 2}, "^all_reduce: rank 0 and rank 2 refused their calls: x is None: pass an array$"),
        ({1}, "^all_reduce: rank 1 refused its call: x is None: pass an array$"),
    ],
)
async def test_what_is_wrong_alike_on_several_ranks_is_told_once(wrong: set[int], match: str) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        with pytest.raises(aiocomm.UsageError, match=match):
            await comm.all_reduce(None if comm.rank in wrong else np.ones(3))

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_whatever_is_wrong_at_one_rank_is_told_to_all() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        for _ in range(3):
            if comm.rank == 1:
                with pytest.raises(RuntimeError, match="today"):
                    await comm.all_reduce(Broken())
            else:
                with pytest.raises(aiocomm.UsageError, match="rank 1 refused its call: RuntimeError: no"):
                    await comm.all_reduce(F4.copy())
            await comm.barrier()

    with anyio.fail_after(LIMIT_S):
        async with world(2) as members:
            await everyone(members, rank)


async def test_what_ends_a_call_at_one_rank_unforeseen_is_told_to_the_others() -> None:
    async with world(2) as (comm, other):

        async def fail() -> None:
            comm._members()._scope(None).abort(1, MemoryError("no memory is left"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            with pytest.raises(aiocomm.TransferCancelled, match=r"up: MemoryError: no memory is left$"):
                await other.barrier()


@pytest.mark.parametrize("repeats", [0, 3])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_memory_that_is_written_already_is_told_to_all(repeats: int) -> None:
    """By a receive of one rank: the others, whose headers have found nothing wrong, wait for its data."""

    async def rank(comm: aiocomm.Communicator) -> None:
        x, out = np.full(100_000, 1.0 + comm.rank), np.empty(200_000)
        for _ in range(repeats):
            await comm.all_gather(out, x)
        if comm.rank == 1:
            receive = comm.recv(out, 0)
            with pytest.raises(aiocomm.UsageError, match=r"another receive .* writes into this memory"):
                await comm.all_gather(out, x)
            await comm.send(b"", 0)
            await receive
        else:
            with pytest.raises(aiocomm.TransferCancelled, match="rank 1 gave the call up: another receive"):
                await comm.all_gather(out, x)
            await comm.recv(bytearray(1), 1)
            await comm.send(x, 1)
        await comm.all_gather(out, x)
        assert out.tolist() == [1.0] * 100_000 + [2.0] * 100_000

    with anyio.fail_after(LIMIT_S):
        async with world(2) as members:
            await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_numbers_may_be_those_of_numpy() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        two, root = np.full(2, 2), np.int64(1)
        deadline: Any = np.float32(30)
        for _ in range(3):  # also as repeats
            x, out = np.arange(4.0) + comm.rank, np.zeros(4)
            await comm.broadcast(x, root, deadline=deadline)
            assert x[0] == 1
            await comm.all_to_allv(out, x, two, two)
            assert np.array_equal(out.reshape(2, 2), [x[2 * comm.rank :][:2]] * 2)
            await comm.gatherv(out if comm.rank == 1 else None, x[:2], two, root)
            await comm.scatterv(out[:2], x if comm.rank == 1 else None, two, root)
            assert np.array_equal(out[:2], x[2 * comm.rank :][:2])
        part = await comm.split(np.int64(0), np.int32(-comm.rank), deadline=deadline)
        assert part is not None
        assert part.ranks == (1, 0)

    async with world(2) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_only_the_own_block_may_lie_where_the_result_goes() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        whole, six, counts = np.full(5, -1.0), np.full(6, -1.0), [1, 2, 2]
        own, other = whole[3:5], whole[2:4]  # rank 2's are the last two
        mine = np.full(counts[comm.rank], float(comm.rank))
        here = comm.rank == 2
        for wrong in (
            lambda: comm.gatherv(
                whole if here else None, other if here else mine, counts if here else None, 2
            ),
            lambda: comm.all_gatherv(whole, other if here else mine, counts),
            lambda: comm.scatterv(
                whole[:2] if here else mine, whole if here else None, counts if here else None, 2
            ),
            lambda: comm.all_to_allv(six, six if here else np.zeros(6), [2] * 3, [2] * 3),
        ):
            with pytest.raises(aiocomm.UsageError, match=r"rank 2 refused its call: .* overlap"):
                await wrong()
            assert not here or (whole == -1).all()
        own[:] = 2
        await comm.gatherv(whole if here else None, own if here else mine, counts if here else None, 2)
        assert not here or whole.tolist() == [0, 1, 1, 2, 2]
        whole[: 5 - 2 * here] = -1
        await comm.all_gatherv(whole, own if here else mine, counts)
        assert whole.tolist() == [0, 1, 1, 2, 2]

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_split_that_was_refused_does_not_number_the_next_differently() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        with pytest.raises(aiocomm.UsageError, match="rank 1 refused its call: color=-1"):
            await comm.split(-comm.rank)
        part = await comm.split(0, deadline=LIMIT_S)
        assert part is not None
        await part.barrier(deadline=LIMIT_S)

    async with world(2) as members:
        await everyone(members, rank)


class Queued:
    """A send that has not been handed to its link yet; until then `cancel` takes it back."""

    def __init__(self, begin: Callable[[], Any], kind: str) -> None:
        self.kind = kind
        self._begin, self._begun, self._taken_back = begin, None, False
        self._told: list[Callable[[Any], object]] = []

    def go_on(self) -> None:
        if not self._taken_back:
            self._begun = self._begin()
            self._begun.add_done_callback(lambda _: [tell(self) for tell in self._told])

    def cancel(self) -> None:
        self._taken_back = self._begun is None
        if self._taken_back:
            for tell in self._told:
                tell(self)

    def add_done_callback(self, tell: Callable[[Any], object]) -> None:
        self._told.append(tell)

    def done(self) -> bool:
        return self._taken_back or (self._begun is not None and self._begun.done())

    def cancelled(self) -> bool:
        return self._taken_back

    def exception(self) -> Any:
        return self._begun.exception()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_who_has_heard_all_still_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 finds the difference while its header to rank 1 waits for the link: rank 1 hears it, too."""
    queued: list[Queued] = []
    give_up = Flight._give_up

    async def giving_up(self: Flight, error: BaseException) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(give_up, self, error)
            await anyio.wait_all_tasks_blocked()
            while self._group.rank == 2 and queued:
                queued.pop().go_on()

    monkeypatch.setattr(Flight, "_give_up", giving_up)
    monkeypatch.setattr(Flight, "_linger", lambda self: self._gate.rung)  # only of the engine's

    async def rank(comm: aiocomm.Communicator) -> None:
        if comm.rank == 2:
            send = comm._send

            def later(data: Any, peer: int, *more: Any) -> Any:
                if peer != 1:
                    return send(data, peer, *more)
                monkeypatch.setattr(comm, "_send", send)
                queued.append(Queued(lambda: send(data, peer, *more), "send"))
                return queued[0]

            monkeypatch.setattr(comm, "_send", later)
        with pytest.raises(aiocomm.UsageError, match="rank 1 "):
            await comm.broadcast(F4.copy(), int(comm.rank == 1))

    with anyio.fail_after(LIMIT_S):
        async with world(3, warmup=True) as members:
            await everyone(members, rank)
    assert not queued


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_counts_that_do_not_fit_together_are_named() -> None:
    said = set()

    async def rank(comm: aiocomm.Communicator) -> None:
        take = [1, 1, 1] if comm.rank != 2 else [1, 2, 1]
        with pytest.raises(aiocomm.UsageError, match="rank 1 gives rank 2 1 elements, which expects 2") as e:
            await comm.all_to_allv(np.zeros(sum(take)), np.zeros(3), take, [1, 1, 1])
        said.add(str(e.value))

    async with world(3) as members:
        await everyone(members, rank)
    assert len(said) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_counts_of_the_root_that_differ_from_a_ranks_are_named() -> None:
    said: dict[str, set[str]] = {"gatherv": set(), "scatterv": set()}

    async def rank(comm: aiocomm.Communicator) -> None:
        mine, root = np.zeros(2 if comm.rank == 2 else 1), comm.rank == 0
        counts = [1, 1, 1] if root else None
        with pytest.raises(
            aiocomm.UsageError, match="rank 2 gives rank 0 2 elements, which expects 1"
        ) as caught:
            await comm.gatherv(np.zeros(3) if root else None, mine, counts)
        said["gatherv"].add(str(caught.value))
        with pytest.raises(
            aiocomm.UsageError, match="rank 0 gives rank 2 1 elements, which expects 2"
        ) as caught:
            await comm.scatterv(mine, np.zeros(3) if root else None, counts)
        said["scatterv"].add(str(caught.value))
        await comm.barrier()

    async with world(3) as members:
        await everyone(members, rank)
    assert [len(texts) for texts in said.values()] == [1, 1]


async def test_a_rank_that_never_calls_is_named() -> None:
    told = []

    async def rank(comm: aiocomm.Communicator) -> None:
        if comm.rank != 2:
            x = np.zeros(100_000)
            told.append(await not_called_by_rank_2(lambda limit: comm.all_reduce(x, deadline=limit)))
            await comm.send(b"go", dst=2)
        else:
            for other in (0, 1):
                await comm.recv(bytearray(2), src=other)
            with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
                await comm.all_reduce(np.zeros(100_000))
        await comm.barrier()

    async with world(3) as members:
        await everyone(members, rank)
    assert aiocomm.DeadlineExceeded in told


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_deadline_of_one_rank_is_none_of_another() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        async def begun() -> None:
            await comm.send(b"go", dst=0)

        if comm.rank == 0:
            await comm.recv(bytearray(2), src=1)
            with pytest.raises(aiocomm.DeadlineExceeded, match=r"not called within 0 s by .*rank 2"):
                await comm.barrier(deadline=0)
        elif comm.rank == 1:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(begun)  # which runs once this rank waits in its call
                with pytest.raises(aiocomm.TransferCancelled, match=r"rank 0 gave the call up: .*rank 2"):
                    await comm.barrier()

    async with world(3, warmup=True) as members:
        await everyone(members, rank)


async def test_a_cancelled_rank_ends_the_call_on_all() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        x = np.zeros(1 << 20)
        if comm.rank == 0:
            with anyio.move_on_after(0.1) as scope:
                await comm.all_reduce(x)
            assert scope.cancelled_caught
            await comm.send(b"go", dst=2)
        elif comm.rank == 1:
            with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up: cancelled"):
                await comm.all_reduce(x)
        else:
            await comm.recv(bytearray(2), src=0)
            with pytest.raises(aiocomm.TransferCancelled):
                await comm.all_reduce(x)
        await comm.barrier()
        await comm.all_reduce(x)

    async with world(3) as members:
        await everyone(members, rank)


CLOSED: dict[str, Callable[[Group], Any]] = {
    "barrier": lambda g: g.barrier(),
    "small": lambda g: g.all_reduce(np.zeros(10)),
    "large": lambda g: g.all_reduce(np.zeros(1 << 20)),
    "experts": lambda g: g.dispatch(np.zeros((2, 4)), [[0], [1]], experts=2),
    "many rows": lambda g: g.dispatch(np.zeros((4000, 200)), np.zeros((4000, 1), int), experts=2),
}


@pytest.mark.parametrize("repeats", [0, 3])
@pytest.mark.parametrize("case", CLOSED)
async def test_a_group_that_one_rank_closes_ends_calls_on_all(case: str, repeats: int) -> None:
    call = CLOSED[case]

    async def rank(comm: aiocomm.Communicator) -> None:
        for closing in (0, 1):  # ranks of the group; the other rank waits, and never waits alone
            group = await comm.group([1, 0, 2])
            for _ in range(repeats + 1):
                await call(group)
            if group.rank == 2:
                await comm.barrier()  # this one comes once the group is closed
                with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
                    await call(group)
            else:

                async def calling(group: Group = group, closing: int = closing) -> None:
                    ours = group.rank == closing
                    kind = aiocomm.ClosedError if ours else aiocomm.TransferCancelled
                    with pytest.raises(kind, match="the group was closed" + "$" * ours):
                        await call(group)

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(calling)
                    await anyio.wait_all_tasks_blocked()
                    if group.rank == closing:
                        group.close()
                await comm.barrier()
            with pytest.raises(aiocomm.ClosedError if group.rank == closing else aiocomm.TransferCancelled):
                await call(group)  # which the one that closed it had not begun
            await comm.barrier()

    with anyio.fail_after(LIMIT_S):
        async with world(3) as members:
            await everyone(members, rank)


async def test_a_group_that_is_closed_by_all_is_no_failure() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        for _ in range(20):
            group = await comm.group([0, 1, 2])
            await group.all_reduce(np.zeros(10))
            group.close()
        await comm.barrier()
        await until(lambda: comm.statistics().in_flight == 0)

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_groups_are_made_by_their_members() -> None:
    async with world(2) as (a, b):
        with pytest.raises(aiocomm.UsageError, match="not one of"):
            await a.group([1])
        with pytest.raises(aiocomm.UsageError, match="comes twice"):
            await a.group([0, 0])
        with pytest.raises(aiocomm.UsageError, match="no rank 5"):
            await a.group([0, 5])
        with pytest.raises(aiocomm.DeadlineExceeded, match=r"not called within 0\.05 s by rank 1"):
            await a.group([0, 1], deadline=0.05)
        with pytest.raises(aiocomm.UsageError, match="another communicator"):
            await a.barrier(channel=b.channel("x"))


async def test_survivors_agree_also_if_another_leaves_meanwhile() -> None:
    left: list[tuple[int, ...]] = []

    async def rank(comm: aiocomm.Communicator) -> None:
        group = await comm.group([3, 1, 0, 2])
        if comm.rank == 3:
            await comm.aclose()
            return
        with pytest.raises(aiocomm.PeerLostError):
            await group.barrier()
        if comm.rank == 2:
            await comm.recv(bytearray(1), src=0)  # the others are about to ask it who is left
            await comm.aclose()
            return
        if comm.rank == 0:
            await comm.send(b"x", dst=2)
        rest = await group.shrink(deadline=LIMIT_S)
        if 2 in rest.ranks:  # it answered before it left
            rest = await rest.shrink(deadline=LIMIT_S)
        left.append(rest.ranks)
        await rest.barrier()

    async with world(4, warmup=True) as members:
        await everyone(members, rank)
    assert left == [(1, 0), (1, 0)]


# ---------------------------------------------------------------- processes


async def _work(comm: aiocomm.Communicator) -> None:
    for operation in UNIFORM:
        await do(comm, operation, None, 90_001)
    for algorithm in ("direct", "ring"):
        await do(comm, "all_reduce", algorithm, 900_000)  # several chunks a block


@pytest.mark.parametrize("link", ["shm", "tcp"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_between_processes(link: str) -> None:
    async with aiocomm.spawn(_work, n=2, links=link) as comm:
        await _work(comm)


async def _die_in_the_middle(comm: aiocomm.Communicator, steps: int) -> None:
    group = await comm.group(range(comm.size))
    if comm.rank == 2:

        async def kill() -> None:
            await comm.recv(bytearray(1), src=0)
            os.kill(os.getpid(), signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            for _ in range(steps):
                await group.all_reduce(np.zeros(200_000))
            await anyio.sleep_forever()
    apart = await comm.group([0, 1, 3])

    async def work() -> None:
        for number in range(10_000):
            if comm.rank == 0 and number == (5 if steps else 0):
                await comm.send(b"x", dst=2)
            await group.all_reduce(np.zeros(200_000), algorithm="ring" if steps % 2 else None)

    with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone") as caught:
        await work()
    assert caught.value.peer == 2
    with pytest.raises(aiocomm.PeerLostError):
        await group.barrier()
    await apart.barrier()  # groups without it do not notice
    left = await group.shrink(deadline=LIMIT_S)
    assert left.ranks == (0, 1, 3)
    x = np.full(50_000, left.rank)
    await left.all_reduce(x)
    assert (x == 3).all()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("steps", [0, 10_000])
async def test_survivors_of_a_killed_rank_go_on(steps: int) -> None:
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_die_in_the_middle, 3, steps) as comm:
            await _die_in_the_middle(comm, steps)
    assert caught.value.rank == 2
    assert caught.value.exit_code == -signal.SIGKILL
