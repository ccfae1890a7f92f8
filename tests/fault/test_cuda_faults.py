"""The GPU link when something fails: driver calls, devices, peers, and memory that is freed and comes back.

Ranks of one process reach each other's memory by its address, so what concerns CUDA IPC runs between
processes. After each test the simulated driver must not have seen an access to memory that was not there
(fixture `gpu`).
"""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Kind, Stream
from fakes.simulated import Engine, Simulator
from harness import LIMIT_S, until, world

import aiocomm
from aiocomm_native import _core

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

LINKS = ("shm", "cuda")
NBYTES = 3 << 20
DEVICE_UNAVAILABLE, ILLEGAL_ADDRESS, UNKNOWN = 46, 700, 999
OUT_OF_MEMORY, THROWS = 2, -1

CALLS = [
    "cuCtxEnablePeerAccess",
    "cuDeviceGet",
    "cuDeviceGetUuid",
    "cuDevicePrimaryCtxRetain",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer",
    "cuMemcpyAsync",
    "cuPointerGetAttributes",
    "cuStreamCreateWithPriority",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuStreamWriteValue32",
]


def random(nbytes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


async def outcome(call: Any) -> BaseException | None:
    """What a transfer ends with; how a call is refused counts, too."""
    try:
        await call()
    except aiocomm.AiocommError as error:
        return error
    return None


async def outcomes(*calls: Any) -> list[BaseException | None]:
    found: list[BaseException | None] = [None] * len(calls)

    async def one(index: int) -> None:
        found[index] = await outcome(calls[index])

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            for index in range(len(calls)):
                group.start_soon(one, index)
    return found


async def the_first(events: Any, kind: type) -> Any:
    with anyio.fail_after(LIMIT_S):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError("the events have ended")


async def one_way(send: Any, receive: Any) -> list[BaseException | None]:
    """Both ends of a message, which end by themselves; where one is refused the other is cancelled."""
    ended: list[BaseException | None] = [None, None]
    transfers: list[Any] = [None, None]
    for index, call in enumerate((send, receive)):
        try:
            transfers[index] = call()
        except aiocomm.AiocommError as error:
            ended[index] = error
    for index, transfer in enumerate(transfers):
        if transfer is not None and transfer.done():
            ended[index] = transfer.exception()
    for index in (0, 1):
        if ended[1 - index] is not None and transfers[index] is not None:
            transfers[index].cancel()
    with anyio.fail_after(LIMIT_S):
        for index, transfer in enumerate(transfers):
            if transfer is not None:
                await until(transfer.done)
                ended[index] = None if transfer.cancelled() else transfer.exception()
    return ended


async def exchange(a: aiocomm.Communicator, b: aiocomm.Communicator, seed: int) -> list[BaseException | None]:
    """GPU to GPU, GPU to host, host to GPU; what arrived without an error must be right."""
    data = random(NBYTES, seed)
    first, second = DeviceArray(NBYTES, device=0).write(data), DeviceArray(NBYTES, device=1)
    host = np.zeros(NBYTES, np.uint8)
    ended = []
    for source, into in ((first, second), (first, host), (data, second)):
        if isinstance(into, DeviceArray):
            into.write(np.zeros(NBYTES, np.uint8))
        both = await one_way(lambda source=source: a.send(source, 1), lambda into=into: b.recv(into, 0))
        if both == [None, None]:
            got = into.numpy() if isinstance(into, DeviceArray) else into
            assert (got == data).all()
        ended += both
    return ended


ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"])  # native code, the same for every loop


@ONE_LOOP
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("call", CALLS)
async def test_one_failing_call(simulator: Simulator, call: str, nth: int) -> None:
    simulator.fail(call, UNKNOWN, nth)
    async with world(2, links=LINKS, warmup=True) as (a, b):
        for error in await exchange(a, b, nth):
            assert error is None or isinstance(
                error, aiocomm.LinkError | aiocomm.PeerError | aiocomm.UsageError
            )
        simulator.heal()
        assert await exchange(a, b, nth + 1) == [None] * 6  # the pair and the device go on


@ONE_LOOP
@pytest.mark.parametrize("call", CALLS)
async def test_a_call_that_always_fails(simulator: Simulator, call: str) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        simulator.fail(call, UNKNOWN, forever=True)
        await exchange(a, b, 1)
        into = bytearray(100)
        assert await outcomes(lambda: a.send(bytes(100), 1), lambda: b.recv(into, 0)) == [None, None]
        simulator.heal()


@ONE_LOOP
@pytest.mark.parametrize("nth", [1, 2])
async def test_no_memory_where_a_copy_is_issued(simulator: Simulator, nth: int) -> None:
    simulator.fail("cuMemcpyAsync", THROWS, nth)
    async with world(2, links=LINKS, warmup=True) as (a, b):
        for error in await exchange(a, b, nth):
            assert error is None or isinstance(error, aiocomm.LinkError | aiocomm.PeerError)
        simulator.heal()
        assert await exchange(a, b, nth + 1) == [None] * 6  # the pair and the device go on


@ONE_LOOP
@pytest.mark.parametrize("nth", [1, 2])
async def test_no_memory_where_a_copys_end_is_asked_for(simulator: Simulator, nth: int) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        simulator.fail("cuStreamWriteValue32", THROWS, nth)
        ended = await exchange(a, b, nth)
        assert any("engine has failed: std::bad_alloc" in str(error) for error in ended)
        simulator.heal()


async def test_an_error_names_the_device_and_the_drivers_code(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        simulator.fail("cuMemcpyAsync", UNKNOWN)
        source, into = DeviceArray(NBYTES), DeviceArray(NBYTES, device=1)
        ended = await outcomes(lambda: a.send(source, 1), lambda: b.recv(into, 0))
        failed = [error for error in ended if isinstance(error, aiocomm.LinkError) and error.code == UNKNOWN]
        assert len(failed) == 1
        assert failed[0].code_name == "CUDA_ERROR_UNKNOWN"
        assert "aiocomm doctor" in str(failed[0])


async def test_no_memory_for_the_array_that_a_receive_makes(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        data = random(NBYTES)
        source = DeviceArray(NBYTES).write(data)
        simulator.fail("cuMemAlloc", 2)
        ended = await one_way(lambda: a.send(source, 1), lambda: b.recv_array(0, device=1))
        assert isinstance(ended[1], aiocomm.LinkError | aiocomm.PeerError)
        simulator.heal()
        sent = a.send(source, 1)
        array = await b.recv_array(0, device=1)
        await sent
        back = np.zeros(NBYTES, np.uint8)
        received = a.recv(back, 1)
        await b.send(array, 0)
        await received
        assert (back == data).all()


@pytest.mark.parametrize("call", ["cuMemHostGetDevicePointer", "cuStreamCreateWithPriority"])
async def test_a_device_that_does_not_start_leaves_nothing(simulator: Simulator, call: str) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, _):
        array = DeviceArray(100, device=3)
        gc.collect()
        assert _core.given_back(10)  # of earlier tests
        before = {kind: simulator.held(kind) for kind in ("streams", "pinned", "contexts")}
        simulator.fail(call, UNKNOWN, 1 if call == "cuMemHostGetDevicePointer" else 3)
        with pytest.raises(aiocomm.LinkError, match="GPU 3: cannot"):
            await a.send(array, 1)
        assert {kind: simulator.held(kind) for kind in before} == before


async def test_a_broken_context_ends_its_transfers_and_leaves_other_devices(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        simulator.fail("@engine", ILLEGAL_ADDRESS)
        source, into = DeviceArray(NBYTES, device=0), DeviceArray(NBYTES, device=1)
        ended = await outcomes(lambda: a.send(source, 1), lambda: b.recv(into, 0))
        assert any(isinstance(error, aiocomm.LinkError) for error in ended)
        data = random(NBYTES)
        third, fourth = DeviceArray(NBYTES, device=2).write(data), DeviceArray(NBYTES, device=3)
        assert await outcomes(lambda: a.send(third, 1), lambda: b.recv(fourth, 0)) == [None, None]
        assert (fourth.numpy() == data).all()
        simulator.heal()


async def test_a_lost_device_ends_what_it_moves(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        for device in (0, 1):
            simulator.pause(device, Engine.PEER)
        source, into = DeviceArray(NBYTES, device=0), DeviceArray(NBYTES, device=1)
        sent, received = a.send(source, 1), b.recv(into, 0)
        await anyio.to_thread.run_sync(simulator.wait_ready_on_any, [0, 1], Engine.PEER)
        for device in (0, 1):
            simulator.lose(device, DEVICE_UNAVAILABLE)
        ended = await outcomes(lambda: sent, lambda: received)
        assert all(isinstance(error, aiocomm.LinkError | aiocomm.PeerError) for error in ended)
        assert any("DEVICE_UNAVAILABLE" in str(error) for error in ended)
        assert await outcomes(lambda: a.send(b"x", 1), lambda: b.recv(bytearray(1), 0)) == [None, None]
        simulator.heal()


async def test_a_closed_gate_on_a_lost_device(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        stream, source = Stream(0), DeviceArray(NBYTES, device=0)
        gate = stream.gate()
        stream.fill(source, 1)
        sent, received = a.send(source, 1, stream=stream), b.recv(DeviceArray(NBYTES, device=1), 0)
        await outcomes(lambda: a.send(b"x", 1, tag=1), lambda: b.recv(bytearray(1), 0, tag=1))
        simulator.lose(0, DEVICE_UNAVAILABLE)
        sent.cancel()
        ended = await outcomes(lambda: received)
        assert isinstance(ended[0], aiocomm.TransferCancelled | aiocomm.LinkError)
        simulator.heal()
        gate.open()
        stream.close()


async def test_a_stream_that_fails_while_it_is_waited_for(simulator: Simulator) -> None:
    """Nothing of the device's is under way that would tell."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        stream, source = Stream(0), DeviceArray(NBYTES, device=0)
        simulator.pause(0, Engine.LOCAL)
        stream.fill(source, 1)
        sent, received = a.send(source, 1, stream=stream), b.recv(DeviceArray(NBYTES, device=1), 0)
        await outcomes(lambda: a.send(b"x", 1, tag=1), lambda: b.recv(bytearray(1), 0, tag=1))
        simulator.fail("@engine", ILLEGAL_ADDRESS)
        simulator.resume(0, Engine.LOCAL)
        ended = await outcomes(lambda: sent, lambda: received)
        assert isinstance(ended[0], aiocomm.LinkError)
        assert ended[0].code == ILLEGAL_ADDRESS
        assert isinstance(ended[1], aiocomm.LinkError | aiocomm.PeerError)
        simulator.heal()
        stream.close()


@ONE_LOOP
@pytest.mark.parametrize("end", ["sent", "received"])
async def test_a_stream_of_either_end_that_fails_is_told_there(simulator: Simulator, end: str) -> None:
    """Bulk that the sender's engine would write, whose device is well."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        device = 0 if end == "sent" else 1
        stream, source, into = Stream(device), DeviceArray(NBYTES), DeviceArray(NBYTES, device=1)
        simulator.pause(device, Engine.LOCAL)
        stream.fill(into if device else source, 1)
        streams = [None, None]
        streams[device] = stream
        received, sent = b.recv(into, 0, stream=streams[1]), a.send(source, 1, stream=streams[0])
        await outcomes(lambda: a.send(b"x", 1, tag=1), lambda: b.recv(bytearray(1), 0, tag=1))
        simulator.fail("@engine", ILLEGAL_ADDRESS)
        simulator.resume(device, Engine.LOCAL)
        ended = await outcomes(lambda: sent, lambda: received)
        own, other = ended if end == "sent" else reversed(ended)
        assert isinstance(own, aiocomm.LinkError)
        assert own.code == ILLEGAL_ADDRESS
        assert isinstance(other, aiocomm.LinkError | aiocomm.PeerError)
        simulator.heal()
        stream.close()


@ONE_LOOP
async def test_host_memory_that_could_not_be_pinned_is_tried_again(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, b):
        source, into = DeviceArray(NBYTES), np.zeros(NBYTES, np.uint8)

        async def again() -> None:
            assert await outcomes(lambda: a.send(source, 1), lambda: b.recv(into, 0)) == [None, None]

        await one_way(lambda: a.send(source.part(0, 100), 1), lambda: b.recv(into, 0))  # the device has begun
        before = simulator.held("registered")
        for call in ("cuMemHostRegister", "cuMemHostAlloc"):
            simulator.fail(call, OUT_OF_MEMORY, forever=True)
        await again()
        assert simulator.held("registered") == before
        simulator.heal()
        while simulator.held("registered") == before:
            await again()


# ---------------------------------------------------------------- between processes


@ONE_LOOP
@pytest.mark.parametrize("kind", [Kind.MALLOC, Kind.VMM, Kind.POOL])
async def test_what_was_refused_once_is_tried_again(simulator: Simulator, kind: Kind) -> None:
    """Opening the other's memory, and memory of the receiver's that the sender can write."""
    call = {Kind.MALLOC: "cuIpcOpenMemHandle", Kind.VMM: "cuMemImportFromShareableHandle"}.get(
        kind, "cuMemAlloc"
    )

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Simulator

        array, more = DeviceArray(NBYTES, device=1, kind=kind), bytearray(1)
        if kind is Kind.POOL:
            Simulator(driver().library).fail(call, OUT_OF_MEMORY)
        await comm.recv(more, 0, tag=1)
        while more[0]:
            await comm.recv(array, 0)
            await comm.recv(more, 0, tag=1)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        source, cuda = DeviceArray(NBYTES, kind=kind), comm.links["cuda"]
        if kind is not Kind.POOL:
            simulator.fail(call, OUT_OF_MEMORY)
        while not cuda.statistics().messages_by_path["device"]:
            await comm.send(b"\1", 1, tag=1)
            await comm.send(source, 1)
        await comm.send(b"\0", 1, tag=1)


@ONE_LOOP
async def test_what_is_always_refused_is_rarely_tried(simulator: Simulator) -> None:
    turns = 50

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        array = DeviceArray(NBYTES, device=1)
        for _ in range(turns):
            await comm.recv(array, 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        simulator.fail("cuIpcOpenMemHandle", OUT_OF_MEMORY, forever=True)
        source, before = DeviceArray(NBYTES), simulator.calls("cuIpcOpenMemHandle")
        for _ in range(turns):
            await comm.send(source, 1)
        # After 0.1 s, and then twice as long each time: one more comes after a minute.
        assert simulator.calls("cuIpcOpenMemHandle") - before <= 10
        assert comm.links["cuda"].statistics().fallbacks == turns


async def test_memory_that_is_still_mapped_as_what_was_there_before(simulator: Simulator) -> None:
    """What its owner has freed is closed a moment later; until then the driver maps nothing else there."""

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        array = DeviceArray(NBYTES, device=1)
        await comm.recv(array, 0)
        await comm.send(array.numpy(), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        simulator.fail("cuIpcOpenMemHandle", 208)
        calls = simulator.calls("cuIpcOpenMemHandle")
        data = random(NBYTES)
        source, into = DeviceArray(NBYTES, device=0).write(data), np.empty_like(data)
        assert await outcomes(lambda: comm.send(source, 1), lambda: comm.recv(into, 1)) == [None, None]
        assert (into == data).all()
        assert simulator.calls("cuIpcOpenMemHandle") == calls + 2
        assert comm.links["cuda"].statistics().fallbacks == 0


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_given_up_where_a_sender_cannot_write_after_all(simulator: Simulator, who: str) -> None:
    """The receiver has answered with the place of its memory, which the sender cannot map after all."""

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        array = DeviceArray(NBYTES, device=1)
        receiving = comm.recv(array, 0)
        await comm.recv(bytearray(1), 0, tag=1)
        if who == "receiver":
            receiving.cancel()
        await comm.send(b"x", 0, tag=2)
        with pytest.raises((aiocomm.TransferCancelled, anyio.get_cancelled_exc_class())):
            await receiving
        await comm.send(b"x", 0, tag=3)
        await comm.recv(array, 0)
        await comm.send(array.numpy(), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        events = comm.events()
        simulator.fail("cuIpcOpenMemHandle", 208, forever=True)
        simulator.pause(0, Engine.TO_HOST)
        data = random(NBYTES)
        source = DeviceArray(NBYTES, device=0).write(data)
        sent = comm.send(source, 1)
        await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
        if who == "sender":
            sent.cancel()
        await comm.send(b"x", 1, tag=1)
        await comm.recv(bytearray(1), 1, tag=2)
        simulator.resume(0, Engine.TO_HOST)
        with anyio.fail_after(LIMIT_S):
            await comm.recv(bytearray(1), 1, tag=3)
        assert sent.cancelled() or isinstance(sent.exception(), aiocomm.TransferCancelled)
        into = np.empty_like(data)
        assert await outcomes(lambda: comm.send(source, 1), lambda: comm.recv(into, 1)) == [None, None]
        assert (into == data).all()
        simulator.heal()
    lost = [event.reason async for event in events if isinstance(event, aiocomm.PeerLost)]
    assert lost == ["left"]


@pytest.mark.parametrize("links", [("tcp", "cuda"), ("shm", "cuda")])
@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_what_follows_a_message_that_its_device_has_not_brought(
    simulator: Simulator, who: str, links: tuple[str, ...]
) -> None:
    """Goes on once that is given up: a message of host memory, of which nothing else tells."""
    nbytes = 3 << 20
    async with world(2, links=links) as (a, b):
        source = DeviceArray(nbytes, device=0)
        into = np.zeros(nbytes, np.uint8)
        await one_way(lambda: a.send(source, 1), lambda: b.recv(into, 0))
        simulator.pause(0, Engine.TO_HOST)
        sent, received = a.send(source, 1, tag=1), b.recv(into, 0, tag=1)
        await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.TO_HOST)
        data = random(nbytes)
        following = a.send(data, 1, tag=2)
        also = b.recv(got := np.zeros(nbytes, np.uint8), 0, tag=2)
        await b.send(b"x", 0)  # and what is above has come to the other side
        await a.recv(bytearray(1), 1)
        (sent if who == "sender" else received).cancel()
        with anyio.fail_after(LIMIT_S):
            await also
            await following
        assert (got == data).all()
        simulator.resume(0, Engine.TO_HOST)
        with anyio.fail_after(LIMIT_S):
            await until(lambda: sent.done() and received.done())


async def test_a_peer_killed_in_the_middle_of_a_copy(simulator: Simulator) -> None:
    """This process's engine is halfway into a copy to or from memory of a process that dies."""

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        array = DeviceArray(NBYTES, device=1)
        while True:
            await comm.recv(array, 0)

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            data = random(NBYTES)
            source = DeviceArray(NBYTES, device=0).write(data)
            await comm.send(source, 1)  # what is to be mapped is
            simulator.stop_halfway(0, Engine.PEER)
            executed = simulator.executed(0, Engine.PEER)
            sent = comm.send(source, 1)
            try:
                await anyio.to_thread.run_sync(simulator.wait_ready, 0, Engine.PEER)
                events = comm.events()
                os.kill(comm.peers[0].pid, signal.SIGKILL)
                await the_first(events, aiocomm.PeerLost)
                assert not sent.done()  # the engine still has the buffer
            finally:
                simulator.resume(0, Engine.PEER)
            with pytest.raises(aiocomm.PeerLostError):
                await sent
            await anyio.to_thread.run_sync(simulator.wait_executed, 0, Engine.PEER, executed + 1)
            # The context is as good as before.
            into = DeviceArray(NBYTES, device=1)
            assert await outcomes(lambda: comm.send(source, 0), lambda: comm.recv(into, 0)) == [None, None]
            assert (into.numpy() == data).all()


@pytest.mark.parametrize("memory", ["gpu", "shared"])
async def test_a_peer_killed_while_its_engine_writes_ours(simulator: Simulator, memory: str) -> None:
    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Engine, Simulator

        engine = Engine.PEER if memory == "gpu" else Engine.TO_HOST
        array, directly = DeviceArray(NBYTES, device=1), 0
        while not directly:
            await comm.send(array, 0)
            directly = comm.links["cuda"].statistics().messages_by_path["device"]
            await comm.send(bytes([directly]), 0, tag=2)
        simulator = Simulator(driver().library)
        for device in (0, 1):
            simulator.stop_halfway(device, engine)
        sending = comm.send(array, 0)
        await anyio.to_thread.run_sync(simulator.wait_ready, 1, engine)
        await comm.send(b"halfway", 0, tag=1)
        await sending

    with pytest.raises(aiocomm.AiocommError):  # noqa: PT012 - as above
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            into: Any = DeviceArray(NBYTES) if memory == "gpu" else aiocomm.empty(NBYTES, np.uint8)
            directly = bytearray(1)
            while not directly[0]:
                await comm.recv(into, 1)
                await comm.recv(directly, 1, tag=2)
            received = comm.recv(into, 1)
            await comm.recv(bytearray(7), 1, tag=1)
            os.kill(comm.peers[0].pid, signal.SIGKILL)
            with pytest.raises(aiocomm.PeerLostError):
                await received
            data = random(NBYTES)
            source = DeviceArray(NBYTES, device=1).write(data)
            assert await outcomes(lambda: comm.send(source, 0), lambda: comm.recv(into, 0)) == [None, None]
            assert ((into.numpy() if memory == "gpu" else into) == data).all()


async def test_a_peers_memory_that_cannot_be_opened_is_staged_and_told(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        array = DeviceArray(NBYTES, device=1)
        await comm.recv(array, 0)
        await comm.send(array, 0)

    with monkeypatch.context() as child:
        child.setenv("FAKE_CUDA_FAIL", "cuIpcOpenMemHandle:1+:801")
        simulator.fail("cuIpcOpenMemHandle", 801, forever=True)
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            events = comm.events()
            data = random(NBYTES)
            source, into = DeviceArray(NBYTES).write(data), DeviceArray(NBYTES)
            await comm.send(source, 1)
            await comm.recv(into, 1)
            assert (into.numpy() == data).all()
            event = await the_first(events, aiocomm.Fallback)
            assert "801" in event.reason
            assert "--ipc=host" in event.reason
    simulator.heal()


@ONE_LOOP
async def test_failing_calls_between_processes(simulator: Simulator) -> None:
    """What one process is refused, at either end and for either kind of memory, goes another way."""
    calls = [
        "cuIpcGetMemHandle",
        "cuIpcOpenMemHandle",
        "cuMemAlloc",
        "cuPointerGetAttribute",
        "cuMemHostAlloc",
    ]
    turns = [(call, kind, end) for call in calls for kind in (Kind.MALLOC, Kind.VMM) for end in (0, 1)]

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Simulator

        simulator = Simulator(driver().library)
        for call, kind, end in turns:
            array = DeviceArray(NBYTES, device=1, kind=kind)
            if end == 1:
                simulator.fail(call, 999)
            await comm.recv(array, 0)
            simulator.heal()
            await comm.send(array.numpy(), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        for index, (call, kind, end) in enumerate(turns):
            data = random(NBYTES, index)
            source, back = DeviceArray(NBYTES, kind=kind).write(data), np.zeros(NBYTES, np.uint8)
            if end == 0:
                simulator.fail(call, UNKNOWN)
            await comm.send(source, 1)
            simulator.heal()
            await comm.recv(back, 1)
            assert (back == data).all(), turns[index]


@ONE_LOOP
@pytest.mark.parametrize("cma", ["allow", "off"])
async def test_memory_in_blocks_moves_directly_where_descriptors_may_be_taken(
    simulator: Simulator, cma: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VMM, as torch's expandable segments are; an address that comes back means what it means then."""
    times, exported = 30, simulator.calls("cuMemExportToShareableHandle")
    monkeypatch.setenv("AIOCOMM_CMA", cma)

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray
        from harness import held

        before: dict[str, int] = {}
        for turn in range(times):
            into = DeviceArray(5 << 20, device=1, kind=Kind.VMM)
            await comm.recv(into, 0)
            await comm.send(into.numpy(), 0)
            into.close()
            if turn == times // 2:
                before = held()
        after = held()
        assert after["descriptors"] <= before["descriptors"] + 8, (before, after)
        await comm.recv(bytearray(1), 0)  # what is mapped of ours goes as we leave, in any case

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        back, addresses = np.zeros(5 << 20, np.uint8), set()
        for turn in range(times):
            data = random(5 << 20, turn)
            source = DeviceArray(5 << 20, kind=Kind.VMM).write(data)
            addresses.add(source.address)
            await comm.send(source, 1)
            await comm.recv(back, 1)
            assert (back == data).all(), turn
            source.close()
        assert len(addresses) < times
        statistics = comm.links["cuda"].statistics()
        assert statistics.messages_by_path["device"] == times
        if cma == "allow":
            assert statistics.fallbacks == 0
            # What is mapped of the other's: at most the last few, once it is known what was freed.
            await until(lambda: simulator.held("mappings") <= 3 * 4)
        else:
            assert simulator.calls("cuMemExportToShareableHandle") == exported
        await comm.send(b"x", 1)


@ONE_LOOP
async def test_parts_that_share_blocks_are_exported_and_mapped_once(simulator: Simulator) -> None:
    """Tensors of one expandable segment lie in blocks that they share with their neighbours."""
    nbytes, turns, mib = 8 << 20, 10, 1 << 20
    parts = [(0, 3 * mib), (mib, 4 * mib), (3 * mib, 3 * mib), (0, 8 * mib)]  # of four blocks

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        into = DeviceArray(nbytes, device=1, kind=Kind.VMM)
        for _ in range(turns):
            for start, size in parts:
                await comm.recv(into.part(start, size), 0)
                await comm.send(into.numpy()[start : start + size], 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        data = random(nbytes)
        source = DeviceArray(nbytes, kind=Kind.VMM).write(data)
        names = ("cuMemExportToShareableHandle", "cuMemImportFromShareableHandle", "cuMemMap")
        before = [simulator.calls(name) for name in names]
        for _ in range(turns):
            for start, size in parts:
                await comm.send(source.part(start, size), 1)
                await comm.recv(back := np.zeros(size, np.uint8), 1)
                assert np.array_equal(back, data[start : start + size])
        assert comm.links["cuda"].statistics().fallbacks == 0
        exported, imported, mapped = (
            simulator.calls(name) - calls for name, calls in zip(names, before, strict=True)
        )
        assert exported == 4
        assert imported == mapped == 2 + 3 + 4  # the third part's two blocks are of the second's


@ONE_LOOP
async def test_blocks_that_are_exported_no_more_are_mapped_no_more(simulator: Simulator) -> None:
    """Of 512 descriptors, what is given up for others: peers let go of it as if it were freed."""
    nbytes, arrays, block = 120 << 20, 3, 2 << 20

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        kept = [DeviceArray(nbytes, device=1, kind=Kind.VMM) for _ in range(arrays)]
        for array in kept:
            for start in range(block, nbytes, block):
                await comm.send(array.part(start, 1), 0)
                await comm.send(array.part(start - 1, 2), 0)
        await comm.recv(bytearray(1), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        into, turns = [DeviceArray(1), DeviceArray(2)], arrays * (nbytes // block - 1)
        before = simulator.held("mappings")
        for _ in range(turns):
            for array in into:
                await comm.recv(array, 1)
        assert comm.links["cuda"].statistics().fallbacks == 0
        await until(lambda: simulator.held("mappings") - before < (1 + 2) * turns)
        await comm.send(b"x", 1)


async def test_memory_freed_behind_the_back_of_a_transfer(simulator: Simulator) -> None:
    """An array keeps its memory as long as it is referred to; who frees by hand gets an error."""

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        await comm.recv(bytearray(1), 0, tag=1)  # the announcement is there, and its memory is gone
        try:
            await comm.recv(DeviceArray(NBYTES, device=1), 0, deadline=5.0)
        except aiocomm.AiocommError as error:
            await comm.send(type(error).__name__.encode().ljust(20), 0)
        else:
            await comm.send(b"received".ljust(20), 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        source, said = DeviceArray(NBYTES), bytearray(20)
        sent = comm.send(source, 1, deadline=5.0)
        source.close()
        await comm.send(b"x", 1, tag=1)
        ended = await outcomes(lambda: sent, lambda: comm.recv(said, 1))
        assert isinstance(ended[0], aiocomm.AiocommError)
        assert ended[1] is None
        assert said.strip() != b"received"


async def test_a_stream_that_was_destroyed(simulator: Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, _):
        stream = Stream()
        handle = stream.handle
        stream.close()
        with pytest.raises(aiocomm.UsageError, match="not a stream of this process"):
            a.send(DeviceArray(16), 1, stream=handle)


async def test_the_legacy_stream_while_a_stream_is_captured_that_waits_for_it(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as (a, _):
        array, capturing = DeviceArray(16), Stream(blocking=True)
        capturing.begin_capture()
        try:
            with pytest.raises(aiocomm.UsageError, match="captured"):
                a.send(array, 1, stream=0)
        finally:
            capturing.end_capture()
            capturing.close()


@ONE_LOOP
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "times"), [(Kind.MALLOC, 1000), (Kind.VMM, 200)])
async def test_an_address_that_is_freed_and_allocated_anew_many_times(
    gpu: Driver, kind: Kind, times: int
) -> None:
    nbytes = 70_000

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        into = DeviceArray(nbytes, device=1)
        for turn in range(times):
            await comm.recv(into, 0)
            assert set(into.numpy().tolist()) == {turn % 251}, turn
        await comm.send(b"all right", 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        addresses = set()
        for turn in range(times):
            source = DeviceArray(nbytes, kind=kind).write(np.full(nbytes, turn % 251, np.uint8))
            addresses.add(source.address)
            await comm.send(source, 1)
            source.close()
        assert len(addresses) < 10  # they do come back
        answer = bytearray(9)
        await comm.recv(answer, 1)
        assert answer == b"all right"


@ONE_LOOP
@pytest.mark.parametrize("kind", [Kind.MALLOC, Kind.VMM])
async def test_what_its_owner_has_freed_is_mapped_no_more(simulator: Simulator, kind: Kind) -> None:
    """Else the memory would not come back while the peer lives."""
    turns, nbytes = 5, 70_000

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Simulator
        from harness import until

        simulator, into = Simulator(driver().library), DeviceArray(nbytes, device=1)
        mapped = "mappings" if kind == "vmm" else "imports"
        before = simulator.held(mapped)
        for _ in range(turns):
            await comm.recv(into, 0)
            assert simulator.held(mapped) == before + 1
            await comm.send(b"have it", 0)
            await until(lambda: simulator.held(mapped) == before)
            await comm.send(b"let go", 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        for _ in range(turns):
            source = DeviceArray(nbytes, kind=kind)
            await comm.send(source, 1)
            await comm.recv(bytearray(7), 1)
            source.close()
            await comm.recv(bytearray(6), 1)


async def test_loops_that_are_woken_before_a_copy_ends(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines with cores to spare, where the copy thread spins and wakes them."""
    monkeypatch.setenv("AIOCOMM_GPU_SPIN_S", "200e-6")
    sizes = [64 << 10, 3 << 20, 33 << 20]

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        arrays = [DeviceArray(nbytes, device=1) for nbytes in sizes]
        for turn in range(24):
            await comm.recv(arrays[turn % 3], 0)
            await comm.send(arrays[turn % 3], 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        for turn in range(24):
            data = random(sizes[turn % 3], turn)
            source, into = DeviceArray(data.nbytes).write(data), DeviceArray(data.nbytes)
            await comm.send(source, 1)
            await comm.recv(into, 1)
            assert np.array_equal(into.numpy(), data)


@pytest.mark.timeout(600)
def test_a_hundred_thousand_transfers_over_a_thousand_buffers(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a coroutine, since it takes longer than one may; the same native code serves every loop."""
    buffers, transfers, window, mappings = 1000, 100_000, 200, 200
    monkeypatch.setenv("AIOCOMM_GPU_MAPPINGS", str(mappings))

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Simulator
        from harness import held_at_rest, until

        simulator = Simulator(driver().library)
        arrays = [DeviceArray(4096, device=1) for _ in range(buffers)]
        before: dict[str, int] = {}
        for start in range(0, transfers, window):
            turn = [comm.recv(arrays[index % buffers], 0) for index in range(start, start + window)]
            for transfer in turn:
                await transfer
            if start == transfers // 10:
                before = await held_at_rest()
        after = await held_at_rest()
        assert after == before, (before, after)
        await until(lambda: simulator.held("imports") <= mappings)
        assert simulator.held("allocations") == buffers
        await comm.send(b"x", 0)

    async def main() -> None:
        async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
            arrays = [DeviceArray(4096).write(np.full(4096, index % 256)) for index in range(buffers)]
            pinned = 0
            for start in range(0, transfers, window):
                turn = [comm.send(arrays[index % buffers], 1) for index in range(start, start + window)]
                for transfer in turn:
                    await transfer
                if start == transfers // 10:
                    pinned = simulator.held("pinned")
            await until(lambda: simulator.held("imports") <= mappings)
            assert simulator.held("pinned") == pinned
            await comm.recv(bytearray(1), 1)

    def kept() -> dict[str, int]:
        gc.collect()  # a communicator's devices go with it
        assert _core.given_back(LIMIT_S)
        return {kind: simulator.held(kind) for kind in ("imports", "streams", "pinned", "references")}

    before = kept()
    anyio.run(main)
    assert kept() == before


@ONE_LOOP
async def test_random_parts_arrive_byte_for_byte(gpu: Driver) -> None:
    cases = []
    generator = np.random.default_rng(7)
    for _ in range(60):
        nbytes = int(generator.integers(1, 1 << int(generator.integers(1, 23))))
        kinds = [Kind.MALLOC, Kind.VMM, Kind.POOL, None]  # None: host memory
        cases.append(
            (
                nbytes,
                int(generator.integers(0, 5000)),
                int(generator.integers(0, 5000)),
                kinds[generator.integers(4)],
                kinds[generator.integers(4)],
            )
        )

    async def worker(comm: aiocomm.Communicator) -> None:
        from fakes.gpu import DeviceArray

        for nbytes, _, offset, _, kind in cases:
            # A byte on each side shows what is written beyond.
            room = np.full(nbytes + 2, 0xEE, np.uint8)
            if kind is None:
                await comm.recv(room[1:-1], 0)
                back = room
            else:
                whole = DeviceArray(nbytes + 2, device=1, kind=kind, offset=offset).write(room)
                await comm.recv(whole.part(1, nbytes), 0)
                back = whole.numpy()
                whole.close()
            await comm.send(back, 0)

    async with aiocomm.spawn(worker, n=1, links=LINKS) as comm:
        for index, (nbytes, offset, _, kind, _) in enumerate(cases):
            data = random(nbytes, index)
            source = data if kind is None else DeviceArray(nbytes, kind=kind, offset=offset).write(data)
            await comm.send(source, 1)
            back = np.zeros(nbytes + 2, np.uint8)
            await comm.recv(back, 1)
            assert back[0] == back[-1] == 0xEE, cases[index]
            assert np.array_equal(back[1:-1], data), cases[index]


async def test_a_capture_elsewhere_in_the_process_is_not_broken(gpu: Driver) -> None:
    """Transfers go on while a thread captures a graph in global mode, torch's default."""
    async with world(2, links=LINKS, warmup=True) as (a, b):
        data = random(NBYTES)
        source, host = DeviceArray(NBYTES).write(data), np.zeros(NBYTES, np.uint8)
        into, capturing = DeviceArray(NBYTES, device=1), Stream(min(2, gpu.count - 1))
        calls = [lambda: a.send(source, 1), lambda: b.recv(into, 0)]
        gc.collect()  # arrays of earlier tests, whose end on this thread would break the capture
        capturing.begin_capture(0)
        ended = await outcomes(*calls)
        staged = await outcomes(lambda: a.send(source, 1), lambda: b.recv(host, 0))
        assert capturing.end_capture() == 0
        assert ended == staged == [None, None]
        assert (host == data).all()
        assert (into.numpy() == data).all()
        capturing.close()


async def test_nothing_is_left_when_a_world_ends(simulator: Simulator) -> None:
    kinds = ("streams", "events", "imports", "pinned", "registered", "references", "contexts")

    async def one() -> None:
        async with world(2, links=LINKS, warmup=True) as (a, b):
            assert await exchange(a, b, 1) == [None] * 6
        del a, b
        gc.collect()

    def held() -> dict[str, int]:
        return {kind: simulator.held(kind) for kind in kinds}

    await one()  # garbage of earlier tests is gone
    before = held()
    for _ in range(3):
        await one()
    # A thread gives back, which may be at it.
    await until(lambda: all(now <= before[kind] for kind, now in held().items()))
