"""Layers that stream into a lease: in order, with their data, from one rank or several; cancels, losses."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import cloudpickle
import numpy as np
import pytest
from harness import LIMIT_S, until, world

import aiocomm
from aiocomm.launch import WorkerError
from aiocomm.pages import mover, transfers
from aiocomm.pages.lease import RemotePages

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers of spawn cannot import this module
LAYERS = 4


def cache(seed: int | None, pages: int = 12, heads: int = 2) -> list[Any]:
    """K and V per layer; zeros without a seed."""
    shape = (pages, 4, heads, 32)
    if seed is None:
        return [np.zeros(shape, np.float16) for _ in range(2 * LAYERS)]
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 999, shape).astype(np.float16) for _ in range(2 * LAYERS)]


async def test_layers_come_in_order_and_with_their_data(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    async with await b.lease_pages(theirs, [1, 2, 9]) as lease:
        remote = a.remote_pages(lease.handle)

        async def send() -> None:
            layers = ours.layers(arrays=2), remote.layers(arrays=2)
            await a.put_layers(layers[0], [5, 0, 3], layers[1], [9, 1, 2], notify=b"all", deadline=LIMIT_S)

        for _ in range(2):  # a lease may be filled again
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                seen = []
                async for layer in lease.layers(deadline=LIMIT_S):
                    seen.append(layer)
                    for array in (2 * layer, 2 * layer + 1):
                        assert np.array_equal(theirs.arrays[array][[9, 1, 2]], ours.arrays[array][[5, 0, 3]])
                assert seen == list(range(LAYERS))
            async for note in b.notifications():
                assert note.payload == b"all"
                break


async def test_what_all_layers_have_in_common_is_checked_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs, [1, 2, 9])
    checked, check = [], RemotePages.check

    def checks(remote: RemotePages, pages: Any) -> None:
        checked.append(remote)
        check(remote, pages)

    monkeypatch.setattr(RemotePages, "check", checks)
    views = [a.remote_pages(lease.handle).layers(arrays=2) for _ in range(2)]
    await a.put_layers(ours.layers(arrays=2), [5, 0], views[0], [9, 1])
    assert len(checked) == 1
    with pytest.raises(aiocomm.UsageError, match="page 3 is not part of the lease"):
        await a.put_layers(ours.layers(arrays=2), [5, 0], views[0], [9, 3])
    checked.clear()
    await a.put_layers(ours.layers(arrays=2), [5, 0], [*views[0][:2], *views[1][2:]], [9, 1])
    assert len(checked) == 2, "once for each handle"
    monkeypatch.undo()
    await lease.aclose()
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_layers(ours.layers(arrays=2), [5, 0], views[0], [9, 1])


async def test_layers_of_one_array_and_of_no_pages(pair: Pair) -> None:
    a, b = pair
    ours = aiocomm.Pages(np.arange(3 * 2 * 6 * 8).reshape(3, 2, 6, 8), page_axis=2)
    theirs = aiocomm.Pages(np.zeros((6, 3, 2, 8), np.int64))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    await a.put_layers(ours.layers(0), [4, 1], remote.layers(1), [0, 3])
    assert [layer async for layer in lease.layers(0)] == [0, 1, 2]
    assert np.array_equal(theirs.arrays[0][[0, 3]], ours.arrays[0].transpose(2, 0, 1, 3)[[4, 1]])
    await a.put_layers(ours.layers(0), [], remote.layers(1), [])
    assert [layer async for layer in lease.layers(0)] == [0, 1, 2]


@pytest.mark.parametrize("link", ["self", "shm", "tcp"])
@pytest.mark.parametrize("wide", [3, 5000, 40_000])
async def test_layers_of_one_array_go_to_their_places_and_come_back(link: str, wide: int) -> None:
    """In lists, by rows, and one by one."""
    async with world(2, links=("shm",) if link == "self" else (link,), warmup=True) as (a, b):
        b = a if link == "self" else b
        data = np.random.default_rng(wide).integers(1, 255, (LAYERS, 12, 2, wide), np.uint8)
        ours, theirs = aiocomm.Pages(data, page_axis=1), aiocomm.Pages(np.zeros((12, LAYERS, wide), np.uint8))
        give, take = np.array([0, 7, 5, 11]), np.array([11, 1, 0, 6])
        async with await b.lease_pages(theirs) as lease:
            remote = a.remote_pages(lease.handle)
            mine = [layer.slice(2, 1, 2) for layer in ours.layers(0)]
            await a.put_layers(mine, give, remote.layers(1), take)
            model = np.zeros_like(theirs.arrays[0])
            model[take] = data[:, give, 1].swapaxes(0, 1)
            assert np.array_equal(theirs.arrays[0], model)
            back = aiocomm.Pages(np.zeros_like(data), page_axis=1)
            for layer, view in zip(remote.layers(1), back.layers(0), strict=True):
                await a.get_pages(layer, take, view.slice(2, 0, 1), give)
        model = np.zeros_like(data)
        model[:, give, 0] = data[:, give, 1]
        assert np.array_equal(back.arrays[0], model)


async def test_a_peer_that_has_come_back_is_sent_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that the layers for its earlier incarnation were given up."""
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    sent: list[Any] = []
    monkeypatch.setattr(transfers._Notes, "_send", lambda _, layer: sent.append(layer))
    monkeypatch.setattr(type(a), "_generation_of", lambda comm, rank: 1 << 60)
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_layers(ours.layers(arrays=2), [5], remote.layers(arrays=2), [9])
    assert not sent
    assert not any(array.any() for array in theirs.arrays)


