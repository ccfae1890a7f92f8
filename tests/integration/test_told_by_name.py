"""What is wrong with the arguments of one rank, whatever it is, is told to all by the name of their call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from harness import all_call, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[aiocomm.Communicator, aiocomm.Communicator]

pytestmark = pytest.mark.anyio


class Lost:
    """As the number in a tensor of a GPU that is lost."""

    def __index__(self) -> int:
        raise RuntimeError("the device is lost")


class Unhashable(Lost):
    def __hash__(self) -> int:
        raise RuntimeError("the device is lost")


def ones(count: int = 4) -> Any:
    return np.ones(count, np.float32)


ROOTED: dict[str, Callable[[Any, Any], Any]] = {
    "broadcast": lambda g, root: g.broadcast(ones(), root),
    "reduce": lambda g, root: g.reduce(ones(), root),
    "gather": lambda g, root: g.gather(ones(8), ones(), root),
    "scatter": lambda g, root: g.scatter(ones(), ones(8), root),
    "scatterv": lambda g, root: g.scatterv(ones(), ones(8), [4, 4], root),
    "split": lambda g, root: g.split(root),
}


@pytest.mark.parametrize("kind", [Lost, Unhashable])
@pytest.mark.parametrize("operation", ROOTED)
async def test_what_cannot_be_looked_at(operation: str, kind: type[Lost], pair: Pair) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        call = ROOTED[operation]
        if comm.rank:
            with pytest.raises(RuntimeError, match="the device is lost"):
                await call(comm, kind())
        else:
            with pytest.raises(
                aiocomm.UsageError, match=f"^{operation}: rank 1 refused its call: .* is lost"
            ):
                await call(comm, 0)
        await comm.barrier()

    await all_call([*pair], rank)


@pytest.mark.parametrize("budget", [0, -1, "x", 1.5, 1 << 32])
@pytest.mark.parametrize("operation", ["reduce", "all_reduce", "reduce_scatter"])
async def test_a_budget_of_host_arrays(operation: str, budget: Any, pair: Pair) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        arrays = [ones(2), ones()] if operation == "reduce_scatter" else [ones()]
        with pytest.raises(aiocomm.UsageError, match=f"{operation}: rank 1 refused its call: sm_budget="):
            await getattr(comm, operation)(*arrays, sm_budget=budget if comm.rank else None)

    await all_call([*pair], rank)


async def test_split_and_group() -> None:
    async with world(3) as comms:
        errors = []

        async def split(comm: aiocomm.Communicator) -> None:
            with pytest.raises(
                aiocomm.UsageError, match=r"^split: rank 1 refused its call: color=-1"
            ) as told:
                await comm.split(-1 if comm.rank == 1 else 0)
            errors.append(str(told.value))
            call = comm.barrier() if comm.rank == 1 else comm.split(0)
            with pytest.raises(aiocomm.UsageError, match=r"^.*: rank 1 called barrier, and the others split"):
                await call
            group = await comm.split(0 if comm.rank else None)
            assert group is None or group.ranks == (1, 2)

        await all_call(comms, split)
        assert len(set(errors)) == 1
        with pytest.raises(
            aiocomm.DeadlineExceeded, match=r"^split \(call .*: not called .* by rank 1, rank 2"
        ):
            await comms[0].split(0, deadline=0.02)
        with pytest.raises(aiocomm.DeadlineExceeded, match=r"^group \(call 1 of group .*by rank 1"):
            await comms[0].group([0, 1], deadline=0.02)


async def test_what_was_dispatched_is_asked_wrongly(pair: Pair) -> None:
    async def rank(comm: aiocomm.Communicator) -> None:
        came = await comm.dispatch(np.ones((2, 4)), [[0], [1]], experts=2)
        assert came.of(np.int64(comm.rank)) == slice(0, 2)
        for expert in ("x", None, 2.0, 1 - comm.rank, -1, 1 << 70, [0]):
            with pytest.raises(aiocomm.UsageError, match="expert"):
                came.of(expert)  # type: ignore[arg-type]
        assert came.routed_to(1).tolist() == [1]
        for place in (-1, 2, "0", None, 1.0):
            with pytest.raises(aiocomm.UsageError, match="rank="):
                came.routed_to(place)  # type: ignore[arg-type]

    await all_call([*pair], rank)
