"""Conformance of links: what groups call over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness import all_call, world

import aiocomm

if TYPE_CHECKING:
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

EXPERTS = 9


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [5, 300_007])
async def test_collectives(variant: Variant, size: int, count: int) -> None:
    blocks = [
        np.random.default_rng(rank).integers(1, 9, count, np.uint8).astype(np.float32) for rank in range(size)
    ]

    async def call(comm: aiocomm.Communicator) -> None:
        mine, out = variant.array(count, np.float32), variant.array(size * count, np.float32)
        mine[:] = blocks[comm.rank]
        for _ in range(3):
            await comm.all_gather(out, mine)
            assert np.array_equal(out, np.concatenate(blocks))
            await comm.all_to_all(out, np.repeat(mine, size))
            wanted = [np.repeat(one, size)[comm.rank * count :][:count] for one in blocks]
            assert np.array_equal(out, np.concatenate(wanted))
            given = mine.copy()
            await comm.broadcast(given, root=size - 1)
            assert np.array_equal(given, blocks[-1])
            summed = mine.copy()
            await comm.all_reduce(summed)
            assert np.array_equal(summed, np.sum(blocks, axis=0))
            await comm.barrier()

    async with world(size, links=(variant.link,), warmup=True) as comms:
        await all_call(comms, call)


async def test_all_hear_of_a_call_that_differs(variant: Variant) -> None:
    """Who hears of it first goes on at once: the others have yet to be told."""
    said: list[str] = []

    async def call(comm: aiocomm.Communicator) -> None:
        for turn in range(40):
            with pytest.raises(aiocomm.UsageError) as caught:
                await comm.broadcast(np.ones(4), root=int(comm.rank == turn % 3))
            said.append(str(caught.value).partition(": ")[2])
            await comm.barrier()

    async with world(3, links=(variant.link,), warmup=True) as comms:
        await all_call(comms, call)
    assert len(said) == 3 * 40
    assert len(set(said)) == 3
    assert all(f"rank {rank} called broadcast" in " ".join(set(said)) for rank in range(3))


async def test_experts(variant: Variant) -> None:
    async def call(comm: aiocomm.Communicator) -> None:
        for tokens, hidden in ((0, 8), (37, 64), (300, 500)):
            seeded = np.random.default_rng((comm.rank, tokens))
            x = seeded.normal(size=(tokens, hidden)).astype(np.float32)
            ids, weights = seeded.integers(0, EXPERTS, (tokens, 3)), seeded.random((tokens, 3), np.float32)
            came = await comm.dispatch(x, ids, weights, experts=EXPERTS)
            by = np.repeat(1 + np.asarray(came.experts), np.diff(came.offsets))
            result = await comm.combine(came.inputs * by[:, None].astype(np.float32), came)
            wanted = x * (weights * (1 + ids)).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5)

    async with world(3, links=(variant.link,), warmup=True) as comms:
        await all_call(comms, call)