async def test_layers_of_several_leases_are_refused(pair: Pair) -> None:
    """Their notes would name one lease, whose owner would never see the other's layers."""
    a, b = pair
    ours, arrays = aiocomm.Pages(cache(1)), cache(None)
    remotes = [
        a.remote_pages((await b.lease_pages(aiocomm.Pages(arrays))).handle).layers(arrays=2) for _ in range(2)
    ]
    with pytest.raises(aiocomm.UsageError, match="of different leases"):
        await a.put_layers(ours.layers(arrays=2), [5], [*remotes[0][:2], *remotes[1][2:]], [9])
    assert not any(array.any() for array in arrays)


async def test_a_layer_is_there_when_all_its_sources_have_brought_it() -> None:
    async with world(3, warmup=True) as (a, b, c):
        sources = [aiocomm.Pages(cache(seed, heads=2)) for seed in (1, 2)]
        theirs = aiocomm.Pages(cache(None, heads=4))
        lease = await c.lease_pages(theirs)

        async def send(comm: aiocomm.Communicator, index: int) -> None:
            remote = comm.remote_pages(lease.handle).slice(2, 2 * index, 2 * index + 2)
            await comm.put_layers(sources[index].layers(arrays=2), [7, 3], remote.layers(arrays=2), [0, 11])

        async with anyio.create_task_group() as tasks:
            for index, comm in enumerate((a, b)):
                tasks.start_soon(send, comm, index)
            async for layer in lease.layers([0, 1], deadline=LIMIT_S):
                for array in (2 * layer, 2 * layer + 1):
                    both = np.concatenate([s.arrays[array][[7, 3]] for s in sources], axis=2)
                    assert np.array_equal(theirs.arrays[array][[0, 11]], both)


