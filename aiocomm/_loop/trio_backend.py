"""trio: a system task waits for the engine's doorbell."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import trio

from aiocomm._forked import tell_of_fork

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

    from aiocomm_native._core import Engine

__all__ = ["TrioBackend"]


class TrioBackend:
    """The trio run in which the communicator was opened."""

    name = "trio"

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._thread: int | None = threading.get_ident()
        self._scopes: list[trio.CancelScope] = []
        self._watching = 0
        self._ended = False
        tell_of_fork(self)

    def _on_fork(self) -> None:
        self._thread = None  # the run seems to go on in the child; asyncio knows by itself that its does not

    def attach(self, engine: Engine) -> None:
        engine.bind_trio()
        for fd in (engine.loop_fd, engine.express_fd):
            scope = trio.CancelScope()
            self._scopes.append(scope)
            trio.lowlevel.spawn_system_task(self._watch, engine, fd, scope)
            self._watching += 1

    async def _watch(self, engine: Engine, fd: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                while True:
                    await trio.lowlevel.wait_readable(fd)
                    engine.drain()
        finally:
            self._ended = self._ended or not scope.cancel_called  # by the end of the run, which cancels all
            self._watching -= 1
            if not self._watching:
                engine.release_descriptors()

    def detach(self, engine: Engine) -> None:
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    def running_here(self) -> bool:
        # Once this run has ended, another one in its thread is no home.
        return not self._ended and threading.get_ident() == self._thread and trio.lowlevel.in_trio_run()

    async def wait(self, future: concurrent.futures.Future[Any]) -> Any:
        done = trio.Event()

        def ended(_: object) -> None:
            self.call_threadsafe(done.set)

        future.add_done_callback(ended)
        try:
            await done.wait()
        except trio.Cancelled:
            future.cancel()
            raise
        return future.result()

    async def turn(self) -> None:
        await trio.lowlevel.checkpoint()

    def call_threadsafe(self, callback: Callable[[], object]) -> bool:
        try:
            self._token.run_sync_soon(_call, callback)
        except trio.RunFinishedError:
            return False
        return True

    def has_ended(self) -> bool:
        return self._ended


def _call(callback: Callable[[], object]) -> None:
    """Tell of an error, as asyncio does; trio would end the run for it."""
    try:
        callback()
    except Exception:
        sys.excepthook(*sys.exc_info())
