"""Layers that arrive one after the other: the sender's notes, and the owner's iterator over them.

A note rides with a put, as notifications do, and comes after its layer's data. It names the lease, the call
that sends it, the layer, and how many layers there are; so notes may come in any order, and calls of several
ranks into one lease do not mix.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Final

import anyio

from aiocomm.errors import ClosedError, DeadlineExceeded, PeerLostError, TransferCancelled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

__all__ = ["LayerNotes", "note", "parse"]

_MAGIC: Final = b"\0aiocomm layer\0"
_NOTE: Final = struct.Struct("<QQII")  # lease, call, layer, layers
_GAVE_UP: Final = 0xFFFFFFFF


def note(lease: int, call: int, layer: int | None, layers: int) -> bytes:
    """The note after a layer; without one, that the sender has given up."""
    return _MAGIC + _NOTE.pack(lease, call, _GAVE_UP if layer is None else layer, layers)


def parse(payload: bytes) -> tuple[int, int, int | None, int] | None:
    """Lease, call, layer and layers of a note; None for other notifications."""
    if len(payload) != len(_MAGIC) + _NOTE.size or not payload.startswith(_MAGIC):
        return None
    lease, call, layer, layers = _NOTE.unpack_from(payload, len(_MAGIC))
    return lease, call, None if layer == _GAVE_UP else layer, layers


class _Call:
    """What has come of one call of one rank."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.came: set[int] = set()
        self.gave_up = False


class LayerNotes:
    """The notes for one lease."""

    def __init__(self) -> None:
        self._calls: dict[int, deque[tuple[int, _Call]]] = {}  # by rank, in the order of their first note
        self._lost: set[int] = set()
        self._closed = False
        self._news = anyio.Event()

    def put(self, source: int, call: int, layer: int | None, layers: int) -> None:
        """Take a note."""
        self._lost.discard(source)
        calls = self._calls.setdefault(source, deque())
        known = next((one for number, one in calls if number == call), None)
        if known is None:
            known = _Call(layers)
            calls.append((call, known))
        if layer is None:
            known.gave_up = True
        else:
            known.came.add(layer)
        self._ring()

    def lose(self, rank: int) -> None:
        """A peer is gone."""
        self._lost.add(rank)
        self._ring()

    def close(self) -> None:
        """The lease has ended."""
        self._closed = True
        self._ring()

    def _ring(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    async def layers(self, sources: int | Sequence[int] | None, deadline: float | None) -> AsyncIterator[int]:
        """See `PageLease.layers`."""
        wanted = None if sources is None else [sources] if isinstance(sources, int) else list(sources)
        ends = None if deadline is None else anyio.current_time() + deadline
        while wanted is None:
            wanted = next(([rank] for rank, calls in self._calls.items() if calls), None)
            if wanted is None:
                await self._wait(ends, "no layer has come")
        calls = [await self._first(rank, ends) for rank in wanted]
        layers = min(call.layers for call in calls)
        try:
            for layer in range(layers):
                for rank, call in zip(wanted, calls, strict=True):
                    while layer not in call.came:
                        self._check(rank, call, f"before layer {layer} of {layers}")
                        await self._wait(ends, f"layer {layer} of {layers} has not come from rank {rank}")
                yield layer
        finally:
            for rank in wanted:  # what was not looked at is not the next call's
                self._calls[rank].popleft()

    async def _first(self, rank: int, ends: float | None) -> _Call:
        while not self._calls.get(rank):
            self._check(rank, None, "before the first layer")
            await self._wait(ends, f"no layer has come from rank {rank}")
        return self._calls[rank][0][1]

    def _check(self, rank: int, call: _Call | None, when: str) -> None:
        if call is not None and call.gave_up:
            raise TransferCancelled(f"rank {rank} gave up {when}: its pages are undefined", rank)
        if rank in self._lost:
            raise PeerLostError(f"rank {rank} is gone {when}: its pages are undefined", rank)

    async def _wait(self, ends: float | None, what: str) -> None:
        if self._closed:
            raise ClosedError(f"the lease has ended, and {what}")
        news = self._news
        if ends is None:
            await news.wait()
            return
        with anyio.CancelScope(deadline=ends):
            await news.wait()
            return
        raise DeadlineExceeded(f"{what} in time")
