"""GPU arrays on the links between hosts: by adapters that reach GPU memory, and by way of the hosts.

Adapters are simulated, and copy at once: what is shown is that each call gets the right bytes by that link.
In the virtual machine (rdma_vm) they are soft-RoCE's, which reach no GPU memory.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from fakes.gpu import DeviceArray
from gpu_experts import layer, on_gpu
from harness import all_call, world

import aiocomm
from aiocomm.group import Group

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractAsyncContextManager

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

NEEDS_HEADERS = pytest.mark.skipif(
    not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"
)
WAYS = [("gpu", "gpu"), ("gpu", "host"), ("host", "gpu")]


GUEST = "AIOCOMM_RDMA_GUEST" in os.environ
ADAPTERS = ("rdma",) if GUEST else ("rdma", "rdma-not-direct")


@pytest.fixture(params=["tcp", *(pytest.param(name, marks=NEEDS_HEADERS) for name in ADAPTERS)])
def link(request: pytest.FixtureRequest, simulator: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The link of the pairs, beside which `cuda` moves GPU memory."""
    assert simulator
    if request.param == "tcp":
        yield "tcp"
        return
    if GUEST:
        monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "rxea0,rxea1")
        monkeypatch.setenv("AIOCOMM_DRAIN_TIMEOUT_S", "30")
        yield "rdma"
        return
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    with contextlib.ExitStack() as stack:
        if request.param != "rdma":
            stack.enter_context(Adapters().refusing_dma_bufs())
        yield "rdma"


def members(link: str, size: int) -> AbstractAsyncContextManager[list[aiocomm.Communicator]]:
    return world(size, links=(link, "cuda"), warmup=True)


def on(where: str, rank: int, values: np.ndarray[Any, Any]) -> Any:
    return on_gpu(rank, values) if where == "gpu" else values.copy()


def numpy(array: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = array.numpy() if isinstance(array, DeviceArray) else array
    return found


@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_pages_of_all_forms(link: str, local: str, remote: str) -> None:
    """Head ranges, other axes, pages of other size: as a NumPy model has them."""
    rng = np.random.default_rng(5)
    async with members(link, 2) as (a, b):
        for _ in range(12):
            heads, tokens, ratio = (int(n) for n in rng.integers(1, (5, 4, 3)))
            source = rng.integers(1, 255, (10, tokens * ratio, heads + 2, 16), np.uint8)
            first = int(rng.integers(0, 3))
            give = rng.permutation(10)[: int(rng.integers(1, 10))]
            take = rng.permutation(30)[: len(give) * ratio]
            model = np.zeros((30, tokens, heads, 16), np.uint8)
            model[take] = source[give][:, :, first : first + heads].reshape(-1, tokens, heads, 16)
            target = on(remote, 1, np.zeros_like(model))
            ours = aiocomm.Pages(on(local, 0, source), token_axis=1).slice(2, first, first + heads)
            async with await b.lease_pages(aiocomm.Pages(target, token_axis=1)) as lease:
                leased = a.remote_pages(lease.handle)
                await a.put_pages(ours, give, leased, take, notify=b"there")
                async for note in b.notifications():
                    assert note.payload == b"there"
                    break
                assert np.array_equal(numpy(target), model)
                into = on(local, 0, np.zeros_like(source))
                again = aiocomm.Pages(into, token_axis=1).slice(2, first, first + heads)
                await a.get_pages(leased, take, again, give)
            expected = np.zeros_like(source)
            expected[give, :, first : first + heads] = source[give, :, first : first + heads]
            assert np.array_equal(numpy(into), expected)


async def test_layers_are_told_as_they_come(link: str) -> None:
    layers, shape = 4, (20, 600)
    data = [np.full(shape, number + 1, np.uint8) for number in range(layers)]
    async with members(link, 2) as (a, b):
        targets = [on_gpu(1, np.zeros(shape, np.uint8)) for _ in range(layers)]
        async with await b.lease_pages(aiocomm.Pages(targets)) as lease:
            remote = a.remote_pages(lease.handle)
            ours = aiocomm.Pages([on_gpu(0, one) for one in data])
            put = (ours.layers(arrays=1), [7, 3, 11], remote.layers(arrays=1), [2, 19, 4])

            async def send() -> None:
                await a.put_layers(*put, notify=b"all")

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                seen = []
                async for number in lease.layers():
                    seen.append(number)
                    assert (targets[number].numpy()[[2, 19, 4]] == number + 1).all()
            assert seen == list(range(layers))
            assert (await anext(b.notifications())).payload == b"all"


@pytest.mark.parametrize("size", [2, 3])
async def test_experts(link: str, size: int) -> None:
    async with members(link, size) as comms:

        async def rank(comm: aiocomm.Communicator) -> None:
            for tokens, hidden in ((0, 8), (37, 64), (200, 300), (20, 1), (3, 5)):
                for _ in range(2):
                    await layer(comm, tokens, hidden, ids_on_gpu=tokens != 20)

        await all_call(comms, rank)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [5, (1 << 20) + 3])
