"""GPU memory between two ranks: on the simulated driver, or on a real one where there is a GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Kind, Stream, driver
from fakes.simulated import Engine
from harness import LIMIT_S, until, world

import aiocomm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from conftest import Pair
    from fakes.simulated import Simulator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

SIZES = [1, 7, 4096, 64 << 10, (1 << 20) + 3, 5 << 20]


LINKS = ["rdma"] if "AIOCOMM_RDMA_GUEST" in os.environ else ["shm", "shm-stream", "tcp"]


@pytest.fixture(params=LINKS)
async def pair(request: pytest.FixtureRequest, gpu: object, monkeypatch: Any) -> AsyncIterator[Pair]:
    """Ranks 0 and 1 over each link that may carry what the GPU link announces."""
    link, _, mode = request.param.partition("-")
    if mode:
        monkeypatch.setenv("AIOCOMM_CMA", "off")
    monkeypatch.setenv("AIOCOMM_RDMA_DEVICES", "rxea0,rxea1")
    async with world(2, links=(link, "cuda"), warmup=True) as (a, b):
        yield a, b


def other_device() -> int:
    return 1 if driver().count > 1 else 0


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


async def both(*transfers: Any) -> list[Any]:
    return [await transfer for transfer in transfers]


@pytest.mark.parametrize("nbytes", SIZES)
async def test_gpu_to_gpu(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data = random(nbytes)
    source = DeviceArray(nbytes).write(data)
    into = DeviceArray(nbytes, device=other_device())
    _, status = await both(a.send(source, 1, tag=3), b.recv(into, 0, tag=3))
    assert status == (0, 3, nbytes)
    assert (into.numpy() == data).all()


@pytest.mark.parametrize("nbytes", SIZES)
async def test_gpu_to_host(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data, into = random(nbytes), np.zeros(nbytes, np.uint8)
    await both(a.send(DeviceArray(nbytes).write(data), 1), b.recv(into, 0))
    assert (into == data).all()


@pytest.mark.parametrize("nbytes", SIZES)
async def test_host_to_gpu(pair: Pair, nbytes: int) -> None:
    a, b = pair
    data, into = random(nbytes), DeviceArray(nbytes)
    await both(a.send(data, 1), b.recv(into, 0))
    assert (into.numpy() == data).all()


async def test_host_messages_that_came_before_their_receive(pair: Pair) -> None:
    a, b = pair
    data = [random(nbytes, nbytes) for nbytes in SIZES]
    sends = [a.send(array, 1, tag=n) for n, array in enumerate(data)]
    for n, array in enumerate(data):
        into = DeviceArray(array.nbytes)
        await b.recv(into, 0, tag=n)
        assert (into.numpy() == array).all()
    await both(*sends)


async def test_parts_of_an_allocation(pair: Pair) -> None:
    a, b = pair
    data = random(100_003)
    source, into = DeviceArray(data.nbytes, offset=77).write(data), DeviceArray(data.nbytes, offset=1001)
    await both(a.send(source, 1), b.recv(into, 0))
    assert (into.numpy() == data).all()


@pytest.mark.parametrize("kind", [Kind.VMM, Kind.POOL])
@pytest.mark.parametrize("towards", [Kind.MALLOC, Kind.VMM, Kind.POOL])
async def test_memory_of_every_kind(pair: Pair, kind: Kind, towards: Kind) -> None:
    a, b = pair
    data = random(3 << 20)
    source, into = DeviceArray(data.nbytes, kind=kind).write(data), DeviceArray(data.nbytes, kind=towards)
    await both(a.send(source, 1), b.recv(into, 0))
    assert (into.numpy() == data).all()


async def test_the_array_a_receive_makes_has_dtype_and_shape(pair: Pair) -> None:
    a, b = pair
    data = np.arange(24, dtype=np.float32).reshape(4, 6)
    _, array = await both(a.send(DeviceArray((4, 6), np.float32).write(data), 1), b.recv_array(0))
    assert array.dtype == np.float32
    assert (array == data).all()


@pytest.mark.parametrize("nbytes", [4, 64 << 10, 3 << 20])
@pytest.mark.parametrize("source", ["gpu", "host"])
async def test_an_array_made_on_a_gpu(pair: Pair, source: str, nbytes: int) -> None:
    a, b = pair
    data = random(nbytes).view(np.float32).reshape(1, -1)
    array = DeviceArray(data.shape, np.float32).write(data) if source == "gpu" else data
    _, made = await both(a.send(array, 1), b.recv_array(0, device=other_device()))
    assert isinstance(made, aiocomm.DeviceArray)
    assert (made.shape, made.typestr, made.device) == (data.shape, "<f4", other_device())
    back = np.zeros_like(data)
    await both(b.send(made, 0), a.recv(back, 1))
    assert (back.view(np.uint32) == data.view(np.uint32)).all()


async def test_a_device_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(aiocomm.UsageError, match="no GPU 99"):
        pair[1].recv_array(0, device=99)


async def test_to_oneself(pair: Pair) -> None:
    a, _ = pair
    data, into = random(2 << 20), DeviceArray(2 << 20)
    await both(a.send(DeviceArray(data.nbytes).write(data), 0), a.recv(into, 0))
    assert (into.numpy() == data).all()


async def test_nothing_to_move(pair: Pair) -> None:
    a, b = pair
    _, status = await both(a.send(DeviceArray(0), 1), b.recv(DeviceArray(16), 0))
    assert status.nbytes == 0


async def test_too_small_a_buffer(pair: Pair) -> None:
    a, b = pair
    sent, received = a.send(DeviceArray(4096), 1), b.recv(DeviceArray(4000), 0)
    with pytest.raises(aiocomm.TruncationError):
        await received
    with pytest.raises(aiocomm.TruncationError):
        await sent


async def test_a_send_waits_for_its_stream(pair: Pair) -> None:
    a, b = pair
    stream, source, into = Stream(), DeviceArray(64 << 10), DeviceArray(64 << 10)
    gate = stream.gate()
    stream.fill(source, 7)
    sent, received = a.send(source, 1, stream=stream), b.recv(into, 0)
    after = a.send(b"after", 1, tag=1)  # is not held up
    await both(after, b.recv(bytearray(5), 0, tag=1))
    assert not sent.done()
    assert not received.done()
    gate.open()
    await both(sent, received)
    assert (into.numpy() == 7).all()
    stream.close()


async def test_a_receive_waits_for_its_stream(pair: Pair) -> None:
    a, b = pair
    stream, source, into = Stream(), DeviceArray(64 << 10), DeviceArray(64 << 10)
    copy = DeviceArray(1)
    source.write(np.full(64 << 10, 5, np.uint8))
    into.write(np.full(64 << 10, 3, np.uint8))
    gate = stream.gate()
    stream.fill(copy, 1)
    received, sent = b.recv(into, 0, stream=stream), a.send(source, 1)
    await both(a.send(b"x", 1, tag=1), b.recv(bytearray(1), 0, tag=1))
    assert (into.numpy() == 3).all()
    gate.open()
    await both(sent, received)
    assert (into.numpy() == 5).all()
    stream.close()


async def test_messages_keep_their_order_behind_a_busy_stream(pair: Pair) -> None:
    a, b = pair
    stream, first = Stream(), DeviceArray(1024)
    gate = stream.gate()
    stream.fill(first, 1)
    sends = [a.send(first, 1, stream=stream), a.send(DeviceArray(1024).write(np.full(1024, 2, np.uint8)), 1)]
    intos = [DeviceArray(1024), DeviceArray(1024)]
    receives = [b.recv(into, 0) for into in intos]
    await receives[1]
    assert not receives[0].done()
    gate.open()
    await both(*sends, *receives)
    assert [int(into.numpy()[0]) for into in intos] == [1, 2]
    stream.close()


async def test_a_capturing_stream_is_refused(pair: Pair) -> None:
    a, _ = pair
    stream = Stream()
    stream.begin_capture()
    try:
        with pytest.raises(aiocomm.UsageError, match="captured"):
            a.send(DeviceArray(16), 1, stream=stream)
    finally:
        stream.end_capture()
        stream.close()


async def test_what_cannot_be_moved_is_refused(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(aiocomm.UsageError, match="managed"):
        a.send(DeviceArray(16, kind=Kind.MANAGED), 1)
    freed = DeviceArray(16)
    described = dict(freed.__cuda_array_interface__)
    freed.close()

    class Freed:
        __cuda_array_interface__ = described

    with pytest.raises(aiocomm.UsageError, match="not device memory"):
        a.send(Freed(), 1)

    class Long:
        memory = DeviceArray(1000)
        __cuda_array_interface__ = memory.part(900, 200).__cuda_array_interface__

    with pytest.raises(aiocomm.UsageError, match="past the end of its memory"):
        a.send(Long(), 1)
    with pytest.raises(aiocomm.UsageError, match="past the end of its memory"):
        a.register(Long())

    class Strided:
        __cuda_array_interface__ = DeviceArray((4, 4)).__cuda_array_interface__ | {"strides": (8, 2)}

    with pytest.raises(aiocomm.UsageError, match="contiguous"):
        b.recv(Strided(), 0)
    with pytest.raises(aiocomm.UsageError, match="stream= belongs"):
        a.send(b"host", 1, stream=0)


async def test_an_array_whose_buffer_refuses(pair: Pair) -> None:
    """CuPy's have the buffer protocol, too, and raise where they lie on a GPU."""

    class Refusing(np.ndarray):
        gpu: DeviceArray

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            return self.gpu.__cuda_array_interface__

    def refusing(nbytes: int, device: int) -> tuple[Refusing, DeviceArray]:
        array = np.empty((2, 3)).T.view(Refusing)  # not in C order
        array.gpu = DeviceArray(nbytes, device=device)
        return array, array.gpu

    a, b = pair
    data = random(4096)
    (source, memory), (into, received) = refusing(4096, 0), refusing(4096, other_device())
    memory.write(data)
    await both(a.send(source, 1), b.recv(into, 0))
    assert (received.numpy() == data).all()


