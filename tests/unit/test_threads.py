"""`comm.from_thread`: blocking twins, called from other threads while the loop runs."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from harness import BACKENDS, until, world

import aiocomm
from aiocomm import threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from conftest import Pair
    from harness import Child

pytestmark = pytest.mark.anyio


async def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call from another thread gives, while this loop runs."""
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


async def test_messages_both_ways(pair: Pair) -> None:
    a, b = pair
    sent, got = np.arange(300_000), np.zeros(300_000, int)

    async def receive() -> None:
        status = await elsewhere(lambda: b.from_thread.recv(got, 0, tag=4))
        assert status == (0, 4, sent.nbytes)

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        assert await elsewhere(lambda: a.from_thread.send(sent, 1, tag=4)) is None
    np.testing.assert_array_equal(got, sent)
    await elsewhere(lambda: a.from_thread.send(np.ones((2, 3), np.float32), 1, channel=a.default))
    array = await elsewhere(lambda: b.from_thread.recv_array(0))
    assert (array.shape, array.dtype) == ((2, 3), np.float32)


async def test_one_sided(pair: Pair) -> None:
    a, b = pair
    memory, got = bytearray(8), bytearray(8)
    async with b.register(memory) as region:
        remote = a.remote(region.handle)
        await elsewhere(lambda: a.from_thread.put(b"12345678", remote, notify=b"n"))
        assert bytes(memory) == b"12345678"
        assert (await anext(b.notifications())).payload == b"n"
        await elsewhere(lambda: a.from_thread.get(remote, got))
    assert bytes(got) == b"12345678"


async def test_errors_come_out_of_the_call(pair: Pair) -> None:
    a, _ = pair
    with pytest.raises(aiocomm.UsageError, match="no rank 9"):
        await elsewhere(lambda: a.from_thread.send(b"x", 9))
    with pytest.raises(aiocomm.DeadlineExceeded, match="recv of 1 bytes from rank 1"):
        await elsewhere(lambda: a.from_thread.recv(bytearray(1), 1, deadline=0.01))
    with pytest.raises(aiocomm.UsageError, match="would block its own event loop: await"):
        a.from_thread.send(b"x", 1)


async def test_closing_ends_the_calls() -> None:
    async with world(2, warmup=True) as (a, _):
        ended: list[BaseException] = []

        async def wait() -> None:
            try:
                await elsewhere(lambda: a.from_thread.recv(bytearray(1), 1))
            except aiocomm.ClosedError as error:
                ended.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while not a.statistics().posted_receives:
                await anyio.lowlevel.checkpoint()
            await a.aclose()
        assert len(ended) == 1
        with pytest.raises(aiocomm.ClosedError):
            await elsewhere(lambda: a.from_thread.recv(bytearray(1), 1))


async def test_a_closed_channel_ends_the_calls_on_it(pair: Pair) -> None:
    a, _ = pair
    channel = a.channel("given up")

    async def wait() -> None:
        with pytest.raises(aiocomm.ClosedError, match="closed"):
            await elsewhere(lambda: a.from_thread.recv(bytearray(1), 1, channel=channel))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        while not a.statistics().posted_receives:
            await anyio.lowlevel.checkpoint()
        channel.close()


class Interrupt(BaseException):
    """As Ctrl-C is one, in the main thread."""


@pytest.mark.parametrize("link", ["shm", "tcp"])
async def test_an_interrupted_call_leaves_nothing_under_way(link: str) -> None:
    async with world(2, links=(link,), warmup=True) as (a, b):
        threads: list[int] = []
        memory = np.zeros(1 << 20, np.uint8)

        def receive() -> None:
            threads.append(threading.get_ident())
            a.from_thread.recv(memory, 1, tag=1)

        async def wait() -> None:
            with pytest.raises(Interrupt):
                await elsewhere(receive)
            assert not a.statistics().posted_receives

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await until(lambda: a.statistics().posted_receives)
            raising = ctypes.c_ulong(threads[0]), ctypes.py_object(Interrupt)
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(*raising) == 1
        b.send(np.ones_like(memory), 0, tag=1).cancel()
        assert not memory.any()


def interrupted(step: int, call: Callable[[], Any]) -> bool:
    """Whether so many steps of a call were to be interrupted: it is so before it looks after its loop."""
    left, looks = step, False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, looks
        left -= 1
        looks = frame.f_code.co_name == "has_ended"
        if looks or not left:
            sys.settrace(None)
            raise Interrupt
        return trace

    with pytest.raises(Interrupt):  # noqa: PT012 -- raises itself is not to be traced
        try:
            sys.settrace(trace)
            call()
        finally:
            sys.settrace(None)
    return not looks


@pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"], indirect=True
)
async def test_a_call_may_be_interrupted_at_any_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """At steps of Python, which is finer than it can be: trio's own queue would not stand that."""
    monkeypatch.setattr(threads, "_LOOK_S", 0.01)
    a, _ = pair

    def receive() -> None:
        a.from_thread.recv(bytearray(1), 1)

    for step in itertools.count(1):
        if not await elsewhere(lambda step=step: interrupted(step, receive)):  # type: ignore[misc]
            break
        assert not a.statistics().posted_receives
    assert step > 10


async def test_a_cancelled_call_is_told_as_such(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair
    receives: list[Any] = []
    receive = a.recv

    def noted(*what: Any, **options: Any) -> Any:
        receives.append(receive(*what, **options))
        return receives[-1]

    monkeypatch.setattr(a, "recv", noted)

    async def wait() -> None:
        with pytest.raises(aiocomm.TransferCancelled, match="recv of 1 bytes: cancelled") as raised:
            await elsewhere(lambda: a.from_thread.recv(bytearray(1), 1))
        assert raised.value.peer == 1

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await until(lambda: receives)
        receives[0].cancel()


ENDS = """
import asyncio, sys, threading
import aiocomm, anyio, trio, uvloop

told = []

def call(comm, *, deadline=None):
    try:
        comm.from_thread.recv(bytearray(1), 0, deadline=deadline)
    except aiocomm.ClosedError as error:
        told.append(str(error))

async def main():
    comm = await aiocomm.connect(size=1)
    threads = [threading.Thread(target=call, args=(comm,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while comm.statistics().posted_receives < len(threads):
        await anyio.lowlevel.checkpoint()
    return comm, threads

if sys.argv[1] == "trio":
    comm, threads = trio.run(main)
else:
    factory = uvloop.new_event_loop if sys.argv[1] == "uvloop" else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        comm, threads = runner.run(main())
for thread in threads:
    thread.join()
print(len(told), flush=True)
call(comm)
print(*set(told), flush=True)
"""


@pytest.mark.timeout(120)  # of which its child may take most to start
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
async def test_calls_end_with_the_loop(child: Callable[..., Child], loop: str) -> None:
    """Also one that was not closed: nothing would ever end them."""
    process = child(ENDS, loop)
    assert await process.line() == "2"
    assert "the event loop of the communicator has ended, and with it" in await process.line()
    status, errors = await anyio.to_thread.run_sync(process.close)
    assert (status, errors) == (0, "")
