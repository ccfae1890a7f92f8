"""Pages between two processes' caches: right bytes, notifications, leases, refusals, cancels."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
from harness import LIMIT_S, world

import aiocomm
from aiocomm.pages import ranges

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio


def cache(seed: int | None, pages: int = 12, tokens: int = 4, layers: int = 3, wide: int = 64) -> list[Any]:
    """K and V per layer; zeros without a seed."""
    shape = (pages, tokens, 2, wide)
    if seed is None:
        return [np.zeros(shape, np.float16) for _ in range(2 * layers)]
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 999, shape).astype(np.float16) for _ in range(2 * layers)]


async def test_pages_go_there_and_back(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(1)), aiocomm.Pages(cache(None))
    async with await b.lease_pages(theirs, [11, 2, 7, 8]) as lease:
        remote = a.remote_pages(lease.handle)
        assert remote.rank == 1
        await a.put_pages(ours, [3, 9, 4, 5], remote, [11, 2, 7, 8], notify=b"req-17", deadline=LIMIT_S)
        async for note in b.notifications():
            assert note.payload == b"req-17"
            break
        for mine, other in zip(ours.arrays, theirs.arrays, strict=True):
            assert np.array_equal(other[[11, 2, 7, 8]], mine[[3, 9, 4, 5]])
            assert not other[[0, 1, 3, 4, 5, 6, 9, 10]].any()
        back = aiocomm.Pages(cache(None))
        await a.get_pages(remote, [2, 7, 8], back, [5, 0, 10])
        for mine, other in zip(back.arrays, theirs.arrays, strict=True):
            assert np.array_equal(mine[[5, 0, 10]], other[[2, 7, 8]])


@pytest.mark.parametrize("link", ["self", "shm", "tcp"])
@pytest.mark.parametrize("nbytes", [1, 60, 3000, 40_000])
async def test_many_scattered_pages(link: str, nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    async with world(2, links=(link,) if link != "self" else ("shm",), warmup=True) as comms:
        a, b = comms if link != "self" else (comms[0], comms[0])
        count = 2000 if nbytes < 10_000 else 200
        data = rng.integers(1, 255, (2 * count, nbytes), np.uint8)
        ours, theirs = aiocomm.Pages(data), aiocomm.Pages(np.zeros_like(data))
        lease = await b.lease_pages(theirs)
        remote = a.remote_pages(lease.handle)
        give, take, back = (rng.permutation(2 * count)[:count] for _ in range(3))
        before = a.links[link].statistics().submitted
        await a.put_pages(ours, give, remote, take, notify=b"done")
        puts = a.links[link].statistics().submitted - before
        model = np.zeros_like(data)
        model[take] = data[give]
        assert np.array_equal(theirs.arrays[0], model)
        async for note in b.notifications():
            assert note.payload == b"done"
            break
        again = aiocomm.Pages(np.zeros_like(data))
        await a.get_pages(remote, take, again, back)
        gets = a.links[link].statistics().submitted - before - puts
        model[:] = 0
        model[back] = data[give]
        assert np.array_equal(again.arrays[0], model)
        if nbytes < 10_000:  # many go in one message
            assert puts < count / 10
            assert gets < count / 10
        await lease.aclose()
        with pytest.raises(aiocomm.StaleHandleError):
            await a.put_pages(ours, give, remote, take)
        with pytest.raises(aiocomm.StaleHandleError):
            await a.get_pages(remote, take, again, back)
        model[:] = 0
        model[take] = data[give]
        assert np.array_equal(theirs.arrays[0], model)


async def test_small_and_large_ranges_mixed(pair: Pair) -> None:
    a, b = pair
    data = np.random.default_rng(0).integers(1, 255, (3000, 1000), np.uint8)
    ours, theirs = aiocomm.Pages(data), aiocomm.Pages(np.zeros_like(data))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    # Single pages, stretches of 20 and 100 that are contiguous at the peer, and some that are so here, too.
    take = np.array(
        [*range(0, 200, 2), *range(300, 320), *range(400, 500), *range(600, 700, 3), *range(800, 900)]
    )
    give = np.random.default_rng(1).permutation(2900)[: len(take)]
    give[-100:] = np.arange(2900, 3000)
    await a.put_pages(ours, give, remote, take)
    model = np.zeros_like(data)
    model[take] = data[give]
    assert np.array_equal(theirs.arrays[0], model)
    again = aiocomm.Pages(np.zeros_like(data))
    await a.get_pages(remote, take, again, give)
    model[:] = 0
    model[give] = data[give]
    assert np.array_equal(again.arrays[0], model)


async def test_head_ranges_and_other_page_sizes(pair: Pair) -> None:
    a, b = pair
    ours = aiocomm.Pages(cache(2, pages=8, tokens=4), token_axis=1)
    theirs = aiocomm.Pages([np.zeros((6, 8, 1, 64), np.float16) for _ in range(6)], token_axis=1)
    async with await b.lease_pages(theirs) as lease:
        remote = a.remote_pages(lease.handle)
        await a.put_pages(ours.slice(2, 1, 2), [6, 1, 0, 3], remote, [4, 2])
        for mine, other in zip(ours.arrays, theirs.arrays, strict=True):
            assert np.array_equal(
                other[[4, 2], :, 0].reshape(16, 64), mine[[6, 1, 0, 3], :, 1].reshape(16, 64)
            )
        back = aiocomm.Pages(cache(None, pages=8, tokens=4), token_axis=1)
        await a.get_pages(remote, [2], back.slice(2, 0, 1), [7, 5])
        assert np.array_equal(back.arrays[0][[7, 5], :, 0].reshape(8, 64), theirs.arrays[0][2, :, 0])


async def test_tokens_and_heads_may_swap_their_places(pair: Pair) -> None:
    a, b = pair
    ours = aiocomm.Pages(cache(6, pages=8), token_axis=1)  # tokens, heads
    theirs = aiocomm.Pages([np.zeros((5, 2, 8, 64), np.float16) for _ in range(6)], token_axis=2)
    async with await b.lease_pages(theirs) as lease:
        remote = a.remote_pages(lease.handle)
        await a.put_pages(ours, [6, 1, 0, 3], remote, [4, 2])
        for mine, other in zip(ours.arrays, theirs.arrays, strict=True):
            wanted = mine[[6, 1, 0, 3]].reshape(2, 8, 2, 64).swapaxes(1, 2)
            assert np.array_equal(other[[4, 2]], wanted)
            assert not other[[0, 1, 3]].any()
        back = aiocomm.Pages(cache(None, pages=8), token_axis=1)
        await a.get_pages(remote, [2], back, [7, 5])
        for mine, again in zip(ours.arrays, back.arrays, strict=True):
            assert np.array_equal(again[[7, 5]], mine[[0, 3]])


async def test_layers_are_streamed_with_their_notifications(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(3)), aiocomm.Pages(cache(None))
    async with await b.lease_pages(theirs, [1, 2]) as lease:
        remote = a.remote_pages(lease.handle)

        async def send() -> None:
            for layer in range(3):
                planes = [2 * layer, 2 * layer + 1]
                await a.put_pages(
                    ours.planes(planes), [0, 5], remote.planes(planes), [1, 2], notify=b"%d" % layer
                )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            expected = 0
            async for note in b.notifications():
                assert int(note.payload) == expected
                assert np.array_equal(theirs.arrays[2 * expected][[1, 2]], ours.arrays[2 * expected][[0, 5]])
                expected += 1
                if expected == 3:
                    break


async def test_pages_that_were_assigned_anew_are_refused(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(4)), aiocomm.Pages(cache(None))
    first = await b.lease_pages(theirs, [1, 2])
    stale = a.remote_pages(first.handle)
    other = a.remote_pages((await b.lease_pages(theirs, [5])).handle)
    second = await b.lease_pages(theirs, [2, 3])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(ours, [0, 1], stale, [1, 2])
    assert not theirs.arrays[0].any()
    await a.put_pages(ours, [0], other, [5])
    await a.put_pages(ours, [0], a.remote_pages(second.handle), [3])
    with pytest.raises(aiocomm.ClosedError):
        _ = first.handle
    assert theirs.arrays[0][[3, 5]].any()


async def test_bad_lists_are_refused_before_a_byte_moves(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(5)), aiocomm.Pages(cache(None))
    lease = await b.lease_pages(theirs, [1, 2])
    remote = a.remote_pages(lease.handle)
    for give, take, message in (
        ([0], [3], "page 3 is not part of the lease"),
        ([12], [1], "source page 12"),
        ([0], [99], "target page 99"),
        ([0, 1], [2, 2], "comes twice"),
        ([0, 1], [2], "2 source pages"),
        ([False, True], [1, 2], "integers, not bool"),
        ([0], ["1"], "integers, not str"),
    ):
        with pytest.raises(aiocomm.UsageError, match=message):
            await a.put_pages(ours, give, remote, take)  # type: ignore[arg-type]
        with pytest.raises(aiocomm.UsageError):
            await a.put_layers(ours.layers(), give, remote.layers(), take)  # type: ignore[arg-type]
    with pytest.raises(aiocomm.UsageError, match="integers, not float"):
        await a.get_pages(remote, [1], ours, [0.0])  # type: ignore[list-item]
    for pages, message in (([1, 1], "a page comes twice"), ([1.5], "not float"), ([False, True], "not bool")):
        with pytest.raises(aiocomm.UsageError, match=message):
            await b.lease_pages(theirs, pages)  # type: ignore[arg-type]
    await a.put_pages(ours, [], remote, np.array([]))
    assert not theirs.arrays[0].any()


@pytest.mark.parametrize("when", ["before it is planned for", "before the plan is kept"])
async def test_a_list_that_changes_during_a_call_spoils_neither_it_nor_later_ones(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    a, b = pair
    count = 6000  # are planned for on another thread
    ours = aiocomm.Pages(np.arange(2 * count, dtype=np.int32).reshape(count, 2))
    theirs = aiocomm.Pages(np.zeros((count, 2), np.int32))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    rng = np.random.default_rng()  # no plan is kept for these
    one, two = rng.permutation(count), rng.permutation(count)
    give, take = one.copy(), np.arange(count)
    where, name = (anyio.to_thread, "run_sync") if when == "before it is planned for" else (ranges, "_groups")
    then = getattr(where, name)

    def change(*arguments: Any) -> Any:
        give[:] = two
        return then(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(where, name, change)
        await a.put_pages(ours, give, remote, take)
    assert (give == two).all()
    assert (theirs.arrays[0] == ours.arrays[0][one]).all()
    for wanted in (two, one):
        await a.put_pages(ours, wanted, remote, take)
        assert (theirs.arrays[0] == ours.arrays[0][wanted]).all()


async def test_layouts_that_cannot_be_mapped_are_refused_before_a_byte_moves(pair: Pair) -> None:
    a, b = pair
    theirs = aiocomm.Pages(cache(None), token_axis=1)
    remote = a.remote_pages((await b.lease_pages(theirs, [1, 2, 3])).handle)
    submitted = {name: link.submitted for name, link in a.statistics().links.items()}
    others = {
        "fewer arrays": aiocomm.Pages(cache(6, layers=2), token_axis=1),
        "wider": aiocomm.Pages(cache(6, wide=32), token_axis=1),
        "other elements": aiocomm.Pages([x.astype(np.float32) for x in cache(6)], token_axis=1),
        "no token axis": aiocomm.Pages(cache(6)),
        "fewer heads": aiocomm.Pages(cache(6), token_axis=1).slice(2, 0, 1),
    }
    for ours in others.values():
        before = [x.copy() for x in ours.arrays]
        with pytest.raises(aiocomm.UsageError, match="do not fit"):
            await a.put_pages(ours, [0, 1], remote, [1, 2])
        with pytest.raises(aiocomm.UsageError, match="do not fit"):
            await a.get_pages(remote, [1, 2], ours, [0, 1])
        assert all(map(np.array_equal, ours.arrays, before))
    ours = aiocomm.Pages(cache(6), token_axis=1)
    for give, take, message in (
        ([1, 2], [4, 4], "target page 4 comes twice"),
        ([1], [12], "target page 12"),
        ([1], [-1], "target page -1"),
        ([1, 2], [4], "2 source pages"),
        ([0], [4], "page 0 is not part of the lease"),
    ):
        with pytest.raises(aiocomm.UsageError, match=message):
            await a.get_pages(remote, give, ours, take)
    assert all(map(np.array_equal, ours.arrays, cache(6)))
    assert not any(x.any() for x in theirs.arrays)
    assert {name: link.submitted for name, link in a.statistics().links.items()} == submitted


async def test_memory_that_comes_twice_is_a_source_only(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(5)), aiocomm.Pages(cache(None))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    once, twice = ours.planes([0, 1]), remote.planes([2, 2])
    with pytest.raises(aiocomm.UsageError, match="one comes twice"):
        await a.put_pages(once, [0], twice, [1])
    with pytest.raises(aiocomm.UsageError, match="one comes twice"):
        await a.put_layers([ours.planes([0]), once], [0], [remote.planes([2]), twice], [1])
    x = np.ones((12, 4, 2, 64), np.float16)
    memory = np.zeros((13, 4, 2, 64), np.float16)
    shared = aiocomm.Pages([x, memory[:12], memory[1:], x])
    overlapping = ([0, 3], [1, 2], [0, 1, 2], [1, 1])
    for planes in overlapping:
        with pytest.raises(aiocomm.UsageError, match="arrays of the target pages overlap"):
            await a.get_pages(remote.planes(range(len(planes))), [1], shared.planes(planes), [0])
        with pytest.raises(aiocomm.UsageError, match="arrays of the target pages overlap"):
            await b.lease_pages(shared.planes(planes))
    assert not any(array.any() for array in (*theirs.arrays, memory))
    await a.put_pages(shared.planes([0, 0]), [0], remote.planes([0, 1]), [1])
    await a.put_pages(shared.planes([0, 3]), [0], remote.planes([2, 3]), [1])
    assert all((array[1] == 1).all() for array in theirs.arrays[:4])
    into = shared.planes([2, 0])  # which are apart
    await a.get_pages(remote.planes([0, 0]), [1], into, [3])
    assert (memory[4] == 1).all()
    await (await b.lease_pages(into)).aclose()
    x.flags.writeable = False
    lease = await b.lease_pages(shared.planes([0, 3]))  # peers only read it
    again = aiocomm.Pages(cache(None))
    await a.get_pages(a.remote_pages(lease.handle), [0], again.planes([4, 5]), [7])
    assert (again.arrays[4][7] == 1).all()


async def test_what_is_no_notification_is_refused(pair: Pair) -> None:
    a, b = pair
    ours, theirs = aiocomm.Pages(cache(5)), aiocomm.Pages(cache(None))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    for wrong, why in (
        ("hello", "takes bytes, not str"),
        (bytearray(1), "not bytearray"),
        (b"x" * 4097, "4,096"),
    ):
        with pytest.raises(aiocomm.UsageError, match=why):
            await a.put_pages(ours, [0], remote, [0], notify=wrong)  # type: ignore[arg-type]
        with pytest.raises(aiocomm.UsageError, match=why):
            await a.put_layers(ours.layers(), [0], remote.layers(), [0], notify=wrong)  # type: ignore[arg-type]


async def test_views_take_integers_of_any_kind_and_nothing_else(pair: Pair) -> None:
    a, b = pair
    kv = aiocomm.Pages(cache(5), np.int64(0), np.int8(1))  # type: ignore[arg-type]
    one = np.int64(1)
    cut = kv.planes(np.array([1, 0])).slice(np.int32(2), np.int64(0), one)  # type: ignore[arg-type]
    remote = a.remote_pages((await b.lease_pages(cut)).handle)
    for pages in (kv, remote):
        for wrong in (
            lambda pages=pages: pages.slice(2, None, 1),
            lambda pages=pages: pages.slice(2, 0, 1.0),
            lambda pages=pages: pages.slice("2", 0, 1),
            lambda pages=pages: pages.planes([0.0]),
            lambda pages=pages: pages.layers(2.0),
            lambda pages=pages: pages.layers(arrays=None),
        ):
            with pytest.raises(aiocomm.UsageError, match="is not an integer"):
                wrong()
        with pytest.raises(aiocomm.UsageError, match="a list of numbers of arrays"):
            pages.planes(0)  # type: ignore[arg-type]
    for arguments in ((0.0,), (None,), (0, 1.0), (0, "1")):
        with pytest.raises(aiocomm.UsageError, match=r"_axis=.* is not an integer"):
            aiocomm.Pages(cache(None), *arguments)  # type: ignore[arg-type]


def test_hostile_handles_are_refused() -> None:
    async def main() -> None:
        async with aiocomm.connect() as comm:
            handle = bytearray((await comm.lease_pages(aiocomm.Pages(cache(6)), [0, 3])).handle)
            comm.remote_pages(bytes(handle))
            for number in range(300):
                bad = bytearray(handle[: len(handle) - number % 7])
                for _ in range(1 + number % 3):
                    bad[secrets.randbelow(len(bad) - 8) + 2] ^= 1 + secrets.randbelow(255)
                try:
                    comm.remote_pages(bytes(bad))
                except (aiocomm.UsageError, aiocomm.StaleHandleError):
                    continue

    anyio.run(main)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_put_leaves_nothing_under_way(pair: Pair) -> None:
    a, b = pair
    ours = aiocomm.Pages(np.ones((4000, 1024), np.uint8))
    theirs = aiocomm.Pages(np.zeros((4000, 1024), np.uint8))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    pages = np.random.default_rng(0).permutation(4000)
    with anyio.move_on_after(0.01):
        await a.put_pages(ours, pages, remote, range(4000))
    assert a.statistics().in_flight == 0
    with pytest.raises(aiocomm.DeadlineExceeded):
        await a.put_pages(ours, pages, remote, range(4000), deadline=0.0)
    await a.put_pages(ours, pages, remote, range(4000))
    assert theirs.arrays[0].all()
