"""Layers that arrive one after the other: the sender's notes, and the owner's iterator over them.

A note rides with a put, as notifications do, and comes after its layer's data. It names the lease, the call
that sends it, the layer, and how many layers there are; so notes may come in any order, and calls of several
ranks into one lease do not mix.

An iteration takes a call of each of its sources when it begins, and nothing gives it back: so there is one
for each call, wherever it was stopped, and notes that come later are known as a call's that is over. A sender
that is cancelled after its last note may say that it gave up when all layers are there: that is not news.

An iteration is an object, and no async generator: a wait that is cancelled would finish a generator, which
then ends as if all layers had come.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections import OrderedDict
from copy import copy
from typing import TYPE_CHECKING, Final, NoReturn

import anyio
import anyio.lowlevel

from aiocomm.errors import AiocommError, ClosedError, DeadlineExceeded, PeerLostError, TransferCancelled

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LayerNotes", "Layers", "note", "parse"]

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
        self._closed: str | None = None  # why
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
        self.ring()

    def lose(self, rank: int) -> None:
        """A peer is gone."""
        of = self._of(rank)
        of.lost = True
        for number, call in [*of.taken.items(), *of.waiting.items()]:
            call.lost = True
            of.look(number)
        self.ring()

    def close(self, why: str = "the lease has ended") -> None:
        """No more notes will come. What is told is why that was so first."""
        self._closed = self._closed or why
        self.ring()

    def ring(self) -> None:
        """Have all that wait look again."""
        news, self._news = self._news, anyio.Event()
        news.set()

    def layers(self, sources: Sequence[int] | None, deadline: float | None) -> Layers:
        """See `PageLease.layers`.

        Args:
            sources: ranks, at least one, none twice.
        """
        return Layers(self, sources, deadline)

    def take(self, sources: Sequence[int] | None) -> tuple[Sequence[int], list[_Call]] | str:
        """The next call of each source, once all have one; of any source: the call that is heard of first.

        Returns:
            The sources and their calls, or what is missing.
        """
        wanted = self._first_of_all() if sources is None else sources
        missing = next((rank for rank in wanted if not self._of(rank).waiting), None)
        if missing is not None:
            if self._of(missing).lost:
                _gone(missing, "before the first layer")
            return f"no layer has come from rank {missing}"
        return (wanted, [self._of(rank).take() for rank in wanted]) if wanted else "no layer has come"

    async def wait(self, ends: float | None, what: str) -> None:
        """Return when there is news.

        Args:
            ends: when the wait fails, by `time.monotonic()`.
            what: is missing, for messages.
        """
        if self._closed is not None:
            raise ClosedError(f"{self._closed}, and {what}")
        news = self._news
        if ends is None:
            await news.wait()
            return
        with anyio.move_on_after(max(0.0, ends - time.monotonic())):
            await news.wait()
            return
        raise DeadlineExceeded(f"{what} in time")

    def _of(self, rank: int) -> _Source:
        return self._sources.setdefault(rank, _Source())

    def _first_of_all(self) -> list[int]:
        waiting = [(next(iter(of.waiting.values())).at, r) for r, of in self._sources.items() if of.waiting]
        return [min(waiting)[1]] if waiting else []


class Layers:
    """One iteration. A wait that is cancelled is for the same layer when it is taken up again."""

    def __init__(self, notes: LayerNotes, sources: Sequence[int] | None, deadline: float | None) -> None:
        self._notes = notes
        self._sources = sources
        self._ends = None if deadline is None else time.monotonic() + deadline
        self._calls: list[tuple[int, _Call]] = []  # the sources and what each brings, once they are taken
        self._next = 0
        self._layers = 0
        self._left = False
        self._error: AiocommError | None = None  # without its traceback, which would keep who was told

    def __aiter__(self) -> Layers:
        return self

    async def __anext__(self) -> int:
        if self._error is not None:
            await anyio.lowlevel.checkpoint()  # who asks again and again must not stop the loop
            raise copy(self._error)
        try:
            while not self._left:
                missing = self._missing()
                if missing is None:
                    break
                await self._notes.wait(self._ends, missing)
        except AiocommError as error:
            self._error = copy(error)
            raise
        if self._left or self._next == self._layers:
            raise StopAsyncIteration
        self._next += 1
        return self._next - 1

    def _missing(self) -> str | None:
        """What keeps the next layer, or the end, from being told."""
        if not self._calls:
            taken = self._notes.take(self._sources)
            if isinstance(taken, str):
                return taken
            self._calls = list(zip(*taken, strict=True))
            self._layers = min(call.layers for _, call in self._calls)
        if self._next == self._layers:
            return None
        which = f"layer {self._next} of {self._layers}"
        for rank, call in self._calls:
            if self._next in call.came:
                continue
            if call.gave_up:
                raise TransferCancelled(f"rank {rank} gave up before {which}: its pages are undefined", rank)
            if call.lost:
                _gone(rank, f"before {which}")
            return f"{which} has not come from rank {rank}"
        return None

    async def aclose(self) -> None:
        """Stop iterating; what is still to come of its calls is not another iteration's."""
        self._left = True
        self._notes.ring()


def _gone(rank: int, when: str) -> NoReturn:
    raise PeerLostError(f"rank {rank} is gone {when}: its pages are undefined", rank)
