"""Dispatch and combine beside CUDA graphs that are being captured."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.gpu import Stream
from gpu_experts import EXPERTS, LINKS, Rows, batch, layer, on_gpu
from harness import all_call, world

import aiocomm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]
GLOBAL, RELAXED = 0, 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("mode", [GLOBAL, RELAXED])
@pytest.mark.parametrize("before", [0, 3])
async def test_a_stream_that_is_captured_is_refused_and_its_graph_stays_whole(before: int, mode: int) -> None:
    """On all ranks, also where calls before were like this one; those on other streams go on meanwhile."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 30, 16)
            given, chosen = on_gpu(comm.rank, x), on_gpu(comm.rank, ids)
            outputs = on_gpu(comm.rank, np.ones((400, 16), np.float32))
            stream = Stream(device=comm.rank)
            for _ in range(before):
                came = await comm.dispatch(given, ids, weights, experts=EXPERTS, stream=stream)
                await comm.combine(Rows(outputs, len(came.rows)), came, stream=stream)
            await comm.barrier()
            if comm.rank == 0:
                stream.begin_capture(mode)
            with pytest.raises(aiocomm.UsageError, match="rank 0 refused its call: the stream is being capt"):
                await comm.dispatch(given, ids, weights, experts=EXPERTS, stream=stream)
            for numbers in (ids, chosen, chosen):
                came = await comm.dispatch(given, numbers, weights, experts=EXPERTS)
                await comm.combine(Rows(outputs, len(came.rows)), came)
            with pytest.raises(aiocomm.UsageError, match="rank 0 refused its call: the stream is being capt"):
                await comm.combine(Rows(outputs, len(came.rows)), came, stream=stream)
            await comm.barrier()
            if comm.rank == 0:
                assert stream.end_capture() == 0  # which nothing has broken
            await comm.barrier()
            came = await comm.dispatch(given, ids, weights, experts=EXPERTS, stream=stream)
            await comm.combine(Rows(outputs, len(came.rows)), came, stream=stream)
            await layer(comm, 30, 16)
            stream.close()

        await all_call(members, rank)
