"""Dispatch and combine: the right rows and sums on every path and loop, bad calls, lost ranks."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import numpy as np
import pytest
from harness import LIMIT_S, until, world

import aiocomm
from aiocomm.launch import WorkerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Rank = Callable[[aiocomm.Communicator], Awaitable[None]]

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
EXPERTS = 10


async def everyone(members: list[aiocomm.Communicator], rank: Rank) -> None:
    """Run a coroutine for every member at once."""
    async with anyio.create_task_group() as group:
        for member in members:
            group.start_soon(rank, member)


def batch(rank: int, tokens: int, hidden: int, dtype: Any) -> tuple[Any, Any, Any]:
    """What a rank dispatches: no other rank has it."""
    seeded = np.random.default_rng(rank)
    x = seeded.normal(size=(tokens, hidden)).astype(dtype)
    return x, seeded.integers(-1, EXPERTS, (tokens, 3)), seeded.random((tokens, 3), np.float32)


def expert(number: int, x: Any) -> Any:
    """What an expert does."""
    return (x * (number + 1) + number).astype(x.dtype)


def alone(x: Any, ids: Any, weights: Any, owner: Any, size: int) -> Any:
    """The result of one process that has all experts, summed in the same order."""
    total = np.zeros(x.shape, np.float32)
    for rank in range(size):
        some = np.zeros(x.shape, np.float32)
        for e in np.flatnonzero(owner == rank).tolist():
            for k in range(ids.shape[1]):
                there = ids[:, k] == e
                some[there] += expert(e, x[there]).astype(np.float32) * weights[there, k, None]
        total += some
    return total


async def layer(
    group: Any, tokens: int, hidden: int, dtype: Any = np.float32, placement: Any = None, **options: Any
) -> None:
    """A dispatch, the experts, a combine; checked against one process."""
    size = group.size
    x, ids, weights = batch(group.rank, tokens, hidden, dtype)
    came = await group.dispatch(x, ids, weights, experts=EXPERTS, placement=placement, **options)
    every = [batch(r, tokens, hidden, dtype)[0] for r in range(size)]
    for source in range(size):
        rows = came.tokens[came.starts[source] : came.starts[source + 1]]
        ids_there = batch(source, tokens, hidden, dtype)[1]
        mine = np.isin(ids_there, came.experts).any(1)
        assert np.array_equal(rows, every[source][mine])
    outputs = came.inputs
    for e in came.experts.tolist():
        outputs[came.of(e)] = expert(e, came.tokens[came.rows[came.of(e)]])
    result = await group.combine(outputs, came, out=np.empty((tokens, hidden), np.float32), **options)
    owner = np.array(placement) if placement is not None else _even(size)
    assert np.array_equal(result, alone(x, ids, weights, owner, size))


def _even(size: int) -> Any:
    return np.concatenate(
        [np.full(len(part), r) for r, part in enumerate(np.array_split(range(EXPERTS), size))]
    )


@pytest.mark.parametrize("path", ["auto", "latency", "bandwidth"])
@pytest.mark.parametrize("size", [1, 2, 4])
async def test_a_layer_is_that_of_one_process(size: int, path: str) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        for tokens, hidden in ((0, 8), (1, 8), (37, 64), (800, 700)):
            await layer(comm, tokens, hidden, path=path)

    async with world(size) as members:
        await everyone(members, rank)
        calls = members[0].statistics().collectives
        if size > 1:
            assert ("dispatch/bandwidth" in calls) == (path != "latency")
            assert ("combine/bandwidth" in calls) == (path != "latency")
            assert calls.get("combine/latency", 0) >= {"latency": 4, "auto": 3, "bandwidth": 1}[path]


async def test_ranks_may_give_different_numbers_of_tokens_by_different_paths() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        tokens = [0, 5, 2000][comm.rank]
        x, ids, weights = batch(comm.rank, tokens, 64, np.float16)
        path = ["latency", "bandwidth", "auto"][comm.rank]
        came = await comm.dispatch(
            x, ids, weights, experts=EXPERTS, placement=[2, 0, 1, 1, 0, 2, 0, 1, 2, 0], path=path
        )
        outputs = came.inputs
        for e in came.experts.tolist():
            outputs[came.of(e)] = expert(e, outputs[came.of(e)])
        owner = np.array([2, 0, 1, 1, 0, 2, 0, 1, 2, 0])
        expected = alone(x, ids, weights, owner, 3)
        exact = await comm.combine(outputs, came, out=np.empty(x.shape, np.float32))
        assert np.array_equal(exact, expected)
        result = await comm.combine(outputs, came, wire=np.float16, path=path)
        assert result.dtype == np.float16
        np.testing.assert_allclose(result, expected, rtol=5e-3, atol=5e-2)
        for other in range(3):
            there = ((owner[ids] == other) & (ids >= 0)).any(1)
            assert np.array_equal(came.routed_to(other), np.flatnonzero(there))

    async with world(3) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_token_travels_once_to_each_rank() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        x = np.arange(8, dtype=np.int32).reshape(2, 4) + 100 * comm.rank
        came = await comm.dispatch(x, [[4, 5, 6], [0, 4, 4]], experts=8)
        if comm.rank == 0:
            assert came.tokens.tolist() == [[4, 5, 6, 7], [104, 105, 106, 107]]
            assert came.experts.tolist() == [0, 1, 2, 3]
            assert came.rows[came.of(0)].tolist() == [0, 1]
            assert came.rows[came.of(3)].tolist() == []
        else:
            assert came.tokens[:, 0].tolist() == [0, 4, 100, 104]
            assert came.rows[came.of(4)].tolist() == [0, 1, 1, 2, 3, 3]
            assert came.weights.tolist() == [1.0] * 10
        assert came.routed_to(0).tolist() == [1]
        assert came.routed_to(1).tolist() == [0, 1]
        with pytest.raises(aiocomm.UsageError, match="not one of this rank's"):
            came.of(4 * (1 - comm.rank))
        assert "4 experts" in repr(came)

    async with world(2) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_layers_overlap_and_need_no_order_with_other_collectives() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        bulk = comm.channel("experts", weight=2.0)

        async def reduce() -> None:
            x = np.ones(50_000)
            await comm.all_reduce(x)
            assert (x == 3).all()

        async def micro(tokens: int) -> None:
            await layer(comm, tokens, 128, channel=bulk)

        async with anyio.create_task_group() as tasks:
            jobs = [reduce, lambda: layer(comm, 50, 16), lambda: micro(600)]
            for job in jobs if comm.rank else jobs[::-1]:
                tasks.start_soon(job)

    async with world(3) as members:
        await everyone(members, rank)


def odd(shape: str, rank: int) -> tuple[Any, Any, Any, int]:
    """What a rank of three dispatches, and the number of experts."""
    rng = np.random.default_rng(rank)
    tokens = {"of one rank": [0, 6, 0], "none": [0, 0, 0]}.get(shape, [5, 3, 7])[rank]
    experts = {"fewer than ranks": 2, "more than choices": 1000}.get(shape, EXPERTS)
    hidden, choices = 0 if shape == "without width" else 8, 0 if shape == "without choices" else 3
    x = rng.normal(size=(tokens, hidden)).astype(np.float32)
    ids = rng.integers(-1, experts, (tokens, choices))
    weights = rng.random((tokens, choices), np.float32)
    if shape == "all to one":
        ids[:] = 7
    elif shape == "twice to one":
        ids = rng.integers(0, 2, (tokens, choices))
    elif shape == "to none" and rank == 1:
        ids[:] = -1
    elif shape == "not numbers":
        weights[::2, 0] = np.nan
        ids[1, 0], weights[1, 0] = -1, np.nan  # of no expert: it makes no difference
    return x, ids, weights, experts


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_odd_shapes_are_those_of_one_process() -> None:
    """In processes of their own."""
    shapes = ["of one rank", "none", "without width", "without choices", "all to one", "twice to one"]
    shapes += ["to none", "not numbers", "fewer than ranks", "more than choices"]

    async def rank(comm: aiocomm.Communicator) -> None:
        for shape, path in itertools.product(shapes, ("auto", "latency", "bandwidth")):
            x, ids, weights, experts = odd(shape, comm.rank)
            came = await comm.dispatch(x, ids, weights, experts=experts, path=path, deadline=LIMIT_S)
            sources = [odd(shape, r) for r in range(3)]
            mine = [s[0][np.isin(s[1], came.experts).any(1)] for s in sources]
            assert np.array_equal(came.tokens, np.concatenate(mine)), shape
            outputs = came.inputs
            for e in came.experts.tolist():
                outputs[came.of(e)] = expert(e, outputs[came.of(e)])
            owner = np.repeat(range(3), [len(part) for part in np.array_split(range(experts), 3)])
            result = await comm.combine(outputs, came, path=path, deadline=LIMIT_S)
            assert np.array_equal(result, alone(x, ids, weights, owner, 3), equal_nan=True), shape

    async with aiocomm.spawn(rank, n=2) as comm:
        await rank(comm)


# ---------------------------------------------------------------- bad calls

X, IDS = np.zeros((3, 4), np.float32), np.zeros((3, 1), np.int64)
WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hidden": (lambda c: c.dispatch(np.zeros((3, 5), np.float32), IDS, experts=6), "hidden 5"),
    "dtype": (lambda c: c.dispatch(X.astype(np.float16), IDS, experts=6), "float16"),
    "experts": (lambda c: c.dispatch(X, IDS, experts=7), "7 experts"),
    "placement": (lambda c: c.dispatch(X, IDS, experts=6, placement=[0, 1, 2, 0, 1, 2]), "placed"),
    "large and of another size": (
        lambda c: c.dispatch(np.zeros((5000, 999)), np.zeros((5000, 1), int), experts=6),
        "hidden 999",
    ),
    "an expert out of range": (
        lambda c: c.dispatch(X, IDS + 6, experts=6),
        "refused its call: token 0 names expert 6",
    ),
    "shape": (lambda c: c.dispatch(X[0], IDS, experts=6), "two dimensions"),
    "path": (lambda c: c.dispatch(X, IDS, experts=6, path="magic"), "choose from"),
    "nothing dispatched": (lambda c: c.combine(X, None), "not what a dispatch"),
    "not contiguous": (lambda c: c.dispatch(X[:, ::2], IDS, experts=6), "contiguous"),
    "ragged numbers": (lambda c: c.dispatch(X, [[0], [1, 2], [3]], experts=6), "expert_ids cannot be made"),
    "no numbers": (lambda c: c.dispatch(X, None, experts=6), "expert_ids is None: pass an array"),
    "weights of bytes": (
        lambda c: c.dispatch(X, IDS, np.zeros((3, 1), "V4"), experts=6),
        "weights holds |V4, not numbers",
    ),
    "ragged weights": (lambda c: c.dispatch(X, IDS, [[1], [1, 2], [1]], experts=6), "weights cannot be made"),
    "masked numbers": (
        lambda c: c.dispatch(X, np.ma.masked_array(IDS), experts=6),
        "expert_ids is a masked array",
    ),
    "ragged placement": (
        lambda c: c.dispatch(X, IDS, experts=2, placement=[[0], [0, 1]]),
        "placement cannot be made",
    ),
    "a rank that there is not": (
        lambda c: c.dispatch(X, IDS, experts=6, placement=[-1, 0, 0, 1, 1, 2]),
        "placement names rank -1",
    ),
    "an array of experts": (
        lambda c: c.dispatch(X, IDS, experts=np.array([6])),
        "experts=array([6]) is not an integer",
    ),
    "a list for a path": (lambda c: c.dispatch(X, IDS, experts=6, path=["auto"]), "unknown path ['auto']"),
    "a deadline that has passed": (lambda c: c.dispatch(X, IDS, experts=6, deadline=-1), "deadline=-1"),
    "a deadline of a combine": (lambda c: c.combine(X, None, deadline="soon"), "deadline='soon'"),
}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("case", WRONG)
async def test_a_rank_that_calls_differently_is_named_on_all(case: str) -> None:
    wrong, text = WRONG[case]
    said: list[str] = []

    async def rank(comm: aiocomm.Communicator) -> None:
        with pytest.raises(aiocomm.UsageError) as caught:
            await (wrong(comm) if comm.rank == 1 else comm.dispatch(X, IDS, experts=6))
        said.append(str(caught.value).partition(": ")[2])
        await layer(comm, 20, 8)  # the group is as good as before

    async with world(3) as members:
        await everyone(members, rank)
    assert len(set(said)) == 1, said
    assert "rank 1 " in said[0]
    assert text in said[0]


class Broken:
    """An array library's own mistake."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory today")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_whatever_is_wrong_at_one_rank_is_told_to_all() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        if comm.rank == 1:
            with pytest.raises(RuntimeError, match="today"):
                await comm.dispatch(X, Broken(), experts=6)
        else:
            with pytest.raises(aiocomm.UsageError, match="rank 1 refused its call: RuntimeError: no memory"):
                await comm.dispatch(X, IDS, experts=6)
        await layer(comm, 20, 8)

    with anyio.fail_after(LIMIT_S):
        async with world(2) as members:
            await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_numbers_may_be_those_of_numpy_and_out_is_returned() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        deadline: Any = np.float32(30)
        out = np.zeros((3, 4), np.float32)
        for placement in (None, np.array([1, 0, 1])):
            came = await comm.dispatch(
                X + 1, IDS, experts=np.int64(3), placement=placement, deadline=deadline
            )
            assert await comm.combine(came.inputs, came, out=out, deadline=deadline) is out
            assert np.array_equal(out, X + 1)

    async with world(2) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_outputs_that_do_not_fit_are_named_on_all() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        came = await comm.dispatch(X, [[0], [3], [4]], experts=6)
        cases: list[tuple[Any, dict[str, Any], str]] = [
            (came.inputs[1:], {}, "rank 1 refused its call: outputs has 3 rows for 4 assignments"),
            (came.inputs.astype(np.int32), {}, "int32"),
            (came.inputs, {"out": np.zeros((3, 5))}, "out has shape"),
            (came.inputs, {"wire": np.int8}, "wire is of dtype int8"),
            (came.inputs, {"wire": [("sum", "f4")]}, "is no dtype: it has fields"),
            (came.inputs, {"wire": np.float16}, "rank 1 called combine .* float32 hidden 4 as float16"),
        ]
        for outputs, options, text in cases:
            given, more = (outputs, options) if comm.rank == 1 else (came.inputs, {})
            with pytest.raises(aiocomm.UsageError, match=text):
                await comm.combine(given, came, **more)
        await comm.combine(came.inputs, came)

    async with world(2) as members:
        await everyone(members, rank)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_sums_may_travel_in_a_dtype_that_numpy_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not yet: ml_dtypes, which tells it, may not have been imported. Or is not there, which is said."""
    dtype = np.dtype

    def before_ml_dtypes(of: Any) -> Any:
        if of == "bfloat16":
            raise TypeError("data type 'bfloat16' not understood")
        return dtype(of)

    async def rank(comm: aiocomm.Communicator) -> None:
        came = await comm.dispatch(X + 0.5, IDS, experts=6)
        assert (await comm.combine(came.inputs, came, wire="bfloat16") == 0.5).all()
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(aiocomm.UsageError, match="bfloat16 needs the package ml_dtypes"):
            await comm.combine(came.inputs, came, wire="bfloat16")

    async with world(1) as (comm,):
        with monkeypatch.context() as patch:
            patch.setattr(np, "dtype", before_ml_dtypes)
            await rank(comm)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_combines_of_dispatches_on_different_channels_are_told_apart() -> None:
    """Both are the first of their channel."""

    async def rank(comm: aiocomm.Communicator) -> None:
        came = [await comm.dispatch(X, IDS, experts=6, channel=comm.channel(name)) for name in ("one", "two")]
        for channel in (None, comm.channel("one")):
            with pytest.raises(aiocomm.UsageError, match="dispatch 1 on channel 'two'"):
                await comm.combine(came[comm.rank].inputs, came[comm.rank], channel=channel)
            for one in came:
                await comm.combine(one.inputs, one, channel=channel)

    async with world(2) as members:
        await everyone(members, rank)


async def test_a_rank_that_never_calls_is_named() -> None:
    """The time of one may be over before the other has begun: that one is named, too, and hears of it."""
    kinds = (aiocomm.DeadlineExceeded, aiocomm.TransferCancelled)
    told: list[type] = []

    async def rank(comm: aiocomm.Communicator) -> None:
        x, ids, _ = batch(comm.rank, 800, 128, np.float32)
        if comm.rank != 2:
            with pytest.raises(kinds, match=r"dispatch .*not called within 0\.1 s by .*rank 2") as caught:
                await comm.dispatch(x, ids, experts=EXPERTS, deadline=0.1)
            told.append(caught.type)
            await comm.send(b"go", dst=2)
        else:
            for other in (0, 1):
                await comm.recv(bytearray(2), src=other)
            with pytest.raises(aiocomm.TransferCancelled, match="gave the call up"):
                await comm.dispatch(x, ids, experts=EXPERTS)
        await layer(comm, 20, 8)

    async with world(3) as members:
        await everyone(members, rank)
    assert aiocomm.DeadlineExceeded in told


@pytest.mark.parametrize("path", ["latency", "bandwidth"])
async def test_a_cancelled_rank_ends_the_call_on_all(path: str) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        x, ids, _ = batch(comm.rank, 800, 128, np.float32)
        if comm.rank == 0:
            with anyio.move_on_after(0.1) as scope:
                await comm.dispatch(x, ids, experts=EXPERTS, path=path)
            assert scope.cancelled_caught
            await until(lambda: comm.statistics().in_flight == 0)  # the words to the others, too
            await comm.send(b"go", dst=2)
        elif comm.rank == 1:
            with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up: cancelled"):
                await comm.dispatch(x, ids, experts=EXPERTS, path=path)
        else:
            await comm.recv(bytearray(2), src=0)
            with pytest.raises(aiocomm.TransferCancelled):
                await comm.dispatch(x, ids, experts=EXPERTS, path=path)
        await layer(comm, 800, 128, path=path)

    async with world(3) as members:
        await everyone(members, rank)


async def test_a_lost_rank_is_reported_with_its_experts_and_the_tokens_it_held() -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        group = await comm.group([0, 1, 2])
        x, ids = np.ones((4, 8), np.float32), [[0, 4], [1, 5], [2, 3], [4, 5]]
        came = await group.dispatch(x, ids, experts=6)
        if comm.rank == 2:
            await comm.aclose()
            return
        with pytest.raises(aiocomm.ExpertsLostError, match="with 2 experts, to which 3 tokens") as caught:
            await group.combine(came.inputs, came)
        assert (caught.value.peer, caught.value.tokens, caught.value.experts) == (2, (0, 1, 3), (4, 5))
        rest = await group.shrink(deadline=LIMIT_S)
        await layer(rest, 30, 16)

    async with world(3, warmup=True) as members:
        await everyone(members, rank)


# ---------------------------------------------------------------- processes


async def _work(comm: aiocomm.Communicator) -> None:
    for path in ("auto", "latency", "bandwidth"):
        await layer(comm, 64, 512, np.float16, path=path)
        await layer(comm, 1500, 512, np.float16, path=path)


@pytest.mark.parametrize("link", ["shm", "tcp"])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_between_processes(link: str) -> None:
    async with aiocomm.spawn(_work, n=2, links=link) as comm:
        await _work(comm)


async def _die_in_the_middle(comm: aiocomm.Communicator, tokens: int) -> None:
    group = await comm.group(range(comm.size))
    x, ids, weights = batch(comm.rank, tokens, 256, np.float32)

    async def layers() -> None:
        for number in range(100_000):
            if comm.rank == 0 and number == 5:
                await comm.send(b"x", dst=2)
            came = await group.dispatch(x, ids, weights, experts=EXPERTS)
            await group.combine(came.inputs, came)

    if comm.rank == 2:

        async def kill() -> None:
            await comm.recv(bytearray(1), src=0)
            os.kill(os.getpid(), signal.SIGKILL)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            await layers()
    with pytest.raises(aiocomm.ExpertsLostError, match="rank 2 is gone") as caught:
        await layers()
    held = np.flatnonzero(_even(4) == 2)
    assert caught.value.peer == 2
    assert caught.value.experts == tuple(held.tolist())
    assert caught.value.tokens == tuple(np.flatnonzero(np.isin(ids, held).any(1)).tolist())
    left = await group.shrink(deadline=LIMIT_S)
    assert left.ranks == (0, 1, 3)
    await layer(left, tokens, 64)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("tokens", [16, 3000])
async def test_survivors_of_a_killed_rank_know_its_tokens_and_go_on(tokens: int) -> None:
    with pytest.raises(WorkerError) as caught:  # spawn reports the killed worker
        async with aiocomm.spawn(_die_in_the_middle, 3, tokens) as comm:
            await _die_in_the_middle(comm, tokens)
    assert caught.value.rank == 2
    assert caught.value.exit_code == -signal.SIGKILL
