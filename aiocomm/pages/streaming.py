"""Layers that arrive one after the other: the sender's notes, and the owner's iterator over them.

A note rides with a put, as notifications do, and comes after its layer's data. It names the lease, the call
that sends it, the layer, and how many layers there are; so notes may come in any order, and calls of several
ranks into one lease do not mix.

An iteration takes a call of each of its sources when it begins, and nothing gives it back: so there is one
for each call, wherever it was stopped, and notes that come later are known as a call's that is over. A sender
that is cancelled after its last note may say that it gave up when all layers are there: that is not news.
"""

from __future__ import annotations

import itertools
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import anyio

from aiocomm.errors import ClosedError, DeadlineExceeded, PeerLostError, TransferCancelled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

__all__ = ["LayerNotes", "note", "parse"]

_MAGIC: Final = b"\0aiocomm layer\0"
_NOTE: Final = struct.Struct("<QQII")  # lease, call, layer, layers
_GAVE_UP: Final = 0xFFFFFFFF
_WAITING: Final = 256  # calls of a source that no iteration has taken
_REMEMBERED: Final = 256  # calls of a source of which nothing can come but that the sender gave up


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

    def __init__(self, at: int, layers: int) -> None:
        self.at = at  # its place among the calls of all ranks
        self.layers = layers
        self.came: set[int] = set()
        self.gave_up = False
        self.lost = False

    @property
    def over(self) -> bool:
        """Whether no layer will come."""
        return len(self.came) >= self.layers or self.gave_up or self.lost


class _Source:
    """The calls of one rank, by number."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[int, _Call] = OrderedDict()  # in the order of their first notes
        self.taken: dict[int, _Call] = {}  # of which more is to come, also if nobody looks
        self.past: OrderedDict[int, None] = OrderedDict()  # the last ones of which nothing is
        self.lost = False

    def take(self) -> _Call:
        number, call = self.waiting.popitem(last=False)
        self.taken[number] = call
        self.look(number)
        return call

    def look(self, number: int) -> None:
        """Keep only the number of a call that is over."""
        if (call := self.taken.get(number)) is not None and call.over:
            del self.taken[number]
            self.past[number] = None
            if len(self.past) > _REMEMBERED:
                self.past.popitem(last=False)


class LayerNotes:
    """The notes for one lease."""

    def __init__(self) -> None:
        self._sources: dict[int, _Source] = {}
        self._calls = itertools.count()
        self._closed = False
        self._news = anyio.Event()

    def put(self, source: int, number: int, layer: int | None, layers: int) -> None:
        """Take a note."""
        of = self._of(source)
        of.lost = False
        if number in of.past:
            return
        call = of.taken.get(number) or of.waiting.get(number)
        if call is None:
            call = of.waiting[number] = _Call(next(self._calls), layers)
            if len(of.waiting) > _WAITING:
                of.take()
        if layer is None:
            call.gave_up = True
        else:
            call.came.add(layer)
        of.look(number)
        self._ring()

    def lose(self, rank: int) -> None:
        """A peer is gone."""
        of = self._of(rank)
        of.lost = True
        for number, call in [*of.taken.items(), *of.waiting.items()]:
            call.lost = True
            of.look(number)
        self._ring()

    def close(self) -> None:
        """The lease has ended."""
        self._closed = True
        self._ring()

    def _of(self, rank: int) -> _Source:
        return self._sources.setdefault(rank, _Source())

    def _ring(self) -> None:
        news, self._news = self._news, anyio.Event()
        news.set()

    async def layers(
        self, sources: Sequence[int] | None, deadline: float | None
    ) -> AsyncGenerator[int, None]:
        """See `PageLease.layers`.

        Args:
            sources: ranks, at least one, none twice.
        """
        ends = None if deadline is None else anyio.current_time() + deadline
        wanted, calls = await self._taken(sources, ends)
        layers = min(call.layers for call in calls)
        for layer in range(layers):
            for rank, call in zip(wanted, calls, strict=True):
                while layer not in call.came:
                    if call.gave_up:
                        why = f"rank {rank} gave up before layer {layer} of {layers}: its pages are undefined"
                        raise TransferCancelled(why, rank)
                    if call.lost:
                        _gone(rank, f"before layer {layer} of {layers}")
                    await self._wait(ends, f"layer {layer} of {layers} has not come from rank {rank}")
            yield layer

    async def _taken(
        self, sources: Sequence[int] | None, ends: float | None
    ) -> tuple[Sequence[int], list[_Call]]:
        """The next call of each source, once all have one; of any source: the call that is heard of first."""
        while True:
            wanted = self._first_of_all() if sources is None else sources
            missing = next((rank for rank in wanted if not self._of(rank).waiting), None)
            if wanted and missing is None:
                return wanted, [self._of(rank).take() for rank in wanted]
            if missing is not None and self._of(missing).lost:
                _gone(missing, "before the first layer")
            await self._wait(ends, "no layer has come" + ("" if missing is None else f" from rank {missing}"))

    def _first_of_all(self) -> list[int]:
        waiting = [(next(iter(of.waiting.values())).at, r) for r, of in self._sources.items() if of.waiting]
        return [min(waiting)[1]] if waiting else []

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


def _gone(rank: int, when: str) -> None:
    raise PeerLostError(f"rank {rank} is gone {when}: its pages are undefined", rank)
