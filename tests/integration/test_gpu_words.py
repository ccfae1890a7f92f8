"""GPU collectives whose ranks give each other their word: words that never come, and what stays behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Stream, driver
from gpu_gathers import LINKS, block, gather_all, gathered, on_gpu
from harness import LIMIT_S, all_call, until, world

import aiocomm
from aiocomm.collectives import device_shared

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each other, however slow the machine is."""
    monkeypatch.setattr(device_shared, "STAYS_S", 20.0)


def arenas() -> int:
    """How many are mapped here: also copy threads that wait for a word in one keep it."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:aiocomm-arena")


def forget_arena(comm: aiocomm.Communicator) -> None:
    """Have nothing keep a rank's arena but what is still under way there."""
    scope = comm._members()._scope(None)
    scope.repeats.clear()
    scope.shared.clear()
    scope.prepared.clear()
    scope.place = None


def under_way(scope: Any) -> list[Any]:
    """A rank's calls that have met all others, and whose own part has not ended."""
    return [c for c in scope.calls.values() if c._flying and c._result == device_shared.GOING_ON]


async def given_word(comm: aiocomm.Communicator) -> None:
    """Return once a rank's own part of a call is under way."""
    await until(lambda: under_way(comm._members()._scope(None)))


async def test_arrays_of_another_shape(gpu: Driver) -> None:
    """Of as many elements: the same call goes on for them."""
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn, shape in enumerate([(600,)] * 3 + [(20, 30)] * 3 + [(600,)]):
                x = on_gpu(comm.rank, block(comm.rank, turn, 600).reshape(shape))
                out = on_gpu(comm.rank, np.zeros((2, *shape), "u1"))
                await comm.all_gather(out, x)
                assert np.array_equal(out.numpy().reshape(-1), gathered(2, turn, 600))

        await all_call(comms, call)


@pytest.mark.parametrize("first", ["direct", "ring"])
async def test_with_an_algorithm_and_without(gpu: Driver, first: str) -> None:
    """They are two calls, though of the same arrays."""
    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn, algorithm in enumerate([first] * 3 + [None] * 3 + [first]):
                await gather_all(comm, turn, 3000, algorithm=algorithm)

        await all_call(comms, call)


@pytest.mark.usefixtures("images")
async def test_a_reduction_with_two_options(gpu: Driver) -> None:
    """What is found by one of them is not taken for the other's."""
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn, algorithm in enumerate([None] * 3 + ["ring"] * 3):
                x = on_gpu(comm.rank, np.full(5000, comm.rank + turn, "f4"))
                await comm.all_reduce(x, algorithm=algorithm, sm_budget=4)
                assert np.array_equal(x.numpy(), np.full(5000, 2 * turn + 1, "f4"))

        await all_call(comms, call)
        assert dict(comms[0].statistics().collectives)["all_reduce/ring"] == 3


@pytest.mark.parametrize("operation", ["all_gather", "broadcast", "all_reduce"])
@pytest.mark.usefixtures("images")
async def test_who_is_cancelled_before_its_word(gpu: Driver, operation: str) -> None:
    """All know its place by then. The others' copy threads wait for its word no longer, and keep nothing."""
    count = 5000

    async def once(comm: aiocomm.Communicator, arrays: Any, stream: Any = None) -> None:
        x, out = arrays
        if operation == "all_gather":
            await comm.all_gather(out, x, stream=stream)
        elif operation == "broadcast":
            await comm.broadcast(out, root=0, stream=stream)
        else:
            await comm.all_reduce(x, stream=stream)

    def made(comm: aiocomm.Communicator) -> Any:
        return on_gpu(comm.rank, np.ones(count, "f4")), on_gpu(comm.rank, np.zeros(3 * count, "f4"))

    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for _ in range(2):
                await once(comm, made(comm))

        before = arenas()
        stream = Stream(2 % driver().count)
        await all_call(comms, call)
        assert arenas() == before + 3
        scope, kept = anyio.CancelScope(), []
        gate = stream.gate()

        async def last(comm: aiocomm.Communicator) -> None:
            arrays = made(comm)
            kept.extend(weakref.ref(array) for array in arrays)
            if comm.rank == 2:
                with scope:
                    await once(comm, arrays, stream)
                return
            with pytest.raises(aiocomm.TransferCancelled, match="rank 2"):
                await once(comm, arrays)

        async def cancel() -> None:
            for comm in comms:
                await given_word(comm)
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            for comm in comms:
                tasks.start_soon(last, comm)
            tasks.start_soon(cancel)
        assert scope.cancelled_caught
        gc.collect()
        assert not [ref for ref in kept if ref() is not None]
        for comm in comms:
            forget_arena(comm)
        await until(lambda: arenas() == before)
        gate.open()
        stream.close()
        groups: dict[int, Any] = {}

        async def go_on(comm: aiocomm.Communicator) -> None:
            groups[comm.rank] = await comm.shrink()
            for _ in range(3):
                await once(groups[comm.rank], made(comm))

        await all_call(comms, go_on)
        assert [group.size for group in groups.values()] == [3] * 3


