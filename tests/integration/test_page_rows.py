"""Pages in host memory of two processes of one host: whoever writes reads the rows where they are."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes import secret
from harness import LIMIT_S, world

import aiocomm
from aiocomm.pages import ranges, transfers
from aiocomm.pages.mover import Mover
from aiocomm_native import _core

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio

LAYERS, PAGES, WIDE = 3, 40, 8192
SHAPE = (LAYERS, PAGES, WIDE)


@pytest.fixture
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any size are moved as they are."""
    monkeypatch.setattr(transfers, "_LEAST_ROW_READ", {False: 1, True: 1})


def ours(seed: int, empty: bool = False) -> np.ndarray[Any, Any]:
    array = aiocomm.empty(SHAPE, np.uint8) if empty else np.empty(SHAPE, np.uint8)
    array[:] = np.random.default_rng(seed).integers(1, 255, SHAPE, np.uint8)
    return array


def by_path(comm: aiocomm.Communicator) -> dict[str, int]:
    return {path: count for path, count in comm.statistics().links["shm"].messages_by_path.items() if count}


async def both_ways(a: aiocomm.Communicator, b: aiocomm.Communicator, empty: bool) -> list[int]:
    """Puts pages and gets them; how many transfers either took."""
    data, target, again = ours(1, empty), ours(2, empty), ours(3, empty)
    model, back = target.copy(), again.copy()
    rng = np.random.default_rng(4)
    give, take, into = (rng.permutation(PAGES)[:20] for _ in range(3))
    lease = await b.lease_pages(aiocomm.Pages(target, page_axis=1))
    remote = a.remote_pages(lease.handle)
    counts = []
    for call in (
        lambda: a.put_pages(aiocomm.Pages(data, page_axis=1), give, remote, take),
        lambda: a.get_pages(remote, take, aiocomm.Pages(again, page_axis=1), into),
    ):
        before = a.links["shm"].statistics().submitted
        await call()
        counts.append(a.links["shm"].statistics().submitted - before)
    model[:, take] = data[:, give]
    back[:, into] = data[:, give]
    assert np.array_equal(target, model)
    assert np.array_equal(again, back)
    await lease.aclose()
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(aiocomm.Pages(data, page_axis=1), [0], remote, [take[0]])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get_pages(remote, [take[0]], aiocomm.Pages(again, page_axis=1), [0])
    assert np.array_equal(target, model)
    assert np.array_equal(again, back)
    return counts


@pytest.mark.parametrize("empty", [False, True])
async def test_all_rows_are_one_transfer(empty: bool) -> None:
    async with world(2, links=("shm",), warmup=True) as (a, b):
        assert await both_ways(a, b, empty) == [1, 1]
        assert by_path(a)["mapped" if empty else "cma"] == 2


async def test_where_memory_cannot_be_read_only_what_is_shared_goes_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AIOCOMM_CMA", "off")
    async with world(2, links=("shm",), warmup=True) as (a, b):
        put, get = await both_ways(a, b, False)
        assert put > 1
        assert get > 1
        assert "cma" not in by_path(a)
        assert await both_ways(a, b, True) == [1, 1]
        assert by_path(a)["mapped"] == 2


async def test_what_cannot_be_fetched_is_not_asked_for_at_once_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOCOMM_CMA", "off")
    async with world(2, links=("shm",), warmup=True) as (a, b):
        pages = aiocomm.Pages(ours(1), page_axis=1)
        remote = a.remote_pages((await b.lease_pages(aiocomm.Pages(ours(2), page_axis=1))).handle)
        await a.put_pages(pages, [0, 5], remote, [1, 3])
        assert not remote.by_rows


