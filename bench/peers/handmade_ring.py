"""The least one can write by hand: a ring of slots in shared memory and an eventfd in the event loop.

One ring each way, its counters on cache lines of their own. Both ends know the size of the next message, so
there are no headers, tags, channels, cancellation or lost peers: a comparison shows what those cost. Stores
become visible in program order on x86; this is not written for other processors.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from ..shared import Doorbell, share
from ..sizes import KIB
from .base import Array, Loop, Peer, Transport

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..control import Control

_SLOT, _SLOTS = 256 * KIB, 16
_COUNTERS = 4 * KIB
_LINE = 64 // 8  # counters are 8 bytes
_CREDIT_EVERY = _SLOTS // 2  # a full ring is always drained across a multiple of this, which wakes the sender


class _Half:
    """One direction: `head` counts slots filled, `tail` slots emptied."""

    def __init__(self, counters: npt.NDArray[np.uint64], slots: Array, direction: int) -> None:
        self.head = counters[2 * _LINE * direction :]
        self.tail = counters[2 * _LINE * direction + _LINE :]
        self.slots = slots[direction * _SLOT * _SLOTS :]

    def slot(self, number: int, nbytes: int) -> Array:
        start = number % _SLOTS * _SLOT
        return self.slots[start : start + nbytes]


class _Ring(Transport):
    def __init__(self, role: int, memory: Array, fds: list[int]) -> None:
        counters, slots = memory[:_COUNTERS].view(np.uint64), memory[_COUNTERS:]
        self._out, self._in = _Half(counters, slots, role), _Half(counters, slots, 1 - role)
        self._ring_data, self._ring_credit = fds[2 * role], fds[2 * (1 - role) + 1]
        self._data, self._credit = Doorbell(fds[2 * (1 - role)]), Doorbell(fds[2 * role + 1])

    async def send(self, data: Array) -> None:
        out = self._out
        for start in range(0, len(data), _SLOT):
            part = data[start : start + _SLOT]
            head = int(out.head[0])
            while head - int(out.tail[0]) == _SLOTS:
                await self._credit.wait()
            np.copyto(out.slot(head, len(part)), part)
            out.head[0] = head + 1
            os.eventfd_write(self._ring_data, 1)

    async def recv(self, out: Array) -> None:
        inward = self._in
        for start in range(0, len(out), _SLOT):
            part = out[start : start + _SLOT]
            tail = int(inward.tail[0])
            while int(inward.head[0]) == tail:
                await self._data.wait()
            np.copyto(part, inward.slot(tail, len(part)))
            inward.tail[0] = tail + 1
            if (tail + 1) % _CREDIT_EVERY == 0:
                os.eventfd_write(self._ring_credit, 1)


async def _open(role: int, control: Control) -> Transport:
    memory, fds = share(role, control, _COUNTERS + 2 * _SLOT * _SLOTS, 4)
    return _Ring(role, memory, fds)


def _peer(name: str, loop: Loop) -> Peer:
    return Peer(name, _open, "handmade", "memory", loop)


PEERS = [_peer("handmade-ring", "asyncio"), _peer("handmade-ring-uvloop", "uvloop")]
