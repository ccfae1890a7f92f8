"""Written by hand: the receiver copies from the sender's memory (process_vm_readv), eventfds wake both."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from .. import cma
from ..shared import Doorbell, share
from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..control import Control

_ADDRESSES = 128  # messages that may wait at once
_LINE = 64 // 8
_SIDE = 2 * _LINE + _ADDRESSES


class _Side:
    """What one sender posts: `head` messages announced, `tail` of them read, and their addresses."""

    def __init__(self, words: Array, role: int) -> None:
        side = words.view(np.uint64)[role * _SIDE : (role + 1) * _SIDE]
        self.head, self.tail, self.addresses = side[:1], side[_LINE : _LINE + 1], side[2 * _LINE :]


class _Cma(Transport):
    def __init__(self, role: int, pid: int, memory: Array, fds: list[int]) -> None:
        self._pid = pid
        self._mine, self._theirs = _Side(memory, role), _Side(memory, 1 - role)
        self._ring_data, self._ring_done = fds[2 * role], fds[2 * (1 - role) + 1]
        self._data, self._done = Doorbell(fds[2 * (1 - role)]), Doorbell(fds[2 * role + 1])

    def _announce(self, data: Array) -> int:
        head = int(self._mine.head[0])
        self._mine.addresses[head % _ADDRESSES] = data.ctypes.data
        self._mine.head[0] = head + 1
        os.eventfd_write(self._ring_data, 1)
        return head

    async def _read_by_other(self, number: int) -> None:
        while int(self._mine.tail[0]) <= number:
            await self._done.wait()

    async def send(self, data: Array) -> None:
        await self._read_by_other(self._announce(data))

    async def send_many(self, messages: Sequence[Array]) -> None:
        last = [self._announce(m) for m in messages][-1]
        await self._read_by_other(last)

    async def recv(self, out: Array) -> None:
        theirs = self._theirs
        tail = int(theirs.tail[0])
        while int(theirs.head[0]) == tail:
            await self._data.wait()
        cma.read(self._pid, int(theirs.addresses[tail % _ADDRESSES]), out.ctypes.data, len(out))
        theirs.tail[0] = tail + 1
        os.eventfd_write(self._ring_done, 1)


async def _open(role: int, control: Control) -> Transport:
    cma.allow()
    memory, fds = share(role, control, 2 * _SIDE * 8, 4)
    return _Cma(role, control.swap(os.getpid()), memory, fds)


def _peer(name: str, loop: Loop) -> Peer:
    return Peer(name, _open, "handmade", "memory", loop)


PEERS = [_peer("handmade-cma", "asyncio"), _peer("handmade-cma-uvloop", "uvloop")]