@pytest.mark.parametrize("operation", ["all_gather", "broadcast"])
async def test_who_is_killed_before_its_word(gpu: Driver, anyio_backend_name: str, operation: str) -> None:
    """The others hear of it, keep nothing, and go on without it."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    over = []

    async def work(comm: aiocomm.Communicator) -> None:
        import gc
        import weakref

        import numpy as np
        from fakes.gpu import DeviceArray, Stream, driver
        from harness import until
        from integration.test_gpu_words import arenas, forget_arena, given_word

        from aiocomm.collectives import device_shared

        device_shared.STAYS_S = 100.0  # processes come one after another, where many share the GPUs
        device = comm.rank % driver().count

        def made(size: int) -> tuple[Any, Any]:
            x, out = (DeviceArray(n, np.uint8, device=device) for n in (5000, 5000 * size))
            return x, out

        async def once(on: Any, arrays: tuple[Any, Any], **how: Any) -> None:
            x, out = arrays
            if operation == "all_gather":
                await on.all_gather(out, x, **how)
            else:
                await on.broadcast(x, **how)

        async def die() -> None:
            await given_word(comm)
            for other in (0, 1):  # theirs is under way, too
                await comm.recv(bytearray(1), other)
            os.kill(os.getpid(), signal.SIGKILL)

        async def tell() -> None:
            await given_word(comm)
            await comm.send(b"x", 2)

        async def lose() -> None:
            arrays = made(3)
            kept.extend(map(weakref.ref, arrays))
            with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone") as lost:
                await once(comm, arrays)
            assert lost.value.peer == 2

        before = arenas()
        earlier = [made(3) for _ in range(3)]  # freed behind the gate, they would hold up who has to go on
        for arrays in earlier:
            await once(comm, arrays)
        kept: list[Any] = []
        if comm.rank == 2:
            stream = Stream(device)
            stream.gate()  # so that it never says that its arrays may be written
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(die)
                await once(comm, made(3), stream=stream)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tell)
            await lose()
        gc.collect()
        assert not [ref for ref in kept if ref() is not None]
        forget_arena(comm)
        await until(lambda: arenas() == before)
        rest = await comm.shrink(deadline=LIMIT_S)
        for _ in range(3):
            await once(rest, made(2))

    with pytest.raises(aiocomm.AiocommError, match="rank 2"):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(work, n=2, links=LINKS) as comm:
            await work(comm)
            over.append(comm.rank)
    assert over == [0]


async def test_a_lost_device_gives_no_word_for_others(gpu: Driver, simulator: simulated.Simulator) -> None:
    """Who waits for a word, and waits in vain, does not tell a third one that it was given."""
    if driver().count < 3:
        pytest.skip("needs a device for each rank")
    async with world(3, links=LINKS, warmup=True) as comms:
        await all_call(comms, lambda comm: gather_all(comm, 0, 3000))
        await all_call(comms, lambda comm: gather_all(comm, 1, 3000))
        outs = [on_gpu(rank, np.zeros(9000, "u1")) for rank in range(3)]
        arrays = [on_gpu(rank, block(rank, 2, 3000)) for rank in range(3)]
        stream, lost = Stream(1), DeviceArray(100_000, device=0)
        gate = stream.gate()
        errors: list[BaseException] = []

        async def call(comm: aiocomm.Communicator) -> None:
            try:
                how = {"stream": stream} if comm.rank == 1 else {}
                await comm.all_gather(outs[comm.rank], arrays[comm.rank], **how)
            except aiocomm.AiocommError as error:
                errors.append(error)
                gate.open()

        async def lose() -> None:
            for comm in comms:
                await given_word(comm)
            copied = simulator.executed(2, simulated.Engine.PEER)
            simulator.pause(0, simulated.Engine.TO_HOST)
            sent, received = comms[0].send(lost, 1), comms[1].recv(bytearray(lost.nbytes), 0)
            await anyio.to_thread.run_sync(simulator.wait_ready, 0, simulated.Engine.TO_HOST)
            simulator.lose(0)
            with contextlib.suppress(aiocomm.AiocommError):
                await sent
            await until(lambda: errors)
            assert simulator.executed(2, simulated.Engine.PEER) == copied
            with contextlib.suppress(aiocomm.AiocommError):
                await received

        async with anyio.create_task_group() as tasks:
            for comm in comms:
                tasks.start_soon(call, comm)
            tasks.start_soon(lose)
        assert len(errors) == 3
        simulator.heal()
        stream.close()


async def test_arrays_are_let_go_where_ranks_do_not_reach_each_other(
    gpu: Driver, anyio_backend_name: str
) -> None:
    """They find that in the middle of the call, make it by messages, and keep no array."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    if simulated.choose() is None:
        pytest.skip("needs a driver that refuses to map")

    async def work(comm: aiocomm.Communicator) -> None:
        import gc
        import weakref

        import numpy as np
        from fakes.gpu import DeviceArray, driver
        from fakes.simulated import Simulator

        from aiocomm.collectives import device_shared

        device_shared.STAYS_S = 20.0
        device = comm.rank % driver().count
        await comm.barrier()
        if comm.rank == 1:
            Simulator(driver().library).fail("cuIpcOpenMemHandle", 1, forever=True)
        await comm.barrier()
        kept: list[Any] = []

        async def once() -> None:
            x, out = (DeviceArray(n, np.uint8, device=device) for n in (5000, 10000))
            kept.extend((weakref.ref(x), weakref.ref(out)))
            await comm.all_gather(out, x)

        for _ in range(3):
            await once()
        assert "all_gather/pushed" not in comm.statistics().collectives
        gc.collect()
        assert not [ref for ref in kept if ref() is not None]

    async with aiocomm.spawn(work, n=1, links=LINKS) as comm:
        await work(comm)