async def test_two_receives_into_one_buffer_are_refused(pair: Pair) -> None:
    _, b = pair
    into = DeviceArray(4096)
    first = b.recv(into, 0)
    with pytest.raises(aiocomm.UsageError, match="another receive"):
        b.recv(into, 0)
    first.cancel()
    await until(first.done)


async def test_cancelled_before_and_after_the_match(pair: Pair) -> None:
    a, b = pair
    stream, source = Stream(), DeviceArray(2 << 20)
    gate = stream.gate()
    sent, received = a.send(source, 1, stream=stream), b.recv(DeviceArray(2 << 20), 0)
    await both(a.send(b"x", 1, tag=1), b.recv(bytearray(1), 0, tag=1))  # the announcement is there by now
    sent.cancel()
    with pytest.raises(aiocomm.TransferCancelled):
        await received
    await until(sent.done)
    again, receiving = a.send(source, 1, stream=stream), b.recv(DeviceArray(2 << 20), 0)
    await both(a.send(b"x", 1, tag=1), b.recv(bytearray(1), 0, tag=1))
    receiving.cancel()
    with pytest.raises(aiocomm.TransferCancelled):
        await again
    await until(receiving.done)
    gate.open()
    stream.close()
    await both(a.send(source, 1), b.recv(DeviceArray(2 << 20), 0))  # the pair goes on


