"""GPU memory that network adapters reach by themselves: exported as a dma-buf, registered, read, written.

Over the simulated driver and simulated adapters: the choice and the sequence of calls, not the hardware.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fakes.adapters import HEADERS, Adapters, build
from fakes.gpu import DeviceArray, Kind, Stream
from harness import until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair
    from fakes import simulated

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.usefixtures("gpu", "simulator"),
    pytest.mark.skipif(not HEADERS, reason="the rdma link is not built (apt install libibverbs-dev)"),
]

SIZES = [1, 4096, (1 << 20) + 3, 5 << 20]
BLOCK = 2 << 20
POISON = 0xAB


@pytest.fixture
def adapters() -> Adapters:
    """The simulated adapters."""
    return Adapters()


@pytest.fixture
async def pair(gpu: object, monkeypatch: pytest.MonkeyPatch, adapters: Adapters) -> AsyncIterator[Pair]:
    """Two ranks over two rails, with GPUs."""
    monkeypatch.setenv("AIOCOMM_LIBIBVERBS", str(build()))
    async with world(2, links=("rdma", "cuda"), warmup=True) as (a, b):
        yield a, b
    assert adapters.regions(0) == 0, "every registration is given back"


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


async def both(*transfers: Any) -> None:
    for transfer in transfers:
        await transfer


def made(comm: aiocomm.Communicator) -> int:
    """Registrations of GPU memory."""
    return comm.links["rdma"].statistics().device["registrations_of_devices"]


def frames_of(comm: aiocomm.Communicator) -> int:
    return comm.links["rdma"].statistics().frames_sent


def paths(comm: aiocomm.Communicator, link: str = "cuda") -> dict[str, int]:
    counted = comm.links[link].statistics().messages_by_path
    return {path: count for path, count in counted.items() if count}


def fallbacks(comm: aiocomm.Communicator) -> int:
    return comm.links["cuda"].statistics().fallbacks


@pytest.mark.parametrize("nbytes", SIZES)
@pytest.mark.parametrize("kind", [Kind.MALLOC, Kind.VMM])
async def test_gpu_to_gpu(pair: Pair, nbytes: int, kind: Kind) -> None:
    a, b = pair
    data = random(nbytes)
    source, into = DeviceArray(nbytes, kind=kind).write(data), DeviceArray(nbytes, device=1, kind=kind)
    await both(a.send(source, 1), b.recv(into, 0))
    assert (into.numpy() == data).all()
    if kind is Kind.VMM and nbytes > BLOCK:  # the driver exports one block at a time
        assert paths(b) == {"staged": 1}
        assert fallbacks(a) == 1
    else:
        assert (made(a), made(b)) == (1, 1)
        assert paths(b) == {"read": 1}
        assert fallbacks(a) == fallbacks(b) == 0


@pytest.mark.parametrize("nbytes", SIZES)
async def test_gpu_to_host(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data, into = random(nbytes), np.zeros(nbytes, np.uint8)
    await both(a.send(DeviceArray(nbytes, offset=100).write(data), 1), b.recv(into, 0))
    assert (into == data).all()
    assert (made(a), made(b)) == (1, 0)


async def test_gpu_into_a_receive_that_was_there_before(pair: Pair) -> None:
    a, b = pair
    data, into = random(1 << 20), np.zeros(1 << 20, np.uint8)
    quiet = b.links["rdma"].statistics().frames_sent
    receiving = b.recv(into, 0)
    await until(lambda: b.links["rdma"].statistics().frames_sent > quiet)  # its offer
    await both(a.send(DeviceArray(1 << 20).write(data), 1), receiving)
    assert (into == data).all()
    assert paths(a) == {"write": 1}


@pytest.mark.parametrize("nbytes", [SIZES[-1]])
async def test_host_to_gpu(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data, into = random(nbytes), DeviceArray(nbytes)
    await both(a.send(data, 1), b.recv(into, 0))
    assert (into.numpy() == data).all()
    assert (made(a), made(b)) == (0, 1)


async def test_what_comes_is_flushed_before_it_is_told(pair: Pair, simulator: simulated.Simulator) -> None:
    a, b = pair
    before = simulator.calls("cuFlushGPUDirectRDMAWrites")
    await both(a.send(random(1 << 20), 1), b.recv(DeviceArray(1 << 20), 0))
    assert simulator.calls("cuFlushGPUDirectRDMAWrites") == before + 1


async def test_put_and_get_of_gpu_memory_here(pair: Pair) -> None:
    """The region is host memory."""
    a, b = pair
    memory, data = np.zeros(4 << 20, np.uint8), random(1 << 20)
    source, into = DeviceArray(1 << 20).write(data), DeviceArray(1 << 20)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        await a.put(source, remote[0 : 1 << 20], notify=b"there")
        assert (memory[: 1 << 20] == data).all()
        memory[1 << 20 : 2 << 20] = data[::-1]
        await a.get(remote[1 << 20 : 2 << 20], into)
    assert (into.numpy() == data[::-1]).all()


@pytest.mark.parametrize("nbytes", [8192, 5 << 20])
@pytest.mark.parametrize("offset", [0, 100])
async def test_a_region_of_gpu_memory(
    pair: Pair, simulator: simulated.Simulator, adapters: Adapters, nbytes: int, offset: int
) -> None:
    """Written and read by the adapters: its owner takes no part, and nothing beside it is reached."""
    a, b = pair
    source, into = DeviceArray(nbytes), DeviceArray(nbytes)
    memory = DeviceArray(nbytes + 8, offset=offset)
    data, back = random(nbytes + 8), np.zeros(nbytes + 8, np.uint8)
    quiet = frames_of(b)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        flushed = simulator.calls("cuFlushGPUDirectRDMAWrites")
        told = b.notifications()
        await a.put(data, remote, notify=b"there")
        async with aclosing(told) as notes:
            assert (await anext(notes)).payload == b"there"
        assert simulator.calls("cuFlushGPUDirectRDMAWrites") == flushed + 1
        assert (memory.numpy() == data).all()
        await a.get(remote, back)
        await a.put(source.write(data[8:]), remote[:nbytes])
        await a.get(remote[:nbytes], into)
        assert (back == data).all()
        assert (into.numpy() == data[8:]).all()
        assert adapters.regions(nbytes + 8) - adapters.regions(nbytes + 9) == 2, (
            "just its bytes, by each adapter"
        )
        assert frames_of(b) == quiet + 1, "its key"
    assert (made(b), fallbacks(b)) == (1, 0)


@pytest.mark.parametrize("nbytes", SIZES)
async def test_a_region_of_gpu_memory_that_adapters_refuse(
    pair: Pair, adapters: Adapters, nbytes: int
) -> None:
    """Its owner serves it by way of host memory: what is put into it and got out of it, on hosts and GPUs."""
    a, b = pair
    events, notes = b.events(), b.notifications()
    memory = DeviceArray(nbytes)
    with adapters.refusing_dma_bufs():
        async with b.register(memory) as region:
            remote = a.remote(region.handle)
            for seed, place in ((1, "host"), (2, "gpu"), (3, "host"), (4, "gpu")):
                data, into = random(nbytes, seed), np.zeros(nbytes, np.uint8)
                source = DeviceArray(nbytes).write(data) if place == "gpu" else data
                target = DeviceArray(nbytes).write(into) if place == "gpu" else into
                await a.put(source, remote, notify=b"there")
                assert (await anext(notes)).payload == b"there"
                assert (memory.numpy() == data).all()
                await a.get(remote, target)
                assert ((target.numpy() if place == "gpu" else target) == data).all()
        with pytest.raises(aiocomm.StaleHandleError):
            await a.put(data, remote)
    await b.aclose()
    told = [event async for event in events if isinstance(event, aiocomm.Fallback)]
    assert (0, "put and get served by the region's owner") in {(event.rank, event.path) for event in told}


async def test_an_allocation_is_registered_once(pair: Pair) -> None:
    a, b = pair
    source = DeviceArray(2 << 20)
    for seed in range(4):
        data, into = random(2 << 20, seed), np.zeros(2 << 20, np.uint8)
        source.write(data)
        await both(a.send(source, 1), b.recv(into, 0))
        assert (into == data).all()
    assert made(a) == 1


async def test_memory_that_is_freed_and_allocated_anew(pair: Pair, adapters: Adapters) -> None:
    """The same address, and another allocation: what was registered there before is given back."""
    a, b = pair
    nbytes = 2 << 20
    addresses = set()
    for seed in range(3):
        data, into = random(nbytes, seed), np.zeros(nbytes, np.uint8)
        source = DeviceArray(nbytes).write(data)
        addresses.add(source.address)
        await both(a.send(source, 1), b.recv(into, 0))
        assert (into == data).all()
        source.close()
    assert len(addresses) == 1, "this test needs the address to come back"
    assert made(a) == 3
    await until(lambda: adapters.regions(nbytes) <= 4)  # the last one, and a host buffer's on its way out


async def test_adapters_that_refuse(pair: Pair, adapters: Adapters) -> None:
    """It goes through host memory, which is counted for every message and told once."""
    a, b = pair
    events = a.events()
    with adapters.refusing_dma_bufs():
        for seed in range(3):
            data, into = random(1 << 20, seed), DeviceArray(1 << 20)
            await both(a.send(DeviceArray(1 << 20).write(data), 1), b.recv(into, 0))
            assert (into.numpy() == data).all()
    assert fallbacks(a) == 3
    assert paths(a) == {"staged": 3}
    told = 0
    await a.aclose()  # which ends the events
    async for event in events:
        if isinstance(event, aiocomm.Fallback):
            assert (event.rank, event.path) == (1, "staged")
            assert "refuses dma-buf" in event.reason or "cannot register" in event.reason
            told += 1
    assert told == 1


async def test_a_driver_that_does_not_export(
    pair: Pair, simulator: simulated.Simulator, adapters: Adapters
) -> None:
    a, b = pair
    simulator.fail("cuMemGetHandleForAddressRange", 801, forever=True)
    data, into = random(1 << 20), np.zeros(1 << 20, np.uint8)
    await both(a.send(DeviceArray(1 << 20).write(data), 1), b.recv(into, 0))
    assert (into == data).all()
    assert fallbacks(a) == 1


async def test_a_send_waits_for_its_stream(pair: Pair) -> None:
    a, b = pair
    stream, source, into = Stream(), DeviceArray(64 << 10), np.zeros(64 << 10, np.uint8)
    gate = stream.gate()
    stream.fill(source, 7)
    sent, received = a.send(source, 1, stream=stream), b.recv(into, 0)
    await both(a.send(b"other", 1, channel=a.channel("x")), b.recv(bytearray(5), 0, channel=b.channel("x")))
    assert not sent.done()
    assert not received.done()
    gate.open()
    await both(sent, received)
    assert (into == 7).all()
    stream.close()


@pytest.mark.parametrize("role", ["send", "recv"])
async def test_it_is_given_up_while_it_is_registered(pair: Pair, adapters: Adapters, role: str) -> None:
    a, b = pair
    nbytes = 4 << 20
    ours, theirs = DeviceArray(nbytes), random(1 << 10)
    with adapters.paused(nbytes):
        if role == "send":
            transfer = a.send(ours, 1)
        else:
            sending = b.send(random(nbytes // 8), 0)
            await until(lambda: a.statistics().unexpected_messages)
            transfer = a.recv(ours, 1)
        await until(lambda: adapters.waiting)
        assert transfer.cancel()
        await until(transfer.done)
        ours.write(np.full(nbytes, POISON, np.uint8))
    if role == "recv":
        with pytest.raises(aiocomm.errors.TransferCancelled):
            await sending
    got = np.zeros(1 << 10, np.uint8)
    await both(a.send(theirs, 1, tag=9), b.recv(got, 0, tag=9))
    assert (got == theirs).all()
    assert (ours.numpy() == POISON).all()
