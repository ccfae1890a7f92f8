"""What a communicator sees of its loop: whether that has something else to do than to wait for it."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
import uvloop
from harness import BACKENDS, until, world

from aiocomm._loop.asyncio_backend import AsyncioBackend, ready_of
from aiocomm._loop.backend import current_backend
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable

_LONG_S = 10.0  # within which a message between two ranks of this process has come

loops = pytest.mark.parametrize(
    "opened", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


@loops
def test_a_loop_shows_what_is_ready(opened: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ready = ready_of(loop)
        assert ready is not None
        await asyncio.sleep(0)  # what was tried has gone
        assert len(ready) == 0
        handle = loop.call_soon(ran.append, 1)
        assert list(ready) == [handle]
        await asyncio.sleep(0)
        assert (len(ready), ran) == (0, [1])
        loop.call_soon_threadsafe(ran.append, 2)
        assert len(ready) == 1
        assert ready_of(loop) is ready

    ran: list[int] = []
    with asyncio.Runner(loop_factory=opened, debug=True) as runner:
        runner.run(main())
    assert ran == [1, 2]


def test_a_loop_that_shows_nothing() -> None:
    class Handle:
        def cancel(self) -> None:
            cancelled.append(self)

    class Loop:
        def call_soon(self, *_: object) -> Handle:
            return Handle()

    cancelled: list[Handle] = []
    assert ready_of(Loop()) is None  # type: ignore[arg-type]
    assert len(cancelled) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "anyio_backend", [BACKENDS["asyncio"], BACKENDS["uvloop"]], ids=["asyncio", "uvloop"], indirect=True
)
async def test_it_looks_for_ends_only_where_nobody_else_is_ready() -> None:
    loop, turns = asyncio.get_running_loop(), []
    async with world(2, links=("shm",), warmup=True) as (a, b):
        await anyio.lowlevel.checkpoint()
        ours = b.recv(bytearray(1), 0)
        a.send(b"x", 1)
        loop.call_soon(turns.append, 1)
        assert not _core.linger([ours], _LONG_S)
        assert (ours.done(), turns) == (False, [])
        await ours
        assert turns == [1]
        ready = ready_of(loop)
        await until(lambda: not ready)  # what the communicators themselves have to do, too
        ours = b.recv(bytearray(1), 0)
        a.send(b"x", 1)
        assert _core.linger([ours], _LONG_S)
        assert ours.done()


def _called(ran: threading.Event) -> None:
    asyncio.get_running_loop().call_soon(ran.set)


def _called_from_a_thread(ran: threading.Event) -> None:
    thread = threading.Thread(target=asyncio.get_running_loop().call_soon_threadsafe, args=(ran.set,))
    thread.start()
    thread.join()


def _due(ran: threading.Event) -> None:
    asyncio.get_running_loop().call_later(0, ran.set)


def _readable(ran: threading.Event) -> None:
    loop, (here, there) = asyncio.get_running_loop(), socket.socketpair()

    def read() -> None:
        loop.remove_reader(here)
        here.close()
        there.close()
        ran.set()

    loop.add_reader(here, read)
    there.send(b"x")


@pytest.mark.anyio
@pytest.mark.parametrize("begin", [_called, _called_from_a_thread, _due, _readable])
async def test_others_run_in_a_turn(
    anyio_backend_name: str, begin: Callable[[threading.Event], None]
) -> None:
    backend, ran = current_backend(), threading.Event()
    if anyio_backend_name == "trio":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_set, ran)
            await backend.turn()
            await backend.turn()
        assert ran.is_set()
        return
    begin(ran)
    for _ in range(2):  # a descriptor's callback is made ready by one turn, and runs in the next
        await backend.turn()
    assert ran.is_set()


async def _set(ran: threading.Event) -> None:
    ran.set()


def test_a_turn_that_would_run_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        later = loop.call_later(1000, math.sqrt, 1)
        await asyncio.sleep(0)  # what the runner has begun with
        monkeypatch.setattr(asyncio, "sleep", sleep)
        await AsyncioBackend(loop).turn()
        assert slept == []
        loop.call_soon(math.sqrt, 1)
        await AsyncioBackend(loop).turn()
        assert slept == [0, 0]  # the callback is ready still: nothing has run
        later.cancel()

    slept: list[float] = []
    asyncio.run(main())


@pytest.mark.anyio
async def test_a_turn_is_due_after_a_while() -> None:
    async with world(1) as (comm,):
        assert not comm._engine.turn_due(True, 1e-3)  # others have had one
        await until(lambda: comm._engine.turn_due(False, 1e-3))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_events_that_come_with_one_whose_hook_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told, and each error is: there is nobody to whom it could be raised."""
    told: list[object] = []
    unraisable: list[object] = []

    def hook(event: tuple[object, ...]) -> None:
        told.append(event[3])
        raise ValueError

    monkeypatch.setattr(sys, "unraisablehook", lambda raised: unraisable.append(raised.exc_type))
    async with world(2, warmup=True) as (a, b), a.register(bytearray(1)) as region:
        a._engine.on_events(hook)
        remote = b.remote(region.handle)
        puts = [b.put(b"x", remote, notify=bytes([i])) for i in range(5)]
        await until(lambda: len(told) == 5)
        for put in puts:
            await put
        a._engine.on_events(a._on_native_event)
    assert told == [bytes([i]) for i in range(5)]
    assert unraisable == [ValueError] * 5
