"""Shared memory and eventfds between the two processes, for what is written by hand here."""

from __future__ import annotations

import asyncio
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .control import Control


def share(role: int, control: Control, nbytes: int, eventfds: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Return a zeroed segment and eventfds that both processes hold; nothing of it has a name."""
    if role == 0:
        memory = os.memfd_create("aiocomm-bench")
        os.ftruncate(memory, nbytes)
        fds = [memory, *(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(eventfds))]
        control.send_fds(fds)
    else:
        fds = control.recv_fds(1 + eventfds)
    control.swap("shared")
    return np.frombuffer(mmap.mmap(fds[0], nbytes), np.uint8), fds[1:]


class Doorbell:
    """Waits for an eventfd in the running loop, one waiter at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None
        self._loop.add_reader(fd, self._ring)

    def _ring(self) -> None:
        os.eventfd_read(self._fd)
        if self._waiter is None:
            self._rung = True
        else:
            self._waiter.set_result(None)
            self._waiter = None

    async def wait(self) -> None:
        """Return once the doorbell has rung since the last wait."""
        if not self._rung:
            self._waiter = self._loop.create_future()
            await self._waiter
        self._rung = False
