"""What a communicator sees of its loop: whether that has something else to do than to wait for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio.lowlevel
import pytest
import uvloop
from harness import BACKENDS, world

from aiocomm._loop.asyncio_backend import ready_of
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
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        ours = b.recv(bytearray(1), 0)
        a.send(b"x", 1)
        assert _core.linger([ours], _LONG_S)
        assert ours.done()
