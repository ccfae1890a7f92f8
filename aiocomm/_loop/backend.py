"""One interface to the running event loop, whichever it is."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

    from aiocomm_native._core import Engine

__all__ = ["Backend", "current_backend", "elsewhere", "import_early", "in_trio"]


class Backend(Protocol):
    """What a communicator needs of its loop."""

    name: str

    def attach(self, engine: Engine) -> None:
        """Wake for the engine's descriptors from now on."""

    def detach(self, engine: Engine) -> None:
        """Undo `attach`, and let go of the engine's descriptors if it is closed. Idempotent."""

    def running_here(self) -> bool:
        """Whether the calling code runs on this loop."""

    async def wait(self, future: concurrent.futures.Future[Any]) -> Any:
        """Await a thread's future; a cancelled wait cancels it."""

    async def turn(self) -> None:
        """Let other tasks run, once, if any can. The caller may be cancelled meanwhile."""

    def call_threadsafe(self, callback: Callable[[], object]) -> bool:
        """Run on the loop's thread, soon. Any thread; False, and nothing is done, once the loop has ended."""

    def has_ended(self) -> bool:
        """Whether the loop will never run again: what was to be called then may not have been. Any thread."""


def import_early() -> None:
    """Have anyio import now what it imports on first use: it would stop the loop in the middle of a call."""
    anyio.get_cancelled_exc_class()  # asks the running loop's own part of it
    for name in ("CancelScope", "Event", "create_task_group", "fail_after", "move_on_after", "sleep"):
        getattr(anyio, name)


def in_trio() -> bool:
    """Whether a loop of trio runs in this thread."""
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


def current_backend() -> Backend:
    """The backend of the running loop.

    Raises:
        UsageError: no event loop is running here.
    """
    if in_trio():
        from aiocomm._loop.trio_backend import TrioBackend

        return TrioBackend()
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(
            "no event loop is running in this thread: call from a coroutine (aiocomm.run(main())), or use "
            f"comm.from_thread (thread {threading.current_thread().name})"
        ) from None
    from aiocomm._loop.asyncio_backend import AsyncioBackend

    return AsyncioBackend(loop)


def elsewhere() -> str:
    """What is told to who calls a communicator where its loop does not run."""
    if asyncio._get_running_loop() is None and not in_trio():
        return (
            "no event loop is running in this thread: call from a coroutine of the loop that opened the "
            "communicator; while that runs in another thread, comm.from_thread calls it from here"
        )
    return (
        "this communicator belongs to another event loop or thread: use comm.from_thread there, or open one "
        "communicator per loop"
    )