async def test_a_deadline(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(aiocomm.DeadlineExceeded):
        await a.send(DeviceArray(4096), 1, deadline=0.01)
    with pytest.raises(aiocomm.DeadlineExceeded):
        await b.recv(DeviceArray(4096), 0, deadline=0.01)


async def test_observers_see_the_cuda_link(pair: Pair) -> None:
    a, b = pair
    submitted, completed = a.links["cuda"].submissions(), a.links["cuda"].completions()
    await both(a.send(DeviceArray(4096), 1), b.recv(DeviceArray(4096), 0))
    with anyio.fail_after(LIMIT_S):
        assert (await anext(submitted)).nbytes == 4096
        done = await anext(completed)
    assert (done.kind, done.peer, done.nbytes, done.ok) == ("send", 1, 4096, True)
    statistics = a.links["cuda"].statistics()
    assert statistics.completed == 1
    assert sum(statistics.messages_by_path.values()) == 1


@pytest.mark.parametrize("nbytes", [1, 64 << 10])
async def test_a_small_urgent_message_goes_round_two_busy_engines(simulator: Simulator, nbytes: int) -> None:
    async with world(2, links=("shm", "cuda"), warmup=True) as (a, b):
        bulk = [DeviceArray(8 << 20, device=device) for device in (0, 1, 0, 1)]
        urgents = [one.channel("urgent", priority=aiocomm.Priority.URGENT) for one in (a, b)]
        for device in (0, 1):
            simulator.pause(device, Engine.PEER)
        moving = [a.send(bulk[0], 1), b.recv(bulk[1], 0), b.send(bulk[3], 0), a.recv(bulk[2], 1)]
        for device in (0, 1):
            await anyio.to_thread.run_sync(simulator.wait_ready, device, Engine.PEER)
        data, into = random(nbytes), DeviceArray(nbytes, device=1)
        await both(urgents[0].send(DeviceArray(nbytes).write(data), 1), urgents[1].recv(into, 0))
        assert (into.numpy() == data).all()
        assert not any(transfer.done() for transfer in moving)
        for device in (0, 1):
            simulator.resume(device, Engine.PEER)
        await both(*moving)


async def test_closing_with_transfers_under_way(gpu: object) -> None:
    async with world(2, links=("cuda",), warmup=True) as (a, b):
        stream, source = Stream(), DeviceArray(4 << 20)
        gate = stream.gate()
        sent, received = a.send(source, 1, stream=stream), b.recv(DeviceArray(4 << 20), 0)
        await both(a.send(b"x", 1, tag=1), b.recv(bytearray(1), 0, tag=1))
        await b.aclose()
        with pytest.raises(aiocomm.AiocommError):
            await received
        with pytest.raises(aiocomm.AiocommError):
            await sent
        gate.open()
        stream.close()


async def test_between_two_processes(gpu: object, anyio_backend_name: str) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    sizes = [*SIZES, 9 << 20]

    async def echo(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver

        for nbytes in sizes:
            array = DeviceArray(nbytes, device=driver().count > 1)
            for _ in range(2):
                await comm.recv(array, 0)
                await comm.send(array, 0)

    async with aiocomm.spawn(echo, n=1) as comm:
        for nbytes in sizes:
            data = random(nbytes, nbytes)
            source, into = DeviceArray(nbytes).write(data), DeviceArray(nbytes)
            for _ in range(2):
                await comm.send(source, 1)
                await comm.recv(into, 1)
                assert (into.numpy() == data).all()
                into.write(np.zeros(nbytes, np.uint8))