async def test_a_sender_that_is_cancelled_in_the_middle_ends_the_iteration(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = pair
    ours = aiocomm.Pages([np.ones((800, 10_000), np.uint8) for _ in range(LAYERS)])
    theirs = aiocomm.Pages([np.zeros((800, 10_000), np.uint8) for _ in range(LAYERS)])
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    give = np.random.default_rng(0).permutation(400)
    take = 2 * np.arange(400)  # no neighbours, and too large for a message of several: one transfer each
    scope = anyio.CancelScope()

    async def send() -> None:
        with scope:
            await a.put_layers(ours.layers(), give, remote.layers(), take)

    seen = set()

    async def look() -> None:
        async for layer in lease.layers():
            seen.add(layer)

    sends = transfers._Notes._send

    def cancelled(notes: Any, layer: int | None) -> Any:
        if layer == 1:
            scope.cancel()
        return sends(notes, layer)

    monkeypatch.setattr(transfers._Notes, "_send", cancelled)
    monkeypatch.setattr(mover, "_BREATH_S", 0.0)  # it is cancelled in its next turn, and has one soon
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        with pytest.raises(aiocomm.TransferCancelled, match=r"rank 0 gave up before layer \d of 4"):
            await look()
    assert len(seen) < LAYERS
    monkeypatch.undo()
    await until(lambda: a.statistics().in_flight == 0)  # the word to the owner, too
    await a.put_layers(ours.layers(), give, remote.layers(), take)
    assert [layer async for layer in lease.layers(0)] == list(range(LAYERS))
    assert all(array[take].all() and not array[1::2].any() for array in theirs.arrays)


async def test_an_iteration_that_was_stopped_has_had_its_call(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)

    async def put(page: int) -> None:
        await a.put_layers(ours.layers(arrays=2), [page], remote.layers(arrays=2), [page])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(put, 0)
        async with aclosing(lease.layers(0, deadline=LIMIT_S)) as layers:
            assert await anext(layers) == 0
    for page in (1, 2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put, page)
            async for layer in lease.layers(0, deadline=LIMIT_S):
                for array in (2 * layer, 2 * layer + 1):
                    assert np.array_equal(theirs.arrays[array][page], ours.arrays[array][page])
    await lease.aclose()


async def test_sources_are_ranks(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    for wrong, why in (
        ([], "no rank"),
        ([0, np.int64(0)], "comes twice"),
        (2, "no rank 2 in this world"),
        ([0, -1], "no rank -1"),
        (0.0, "a rank, or a list of ranks"),
        ("0", "not an integer"),
        ([None], "not an integer"),
    ):
        with pytest.raises(aiocomm.UsageError, match=why):
            lease.layers(wrong)  # type: ignore[arg-type]
    for sources in (np.int64(0), [np.int32(0)], np.array([0]), (0,), range(1)):
        await a.put_layers(ours.layers(), [0], remote.layers(), [0])
        assert [layer async for layer in lease.layers(sources, deadline=LIMIT_S)] == list(range(2 * LAYERS))  # type: ignore[arg-type]


@pytest.mark.parametrize(("give", "take"), [(99, 0), (0, 1)])
async def test_the_owner_hears_of_a_call_that_is_refused(pair: Pair, give: int, take: int) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs, [0])
    remote = a.remote_pages(lease.handle)
    with pytest.raises(aiocomm.UsageError, match=f"page {give or take} is"):
        await a.put_layers(ours.layers(), [give], remote.layers(), [take])
    with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave up before layer 0"):
        await anext(lease.layers(0, deadline=LIMIT_S))
    await a.put_layers(ours.layers(), [0], remote.layers(), [0])
    assert len([layer async for layer in lease.layers(0, deadline=LIMIT_S)]) == 2 * LAYERS


async def test_a_sender_is_cancelled_before_a_byte_moves(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it still plans: the owner may wait already."""
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    with anyio.CancelScope() as scope:

        async def plans(*_: Any) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        monkeypatch.setattr(transfers, "plan_pages", plans)
        await a.put_layers(ours.layers(), [0], remote.layers(), [0])
    assert scope.cancelled_caught
    monkeypatch.undo()
    with pytest.raises(aiocomm.TransferCancelled, match="gave up before layer 0"):
        await anext(lease.layers(0))
    await a.put_layers(ours.layers(), [0], remote.layers(), [0])
    assert [layer async for layer in lease.layers(0)] == list(range(8))
    await lease.aclose()


async def test_waits_end_by_deadline_and_with_the_lease(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    with pytest.raises(aiocomm.DeadlineExceeded, match="no layer has come from rank 0"):
        await anext(lease.layers(0, deadline=0.01))
    with pytest.raises(aiocomm.DeadlineExceeded):
        await a.put_layers(ours.layers(), [0], remote.layers(), [0], deadline=0.0)
    with pytest.raises(aiocomm.TransferCancelled, match="gave up before layer 0"):
        await anext(lease.layers(0))

    async def look() -> None:
        with pytest.raises(aiocomm.ClosedError, match="the lease has ended"):
            await anext(lease.layers())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        await anyio.lowlevel.checkpoint()
        await lease.aclose()
    for pages in ([0], []):  # whichever of its transfers is the first to fail
        with pytest.raises(aiocomm.StaleHandleError, match=r"^put_layers to rank 1 on channel ''"):
            await a.put_layers(ours.layers(), pages, remote.layers(), pages)


async def test_what_cannot_be_done_is_refused_before_a_byte_moves(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs, [1])
    remote = a.remote_pages(lease.handle)
    other = aiocomm.Pages([np.zeros((12, 9), np.float16)] * 8)
    for layers, remotes, give, take, message in (
        (ours.layers(), remote.layers()[1:], [0], [1], "8 layers here and 7 at the peer"),
        ([], [], [0], [1], "0 layers"),
        (ours.layers()[:7] + other.layers()[:1], remote.layers(), [0], [1], "do not fit"),
        (ours.layers(), remote.layers(), [0], [2], "page 2 is not part of the lease"),
        (ours.layers(), remote.layers(), [12], [1], "source page 12"),
    ):
        with pytest.raises(aiocomm.UsageError, match=message):
            await a.put_layers(layers, give, remotes, take)
    with pytest.raises(aiocomm.UsageError, match="do not divide into layers of 3"):
        ours.layers(arrays=3)
    with pytest.raises(aiocomm.UsageError, match="page axis"):
        remote.layers(0)
    frozen = np.zeros((12, 4, 2, 32), np.float16)
    frozen.flags.writeable = False
    with pytest.raises(aiocomm.UsageError, match="read-only"):
        await a.get_pages(remote.planes([0]), [1], aiocomm.Pages(frozen), [0])
    assert not any(array.any() for array in theirs.arrays)


async def _prefill(comm: aiocomm.Communicator, dies: bool) -> None:
    ours = aiocomm.Pages(cache(3))
    remote = comm.remote_pages((await comm.recv_array(src=0)).tobytes())
    layers = list(zip(ours.layers(arrays=2), remote.layers(arrays=2), strict=True))
    if dies:
        await comm.put_layers([ours.planes([0, 1])] * 2, [0], [layers[0][1]] * 2, [1])
        await comm.recv(bytearray(1), src=0)
        os.kill(os.getpid(), signal.SIGKILL)
    await comm.put_layers([o for o, _ in layers], [0, 5], [r for _, r in layers], [1, 2])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("link", ["shm", "tcp"])
async def test_between_processes(link: str) -> None:
    async with aiocomm.spawn(_prefill, 1, False, links=link) as comm:
        theirs = aiocomm.Pages(cache(None))
        lease = await comm.lease_pages(theirs)
        await comm.send(np.frombuffer(lease.handle, np.uint8), dst=1)
        given = cache(3)
        async for layer in lease.layers(1):
            assert np.array_equal(theirs.arrays[2 * layer + 1][[1, 2]], given[2 * layer + 1][[0, 5]])


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_killed_sender_ends_the_iteration() -> None:
    async def run() -> None:
        async with aiocomm.spawn(_prefill, 1, True) as comm:
            lease = await comm.lease_pages(aiocomm.Pages(cache(None)))
            await comm.send(np.frombuffer(lease.handle, np.uint8), dst=1)
            assert [layer async for layer in lease.layers(1)] == [0, 1]
            await comm.send(b"x", dst=1)
            with pytest.raises(aiocomm.PeerLostError, match="rank 1 is gone before the first layer"):
                await anext(lease.layers(1))

    with pytest.raises(WorkerError):
        await run()
