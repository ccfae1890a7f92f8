"""Put, get, notifications and regions with GPU memory at either end."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Kind, Stream, driver
from fakes.simulated import Engine, Simulator
from harness import LIMIT_S, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

SIZES = [1, 4096, 64 << 10, (1 << 20) + 3, 5 << 20]
WAYS = [("gpu", "gpu"), ("gpu", "host"), ("host", "gpu")]  # local, region
LINKS = ("shm", "cuda")


@pytest.fixture(params=["shm", "shm-stream", "tcp"])
async def pair(request: pytest.FixtureRequest, gpu: object, monkeypatch: Any) -> AsyncIterator[Pair]:
    """Ranks 0 and 1 over each link that may carry what the GPU link announces."""
    link, _, mode = request.param.partition("-")
    if mode:
        monkeypatch.setenv("AIOCOMM_CMA", "off")
    async with world(2, links=(link, "cuda"), warmup=True) as (a, b):
        yield a, b


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def other_device() -> int:
    return 1 if driver().count > 1 else 0


def memory(where: str, data: np.ndarray[Any, Any], device: int = 0, kind: Kind = Kind.MALLOC) -> Any:
    """An array with these bytes."""
    return data.copy() if where == "host" else DeviceArray(data.nbytes, device=device, kind=kind).write(data)


def content(array: Any) -> np.ndarray[Any, Any]:
    return array.numpy() if isinstance(array, DeviceArray) else array


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_put_and_get_move_the_bytes(pair: Pair, local: str, remote: str, nbytes: int) -> None:
    a, b = pair
    zeros = np.zeros(nbytes + 20, np.uint8)
    whole, data = memory(remote, zeros, other_device()), random(nbytes)
    async with b.register(whole) as region:
        part = a.remote(region.handle)[10 : 10 + nbytes]
        await a.put(memory(local, data), part)
        zeros[10 : 10 + nbytes] = data
        np.testing.assert_array_equal(content(whole), zeros)
        got = memory(local, np.zeros(nbytes + 5, np.uint8))
        await a.get(part, got)
        np.testing.assert_array_equal(content(got)[:nbytes], data)
        assert not content(got)[nbytes:].any()


@pytest.mark.parametrize("nbytes", [0, 10, 1 << 20])
@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_a_notification_comes_after_the_data(pair: Pair, local: str, remote: str, nbytes: int) -> None:
    a, b = pair
    whole = memory(remote, np.zeros(nbytes, np.uint8), other_device())
    async with b.register(whole) as region:
        target = a.remote(region.handle)
        for number in range(3):
            text = b"%d" % number * 4096
            putting = a.put(memory(local, np.full(nbytes, number + 1, np.uint8)), target, notify=text)
            async for note in b.notifications():
                assert (note.source, note.payload, note.nbytes) == (0, text, nbytes)
                assert (content(whole) == number + 1).all()
                break
            await putting


async def test_notifications_keep_the_order_of_small_puts(pair: Pair) -> None:
    a, b = pair
    async with b.register(DeviceArray(1)) as region:
        target = a.remote(region.handle)
        putting = [a.put(b"x", target, notify=bytes([number])) for number in range(100)]
        notes = b.notifications()
        assert [ord((await anext(notes)).payload) for _ in range(100)] == list(range(100))
        for transfer in putting:
            await transfer


async def test_many_accesses_at_once(pair: Pair) -> None:
    a, b = pair
    piece, count = 200_000, 30
    data = random(count * piece)
    whole = memory("gpu", np.zeros_like(data), other_device())
    source, got = memory("gpu", data), memory("gpu", np.zeros_like(data))
    async with b.register(whole) as region:
        target = a.remote(region.handle)
        slices = [(at * piece, (at + 1) * piece) for at in range(count)]
        for transfer in [a.put(source.part(i, piece), target[i:j]) for i, j in slices]:
            await transfer
        for transfer in [a.get(target[i:j], got.part(i, piece)) for i, j in slices]:
            await transfer
    np.testing.assert_array_equal(content(whole), data)
    np.testing.assert_array_equal(content(got), data)


@pytest.mark.parametrize("nbytes", [10, 1 << 20])
@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_a_closed_region_is_stale(pair: Pair, local: str, remote: str, nbytes: int) -> None:
    a, b = pair
    region = b.register(memory(remote, np.zeros(nbytes, np.uint8)))
    target, array = a.remote(region.handle), memory(local, np.zeros(nbytes, np.uint8))
    await region.aclose()
    with pytest.raises(aiocomm.StaleHandleError, match="exchange"):
        await a.put(array, target)
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get(target, array)


async def test_a_read_only_region_and_bounds(pair: Pair) -> None:
    a, b = pair
    data = random(200_000)
    whole = memory("gpu", data, other_device())
    async with b.register(whole.part(1000, 100_000), writable=False) as region:
        target, got = a.remote(region.handle), memory("gpu", np.zeros(100_000, np.uint8))
        await a.get(target, got)
        np.testing.assert_array_equal(content(got), data[1000:101_000])
        with pytest.raises(aiocomm.UsageError, match="read-only"):
            await a.put(got, target)
        lying = type(target)(a, target.rank, target._generation, target._number, 0, 10**9, True)
        for start, stop in [(99_990, 100_010), (10**8, 10**8 + 10)]:
            with pytest.raises(aiocomm.UsageError, match="outside"):
                await a.get(lying[start:stop], got)
    async with b.register(whole.part(1000, 100_000)) as region:
        target = a.remote(region.handle)
        lying = type(target)(a, target.rank, target._generation, target._number, 0, 10**9, True)
        with pytest.raises(aiocomm.UsageError, match="outside"):
            await a.put(got, lying[1:100_001])
    np.testing.assert_array_equal(content(whole), data)


@pytest.mark.parametrize("kind", ["put", "get"])
@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_closing_a_region_waits_for_accesses(pair: Pair, local: str, remote: str, kind: str) -> None:
    a, b = pair
    nbytes = 16 << 20
    whole = memory(remote, np.zeros(nbytes, np.uint8), other_device())
    array = memory(local, random(nbytes))
    region = b.register(whole)
    target = a.remote(region.handle)
    transfer = a.put(array, target) if kind == "put" else a.get(target, array)
    await region.aclose()
    if isinstance(whole, DeviceArray):
        whole.write(np.full(nbytes, 7, np.uint8))  # ours again
    else:
        whole[:] = 7
    with contextlib.suppress(aiocomm.StaleHandleError):
        await transfer
    with pytest.raises(aiocomm.StaleHandleError):
        await a.get(target, array)
    assert (content(whole) == 7).all()


@pytest.mark.parametrize("kind", [Kind.VMM, Kind.POOL])
@pytest.mark.parametrize("towards", [Kind.MALLOC, Kind.VMM, Kind.POOL])
async def test_memory_of_every_kind(pair: Pair, kind: Kind, towards: Kind) -> None:
    a, b = pair
    data = random(3 << 20)
    whole = memory("gpu", np.zeros_like(data), other_device(), towards)
    async with b.register(whole) as region:
        target, got = a.remote(region.handle), memory("gpu", np.zeros_like(data), kind=kind)
        await a.put(memory("gpu", data, kind=kind), target)
        np.testing.assert_array_equal(content(whole), data)
        await a.get(target, got)
        np.testing.assert_array_equal(content(got), data)


@pytest.mark.parametrize("remote", ["gpu", "host"])
async def test_a_put_waits_for_its_stream(pair: Pair, remote: str) -> None:
    a, b = pair
    stream, source = Stream(), DeviceArray(64 << 10)
    whole = memory(remote, np.zeros(64 << 10, np.uint8), other_device())
    gate = stream.gate()
    stream.fill(source, 7)
    async with b.register(whole) as region:
        putting = a.put(source, a.remote(region.handle), stream=stream)
        into = bytearray(1)
        receiving = b.recv(into, 0)
        await a.send(b"x", 1)  # is not held up
        await receiving
        assert not putting.done()
        gate.open()
        await putting
    assert (content(whole) == 7).all()
    stream.close()


@pytest.mark.parametrize("local", ["gpu", "host"])
async def test_accesses_wait_for_the_stream_of_a_region(pair: Pair, local: str) -> None:
    a, b = pair
    stream, whole = Stream(), DeviceArray(64 << 10)
    got = memory(local, np.zeros(64 << 10, np.uint8), other_device())
    gate = stream.gate()
    stream.fill(whole, 7)
    async with b.register(whole, stream=stream) as region:
        target = a.remote(region.handle)
        getting = a.get(target, got)
        putting = a.put(np.full(10, 8, np.uint8), target[:10])
        await a.send(b"x", 1)
        await b.recv(bytearray(1), 0)
        assert not getting.done()
        assert not putting.done()
        gate.open()
        await getting
        await putting
    assert (content(got)[10:] == 7).all()
    assert (content(whole)[:10] == 8).all()
    stream.close()


@pytest.mark.parametrize("side", ["put", "get"])
@pytest.mark.parametrize(("local", "remote"), WAYS)
async def test_cancelled_behind_a_stream(pair: Pair, local: str, remote: str, side: str) -> None:
    a, b = pair
    stream = Stream()
    gate = stream.gate()
    busy = DeviceArray(1)
    stream.fill(busy, 1)
    zeros = np.zeros(2 << 20, np.uint8)
    whole, array = memory(remote, zeros, other_device()), memory(local, zeros)
    held = {"stream": stream}
    async with b.register(whole, **(held if remote == "gpu" else {})) as region:
        target, more = a.remote(region.handle), held if local == "gpu" else {}
        running = a.put(array, target, **more) if side == "put" else a.get(target, array, **more)
        await a.send(b"x", 1)
        await b.recv(bytearray(1), 0)
        running.cancel()
        with anyio.fail_after(LIMIT_S):
            await until(running.done)
        assert running.cancelled()
        gate.open()
        await a.put(array, target)  # the pair goes on
        await a.get(target, array)
    stream.close()


async def test_a_deadline(pair: Pair) -> None:
    a, b = pair
    stream = Stream()
    gate = stream.gate()
    busy = DeviceArray(1)
    stream.fill(busy, 1)
    async with b.register(DeviceArray(4096)) as region:
        with pytest.raises(aiocomm.DeadlineExceeded):
            await a.put(DeviceArray(4096), a.remote(region.handle), stream=stream, deadline=0.01)
        gate.open()
    stream.close()


async def test_what_is_refused(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(aiocomm.UsageError, match="managed"):
        b.register(DeviceArray(16, kind=Kind.MANAGED))
    with pytest.raises(aiocomm.UsageError, match="stream= belongs"):
        b.register(bytearray(16), stream=0)
    async with b.register(DeviceArray(16)) as region:
        target = a.remote(region.handle)
        with pytest.raises(aiocomm.UsageError, match="17 bytes do not fit"):
            a.put(DeviceArray(17), target)
        with pytest.raises(aiocomm.UsageError, match="does not fit into 15"):
            a.get(target, DeviceArray(15))


async def test_between_two_processes(gpu: object) -> None:
    nbytes = 3 << 20

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, Kind, driver

        for kind in (Kind.MALLOC, Kind.VMM):
            whole = DeviceArray(nbytes, device=driver().count > 1, kind=kind)
            async with comm.register(whole) as region:
                await comm.exchange(region, 0)
                async for note in comm.notifications():
                    await comm.send(whole.numpy(), note.source)
                    break
                await comm.recv(bytearray(1), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        for kind in (Kind.MALLOC, Kind.VMM):
            data = random(nbytes, 3)
            source, back = DeviceArray(nbytes, kind=kind).write(data), np.zeros(nbytes, np.uint8)
            async with comm.register(bytearray(1)) as mine:
                target = await comm.exchange(mine, 1)
            await comm.put(source, target, notify=b"done")
            await comm.recv(back, 1)
            np.testing.assert_array_equal(back, data)
            got = DeviceArray(nbytes, kind=kind)
            await comm.get(target, got)
            np.testing.assert_array_equal(got.numpy(), data)
            await comm.send(b"x", 1)


async def test_cancelled_in_the_middle_of_a_copy(simulator: Simulator) -> None:
    """A cancelled put ends, and the region closes, only when the engine has let go."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        nbytes = 3 << 20
        source, whole = DeviceArray(nbytes, device=0), DeviceArray(nbytes, device=1)
        region = b.register(whole)
        target = a.remote(region.handle)
        simulator.stop_halfway(0, Engine.PEER)
        putting = a.put(source, target)
        closed = anyio.Event()

        async def close() -> None:
            await region.aclose()
            closed.set()

        async with anyio.create_task_group() as group:
            await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.PEER)
            group.start_soon(close)
            putting.cancel()
            await a.send(b"x", 1)
            await b.recv(bytearray(1), 0)
            assert not putting.done()
            assert not closed.is_set()
            simulator.resume(0, Engine.PEER)
            with anyio.fail_after(LIMIT_S):
                await until(putting.done)
                await closed.wait()
        assert putting.cancelled()