@pytest.mark.parametrize("operation", ["put", "get"])
async def test_ranges_of_rows_that_are_refused_are_made_off_the_loop(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And moved once, however many transfers were refused."""
    monkeypatch.setattr(transfers, "_MOST_GROUPS", 1)
    monkeypatch.setenv("AIOCOMM_CMA", "off")
    monkeypatch.setattr(ranges, "_INLINE", 3)
    ranges._kept.clear()
    threads, far_ranges = [], _core.far_ranges

    def made(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return far_ranges(*arguments)

    monkeypatch.setattr(_core, "far_ranges", made)
    async with world(2, links=("shm",), warmup=True) as (a, b):
        mine, theirs = (aiocomm.Pages(ours(seed), page_axis=1) for seed in (1, 2))
        remote = a.remote_pages((await b.lease_pages(theirs)).handle)
        give, take = np.array([0, 5, 9, 11]), np.array([1, 3, 30, 8])
        before = a.links["shm"].statistics().submitted
        if operation == "put":
            await a.put_layers(mine.layers(0), give, remote.layers(0), take)
            # of each layer: two of rows, which are refused, one message with all of them, and the note
            assert a.links["shm"].statistics().submitted - before == LAYERS * 4
        else:
            await a.get_pages(remote, take, mine, give)
        assert np.array_equal(theirs.arrays[0][:, take], mine.arrays[0][:, give])
        assert not remote.by_rows
    assert len(threads) == 1, "once for all layers"
    assert threads[0] != threading.get_ident()


@pytest.mark.skipif(secret.MISSING is not None, reason=str(secret.MISSING))
@pytest.mark.usefixtures("every_row")
async def test_pages_that_no_other_process_can_read_are_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows went in several transfers: what is done instead is done once."""
    monkeypatch.setattr(transfers, "_MOST_GROUPS", 3)
    async with world(2, links=("shm",), warmup=True) as (a, b):
        hidden = secret.secret_array(PAGES * WIDE).reshape(PAGES, WIDE)
        hidden[:] = ours(1)[0]
        target = np.zeros((PAGES, WIDE), np.uint8)
        remote = a.remote_pages((await b.lease_pages(aiocomm.Pages(target))).handle)
        give = np.random.default_rng(2).permutation(PAGES)
        before = a.links["shm"].statistics().submitted
        await a.put_pages(aiocomm.Pages(hidden), give, remote, np.arange(PAGES))
        assert np.array_equal(target, hidden[give])
        assert a.links["shm"].statistics().submitted - before < 2 * PAGES


@pytest.mark.usefixtures("every_row")
@pytest.mark.parametrize("most", [1, 3, 256])
async def test_random_views(pair: Pair, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Head ranges, other axes, pages of other size, in as many transfers as lists of `most` groups take."""
    monkeypatch.setattr(transfers, "_MOST_GROUPS", most)
    a, b = pair
    rng = np.random.default_rng(most)
    for _ in range(20):
        heads, tokens, ratio = (int(rng.integers(1, n)) for n in (5, 4, 3))
        data = rng.integers(1, 255, (10, tokens * ratio, heads + 2, 16), np.uint8)
        model = np.zeros((30, tokens, heads, 16), np.uint8)
        first = int(rng.integers(0, 3))
        give = rng.permutation(10)[: int(rng.integers(1, 10))]
        take = rng.permutation(30)[: len(give) * ratio]
        theirs = aiocomm.Pages(np.zeros_like(model), token_axis=1)
        async with await b.lease_pages(theirs) as lease:
            remote = a.remote_pages(lease.handle)
            source = aiocomm.Pages(data, token_axis=1).slice(2, first, first + heads)
            await a.put_pages(source, give, remote, take)
            model[take] = data[give, :, first : first + heads].reshape(-1, tokens, heads, 16)
            assert np.array_equal(theirs.arrays[0], model)
            back = aiocomm.Pages(np.zeros_like(data), token_axis=1)
            await a.get_pages(remote, take, back.slice(2, first, first + heads), give)
        expected = np.zeros_like(data)
        expected[give, :, first : first + heads] = data[give, :, first : first + heads]
        assert np.array_equal(back.arrays[0], expected)


async def test_layers_come_with_their_notes_when_all_their_rows_are_there(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_MOST_GROUPS", 3)
    a, b = pair
    data, target = ours(1), np.zeros(SHAPE, np.uint8)
    mine, theirs = aiocomm.Pages(data, page_axis=1), aiocomm.Pages(target, page_axis=1)
    give, take = (np.random.default_rng(seed).permutation(PAGES)[:20] for seed in (2, 3))
    async with await b.lease_pages(theirs) as lease, anyio.create_task_group() as tasks:
        remote = a.remote_pages(lease.handle)
        tasks.start_soon(lambda: a.put_layers(mine.layers(0), give, remote.layers(0), take))
        layers = []
        async for layer in lease.layers(deadline=LIMIT_S):
            assert np.array_equal(target[layer, take], data[layer, give])
            layers.append(layer)
        assert layers == [0, 1, 2]


@pytest.mark.parametrize("operation", ["put", "get"])
async def test_a_call_that_is_given_up_leaves_both_memories_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Nothing is written once the call, or the lease, has ended."""
    a, b = pair
    shape = (64, 4096, 4096)  # 1 GiB of zeros, which no memory is taken for
    here, there = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    mine, theirs = aiocomm.Pages(here, page_axis=1), aiocomm.Pages(there, page_axis=1)
    give, take = (np.random.default_rng(seed).permutation(4096) for seed in (2, 3))
    lease = await b.lease_pages(theirs)
    remote = a.remote_pages(lease.handle)
    lists = (mine, give, remote, take) if operation == "put" else (remote, take, mine, give)
    given_up = anyio.CancelScope()
    submit = getattr(Mover, f"{operation}_rows")

    def submit_and_give_up(*arguments: Any) -> Any:
        transfer = submit(*arguments)
        given_up.cancel()
        return transfer

    monkeypatch.setattr(Mover, f"{operation}_rows", submit_and_give_up)
    with given_up:
        await getattr(a, f"{operation}_pages")(*lists)
    assert given_up.cancelled_caught
    monkeypatch.undo()
    with anyio.fail_after(LIMIT_S):
        await lease.aclose()
    written = there if operation == "put" else here
    written[:, :64] = 7
    await b.send(b"x", 0)
    await a.recv(bytearray(1), 1)
    assert (written[:, :64] == 7).all()
    with contextlib.suppress(aiocomm.StaleHandleError):
        await a.get_pages(remote, [0], mine, [0])
    assert a.statistics().in_flight == 0
