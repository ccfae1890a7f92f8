"""Waiting for news that callbacks bring, on whichever loop runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from aiocomm._loop.backend import Backend

__all__ = ["Gate"]


class Gate:
    """One waiter. `ring` may come before `wait`, any number of times."""

    def __init__(self, backend: Backend) -> None:
        self._loop = asyncio.get_running_loop() if backend.name == "asyncio" else None
        self._rung = False
        self._waiter: asyncio.Future[None] | anyio.Event | None = None

    @property
    def rung(self) -> bool:
        """Whether the next wait returns at once."""
        return self._rung

    def ring(self) -> None:
        """Let the waiter, or the next one, go on."""
        self._rung = True
        waiter = self._waiter
        if waiter is None:
            return
        self._waiter = None
        if isinstance(waiter, anyio.Event):
            waiter.set()
        elif not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Return once it has rung since the last wait."""
        if not self._rung:
            if self._loop is not None:
                self._waiter = future = self._loop.create_future()
                await future
            else:
                self._waiter = event = anyio.Event()
                await event.wait()
        self._rung = False

    async def wait_shielded(self, until: Any) -> None:
        """Wait until `until()` holds, whatever is cancelled meanwhile; a cancellation is raised then."""
        if until():
            return
        cancelled: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while not until():
                try:
                    await self.wait()
                except asyncio.CancelledError as error:  # Task.cancel() goes through a shield
                    cancelled = error
        if cancelled is not None:
            raise cancelled
