"""Combine of GPU arrays that overlap or lie anywhere, and memory that is not what its owner says."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from gpu_experts import EXPERTS, LINKS, batch, layer, on_gpu, to_host
from harness import all_call, until, world

import aiocomm
from aiocomm.moe import device_moving, exchange
from aiocomm.moe.device_exchange import DEVICE_HEAD_BYTES, DeviceExchange, Where
from aiocomm.moe.device_quick import QuickCombine, QuickDispatch
from aiocomm.moe.wire import HEAD_BYTES

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("gpu", "images")]

# ------------------------------------------------------------ the caller's arrays


class Over:
    """An array over the memory of another one, from a byte of it on."""

    def __init__(self, whole: Any, start: int, shape: tuple[int, ...], typestr: str) -> None:
        self._whole = whole
        data = (whole.address + start, False)
        self.__cuda_array_interface__ = whole.__cuda_array_interface__ | {
            "shape": shape,
            "typestr": typestr,
            "data": data,
        }


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("size", [1, 2])
async def test_a_result_over_outputs(size: int, kind: str) -> None:
    """Rows are written only when no row of `outputs` is read any more."""
    async with world(size, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            tokens, hidden = 40, 24
            x, ids, weights = batch(comm.rank, tokens, hidden)
            expected = await comm.dispatch(x, ids, weights, experts=EXPERTS)
            came = await comm.dispatch(on_gpu(comm.rank, x), ids, weights, experts=EXPERTS)
            outputs = expected.inputs * np.float32(1.7)
            wanted = await comm.combine(outputs, expected, out=np.empty((tokens, hidden), kind))
            room = tokens * hidden * np.dtype(kind).itemsize
            for start in (0, 4 * hidden, outputs.nbytes - room // 3, outputs.nbytes + room):
                memory = np.zeros(-(-(outputs.nbytes + 2 * room) // 4), np.float32)
                memory[: outputs.size] = outputs.reshape(-1)
                whole = on_gpu(comm.rank, memory)
                given = Over(whole, 0, outputs.shape, "<f4")
                start -= start % 8
                out = Over(whole, start, (tokens, hidden), f"<{kind}")
                assert await comm.combine(given, came, out=out) is out
                found = whole.numpy().view(np.uint8)[start : start + room].view(kind)
                assert found.tobytes() == wanted.tobytes()
                over = memory.view(np.uint8)[start : start + room].view(kind).reshape(tokens, hidden)
                await comm.combine(memory[: outputs.size].reshape(outputs.shape), expected, out=over)
                assert over.tobytes() == wanted.tobytes()  # nor on the host

        await all_call(members, rank)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("outputs_off", "out_off"), [(1, 0), (0, 1), (1, 1)])
async def test_rows_that_are_off_by_one_element(dtype: Any, outputs_off: int, out_off: int) -> None:
    """Rows of whole groups, which lie where no group may be read or written at once."""
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 20, 8, dtype)
            expected = await comm.dispatch(x, ids, weights, experts=EXPERTS)
            came = await comm.dispatch(on_gpu(comm.rank, x, offset=x.itemsize), ids, weights, experts=EXPERTS)
            assert np.array_equal(to_host(came.tokens, dtype), expected.tokens)
            wanted = await comm.combine(expected.inputs, expected)
            outputs = on_gpu(comm.rank, expected.inputs, offset=outputs_off * x.itemsize)
            out = on_gpu(comm.rank, np.zeros_like(wanted), offset=out_off * x.itemsize)
            await comm.combine(outputs, came, out=out)
            assert out.numpy().tobytes() == wanted.tobytes()

        await all_call(members, rank)


# ------------------------------------------------------------ what others say


def _tell(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], quickly: bool) -> None:
    """Have ranks tell something else of their memory, on the way of usual calls and on the other."""
    packed, swapped = Where.pack, DeviceExchange._swap

    def pack(where: Where) -> bytes:
        return packed(where._replace(**{name: how(where) for name, how in change.items()}))

    def swap(call: DeviceExchange, messages: Any) -> bool:
        told = [m and m[:HEAD_BYTES] + pack(Where.unpack(m)) + m[DEVICE_HEAD_BYTES:] for m in messages]
        return swapped(call, told)

    monkeypatch.setattr(Where, "pack", pack)
    monkeypatch.setattr(DeviceExchange, "_swap", swap)
    if not quickly:
        for kind in (QuickCombine, QuickDispatch):
            monkeypatch.setattr(kind, "_swap_quickly", lambda _: False)


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("hidden", [8, 7])
async def test_rows_where_none_may_be_are_not_read(
    monkeypatch: pytest.MonkeyPatch, quickly: bool, hidden: int
) -> None:
    async with world(2, links=LINKS, warmup=True) as members:
        came: dict[int, Any] = {}

        async def dispatch(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 20, hidden)
            came[comm.rank] = await comm.dispatch(on_gpu(comm.rank, x), ids, weights, experts=EXPERTS)

        async def combine(comm: aiocomm.Communicator) -> None:
            outputs = on_gpu(comm.rank, np.ones((len(came[comm.rank].rows), hidden), np.float32))
            with pytest.raises(aiocomm.PeerError, match=f"not at a multiple of {16 if hidden == 8 else 4}"):
                await comm.combine(outputs, came[comm.rank])

        await all_call(members, dispatch)
        _tell(monkeypatch, {"start": lambda where: where.start + 2}, quickly)
        await all_call(members, combine)


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_place_where_no_group_may_be(monkeypatch: pytest.MonkeyPatch, quickly: bool) -> None:
    """What names an address that its own allocator does not give breaks the protocol."""
    async with world(2, links=LINKS, warmup=True) as members:
        came: dict[int, Any] = {}

        async def dispatch(comm: aiocomm.Communicator) -> None:
            x, ids, weights = batch(comm.rank, 20, 8)
            came[comm.rank] = await comm.dispatch(on_gpu(comm.rank, x), ids, weights, experts=EXPERTS)

        async def combine(comm: aiocomm.Communicator) -> None:
            outputs = on_gpu(comm.rank, np.ones((len(came[comm.rank].rows), 8), np.float32))
            with pytest.raises(aiocomm.ExpertsLostError):
                await comm.combine(outputs, came[comm.rank])

        def further(where: Where) -> bytes:
            address = int.from_bytes(where.place[8:16], "little") + 4
            return where.place[:8] + address.to_bytes(8, "little") + where.place[16:]

        await all_call(members, dispatch)
        _tell(monkeypatch, {"place": further}, quickly)
        await all_call(members, combine)


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("reached", [True, False])
async def test_tokens_that_are_not_there_are_not_read(
    monkeypatch: pytest.MonkeyPatch, quickly: bool, reached: bool
) -> None:
    async with world(2, links=LINKS, warmup=True) as members:

        async def dispatch(comm: aiocomm.Communicator) -> None:
            x = on_gpu(comm.rank, np.ones((20, 8), np.float32))
            with pytest.raises(aiocomm.PeerError, match=r"has 639 bytes where 640 are needed"):
                await comm.dispatch(x, np.tile([0, 1], (20, 1)), experts=2)

        def get(*_: Any) -> int:
            raise AssertionError("it was got")

        await all_call(members, lambda comm: layer(comm, 11, 8))
        place = {} if reached else {"place": lambda where: b""}
        _tell(monkeypatch, {"extent": lambda where: where.extent - 1, **place}, quickly)
        monkeypatch.setattr(DeviceExchange, "_get", get)
        await all_call(members, dispatch)


# ------------------------------------------------------------ a task that is cancelled


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("work", ["routed", "arrange"])
async def test_memory_is_kept_while_a_worker_reads_it(monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """Task.cancel() goes through shields: the call ends with the worker nevertheless."""
    came, go = threading.Event(), threading.Event()
    done = getattr(device_moving, work)

    def held(*arguments: Any) -> Any:
        came.set()
        assert go.wait(20)
        return done(*arguments)

    async with world(1, links=LINKS) as (comm,):
        group = await comm.group([0])
        await layer(group, 11, 8)
        scope, _ = group._expert_scope(None)
        x, ids, _ = batch(0, 30, 16)
        given, chosen = on_gpu(0, x), on_gpu(0, ids)
        monkeypatch.setattr(exchange, "_INLINE_BYTES", -1)
        monkeypatch.setattr(device_moving, work, held)
        given_back: list[Any] = []
        for pool in scope.pools.values():
            monkeypatch.setattr(pool, "give_back_pinned", given_back.append)
        task = asyncio.create_task(group.dispatch(given, chosen, experts=EXPERTS))
        try:
            await until(came.is_set)
            for _ in range(2):
                task.cancel()
                for _ in range(20):
                    await asyncio.sleep(0)
                assert not task.done()
                assert not given_back
        finally:
            go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert given_back
        monkeypatch.undo()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_worker_refuses_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_INLINE_BYTES", -1)
    async with world(2, links=LINKS, warmup=True) as members:

        async def rank(comm: aiocomm.Communicator) -> None:
            ids = np.array([0, 3, 6 if comm.rank == 1 else 0])
            with pytest.raises(aiocomm.UsageError, match="token 2 names expert 6"):
                await comm.dispatch(on_gpu(comm.rank, np.ones((3, 8), np.float32)), ids, experts=6)
            await layer(comm, 11, 8)

        await all_call(members, rank)