async def test_the_owner_killed_in_the_middle_of_a_put(simulator: Simulator) -> None:
    nbytes = 3 << 20

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        async with comm.register(DeviceArray(nbytes, device=1)) as region:
            await comm.exchange(region, 0)
            await comm.recv(bytearray(1), 0)

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            source = DeviceArray(nbytes, device=0)
            async with comm.register(bytearray(1)) as mine:
                target = await comm.exchange(mine, 1)
            await comm.put(source, target)
            simulator.stop_halfway(0, Engine.PEER)
            putting = comm.put(source, target)
            try:
                await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.PEER)
                events = comm.events()
                os.kill(comm.peers[0].pid, signal.SIGKILL)
                async for event in events:
                    if isinstance(event, aiocomm.PeerLost):
                        break
                assert not putting.done()  # the engine still has the buffer
            finally:
                simulator.resume(0, Engine.PEER)
            with pytest.raises(aiocomm.PeerLostError):
                await putting
            with pytest.raises(aiocomm.AiocommError):
                await comm.get(target, source)


async def test_the_writer_killed_in_the_middle_of_a_put(simulator: Simulator) -> None:
    """The region closes: nobody writes it any more."""

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Engine, Simulator

        simulator = Simulator(driver().library)
        async with comm.register(bytearray(1)) as mine:
            target = await comm.exchange(mine, 0)
        source = DeviceArray(3 << 20, device=1)
        await comm.put(source, target)
        for device in (0, 1):
            simulator.stop_halfway(device, Engine.PEER)
        putting = comm.put(source, target, notify=b"never")
        await anyio.to_thread.run_sync(simulator.wait_ready, 1, Engine.PEER)
        await comm.send(b"halfway", 0)
        await putting

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            region = comm.register(DeviceArray(3 << 20, device=0))
            await comm.exchange(region, 1)
            await comm.recv(bytearray(7), 1)
            os.kill(comm.peers[0].pid, signal.SIGKILL)
            with anyio.fail_after(LIMIT_S):
                await region.aclose()
