"""`comm.from_thread`: blocking twins, called from other threads while the loop runs."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import functools
import itertools
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import uvloop
from harness import BACKENDS, until, world

import aiocomm
from aiocomm import threads

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
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


async def test_a_transfer_is_its_loops(pair: Pair) -> None:
    """Other threads may look at it; what touches it is refused there, and goes over the loop."""
    a, b = pair
    called: list[object] = []
    pending, done = b.recv(bytearray(1), 0, tag=1), a.send(b"x", 1, tag=2)
    await done
    await b.recv(bytearray(1), 0, tag=2)
    for attempt in (
        pending.cancel,
        lambda: pending.add_done_callback(called.append),
        lambda: pending.remove_done_callback(called.append),
    ):
        with pytest.raises(aiocomm.UsageError, match="call_soon_threadsafe"):
            await elsewhere(attempt)
    assert await elsewhere(lambda: (pending.done(), done.done(), done.result())) == (False, True, None)
    assert await elsewhere(done.cancel) is False  # there is nothing to be done about it
    pending.add_done_callback(called.append)
    await elsewhere(lambda: a.from_thread.send(b"x", 1, tag=1))
    await pending
    await until(lambda: called == [pending])


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
@pytest.mark.parametrize("library", [asyncio, uvloop])
async def test_a_loop_may_go_on_in_another_thread(library: Any) -> None:
    def run(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        thread = threading.Thread(target=lambda: loop.run_until_complete(step()))
        thread.start()
        thread.join()

    async def begin() -> None:
        _, b = await opened.__aenter__()
        transfers.append(b.recv(bytearray(1), 0))

    async def end() -> None:
        assert transfers[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfers[0]
        await opened.__aexit__(None, None, None)
        ended.append(True)

    transfers: list[aiocomm.Transfer[Any]] = []
    ended: list[bool] = []
    opened = world(2)
    loop = library.new_event_loop()
    for step in (begin, end):
        await elsewhere(functools.partial(run, step))
    loop.close()
    assert ended


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_loops_of_several_threads(link: str) -> None:
    """Each has a world of its own; without a GIL they run at once, beside who looks at their transfers."""
    looked: deque[bool] = deque(maxlen=1000)
    over = threading.Event()
    shared: list[aiocomm.Transfer[Any]] = []

    def look() -> None:
        last = False
        while not last:
            last = over.wait(1e-4)  # once more when all have ended
            looked.extend(transfer.result() is None for transfer in shared[-20:] if transfer.done())

    async def work(seed: int) -> int:
        random = np.random.default_rng(seed)
        sizes = [int(size) for size in random.choice([1, 100, 5_000, 300_000], 150)]
        async with world(2, links=(link,)) as (a, b):
            for first in range(0, len(sizes), 10):
                sent = [np.full(size, first % 251, np.uint8) for size in sizes[first : first + 10]]
                into = [np.zeros_like(data) for data in sent]
                receives = [b.recv(data, 0, tag=tag) for tag, data in enumerate(into)]
                sends = [a.send(data, 1, tag=tag) for tag, data in enumerate(sent)]
                shared.extend(sends)
                await asyncio.gather(*receives, *sends)
                assert all(map(np.array_equal, into, sent))
                sums = np.ones((2, 1000))
                await asyncio.gather(a.all_reduce(sums[0]), b.all_reduce(sums[1]))
                assert (sums == 2).all()
        return len(sizes)

    looks = threading.Thread(target=look)
    looks.start()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda seed: asyncio.run(work(seed)), range(3)))
    over.set()
    looks.join()
    assert done == [150] * 3
    assert looked
    assert all(looked)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python always has a GIL")
def test_the_gil_stays_off() -> None:
    code = "import sys, aiocomm; print(sys._is_gil_enabled())"
    told = subprocess.check_output([sys.executable, "-W", "error", "-c", code], text=True)
    assert told == "False\n"


SUB_INTERPRETER = """
import asyncio, importlib, os, sys
import aiocomm
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        pass
try:
    code = f"import sys; sys.path[:] = {sys.path}; import aiocomm_native"
    print(interpreters.run_string(interpreters.create(), code))
except Exception as error:
    print(error)

async def main():
    address = f"unix://@aiocomm-test-{os.getpid()}"
    async with await aiocomm.connect(address, rank=0, size=1) as comm:
        await asyncio.gather(comm.send(b"x", 0), comm.recv(bytearray(1), 0))

asyncio.run(main())
print("works")
"""


def test_a_sub_interpreter_is_refused_and_the_main_one_works_on() -> None:
    told = subprocess.check_output([sys.executable, "-c", SUB_INTERPRETER], text=True).splitlines()
    assert "main interpreter only" in " ".join(told[:-1])
    assert told[-1] == "works"
