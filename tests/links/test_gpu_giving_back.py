"""Memory goes back once streams are at rest: nobody else waits for that."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Stream
from harness import LIMIT_S, until, world
from links.test_gpu import LINKS, both, pair, random  # noqa: F401

import aiocomm
from aiocomm_native import _core

if TYPE_CHECKING:
    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


async def test_the_loop_goes_on_while_memory_waits_to_be_freed(pair: Pair) -> None:  # noqa: F811
    """Copies are behind the stream with it: the driver lets none be queued."""
    a, b = pair
    data = random(1 << 20)
    stream, busy = Stream(), DeviceArray(1)
    source, into = DeviceArray(1 << 20).write(data), DeviceArray(1 << 20)
    # Before anything is held up: what a driver does on first use may wait, too.
    _, made = await both(a.send(source, 1), b.recv_array(0, device=0))
    await both(a.send(source, 1), b.recv(into, 0))
    into.write(np.zeros(1 << 20, np.uint8))
    gate = stream.gate()
    stream.fill(busy, 1)
    del made
    gc.collect()
    transfers = [a.send(source, 1), b.recv(into, 0)]
    for _ in range(20):
        await both(a.send(b"goes on", 1, tag=1), b.recv(bytearray(7), 0, tag=1))
    assert not stream.done()
    gate.open()
    await both(*transfers)
    assert (into.numpy() == data).all()
    stream.close()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_closed_and_collected_behind_a_busy_stream() -> None:
    """Neither waits for the stream: `close` for a second at most, the collector not at all."""
    stream, busy = Stream(), DeviceArray(1)
    async with world(2, warmup=True) as (a, b):
        for into in (DeviceArray(2 << 20), bytearray(2 << 20)):
            await both(a.send(DeviceArray(2 << 20), 1), b.recv(into, 0))
        _, made = await both(a.send(DeviceArray(64), 1), b.recv_array(0, device=0))
        gate = stream.gate()
        stream.fill(busy, 1)
    with pytest.raises(aiocomm.ClosedError):
        a.send(made, 1)
    del a, b, made
    gc.collect()
    async with world(2, warmup=True) as (a, b):
        await both(a.send(b"goes on", 1), b.recv(bytearray(7), 0))
        assert not stream.done()
        gate.open()
        stream.synchronize()
        await both(a.send(busy, 1), b.recv(DeviceArray(1), 0))
    stream.close()


async def test_memory_for_a_receive_that_was_cancelled_meanwhile(pair: Pair, simulator: Simulator) -> None:  # noqa: F811
    a, b = pair
    source = DeviceArray(1 << 20)
    _, _kept = await both(a.send(source, 1), b.recv_array(0, device=0))  # not to be freed meanwhile
    gc.collect()
    assert _core.given_back(LIMIT_S)
    before, freed = simulator.held("allocations"), simulator.calls("cuMemFree")
    simulator.hold("cuMemAlloc")
    receive = b.recv_array(0, device=0)
    sending = a.send(source, 1)
    await anyio.to_thread.run_sync(simulator.wait_held)
    receive.cancel()
    await until(lambda: receive.done() and sending.done())
    simulator.let_go()
    await until(lambda: simulator.calls("cuMemFree") > freed and simulator.held("allocations") == before)


async def test_all_of_it_is_back_when_closed(simulator: Simulator) -> None:
    kinds = ("allocations", "pinned", "registered", "streams")
    gc.collect()
    assert _core.given_back(LIMIT_S)  # what earlier tests had
    before = {kind: simulator.held(kind) for kind in kinds}
    async with world(2, warmup=True) as (a, b):
        source = DeviceArray(2 << 20)
        for _ in range(3):
            await both(a.send(source, 1), b.recv(bytearray(2 << 20), 0))
            _, made = await both(a.send(source, 1), b.recv_array(0, device=0))
            del made
        source.close()
        assert simulator.held("pinned") > before["pinned"]
    del a, b
    await until(lambda: gc.collect() >= 0 and all(simulator.held(kind) <= before[kind] for kind in kinds))