async def test_who_gives_up_before_it_knows_the_arena_keeps_no_array(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        await all_call(comms, lambda comm: gather_all(comm, 0, 3000))
        comm = comms[1]
        (shared,) = comm._members()._scope(None).shared.values()
        shared.place.expected = True  # as where rank 0 has other things to do
        x, out = on_gpu(1, np.zeros(3000, "u1")), on_gpu(1, np.zeros(6000, "u1"))
        kept = weakref.ref(x)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(comm.all_gather, out, x)
                await until(lambda: comm._members()._scope(None).calls)
                scope.cancel()
        shared.place.expected = False
        del x, out
        await until(lambda: gc.collect() is None or kept() is None)


async def test_calls_of_two_channels_at_the_same_time(gpu: Driver, simulator: simulated.Simulator) -> None:
    """Their copies go by streams of their own, each of which tells of its own only."""
    async with world(2, links=LINKS, warmup=True) as comms:
        outs = [[on_gpu(rank, np.zeros(6000, "u1")) for rank in range(2)] for _ in range(2)]
        arrays = [[on_gpu(rank, block(rank, which, 3000)) for rank in range(2)] for which in range(2)]
        urgent = [comm.channel("urgent", priority=aiocomm.Priority.HIGH) for comm in comms]
        ended: list[tuple[int, int]] = []

        async def call(comm: aiocomm.Communicator, which: int) -> None:
            rank = comm.rank
            channel = urgent[rank] if which else None
            await comm.all_gather(outs[which][rank], arrays[which][rank], channel=channel)
            ended.append((which, rank))

        for which in (0, 1, 0, 1):
            await all_call(comms, lambda comm, which=which: call(comm, which))  # type: ignore[misc]
        for out in (*outs[0], *outs[1]):
            out.write(np.zeros(6000, "u1"))
        ended.clear()
        other = on_gpu(0, np.ones(100_000, "u1"))
        simulator.hold("cuMemcpyAsync")
        sent, received = comms[0].send(other, 1, tag=3), comms[1].recv(bytearray(100_000), 0, tag=3)
        await anyio.to_thread.run_sync(simulator.wait_held)  # GPU 0's copy thread begins nothing meanwhile
        async with anyio.create_task_group() as tasks:
            for comm in comms:
                for which in (0, 1):
                    tasks.start_soon(call, comm, which)
            for channel in (None, urgent[0]):
                scope = comms[0]._members()._scope(channel)
                await until(lambda: under_way(scope))  # noqa: B023
            for channel in (None, urgent[1]):  # theirs may have ended, but not the calls
                scope = comms[1]._members()._scope(channel)
                await until(lambda: [c._result for c in scope.calls.values()] != [device_shared.OPEN])  # noqa: B023
            simulator.pause(0, simulated.Engine.PEER)
            assert simulator.let_go()
            await anyio.to_thread.run_sync(simulator.wait_ready, 0, simulated.Engine.PEER)
            for _ in range(5):
                receiving = comms[1].recv(bytearray(1), 0)
                await comms[0].send(b"x", 1)
                await receiving
            early = list(ended)
            simulator.resume(0, simulated.Engine.PEER)
        assert not early
        for which in (0, 1):
            for out in outs[which]:
                assert np.array_equal(out.numpy(), gathered(2, which, 3000))
        await received
        await sent
