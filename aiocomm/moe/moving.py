"""Dispatch and combine of one rank, on the messages of `exchange`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.collectives.headers import header, refusal
from aiocomm.errors import PeerError
from aiocomm.moe.exchange import LISTS, ROWS, Exchange
from aiocomm.moe.routing import arrange
from aiocomm.moe.weighting import accumulator, add_up, weigh
from aiocomm.moe.wire import HEAD_BYTES, LISTS_RIDE, ROWS_RIDE, Head, lists_bytes, pack_lists, unpack_lists

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.dispatched import Dispatched
    from aiocomm.moe.placement import Placement
    from aiocomm.moe.routing import Arrangement, Part

    Array = NDArray[Any]
    Bytes = NDArray[np.uint8]

__all__ = ["Combine", "Dispatch", "Refused"]


class Refused(Exchange):
    """A call that is wrong by itself: the others learn of it instead of waiting."""

    def __init__(
        self, scope: Scope, bulk: int, operation: str, error: Exception, deadline: float | None
    ) -> None:
        super().__init__(scope, bulk, operation, refusal(error), None, (), "auto", deadline)

    async def _send(self) -> None:
        for peer in self._others():
            self._send_head(peer, Head(self._header, 0, 0, 0).pack())


class Dispatch(Exchange):
    """Rows go out as bytes of any dtype.

    Args:
        tokens: shape (tokens, hidden).
    """

    def __init__(
        self,
        scope: Scope,
        bulk: int,
        text: str,
        tokens: Array,
        placement: Placement,
        parts: list[Part],
        path: str,
        deadline: float | None,
    ) -> None:
        super().__init__(scope, bulk, "dispatch", header(text), placement, parts, path, deadline)
        self._given = tokens
        self._placed = placement
        self._width = tokens.shape[1] * tokens.itemsize
        self._lists: dict[int, Bytes] = {}
        self.tokens: Array = tokens[:0]
        self.found: Arrangement

    @property
    def count(self) -> int:
        """Tokens of this rank."""
        return len(self._given)

    def _as_bytes(self, array: Array) -> Bytes:
        return array.view(np.uint8).reshape(len(array), self._width)

    def _pack(self, part: Part, into: Bytes) -> None:
        if part.rows:
            np.take(
                self._as_bytes(self._given), part.tokens, 0, into.reshape(part.rows, self._width), mode="clip"
            )

    async def _send(self) -> None:
        following = []
        for peer in self._others():
            part = self._parts[peer]
            lists, rows = lists_bytes(part.rows, len(part.experts)), part.rows * self._width
            flags = LISTS_RIDE * (HEAD_BYTES + lists <= self._ride_bytes)
            flags |= ROWS_RIDE * (HEAD_BYTES + lists + rows <= self._ride_bytes)
            message = self._borrow(HEAD_BYTES + lists * bool(flags) + rows * bool(flags & ROWS_RIDE))
            head = Head(self._header, part.rows, len(part.experts), flags).pack()
            message[:HEAD_BYTES] = np.frombuffer(head, np.uint8)
            if flags:
                pack_lists(part, message[HEAD_BYTES : HEAD_BYTES + lists])
            if flags & ROWS_RIDE:
                await self._work(rows, partial(self._pack, part, message[HEAD_BYTES + lists :]))
            self._send_head(peer, message)
            if not flags & ROWS_RIDE:
                following.append((peer, part, flags))
        for peer, part, flags in following:
            if not flags:
                memory = self._borrow(lists_bytes(part.rows, len(part.experts)))
                pack_lists(part, memory)
                self._send_following(peer, LISTS, memory)
            memory = self._borrow(part.rows * self._width)
            await self._work(memory.nbytes, partial(self._pack, part, memory))
            self._send_following(peer, ROWS, memory)

    async def _receive(self) -> None:
        heads, own = self._heads, self._parts[self._group.rank]
        counts = [heads[r].rows if r in heads else own.rows for r in range(self._group.size)]
        ends = np.cumsum(counts).tolist()
        self.tokens = np.empty((ends[-1], self._given.shape[1]), self._given.dtype)
        rows = self._as_bytes(self.tokens)
        places = [rows[end - n : end].reshape(-1) for n, end in zip(counts, ends, strict=True)]
        riding = []
        for peer, head in heads.items():
            lists = lists_bytes(head.rows, head.assignments)
            if head.flags & LISTS_RIDE:
                self._lists[peer] = self._slot(peer)[HEAD_BYTES : HEAD_BYTES + lists]
            else:
                self._lists[peer] = self._borrow(lists)
                self._receive_following(peer, LISTS, self._lists[peer])
            if head.flags & ROWS_RIDE:
                riding.append((places[peer], self._slot(peer)[HEAD_BYTES + lists :]))
            else:
                self._receive_following(peer, ROWS, places[peer])

        def copy() -> None:
            self._pack(own, places[self._group.rank])
            for place, came in riding:
                place[:] = came[: place.nbytes]

        await self._work(own.rows * self._width + sum(place.nbytes for place, _ in riding), copy)

    async def _finish(self) -> None:
        await self._work(16 * sum(head.assignments for head in self._heads.values()), self._arrange)

    def _arrange(self) -> None:
        rank = self._group.rank
        came = []
        for peer in range(self._group.size):
            if peer == rank:
                came.append(self._parts[rank])
                continue
            try:
                came.append(unpack_lists(self._heads[peer], self._lists[peer], self._placed, rank))
            except ValueError as error:
                raise PeerError(
                    f"dispatch: {self._group.names[peer]}: {error}", self._group.ranks[peer]
                ) from None
        self.found = arrange(came, self._placed, rank)


class Combine(Exchange):
    """Partial sums go back to where the tokens came from.

    Args:
        outputs: one row per assignment; shape (assignments, hidden).
        wire: the dtype in which partial sums travel.
        out: receives the result; shape (tokens, hidden).
    """

    def __init__(
        self,
        scope: Scope,
        bulk: int,
        text: str,
        outputs: Array,
        dispatched: Dispatched,
        wire: np.dtype[Any],
        out: Array,
        path: str,
        deadline: float | None,
    ) -> None:
        placement, parts = dispatched._placement, dispatched._sent
        super().__init__(scope, bulk, "combine", header(text), placement, parts, path, deadline)
        self._outputs = outputs
        self._found = dispatched._found
        self._hidden = outputs.shape[1]
        self._wire = wire
        self._sum = accumulator(outputs.dtype)
        self._out = out
        self._sums: dict[int, Array] = {}
        rows = max(1, len(self._found.first) - 1)
        self._terms = outputs.nbytes // rows + self._hidden * wire.itemsize  # bytes of work per row

    def _shaped(self, memory: Bytes, dtype: np.dtype[Any]) -> Array:
        rows = memory.nbytes // dtype.itemsize // self._hidden if self._hidden else 0
        return memory.view(dtype).reshape(rows, self._hidden)

    def _weigh(self, rank: int, into: Bytes, wire: np.dtype[Any]) -> None:
        start, stop = self._found.starts[rank : rank + 2].tolist()
        weigh(self._outputs, self._found, start, stop, self._shaped(into, wire))

    async def _send(self) -> None:
        starts = self._found.starts
        for peer in self._others():
            rows = int(starts[peer + 1] - starts[peer])
            nbytes = rows * self._hidden * self._wire.itemsize
            rides = HEAD_BYTES + nbytes <= self._ride_bytes
            head = Head(self._header, rows, 0, ROWS_RIDE * rides).pack()
            traffic = rows * self._terms
            if rides:
                message = self._borrow(HEAD_BYTES + nbytes)
                message[:HEAD_BYTES] = np.frombuffer(head, np.uint8)
                await self._work(traffic, partial(self._weigh, peer, message[HEAD_BYTES:], self._wire))
                self._send_head(peer, message)
            else:
                self._send_head(peer, head)
                memory = self._borrow(nbytes)
                await self._work(traffic, partial(self._weigh, peer, memory, self._wire))
                self._send_following(peer, ROWS, memory)

    async def _receive(self) -> None:
        own = self._group.rank
        for peer, head in self._heads.items():
            rows = self._parts[peer].rows
            self._check_rows(peer, head.rows, rows)
            nbytes = rows * self._hidden * self._wire.itemsize
            if head.flags & ROWS_RIDE:
                came = self._slot(peer)[HEAD_BYTES : HEAD_BYTES + nbytes]
            else:
                came = self._borrow(nbytes)
                self._receive_following(peer, ROWS, came)
            self._sums[peer] = self._shaped(came, self._wire)
        rows = self._parts[own].rows
        mine = self._borrow(rows * self._hidden * self._sum.itemsize)
        await self._work(rows * self._terms, partial(self._weigh, own, mine, self._sum))
        self._sums[own] = self._shaped(mine, self._sum)

    async def _finish(self) -> None:
        nbytes = sum(sums.nbytes for sums in self._sums.values())
        await self._work(nbytes, self._add_up)

    def _add_up(self) -> None:
        parts = [(self._parts[r].tokens, self._sums[r]) for r in range(self._group.size)]
        add_up(parts, self._sum == np.float64, self._out)
