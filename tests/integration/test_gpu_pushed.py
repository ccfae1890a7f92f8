"""Collectives of GPU arrays whose ranks write into each other's memory, and what can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import anyio
import numpy as np
import pytest
from fakes import simulated
from fakes.gpu import DeviceArray, Driver, Kind, driver
from gpu_gathers import LINKS, block, gather_all, gathered, on_gpu
from harness import LIMIT_S, all_call, given_up_halfway, messages_pass, until, world

import aiocomm
from aiocomm.collectives import device_shared

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each other, however slow the machine is."""
    monkeypatch.setattr(device_shared, "STAYS_S", 20.0)


def ways(comm: aiocomm.Communicator) -> dict[str, int]:
    return dict(comm.statistics().collectives)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("nbytes", [16 * MIB, 16 * MIB + 3])
async def test_a_chain_passes_chunks_on(gpu: Driver, size: int, nbytes: int) -> None:
    async with world(size, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn in range(3):
                x = on_gpu(comm.rank, block(comm.rank, turn, nbytes))
                await comm.broadcast(x, root=size - 1)
                assert np.array_equal(x.numpy(), block(size - 1, turn, nbytes))

        await all_call(comms, call)
        assert ways(comms[0]) == {"broadcast/chain": 1, "broadcast/pushed": 2}


@pytest.mark.parametrize("failing", ["", "cuEventCreate", "cuEventRecord"])
async def test_ends_of_chunks_are_told_aside(simulator: simulated.Simulator, failing: str) -> None:
    """By events, that they hold up none behind them; if the driver refuses these, by the stream itself."""
    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, block(comm.rank, 0, 16 * MIB))
            for _ in range(3):
                await comm.broadcast(x, root=0)
            assert np.array_equal(x.numpy(), block(0, 0, 16 * MIB))

        if failing:
            simulator.fail(failing, 801, forever=True)
        before = simulator.calls("cuEventQuery")
        await all_call(comms, call)
        assert (simulator.calls("cuEventQuery") > before) == (not failing)
        assert ways(comms[0]) == {"broadcast/chain": 1, "broadcast/pushed": 2}


