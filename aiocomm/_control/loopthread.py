"""A daemon thread with a private asyncio loop.

The control plane runs here, so that it works alike under asyncio, uvloop and trio, and while the user's loop
is blocked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from aiocomm._control.host import what_to_do
from aiocomm.errors import LinkError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class _Loop(asyncio.SelectorEventLoop):
    """Gives back what it has if it cannot be made: asyncio's own complains when it is collected."""

    def __init__(self) -> None:
        try:
            super().__init__()
        except OSError:
            selector = getattr(self, "_selector", None)
            if selector is not None:
                selector.close()
            self._closed = True
            raise


class LoopThread:
    """Runs coroutines on a thread of its own. Started by the first one, ended by `stop`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False
        # When the thread has ended and given back what it had.
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.ended.set_running_or_notify_cancel()  # so that a cancelled wait does not break it off

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Run a coroutine; the future has its outcome, and cancels it.

        Raises:
            RuntimeError: the thread was stopped.
            LinkError: it cannot be started.
        """
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise RuntimeError(f"{self._name} is stopped")
            if self._loop is None:
                try:
                    self._begin()
                except (OSError, RuntimeError) as error:
                    coroutine.close()
                    number = getattr(error, "errno", None)
                    raise LinkError(
                        f"the thread {self._name} cannot be started: {what_to_do(error)}",
                        number,
                        errno.errorcode.get(number or 0),
                    ) from error
            assert self._loop is not None
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the thread, soon; nothing happens once it is stopped."""
        with self._lock:
            if self._loop is not None and not self._stopped:
                self._loop.call_soon_threadsafe(function, *arguments)

    @property
    def started(self) -> bool:
        """Whether something has been submitted."""
        return self._loop is not None

    def stop(self) -> None:
        """End the loop after what is ready now has run. Any thread; idempotent."""
        with self._lock:
            if not self._stopped:
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._loop.stop)
                else:
                    self.ended.set_result(None)
            self._stopped = True

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread to end. Not from the thread itself."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _begin(self) -> None:
        # Never the policy's loop: that may be uvloop, whose add_reader and sock_* differ in detail.
        loop = _Loop()
        thread = threading.Thread(target=self._run, args=(loop,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            loop.close()
            raise
        self._loop, self._thread = loop, thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            try:
                left = asyncio.all_tasks(loop)
                for task in left:
                    task.cancel()
                if left:
                    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            finally:
                asyncio.set_event_loop(None)
                loop.close()
                self.ended.set_result(None)
