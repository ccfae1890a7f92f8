"""Leases of pages that end with accesses under way, whose end is cancelled, or that others end."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import until, world

import aiocomm

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio

LARGE = 64 << 20
POISON = 0xAB


class Busy:
    """Regions of a lease through which an access is under way until `end` is called."""

    def __init__(self, lease: Any) -> None:
        self.regions = lease._regions
        self.refused: list[int] = []
        self._comm = self.regions[0]._comm
        for region in self.regions:
            region._comm = SimpleNamespace(closed=False, _engine=self)

    def close_region(self, number: int) -> bool:
        self.refused.append(number)
        return False

    def end(self) -> None:
        for region in self.regions:
            self._comm._engine.close_region(region._number)
            self._comm._regions.pop(region._number, None)
            region._freed()


def caches() -> tuple[aiocomm.Pages, aiocomm.Pages]:
    shape = (8, 16)
    ours = aiocomm.Pages([np.full(shape, 7, np.uint8), np.full(shape, 8, np.uint8)])
    return ours, aiocomm.Pages([np.zeros(shape, np.uint8) for _ in range(2)])


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def test_a_lease_says_what_it_holds(pair: Pair) -> None:
    lease = await pair[0].lease_pages(caches()[0], [1, 5])
    assert repr(lease) == "<aiocomm.PageLease 2 of 8 pages>"
    await lease.aclose()
    assert repr(lease) == "<aiocomm.PageLease ended>"


@pytest.mark.parametrize("cma", ["auto", "off"])
async def test_what_an_earlier_holder_has_under_way_ends_before_the_pages_are_anothers(
    cma: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the calls that ended the earlier lease were cancelled."""
    monkeypatch.setenv("AIOCOMM_CMA", cma)
    async with world(2, warmup=True) as (a, b):
        ours = aiocomm.Pages([np.full((1, LARGE), 7, np.uint8) for _ in range(2)])
        theirs = aiocomm.Pages([np.zeros((1, LARGE), np.uint8) for _ in range(2)])
        lease = await b.lease_pages(theirs, [0])
        stale = a.remote_pages(lease.handle)

        async def put() -> None:
            with contextlib.suppress(aiocomm.StaleHandleError, aiocomm.TransferCancelled):
                await a.put_pages(ours.planes([0]), [0], stale.planes([0]), [0])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(put)
            await until(lambda: theirs.arrays[0][0, 0])
            for end in (lambda: b.lease_pages(theirs, [0]), lease.aclose):
                with anyio.move_on_after(0):
                    await end()
            await b.lease_pages(theirs, [0])
            for array in theirs.arrays:
                array.fill(POISON)
        with pytest.raises(aiocomm.StaleHandleError):
            await a.put_pages(ours.planes([1]), [0], stale.planes([1]), [0])
        assert all((array == POISON).all() for array in theirs.arrays)


async def test_leases_are_those_of_one_pages_and_its_views(pair: Pair) -> None:
    a, b = pair
    _, theirs = caches()
    first = await b.lease_pages(theirs, [1])
    other = await b.lease_pages(aiocomm.Pages(theirs.arrays), [1])
    for lease in (first, other):
        await a.put_pages(caches()[0], [0], a.remote_pages(lease.handle), [1])
    stale = a.remote_pages(first.handle)
    await b.lease_pages(theirs.planes([1]), [1])
    with pytest.raises(aiocomm.StaleHandleError):
        await a.put_pages(caches()[0], [0], stale, [1])
    assert other.handle


async def test_a_lease_whose_end_was_cancelled_is_waited_for(pair: Pair) -> None:
    _, b = pair
    _, theirs = caches()
    lease = await b.lease_pages(theirs, [1, 2])
    busy = Busy(lease)
    with anyio.move_on_after(0):
        await lease.aclose()
    assert len(busy.refused) == 2, "all arrays refuse at once"
    with pytest.raises(aiocomm.ClosedError):
        _ = lease.handle
    other = await b.lease_pages(theirs, [3])  # waits for nobody
    with anyio.move_on_after(0):
        await b.lease_pages(theirs, [2, 4])
    began: list[aiocomm.PageLease] = []

    async def begin() -> None:
        began.append(await b.lease_pages(theirs, [2]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
        tasks.start_soon(lease.aclose)
        await turns()
        assert not began
        busy.end()
    assert began[0].handle
    assert theirs._leases == [other, began[0]]


async def test_a_deadline_ends_the_wait_and_not_what_is_waited_for(pair: Pair) -> None:
    _, b = pair
    _, theirs = caches()
    first = await b.lease_pages(theirs, [1, 2], deadline=0)
    with pytest.raises(aiocomm.UsageError, match="deadline=-1"):
        await b.lease_pages(theirs, [1], deadline=-1)
    assert first.handle, "a call that is refused ends nothing"
    second = await b.lease_pages(theirs, [2, 3], deadline=0)  # nothing is under way
    busy = Busy(second)
    for deadline in (0, 0.02):
        with pytest.raises(aiocomm.DeadlineExceeded, match="lease_pages: accesses through an earlier lease"):
            await b.lease_pages(theirs, [3], deadline=deadline)
    assert len(busy.refused) == 2
    with pytest.raises(aiocomm.ClosedError):
        _ = second.handle
    began: list[aiocomm.PageLease] = []

    async def begin() -> None:
        began.append(await b.lease_pages(theirs, [3], deadline=30))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
        await turns()
        assert not began
        busy.end()
    assert theirs._leases == began


@pytest.mark.parametrize("busy", [False, True])
async def test_of_concurrent_leases_of_a_page_the_last_has_it(pair: Pair, busy: bool) -> None:
    a, b = pair
    ours, theirs = caches()
    first = await b.lease_pages(theirs, [1, 5])
    under_way = Busy(first) if busy else None
    found: dict[int, aiocomm.PageLease] = {}

    async def begin(number: int, pages: list[int]) -> None:
        found[number] = await b.lease_pages(theirs, pages)

    async with anyio.create_task_group() as tasks:
        for number, pages in enumerate(([1, 2], [1, 3], [2, 1], [4])):
            tasks.start_soon(begin, number, pages)
            await turns()
        assert (0 in found) != busy
        if under_way is not None:
            under_way.end()
    for number in (0, 1):
        with pytest.raises(aiocomm.ClosedError, match="the lease has ended"):
            _ = found[number].handle
    for number, page in ((2, 1), (3, 4)):
        await a.put_pages(ours, [0], a.remote_pages(found[number].handle), [page])
        assert theirs.arrays[1][page].all()
    assert theirs._leases == [found[2], found[3]]


async def test_a_lease_that_is_not_begun_leaves_nothing_behind(pair: Pair) -> None:
    _, b = pair
    _, theirs = caches()
    before = set(b._regions)
    with pytest.raises(aiocomm.UsageError, match="stream="):
        await b.lease_pages(theirs, stream=1)
    first = await b.lease_pages(theirs)
    busy = Busy(first)
    with anyio.move_on_after(0):
        await b.lease_pages(theirs)
    busy.end()
    lease = await b.lease_pages(theirs)
    await lease.aclose()
    assert not theirs._leases
    assert set(b._regions) == before
    assert not b._layer_notes