async def test_on_an_urgent_channel(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            urgent = comm.channel("urgent", priority=aiocomm.Priority.HIGH)
            for turn in range(3):
                await gather_all(comm, turn, 3000, channel=urgent)
                await gather_all(comm, turn, 9 * MIB)

        await all_call(comms, call)
        assert ways(comms[0]) == {"all_gather/direct": 2, "all_gather/pushed": 4}


async def test_statistics_of_the_link(gpu: Driver) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            await gather_all(comm, 0, 5000)
            before = comm.links["cuda"].statistics()
            await gather_all(comm, 1, 5000)
            after = comm.links["cuda"].statistics()
            assert after.bytes_sent - before.bytes_sent == (5000 if gpu.count > 1 else 0)  # to another GPU
            assert after.completed - before.completed == 1

        await all_call(comms, call)


@pytest.mark.parametrize("kind", [Kind.VMM, Kind.POOL])
async def test_memory_that_others_cannot_map(gpu: Driver, kind: Kind) -> None:
    """One rank's is: all make the call by messages."""
    async with world(3, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            how = {"kind": kind} if comm.rank == 1 else {}
            for turn in range(3):
                out = on_gpu(comm.rank, np.zeros(9000, "u1"))
                await comm.all_gather(out, on_gpu(comm.rank, block(comm.rank, turn, 3000), **how))
                assert np.array_equal(out.numpy(), gathered(3, turn, 3000))

        await all_call(comms, call)
        assert ways(comms[0]) == {"all_gather/direct": 3}


@pytest.mark.parametrize("names", [("cuMemcpyAsync", "cuMemcpyBatchAsync"), ("cuStreamWriteValue32",)])
@pytest.mark.parametrize("count", [100, 300_000])
async def test_a_copy_that_fails(
    gpu: Driver, simulator: simulated.Simulator, names: tuple[str, ...], count: int
) -> None:
    """The call fails on all ranks, and the next ones are made by messages."""
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            for turn in range(2):
                await gather_all(comm, turn, count)
            out = on_gpu(comm.rank, np.zeros(2 * count, "u1"))
            x = on_gpu(comm.rank, block(comm.rank, 0, count))
            await comm.barrier()
            if comm.rank == 0:
                for name in names:
                    simulator.fail(name, 2, forever=True)
            await comm.barrier()
            with pytest.raises((aiocomm.LinkError, aiocomm.TransferCancelled)):
                await comm.all_gather(out, x)
            await comm.barrier()
            simulator.heal()
            await comm.barrier()
            for turn in range(2):
                await gather_all(comm, turn, count)

        await all_call(comms, call)


async def test_who_gives_up_stays_until_nobody_writes(gpu: Driver, simulator: simulated.Simulator) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        outs = [on_gpu(rank, np.zeros(6000, "u1")) for rank in range(2)]
        arrays = [on_gpu(rank, block(rank, 0, 3000)) for rank in range(2)]

        async def call(comm: aiocomm.Communicator) -> None:
            await comm.all_gather(outs[comm.rank], arrays[comm.rank])

        for _ in range(2):
            await all_call(comms, call)
        await given_up_halfway(comms, call, simulator, simulated.Engine.PEER)
        await all_call(comms, call)
        assert np.array_equal(outs[0].numpy(), gathered(2, 0, 3000))


async def test_a_deadline_while_copies_are_waited_for(gpu: Driver, simulator: simulated.Simulator) -> None:
    """It ends once nothing is copied any more."""
    async with world(2, links=LINKS, warmup=True) as comms:
        scope = comms[0]._members()._scope(None)
        ended: list[int] = []
        held = 0

        async def late(comm: aiocomm.Communicator) -> None:
            with pytest.raises((aiocomm.DeadlineExceeded, aiocomm.TransferCancelled)):
                await gather_all(comm, 0, 3000, deadline=0.1 if comm.rank == 0 else None)
            ended.append(comm.rank)

        async def resume() -> None:
            nonlocal held
            await until(lambda: 0 in ended or any(call._over for call in scope.calls.values()))
            held = simulator.ready(0, simulated.Engine.PEER)
            simulator.resume(0, simulated.Engine.PEER)

        while not held:  # the deadline may pass before anything is copied
            for _ in range(2):
                await all_call(comms, lambda comm: gather_all(comm, 0, 3000))
            ended.clear()
            simulator.pause(0, simulated.Engine.PEER)
            async with anyio.create_task_group() as tasks:
                for comm in comms:
                    tasks.start_soon(late, comm)
                tasks.start_soon(resume)
        await all_call(comms, lambda comm: gather_all(comm, 1, 3000))


async def test_a_deadline_that_passes_as_the_ranks_meet(
    gpu: Driver, simulator: simulated.Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this rank copies has begun by then, and is waited for."""
    async with world(2, links=LINKS, warmup=True) as comms:
        for _ in range(2):
            await all_call(comms, lambda comm: gather_all(comm, 0, 3000))
        scope = comms[0]._members()._scope(None)
        ended: list[int] = []

        def met(flight: device_shared.DeviceFlight) -> bool:
            return flight._group.rank == 0 and flight._result == device_shared.GOING_ON

        async def late() -> None:
            with pytest.raises(aiocomm.DeadlineExceeded):
                await gather_all(comms[0], 0, 3000, deadline=LIMIT_S)  # which is over as `met` says so
            ended.append(0)

        async def other() -> None:
            with contextlib.suppress(aiocomm.TransferCancelled):  # or it has all by then
                await gather_all(comms[1], 0, 3000)

        monkeypatch.setattr(device_shared.DeviceFlight, "_late", met)
        simulator.pause(0, simulated.Engine.PEER)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(late)
            await until(lambda: scope.calls)
            tasks.start_soon(other)
            await anyio.to_thread.run_sync(simulator.wait_ready, 0, simulated.Engine.PEER)
            await until(lambda: ended or any(call._over for call in scope.calls.values()))
            await messages_pass(comms[0], comms[1], times=3)
            early = list(ended)
            simulator.resume(0, simulated.Engine.PEER)
        assert not early
        await all_call(comms, lambda comm: gather_all(comm, 1, 3000))


@pytest.mark.parametrize("lacking", ["", "FAKE_CUDA_FAIL=cuIpcOpenMemHandle:1+:1"], ids=["", "maps"])
async def test_between_processes(
    gpu: Driver, anyio_backend_name: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some cannot map the others' memory."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    if lacking:
        if simulated.choose() is None:
            pytest.skip("needs a driver that refuses to map")
        monkeypatch.setenv(*lacking.split("=", 1))

    async def work(comm: aiocomm.Communicator) -> None:
        import numpy as np

        from aiocomm.collectives import device_shared

        device_shared.STAYS_S = 20.0
        device = comm.rank % driver().count
        for turn in range(6):
            if turn % 2 == 0:  # memory that the others have not mapped yet
                x, out = (DeviceArray(n, np.float32, device=device) for n in (5000, 15000))
            x.write(np.arange(5000, dtype=np.float32) * (comm.rank + 1) + turn)
            await comm.all_gather(out, x)
            expected = [np.arange(5000, dtype=np.float32) * (rank + 1) + turn for rank in range(3)]
            assert np.array_equal(out.numpy(), np.concatenate(expected))
        pushed = comm.statistics().collectives.get("all_gather/pushed", 0)
        if not lacking:
            assert pushed > 0
        elif comm.rank:  # the parent's driver was there before it was to fail
            assert pushed == 0

    async with aiocomm.spawn(work, n=2, links=LINKS) as comm:
        await work(comm)


async def test_arrays_that_could_not_be_mapped_once(
    gpu: Driver, anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls with other arrays of that shape, and of other shapes, are pushed again after a while."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    if simulated.choose() is None:
        pytest.skip("needs a driver that refuses to map")
    monkeypatch.setenv("FAKE_CUDA_FAIL", ",".join(f"cuIpcOpenMemHandle:{nth}:1" for nth in range(1, 9)))

    async def work(comm: aiocomm.Communicator) -> None:
        import numpy as np

        device = comm.rank % driver().count
        for count in (5000, 7000):
            pushed, before = np.zeros(1, np.int64), comm.statistics().collectives.get("all_gather/pushed", 0)
            while not pushed[0]:
                x, out = (DeviceArray(n, np.float32, device=device) for n in (count, 2 * count))
                for _ in range(40):
                    await comm.all_gather(out, x)
                pushed[0] = comm.statistics().collectives.get("all_gather/pushed", 0) - before
                await comm.all_reduce(pushed, op="min")
        assert comm.statistics().links["cuda"].fallbacks or comm.rank == 0

    async with aiocomm.spawn(work, n=1, links=LINKS) as comm:
        await work(comm)


async def test_a_rank_that_cannot_take_part_says_so(gpu: Driver) -> None:
    """The others do not wait for it: its submissions are looked at, which are those of messages."""
    async with world(2, links=LINKS, warmup=True) as comms:
        for turn in range(2):
            await all_call(comms, lambda comm, turn=turn: gather_all(comm, turn, 3000))
        assert ways(comms[0]) == {"all_gather/direct": 1, "all_gather/pushed": 1}
        submissions = comms[1].links["cuda"].submissions()
        for turn in range(2, 8):
            await all_call(comms, lambda comm, turn=turn: gather_all(comm, turn, 3000))
        assert ways(comms[0]) == ways(comms[1]) == {"all_gather/direct": 7, "all_gather/pushed": 1}
        await submissions.aclose()
        await all_call(comms, lambda comm: gather_all(comm, 8, 3000))
        assert ways(comms[0]) == ways(comms[1]) == {"all_gather/direct": 7, "all_gather/pushed": 2}


async def test_a_task_is_cancelled_as_its_call_turns_to_messages(
    gpu: Driver, anyio_backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, who make the call so, hear that this rank does not."""
    if anyio_backend_name == "trio":
        pytest.skip("its cancellation waits behind a shield: only asyncio's Task.cancel() comes through")
    end = device_shared.DeviceFlight._end

    async def cancelled(flight: device_shared.DeviceFlight) -> bool:
        assert flight._flying, "others are watched"
        tasks[0].cancel()
        return await end(flight)

    async with world(2, links=LINKS, warmup=True) as comms:
        for turn in range(2):
            await all_call(comms, lambda comm, turn=turn: gather_all(comm, turn, 3000))
        # Once others are watched they are late, and not before, however slow the machine is.
        monkeypatch.setattr(device_shared.DeviceFlight, "_late", lambda flight: bool(flight._flying))
        monkeypatch.setattr(device_shared.DeviceFlight, "_end", cancelled)
        tasks = [asyncio.ensure_future(gather_all(comms[0], 2, 3000))]
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        monkeypatch.undo()
        with pytest.raises(aiocomm.TransferCancelled, match="rank 0"):
            await gather_all(comms[1], 2, 3000)
        await all_call(comms, lambda comm: gather_all(comm, 3, 3000))


async def test_a_lost_rank_is_named_where_another_found_that_first(gpu: Driver) -> None:
    """And has broken the call, but stands still before it says why."""
    async with world(2, links=LINKS, warmup=True) as comms:
        for turn in range(2):
            await all_call(comms, lambda comm, turn=turn: gather_all(comm, turn, 3000))

        async def call() -> None:
            with pytest.raises(aiocomm.PeerLostError, match="rank 1 is gone"):
                await gather_all(comms[0], 2, 3000)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            calls = comms[0]._members()._scope(None).calls
            await until(lambda: calls)
            (flight,) = calls.values()
            flight.lose(1)
            error = await flight._why_broken()
        assert isinstance(error, aiocomm.PeerLostError)
        assert "rank 1 is gone" in str(error)


async def test_a_rank_is_killed_in_the_middle(gpu: Driver, anyio_backend_name: str) -> None:
    """In a call whose ranks have met: the others hear of it, and go on without it."""
    if anyio_backend_name == "trio":
        pytest.skip("spawn's parent is the same on every loop: once is enough")
    over = []

    async def work(comm: aiocomm.Communicator) -> None:
        import numpy as np
        from fakes.gpu import Stream

        from aiocomm.collectives import device_shared

        device_shared.STAYS_S = 20.0
        device = comm.rank % driver().count
        x, out = DeviceArray(5000, np.uint8, device=device), DeviceArray(15000, np.uint8, device=device)
        for _ in range(3):
            await comm.all_gather(out, x)
        if comm.rank == 2:
            stream = Stream(device)
            gate = stream.gate()  # so that it never says that its arrays may be written

            async def die() -> None:
                scope = comm._members()._scope(None)
                while not any(call._result == device_shared.GOING_ON for call in scope.calls.values()):
                    await anyio.lowlevel.checkpoint()
                os.kill(os.getpid(), signal.SIGKILL)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(die)
                await comm.all_gather(out, x, stream=stream)
            gate.open()
        with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone") as lost:
            await comm.all_gather(out, x)
        assert lost.value.peer == 2
        rest = await comm.shrink(deadline=LIMIT_S)
        pair = DeviceArray(10000, np.uint8, device=device)
        for _ in range(3):
            await rest.all_gather(pair, x)

    with pytest.raises(aiocomm.AiocommError, match="rank 2"):  # noqa: PT012 - spawn tells of the killed worker
        async with aiocomm.spawn(work, n=2, links=LINKS) as comm:
            await work(comm)
            over.append(comm.rank)
    assert over == [0]