async def test_collectives(link: str, size: int, count: int) -> None:
    blocks = [
        np.random.default_rng(rank).integers(1, 4, count, np.uint8).astype(np.float32) for rank in range(size)
    ]
    total = np.sum(blocks, axis=0)
    async with members(link, size) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            mine = on_gpu(comm.rank, blocks[comm.rank])
            for _ in range(2):
                out = on_gpu(comm.rank, np.zeros(size * count, np.float32))
                await comm.all_gather(out, mine)
                assert np.array_equal(out.numpy(), np.concatenate(blocks))
                every = on_gpu(comm.rank, np.repeat(blocks[comm.rank], size))
                await comm.all_to_all(out, every)
                wanted = np.concatenate([np.repeat(one, size)[comm.rank * count :][:count] for one in blocks])
                assert np.array_equal(out.numpy(), wanted)
                given = on_gpu(comm.rank, blocks[comm.rank])
                await comm.broadcast(given, root=size - 1)
                assert np.array_equal(given.numpy(), blocks[-1])
                summed = on_gpu(comm.rank, blocks[comm.rank])
                await comm.all_reduce(summed)
                assert np.array_equal(summed.numpy(), total)

        await all_call(comms, call)


@NEEDS_HEADERS
@pytest.mark.parametrize("hosts", [(0, 0, 1, 1), (0, 1, 0, 0)])
@pytest.mark.parametrize("algorithm", [None, "hierarchical"])
async def test_groups_on_several_hosts_go_by_host(
    link: str, hosts: tuple[int, ...], algorithm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is large crosses the network once; what is small goes directly unless it is asked for."""
    monkeypatch.setattr(Group, "hosts", hosts)
    async with members(link, 4) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            rank = comm.rank
            for count in (3, 300_001):
                blocks = [
                    np.random.default_rng(r).integers(1, 4, 4 * count, np.uint8).astype(np.float32)
                    for r in range(4)
                ]
                total = np.sum(blocks, axis=0)
                mine = on_gpu(rank, blocks[rank])
                every = on_gpu(rank, np.zeros(16 * count, np.float32))
                await comm.all_gather(every, mine, algorithm=algorithm)
                assert np.array_equal(every.numpy(), np.concatenate(blocks))
                own = on_gpu(rank, np.zeros(count, np.float32))
                await comm.reduce_scatter(own, mine, algorithm=algorithm)
                assert np.array_equal(own.numpy(), total[rank * count :][:count])
                summed = on_gpu(rank, blocks[rank])
                await comm.reduce(summed, 2, algorithm=algorithm)
                assert rank != 2 or np.array_equal(summed.numpy(), total)
                for _ in range(2):
                    summed = on_gpu(rank, blocks[rank])
                    await comm.all_reduce(summed, algorithm=algorithm)
                    assert np.array_equal(summed.numpy(), total)
                given = on_gpu(rank, blocks[rank])
                await comm.broadcast(given, 3, algorithm=algorithm)
                assert np.array_equal(given.numpy(), blocks[3])

        await all_call(comms, call)
        calls = comms[0].statistics().collectives
        for operation in ("all_gather", "reduce_scatter", "reduce", "all_reduce"):
            assert calls[f"{operation}/hierarchical"] > 0
        assert ("all_reduce/one_shot" in calls) == (algorithm is None)


async def test_nothing_stays_registered(link: str) -> None:
    async with members(link, 2) as comms:

        async def rank(comm: aiocomm.Communicator) -> None:
            await layer(comm, 37, 64)

        await all_call(comms, rank)
    assert link != "rdma" or GUEST or Adapters().regions(0) == 0
