"""asyncio and uvloop: the engine's doorbell is a reader of the loop."""

from __future__ import annotations

import asyncio
import gc
import select
import selectors
from collections import deque
from typing import TYPE_CHECKING, Any

from aiocomm._loop.spin import SpinSelector

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

    from aiocomm_native._core import Engine

__all__ = ["AsyncioBackend", "ready_of"]


class AsyncioBackend:
    """The loop that was running when the communicator was opened."""

    name = "asyncio"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        selector = getattr(loop, "_selector", None)
        self._spin = selector if isinstance(selector, SpinSelector) else None
        self._rings: dict[int, Callable[[], object]] = {}  # what is to be done for a bell, by its descriptor
        self._news: select.poll | None = None  # of its descriptors, where all that a turn runs is seen
        if isinstance(loop, asyncio.SelectorEventLoop) and isinstance(selector, selectors.EpollSelector):
            self._news = select.poll()
            self._news.register(selector.fileno(), select.POLLIN)

    def attach(self, engine: Engine) -> None:
        self._rings = {engine.loop_fd: engine.drain, engine.express_fd: engine.drain_express}
        for fd, ring in self._rings.items():
            self._loop.add_reader(fd, ring)
        engine.bind_asyncio(self._loop, ready_of(self._loop), self._bells(engine))
        if self._spin is not None:
            self._spin.add(engine)

    def _bells(self, engine: Engine) -> tuple[Any, ...]:
        """The loop's handles that only call for what the engine has."""
        selector = getattr(self._loop, "_selector", None)
        try:
            return tuple(selector.get_key(fd).data[0] for fd in (engine.loop_fd, engine.express_fd))  # type: ignore[union-attr]
        except (AttributeError, KeyError, LookupError, TypeError):  # loops of other kinds
            return ()

    def detach(self, engine: Engine) -> None:
        if self._spin is not None:
            self._spin.discard(engine)
        if engine.loop_fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(engine.loop_fd)
            self._loop.remove_reader(engine.express_fd)
        engine.release_descriptors()

    def running_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    async def wait(self, future: concurrent.futures.Future[Any]) -> Any:
        return await asyncio.wrap_future(future)

    async def turn(self) -> None:
        if self._has_nothing():
            return
        await asyncio.sleep(0)  # anyio's checkpoints take 25 µs longer
        if self._news is not None and self._loop._ready:  # type: ignore[attr-defined]
            await asyncio.sleep(0)  # timers and descriptors that were found by that

    def _has_nothing(self) -> bool:
        """Whether a turn would run nothing, and so only take its 25 µs. What the engine has is done."""
        if self._news is None:
            return False
        loop: Any = self._loop
        timers = loop._scheduled
        if loop._ready or (timers and timers[0].when() < loop.time() + loop._clock_resolution):
            return False
        if not self._news.poll(0):
            return True
        found = selectors.EpollSelector.select(loop._selector, 0)
        if any(key.fd not in self._rings for key, _ in found):
            return False
        for key, _ in found:
            self._rings[key.fd]()
        return not loop._ready

    def call_threadsafe(self, callback: Callable[[], object]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            return False
        return True

    def has_ended(self) -> bool:
        return self._loop.is_closed()


def ready_of(loop: asyncio.AbstractEventLoop) -> Any:
    """The loop's queue of ready callbacks, which says whether it has other work; None: it shows none.

    uvloop's is an attribute that only the garbage collector is shown; a callback of ours tells it apart.
    """
    ready = getattr(loop, "_ready", None)
    if ready is not None:
        return ready
    ours = loop.call_soon(_nothing)
    found = [one for one in gc.get_referents(loop) if type(one) is deque and any(h is ours for h in one)]
    ours.cancel()
    return found[0] if len(found) == 1 else None


def _nothing() -> None:
    """Do what there is to do."""
