"""Conformance of links: put, get, notifications, regions."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import aiocomm

if TYPE_CHECKING:
    from conftest import Pair
    from links.conftest import Variant

pytestmark = pytest.mark.anyio

EAGER = 64 << 10
SIZES = [1, 100, EAGER, EAGER + 1, (5 << 20) + 3]


async def swap(pair: Pair, one: aiocomm.Region, other: aiocomm.Region) -> list[aiocomm.RemoteRegion]:
    """What both sides of `exchange` get."""
    remotes: dict[int, aiocomm.RemoteRegion] = {}

    async def side(rank: int, region: aiocomm.Region) -> None:
        remotes[rank] = await pair[rank].exchange(region, 1 - rank)

    async with anyio.create_task_group() as group:
        group.start_soon(side, 0, one)
        group.start_soon(side, 1, other)
    return [remotes[0], remotes[1]]


@pytest.mark.parametrize("nbytes", SIZES)
async def test_put_and_get_move_the_bytes(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    memory = variant.array(nbytes + 20)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)[10 : 10 + nbytes]
        sent, got = variant.random(nbytes), variant.array(nbytes)
        await a.put(sent, remote)
        np.testing.assert_array_equal(memory[10 : 10 + nbytes], sent)
        assert not memory[:10].any()
        assert not memory[10 + nbytes :].any()
        await a.get(remote, got)
        np.testing.assert_array_equal(got, sent)


async def test_exchange_gives_each_the_others_region(pair: Pair, variant: Variant) -> None:
    a, b = pair
    memories = [variant.random(1000, 1), variant.random(1000, 2)]
    got = [variant.array(1000), variant.array(1000)]
    async with a.register(memories[0]) as one, b.register(memories[1]) as other:
        remotes = await swap(pair, one, other)
        await a.get(remotes[0], got[0])
        await b.get(remotes[1], got[1])
    np.testing.assert_array_equal(got[0], memories[1])
    np.testing.assert_array_equal(got[1], memories[0])


@pytest.mark.parametrize("nbytes", [0, 10, 1 << 20])
async def test_a_notification_comes_after_the_data(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    memory = variant.array(nbytes)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        sent = variant.random(nbytes)
        for number in range(3):
            sent[:] = number + 1
            putting = a.put(sent, remote, notify=b"req-%d" % number)
            async for note in b.notifications():
                assert (note.source, note.payload, note.nbytes) == (0, b"req-%d" % number, nbytes)
                assert (memory == number + 1).all()
                break
            await putting


async def test_notifications_keep_the_order_of_small_puts(pair: Pair, variant: Variant) -> None:
    a, b = pair
    memory = variant.array(1)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        putting = [a.put(b"x", remote, notify=bytes([number])) for number in range(200)]
        notes = b.notifications()
        assert [ord((await anext(notes)).payload) for _ in range(200)] == list(range(200))
        for transfer in putting:
            await transfer


async def test_many_accesses_at_once(pair: Pair, variant: Variant) -> None:
    a, b = pair
    piece = 200_000
    memory, source = variant.array(40 * piece), variant.random(40 * piece)
    got = variant.array(40 * piece)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        slices = [slice(i * piece, (i + 1) * piece) for i in range(40)]
        running = [a.put(source[s], remote[s]) for s in slices]
        for transfer in running:
            await transfer
        running = [a.get(remote[s], got[s]) for s in slices]
        for transfer in running:
            await transfer
    np.testing.assert_array_equal(memory, source)
    np.testing.assert_array_equal(got, source)


async def test_accesses_and_messages_share_a_pair(pair: Pair, variant: Variant) -> None:
    a, b = pair
    memory, source, got = variant.array(4 << 20), variant.random(4 << 20), variant.array(4 << 20)
    async with b.register(memory) as region:
        putting = a.put(source, a.remote(region.handle))
        sending, receiving = b.send(source, 0), a.recv(got, 1)
        for transfer in (putting, sending, receiving):
            await transfer
    np.testing.assert_array_equal(memory, source)
    np.testing.assert_array_equal(got, source)


@pytest.mark.parametrize("nbytes", [10, 1 << 20])
async def test_a_closed_region_is_stale(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    region = b.register(variant.array(nbytes))
    remote = a.remote(region.handle)
    await region.aclose()
    await region.aclose()
    with pytest.raises(aiocomm.StaleHandleError, match="exchange"):
        await a.put(variant.array(nbytes), remote)
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get(remote, variant.array(nbytes))


@pytest.mark.parametrize("nbytes", [10, 1 << 20])
async def test_a_read_only_region_can_be_read_only(pair: Pair, variant: Variant, nbytes: int) -> None:
    a, b = pair
    memory, got = variant.random(nbytes), variant.array(nbytes)
    async with b.register(memory, writable=False) as region:
        remote = a.remote(region.handle)
        await a.get(remote, got)
        with pytest.raises(aiocomm.UsageError, match="read-only"):
            await a.put(variant.array(nbytes), remote)
    np.testing.assert_array_equal(got, memory)
    np.testing.assert_array_equal(got, variant.random(nbytes))


async def test_the_owner_checks_the_bounds_itself(pair: Pair, variant: Variant) -> None:
    """A handle that lies about its length does not reach memory outside the region."""
    a, b = pair
    memory = variant.array(200_000)
    async with b.register(memory[1000:101_000]) as region:
        remote = a.remote(region.handle)
        lying = type(remote)(a, remote.rank, remote._generation, remote._number, 0, 10**9, True)
        for start, stop in [(99_990, 100_010), (10**8, 10**8 + 10), (0, 150_000)]:
            with pytest.raises(aiocomm.UsageError, match="outside"):
                await a.put(variant.random(stop - start), lying[start:stop])
            with pytest.raises(aiocomm.UsageError, match="outside"):
                await a.get(lying[start:stop], variant.array(stop - start))
        beyond = type(remote)(a, remote.rank, remote._generation, remote._number, 2**64 - 8, 16, True)
        with pytest.raises(aiocomm.UsageError, match="outside"):
            await a.put(variant.random(16), beyond)
    assert not memory.any()


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_closing_a_region_waits_for_accesses(pair: Pair, variant: Variant, kind: str) -> None:
    a, b = pair
    nbytes = 32 << 20
    memory, local = variant.array(nbytes), variant.random(nbytes)
    region = b.register(memory)
    remote = a.remote(region.handle)
    transfer = a.put(local, remote) if kind == "put" else a.get(remote, local)
    await region.aclose()
    memory[:] = 7  # ours again
    with contextlib.suppress(aiocomm.StaleHandleError):
        await transfer
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get(remote, local)
    assert (memory == 7).all()


@pytest.mark.parametrize("kind", ["put", "get"])
async def test_a_large_access_takes_the_path_that_the_variant_has(
    pair: Pair, variant: Variant, kind: str
) -> None:
    """Both ends count it; on rdma only the end that asks, for the other does nothing."""
    a, b = pair
    nbytes = 3 << 20
    memory, local = variant.array(nbytes), variant.random(nbytes)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        await (a.put(local, remote) if kind == "put" else a.get(remote, local))
    one_sided = {"put": "write", "get": "read"}[kind]
    path = {"shm": "cma", "shm-mapped": "mapped", "rdma": one_sided}.get(variant.way, "stream")
    for comm in pair:
        statistics = comm.links[variant.link].statistics()
        counted = {name: n for name, n in statistics.messages_by_path.items() if n}
        assert counted == ({} if variant.link == "rdma" and comm is b else {path: 1})
        assert statistics.bytes_by_path.get(path, 0) == (nbytes if counted else 0)


async def test_zero_bytes(pair: Pair, variant: Variant) -> None:
    a, b = pair
    async with b.register(variant.array(0)) as region:
        remote = a.remote(region.handle)
        await a.put(b"", remote)
        await a.get(remote, bytearray())
