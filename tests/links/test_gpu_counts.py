"""What is counted of GPU memory: each byte once at each end, by the link that carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.adapters import HEADERS, build
from fakes.gpu import DeviceArray, Kind, driver
from harness import LIMIT_S, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "simulator")]

LINKS = ["shm", "shm-stream", "tcp", *(["rdma"] if HEADERS else [])]


@pytest.fixture(params=LINKS)
async def pair(request: pytest.FixtureRequest, gpu: object, monkeypatch: Any) -> AsyncIterator[Pair]:
    """Ranks 0 and 1 over each link that may carry what the GPU link announces."""
    link, _, mode = request.param.partition("-")
    if mode:
        monkeypatch.setenv("AIOCOMM_CMA", "off")
    if link == "rdma":
        monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=(link, "cuda"), warmup=True) as (a, b):
        yield a, b


def memory(where: str, shape: int | tuple[int, int], device: int) -> Any:
    if where == "host":
        return np.zeros(shape, np.uint8)
    device = device if driver().count > 1 else 0
    kind = Kind.POOL if where == "pool" else Kind.MALLOC
    return DeviceArray(shape, np.uint8, device=device, kind=kind)


def carried(comm: aiocomm.Communicator, what: str) -> dict[str, int]:
    """Bytes by link."""
    by_link = {name: getattr(link, what) for name, link in comm.statistics().links.items()}
    return {name: nbytes for name, nbytes in by_link.items() if nbytes}


def messages(comm: aiocomm.Communicator) -> int:
    return sum(sum(link.messages_by_path.values()) for link in comm.statistics().links.values())


async def all_has_ended(*comms: aiocomm.Communicator) -> None:
    for comm in comms:
        with anyio.fail_after(LIMIT_S):
            await until(lambda comm=comm: comm.statistics().in_flight == 0)
        for link in comm.statistics().links.values():
            assert link.submitted == link.completed + link.failed + link.cancelled


@pytest.mark.parametrize("nbytes", [1000, (1 << 20) + 3, 5 << 20])
@pytest.mark.parametrize("kind", ["send", "put", "get"])
@pytest.mark.parametrize(
    ("source", "sink"), [("gpu", "gpu"), ("gpu", "host"), ("host", "gpu"), ("pool", "pool"), ("pool", "host")]
)
async def test_both_ends_count_the_same(pair: Pair, kind: str, source: str, sink: str, nbytes: int) -> None:
    a, b = pair
    data, into = memory(source, nbytes, 0), memory(sink, nbytes, 1)
    if kind == "send":
        receiving = b.recv(into, 0)
        await a.send(data, 1)
        await receiving
    elif kind == "put":
        async with b.register(into) as region:
            await a.put(data, a.remote(region.handle))
    else:
        async with a.register(data) as region:
            await b.get(b.remote(region.handle), into)
    await all_has_ended(a, b)
    one_sided = "rdma" in a.links and kind != "send"
    ends = ([b] if kind == "get" else [a]) if one_sided else [a, b]
    with anyio.fail_after(LIMIT_S):
        for comm in ends:
            await until(lambda comm=comm: messages(comm) >= 1)
    sent, received = carried(a, "bytes_sent"), carried(b, "bytes_received")
    if one_sided and not (sent and received):  # by the adapter: the other end does nothing
        assert {**sent, **received} == {"rdma": nbytes}
    else:
        assert sent == received
        assert sum(sent.values()) == nbytes
    assert carried(a, "bytes_received") == carried(b, "bytes_sent") == {}


@pytest.mark.parametrize("kind", ["put", "get"])
@pytest.mark.parametrize(("local", "remote"), [("gpu", "host"), ("host", "gpu"), ("gpu", "gpu")])
async def test_both_ends_count_the_same_of_pages(pair: Pair, kind: str, local: str, remote: str) -> None:
    a, b = pair
    if "rdma" in a.links:
        pytest.skip("the other end does nothing")
    ours, theirs = (aiocomm.Pages(memory(where, (200, 3000), at)) for at, where in enumerate([local, remote]))
    give, take = np.random.default_rng(0).permutation(200).reshape(2, 100)
    async with await b.lease_pages(theirs) as lease:
        target = a.remote_pages(lease.handle)
        if kind == "put":
            await a.put_pages(ours, give, target, take)
        else:
            await a.get_pages(target, take, ours, give)
    source, sink = pair if kind == "put" else pair[::-1]
    with anyio.fail_after(LIMIT_S):
        await until(lambda: messages(source) == messages(sink))
    assert carried(source, "bytes_sent") == carried(sink, "bytes_received")
    assert sum(carried(source, "bytes_sent").values()) >= 300_000
    await all_has_ended(a, b)
