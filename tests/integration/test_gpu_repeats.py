"""Collectives of GPU arrays that are called again: prepared, and what they do as the first time."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from fakes.gpu import DeviceArray, Driver, Stream, driver
from harness import LIMIT_S, all_call, held_up, world

import aiocomm
from aiocomm.collectives import device_shared, quick

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu")]

LINKS = ("shm", "cuda")


@pytest.fixture(params=["messages", "arena"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By messages, as where ranks cannot share memory; or through it, and then for sure."""
    if request.param == "messages":
        monkeypatch.setattr(device_shared, "prepare", lambda *_: None)
    monkeypatch.setattr(device_shared, "STAYS_S", 20.0)
    name: str = request.param
    return name


@pytest.fixture(params=[1, 2, 3])
async def comms(request: pytest.FixtureRequest, gpu: Driver) -> AsyncIterator[list[aiocomm.Communicator]]:
    async with world(request.param, links=LINKS, warmup=True) as members:
        yield members


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What prepared calls of this process came to."""
    found: list[object] = []
    attempt = quick.Prepared.attempt

    def noting(self: quick.Prepared, *arguments: Any) -> Any:
        found.append(attempt(self, *arguments))
        return found[-1]

    monkeypatch.setattr(quick.Prepared, "attempt", noting)
    return found


def on_gpu(rank: int, values: np.ndarray[Any, Any], **how: Any) -> DeviceArray:
    return DeviceArray(values.shape, values.dtype, device=rank % driver().count, **how).write(values)


def empty(rank: int, count: int) -> DeviceArray:
    return on_gpu(rank, np.zeros(count, np.int32))


def block(rank: int, turn: int, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((rank, turn)).integers(0, 1 << 30, count, np.int32)


@pytest.mark.parametrize("count", [3, 100_000])
async def test_every_operation_again(
    comms: list[aiocomm.Communicator], count: int, attempts: list[object], way: str
) -> None:
    size, root, turns = len(comms), len(comms) - 1, 4

    async def call(comm: aiocomm.Communicator) -> None:
        rank = comm.rank
        whole, mine = empty(rank, size * count), empty(rank, count)
        out, give = empty(rank, size * count), empty(rank, size * count)
        for turn in range(turns):
            every = [block(r, turn, count) for r in range(size)]
            mine.write(every[rank])
            await comm.all_gather(whole, mine)
            assert np.array_equal(whole.numpy(), np.concatenate(every))
            await comm.broadcast(mine, root)
            assert np.array_equal(mine.numpy(), every[root])
            await comm.scatter(mine, whole if rank == 0 else None)
            assert np.array_equal(mine.numpy(), every[rank])
            await comm.gather(out if rank == root else None, mine, root)
            if rank == root:
                assert np.array_equal(out.numpy(), np.concatenate(every))
            give.write(np.concatenate([block(size * rank + to, turn, count) for to in range(size)]))
            await comm.all_to_all(out, give)
            expected = [block(size * source + rank, turn, count) for source in range(size)]
            assert np.array_equal(out.numpy(), np.concatenate(expected))

    await all_call(comms, call)
    called = dict(comms[0].statistics().collectives)
    if way == "messages" or size == 1:
        assert len(attempts) == 5 * size * (turns - 1)
        assert False not in attempts
        assert called["all_gather/direct"] == turns
    else:
        assert not attempts
        moved = ("all_gather", "broadcast", "scatter", "gather", "all_to_all")
        assert called == {
            f"{one}/{how}": n for one in moved for how, n in (("direct", 1), ("pushed", turns - 1))
        }


async def test_in_place_and_apart_are_two_shapes(gpu: Driver, attempts: list[object], way: str) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        expected = np.concatenate([block(rank, 0, 500) for rank in range(2)])

        async def call(comm: aiocomm.Communicator) -> None:
            own = block(comm.rank, 0, 500)
            apart = on_gpu(comm.rank, own)
            for _ in range(3):
                out = empty(comm.rank, 1000)
                await comm.all_gather(out, apart)
                assert np.array_equal(out.numpy(), expected)
                out.write(np.concatenate([own, own]))
                inside = out.part(2000 * comm.rank, 2000)
                view = DeviceView(inside, (500,))
                await comm.all_gather(out, view)
                assert np.array_equal(out.numpy(), expected)
                with pytest.raises(aiocomm.UsageError, match="not this rank's own block"):
                    await comm.all_gather(out, DeviceView(out.part(4, 2000), (500,)))

        await all_call(comms, call)
        assert len(attempts) == (8 if way == "messages" else 0)


class DeviceView:
    """int32 at some place of an array."""

    def __init__(self, part: Any, shape: tuple[int, ...]) -> None:
        self.part = part  # keeps it
        interface = part.__cuda_array_interface__
        self.__cuda_array_interface__ = interface | {"typestr": "<i4", "shape": shape}


@pytest.mark.parametrize("named", ["by argument", "by both arrays", "by what is given", "by out"])
@pytest.mark.parametrize("count", [8, 100_000])
async def test_a_repeat_waits_for_its_stream(gpu: Driver, count: int, named: str) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:
        streams = [Stream(rank % driver().count) for rank in range(2)]
        arrays = [on_gpu(rank, np.zeros(count, np.uint8)) for rank in range(2)]
        outs = [on_gpu(rank, np.zeros(2 * count, np.uint8)) for rank in range(2)]
        ended: list[int] = []

        for rank, stream in enumerate(streams):
            idle = Stream(rank % driver().count).handle
            arrays[rank].stream = idle if named == "by out" else stream.handle
            outs[rank].stream = idle if named == "by what is given" else stream.handle

        async def call(comm: aiocomm.Communicator) -> None:
            stream = streams[comm.rank] if named == "by argument" else None
            await comm.all_gather(outs[comm.rank], arrays[comm.rank], stream=stream)
            ended.append(comm.rank)

        await all_call(comms, call)
        ended.clear()
        if named == "by out":
            for rank, stream in enumerate(streams):
                stream.fill(arrays[rank], rank + 1)
                stream.synchronize()
        gates = [stream.gate() for stream in streams]
        for rank, stream in enumerate(streams):  # which would undo what comes too early
            stream.fill(*((outs[rank], 0) if named == "by out" else (arrays[rank], rank + 1)))
        await held_up(comms, call, gates, ended)
        for out in outs:
            assert np.array_equal(out.numpy(), np.repeat(np.array([1, 2], np.uint8), count))
        for stream in streams:
            stream.close()


@pytest.mark.parametrize("count", [8, 100_000])
async def test_repeats_may_overlap(gpu: Driver, count: int) -> None:
    async with world(2, links=LINKS, warmup=True) as comms:

        async def call(comm: aiocomm.Communicator) -> None:
            async def one(value: int) -> None:
                out = empty(comm.rank, 2 * count)
                await comm.all_gather(out, on_gpu(comm.rank, block(comm.rank, value, count)))
                expected = np.concatenate([block(rank, value, count) for rank in range(2)])
                assert np.array_equal(out.numpy(), expected)

            await one(0)
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(one, 7)

        await all_call(comms, call)


@pytest.mark.parametrize("count", [8, 100_000])
async def test_repeats_end_as_first_ones_do(gpu: Driver, count: int) -> None:
    late: list[type[BaseException]] = []

    async def call(comm: aiocomm.Communicator) -> None:
        out, x = empty(comm.rank, 3 * count), empty(comm.rank, count)
        for _ in range(2):
            await comm.all_gather(out, x)
            await comm.all_to_all(out, empty(comm.rank, 3 * count))
        other = (
            comm.all_to_all(out, empty(comm.rank, 3 * count)) if comm.rank == 1 else comm.all_gather(out, x)
        )
        with pytest.raises(aiocomm.UsageError, match="rank 1 called all_to_all"):
            await other
        await comm.all_gather(out, x)
        if comm.rank == 2:  # never calls in time
            for other in (0, 1):
                await comm.recv(bytearray(2), src=other)
            with contextlib.suppress(aiocomm.TransferCancelled):
                await comm.all_gather(out, x)
        else:
            # Of two that wait in vain the first may say so before the other has called.
            vain = aiocomm.DeadlineExceeded, aiocomm.TransferCancelled
            with pytest.raises(vain, match=r"not called within 0\.2 s by .*rank 2") as ended:
                await comm.all_gather(out, x, deadline=0.2)
            late.append(ended.type)
            await comm.send(b"go", dst=2)
        await comm.barrier()
        if comm.rank == 0:
            with anyio.move_on_after(0.05) as scope:
                await comm.all_gather(out, x)
            assert scope.cancelled_caught
            await comm.send(b"go", dst=2)
        elif comm.rank == 1:
            with pytest.raises(aiocomm.TransferCancelled, match="rank 0 gave the call up: cancelled"):
                await comm.all_gather(out, x)
        else:
            await comm.recv(bytearray(2), src=0)
        await comm.barrier(channel=comm.channel("apart"), deadline=LIMIT_S)

    async with world(3, links=LINKS, warmup=True) as comms:
        await all_call(comms, call)
    assert aiocomm.DeadlineExceeded in late


@pytest.mark.parametrize("count", [8, 100_000])
async def test_a_repeat_fails_at_once_where_a_rank_is_lost(gpu: Driver, count: int) -> None:
    async def call(comm: aiocomm.Communicator) -> None:
        group = await comm.group([0, 1, 2])
        out, x = empty(comm.rank, 3 * count), empty(comm.rank, count)
        for _ in range(2):
            await group.all_gather(out, x)
        if comm.rank == 2:
            await comm.aclose()
            return
        with pytest.raises(aiocomm.PeerLostError, match="rank 2 is gone"):
            await group.all_gather(out, x)
        rest = await group.shrink(deadline=LIMIT_S)
        await rest.all_gather(empty(comm.rank, 2 * count), x)

    async with world(3, links=LINKS, warmup=True) as comms:
        await all_call(comms, call)
