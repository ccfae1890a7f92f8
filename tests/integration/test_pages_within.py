"""Pages that move within one process, and what is refused of pages before a byte moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes.gpu import DeviceArray
from gpu_experts import LINKS, to_host
from harness import LIMIT_S, world

import aiocomm

if TYPE_CHECKING:
    Pair = tuple[aiocomm.Communicator, aiocomm.Communicator]

pytestmark = pytest.mark.anyio

SHAPES = [((6, 16), 0), ((6, 3, 1000), 1), ((6, 100_000), 0)]


async def moves_within(make: Any, read: Any, shape: tuple[int, ...], axis: int) -> None:
    """What is right is done, and what would not be is refused, and leaves the pages as they are."""
    count = shape[axis]
    numbers = np.arange(count, dtype=np.int32).reshape([-1 if at == axis else 1 for at in range(len(shape))])
    values = np.zeros(shape, np.int32) + numbers
    async with world(2, links=LINKS) as (a, _):
        for give, take, fine in [
            ([0, 1], [1, 0], False),
            ([0, 1], [1, 2], False),
            ([1, 2], [0, 1], False),
            ([0], [0], False),
            ([0, 0], [1, 2], True),
            ([0], [count - 1], True),
            ([], [], True),
        ]:
            for op in ("put", "get"):
                array = make(values)
                pages = aiocomm.Pages(array, page_axis=axis)
                remote = a.remote_pages((await a.lease_pages(pages)).handle)
                call = (
                    a.put_pages(pages, give, remote, take)
                    if op == "put"
                    else a.get_pages(remote, give, pages, take)
                )
                if fine:
                    await call
                else:
                    with pytest.raises(aiocomm.UsageError, match=r"read and written .* two steps"):
                        await call
                wanted = np.moveaxis(values.copy(), axis, 0)
                if fine:
                    wanted[take] = wanted[give]
                assert np.array_equal(np.moveaxis(read(array), axis, 0), wanted)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.usefixtures("gpu")
async def test_pages_are_not_read_and_written(shape: tuple[int, ...], axis: int) -> None:
    await moves_within(np.copy, np.asarray, shape, axis)
    await moves_within(
        lambda values: DeviceArray(values.shape, values.dtype).write(values),
        lambda array: to_host(array, np.int32),
        shape,
        axis,
    )


@pytest.mark.parametrize("what", ["views", "heads", "layers", "layers of one array"])
async def test_it_is_the_memory_that_counts(what: str, pair: Pair) -> None:
    """Not the objects, nor the numbers of pages."""
    a, _ = pair
    x = np.arange(2 * 8 * 4 * 2, dtype=np.float32).reshape(2, 8, 4, 2)
    before = x.copy()
    if what == "layers of one array":
        both = aiocomm.Pages(x, page_axis=1)
        remote = a.remote_pages((await a.lease_pages(both)).handle)
        for give, take in ((0, 0), (1, 1)):  # each is as far from where the array begins as the other
            with pytest.raises(aiocomm.UsageError, match="read and written"):
                await a.put_pages(both.layers(0)[give], [3], remote.layers(0)[take], [3])
        await a.put_pages(both.layers(0)[0], [3], remote.layers(0)[1], [3])
        assert (x[1, 3] == before[0, 3]).all()
        return
    kv = aiocomm.Pages([x[0], x[1]])
    remote = a.remote_pages((await a.lease_pages(kv)).handle)
    if what == "views":
        shifted = aiocomm.Pages(x[0, 2:])  # its page 0 is page 2
        with pytest.raises(aiocomm.UsageError, match="read and written"):
            await a.put_pages(shifted, [0, 1], remote.planes([0]), [3, 4])
        await a.put_pages(shifted, [0, 1], remote.planes([1]), [2, 3])
        assert (x[1, 2:4] == before[0, 2:4]).all()
        await a.put_pages(shifted, [0, 1], remote.planes([0]), [0, 1])
        assert (x[0, 0:2] == before[0, 2:4]).all()
    elif what == "heads":
        first, second = kv.slice(1, 0, 2), remote.slice(1, 2, 4)
        await a.put_pages(first, [0, 1], second, [1, 0])  # other bytes of the same pages
        assert (x[:, [1, 0], 2:] == before[:, [0, 1], :2]).all()
        with pytest.raises(aiocomm.UsageError, match="read and written"):
            await a.put_pages(kv.slice(1, 1, 3), [0, 1], second, [1, 0])
    else:
        crossed = kv.planes([1]), kv.planes([0])
        with pytest.raises(
            aiocomm.UsageError, match="read and written"
        ):  # one layer writes what another reads
            await a.put_layers(crossed, [0], remote.layers(), [0])
        assert (x == before).all()
        await a.put_layers(crossed, [0], remote.layers(), [1])
        assert (x[::-1, 1] == before[:, 0]).all()


async def test_another_process_may_have_the_same_numbers(pair: Pair) -> None:
    a, b = pair
    ours, theirs = (aiocomm.Pages(np.full((4, 8), value)) for value in (1.0, 2.0))
    remote = a.remote_pages((await b.lease_pages(theirs)).handle)
    await a.put_pages(ours, [0, 1], remote, [1, 0])
    assert theirs.arrays[0][:, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("shape", [(8, 4, 0), (8, 0, 4)])
@pytest.mark.usefixtures("gpu")
async def test_pages_of_no_bytes(shape: tuple[int, ...]) -> None:
    async with world(2, links=LINKS) as (a, b):
        for make in (np.zeros, DeviceArray):
            pages, theirs = (aiocomm.Pages(make(shape, np.float16)) for _ in range(2))
            lease = await b.lease_pages(theirs)
            remote = a.remote_pages(lease.handle)
            await a.put_pages(pages, [0, 3], remote, [1, 2], notify=b"none")
            await a.get_pages(remote, [1], pages, [0])
            await a.put_layers([pages], [0], [remote], [1])
            assert [layer async for layer in lease.layers(0, deadline=LIMIT_S)] == [0]
            async for note in b.notifications():
                assert note.payload == b"none"
                break


async def test_what_is_no_pages(pair: Pair) -> None:
    a, b = pair
    pages, theirs = aiocomm.Pages(np.zeros((4, 8))), aiocomm.Pages(np.zeros((4, 8)))
    lease = await b.lease_pages(theirs)
    remote: Any = a.remote_pages(lease.handle)
    swapped: list[Any] = [
        a.put_pages(remote, [0], pages, [0]),  # type: ignore[arg-type]
        a.get_pages(pages, [0], remote, [0]),  # type: ignore[arg-type]
        a.put_layers([remote], [0], [pages], [0]),  # type: ignore[list-item]
    ]
    for call in swapped:
        with pytest.raises(aiocomm.UsageError, match="in place of"):
            await call
    for wrong in (b"\0", bytearray(b"\0")):
        with pytest.raises(aiocomm.UsageError, match="page indices are integers, not byte"):
            await a.put_pages(pages, wrong, remote, [1])
    with pytest.raises(aiocomm.UsageError, match="masks do not travel"):
        aiocomm.Pages(np.ma.ones((4, 8)))
    for cut in (lease.handle[:-1], lease.handle[:-100], lease.handle[:20], lease.handle + b"\0"):
        with pytest.raises(aiocomm.UsageError, match="no handle of pages"):
            a.remote_pages(cut)
