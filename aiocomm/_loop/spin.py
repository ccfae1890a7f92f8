"""A selector that polls the engines for a moment before it sleeps.

A wake-up through the kernel costs more than moving 64 KiB. Spinning saves it where answers come fast, and
costs a core for at most `spin_s` after the last of them; timers and descriptors have their turn meanwhile. It
stops by itself where cores are short: the native side gives up once its core was taken from it, and skips
spins for a while.

A process spins in one thread at most: loops of other threads only look meanwhile, and sleep.
"""

from __future__ import annotations

import math
import selectors
import threading
from typing import TYPE_CHECKING

from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm_native._core import Engine

__all__ = ["SpinSelector"]

_spinning = threading.Lock()  # held by the one thread that spins


class SpinSelector(selectors.EpollSelector):
    """An epoll selector for `asyncio.SelectorEventLoop`: polls all engines, each turn, before it sleeps."""

    def __init__(self, spin_s: float) -> None:
        super().__init__()
        self._spinner = _core.Spinner(spin_s, self.fileno())
        self._engines: list[Engine] = []  # which it does not keep

    def add(self, engine: Engine) -> None:
        """Poll this engine, too."""
        self._engines.append(engine)
        self._spinner.add(engine)

    def discard(self, engine: Engine) -> None:
        """Poll it no more."""
        if engine in self._engines:
            self._spinner.discard(engine)
            self._engines.remove(engine)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As for any selector; completions found by polling are handed to the loop as ready callbacks."""
        if not self._engines:
            return super().select(timeout)
        spinner, waits = self._spinner, timeout is None or timeout > 0
        if waits and _spinning.acquire(blocking=False):
            try:
                found = spinner.spin(math.inf if timeout is None else timeout)
            finally:
                _spinning.release()
        else:
            found = spinner.look()
        if found and spinner.looked():
            return []
        if waits and not found:
            found = spinner.prepare_to_sleep()
        try:
            return super().select(0 if found else timeout)
        finally:
            spinner.woken()
