"""The usual dispatch and combine of GPU arrays, of a decode batch for example, in a few calls into the extension.

What is waited for meanwhile, an own kernel and the others' messages, is looked for by these calls, without a turn
of the loop, for up to `LINGER_S` each. They decide nothing but plain success: where anything is unusual (rows
that copy engines are to get, lists that do not ride, memory out of reach, ranks that called differently), the
steps of `device_exchange` begin again from the same messages.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.moe.device_exchange import LINGER_S, Where
from aiocomm.moe.device_moving import ENTRY_BYTES, DeviceCombine, DeviceDispatch, host_array, move
from aiocomm.moe.memory import Tables
from aiocomm.moe.routing import MOST_CHOICES, Arrangement, Part, Routed
from aiocomm.moe.wire import LISTS_RIDE
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["QuickCombine", "QuickDispatch"]

_ROUTE_BYTES, _ARRANGE_BYTES = 64, 16  # of memory traffic per choice, per assignment


class QuickDispatch(DeviceDispatch):
    """A dispatch whose rows are read by kernels, and whose lists ride."""

    _swapped = False

    def _swap_quickly(self) -> bool:
        if self._packed:
            return False
        found = self._small_arrays()
        if found is None:
            return False
        ids, weights = found
        most, given, slab, size = ids.size, self._tokens, self._slab, self._group.size
        whole = Part(
            np.empty(most, np.int64),
            np.empty(most, np.uint16),
            np.empty(most, np.int32),
            np.empty(most, np.float32),
        )
        region, nbytes = (0, 0) if slab is None else (slab.region, given.nbytes)
        where = self._group.rank, self._header, self._ended_call(), region, nbytes, self._places(slab)
        try:
            rows, assignments, messages = _core.route_messages(
                ids, weights, given.rows, self._placed.owner, *where, self._slot_bytes, *whole
            )
        except ValueError:
            return False
        assert len(rows) == size + 1
        self._parts = self.parts = Routed(whole, rows, assignments)
        self._swapped = messages is not None and self._swap(messages)
        return self._swapped

    def _small_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Numbers and weights of the experts. None: something about them is unusual."""
        found = {"_ids": self._ids, "_weights": self._weights}
        for name, described, memory in self._read:
            found[name] = host_array(described, memory.bytes)
        ids, weights = np.asarray(found["_ids"]), found["_weights"]
        plain = (
            ids.ndim == 2
            and ids.dtype.kind == "i"
            and 0 < len(ids) == self._tokens.rows
            and 0 < ids.shape[1] <= MOST_CHOICES
            and self._is_inline(ids.size * _ROUTE_BYTES)
        )
        if not plain:
            return None
        if weights is None:
            weights = np.ones(ids.shape, np.float32)
        weights = np.asarray(weights)
        if weights.shape != ids.shape or weights.dtype.kind not in "fiu":
            return None
        return np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(weights, np.float32)

    async def _receive_quickly(self) -> bool:
        if not self._swapped or not self._width or (heads := self._read_heads()) is None:
            return False
        group, width, parts = self._group, self._width, self.parts
        assert isinstance(parts, Routed)
        rank, size = group.rank, group.size
        pulled = []
        for peer in self._others():
            rows, _, flags, *_ = heads[peer]
            if flags != LISTS_RIDE or (rows and not self._may_pull(peer)):
                return False
            if rows:
                pulled.append(peer)
        own = parts[rank]
        rows = [own.rows if peer == rank else heads[peer][0] for peer in range(size)]
        total = sum(rows)
        count = len(own.experts) + sum(heads[peer][1] for peer in self._others())
        if not total or not self._is_inline(max(total, count) * _ARRANGE_BYTES):
            return False
        moves = self._borrow_pinned(total * ENTRY_BYTES)
        slots = self._slots, self._slot_bytes, rank
        extents = _core.list_came(*slots, size, own.tokens, moves.bytes)
        if extents is None:
            return False
        for peer in pulled:
            extent = extents[peer] * width
            if self._where[peer].extent < extent:
                return False
            self._where[peer] = self._where[peer]._replace(extent=extent)
        self._begins = list(itertools.accumulate(rows, initial=0))
        self._take_place()
        base = {rank: self._tokens.address}
        far = [self._far(peer, 8 * peer) for peer in pulled]
        argument = move(self._into[1], width, base, moves.address, total)
        key = self._launch(self._entries[0], argument, total * width, self._after, far)
        self._after = []
        # While it runs.
        if not self._arrange_quickly(own, total, count):
            return False
        return not await self._landed([key])

    def _arrange_quickly(self, own: Part, rows: int, count: int) -> bool:
        parts, placed, rank, tokens = self.parts, self._placed, self._group.rank, self._tokens.rows
        assert isinstance(parts, Routed)
        held, size = len(placed.held[rank]), self._group.size
        found = Arrangement(
            np.empty(size + 1, np.int64),
            np.empty(count, np.int64),
            np.empty(held + 1, np.int64),
            np.empty(count, np.float32),
            np.empty(count, np.int64),
            np.empty(rows + 1, np.int64),
        )
        tables = Tables(self._pool, count, rows, tokens, size)
        lists = found.starts, found.rows, found.offsets, found.weights, found.order, found.first
        if not _core.arrange_came(
            self._slots,
            self._slot_bytes,
            rank,
            own[1:],
            placed.here(rank),
            held,
            lists,
            parts.whole.tokens,
            parts.rows,
            tokens,
            tables.bytes,
        ):
            return False
        tables.upload()
        self.found, self.tables = found, tables
        return True


class QuickCombine(DeviceCombine):
    """A combine whose sums are read by kernels."""

    _swapped = False

    def _swap_quickly(self) -> bool:
        if self._packed:
            return False
        slab = self._slab
        region = 0 if slab is None else slab.region
        row = 0 if slab is None else self._row
        ended, places = self._ended_call(), self._places(slab)
        messages = _core.sum_messages(
            self._found.starts, row, self._group.rank, self._header, ended, region, places
        )
        self._swapped = self._swap(messages)
        return self._swapped

    async def _receive_quickly(self) -> bool:
        if not self._swapped or not self._row or (heads := self._read_heads()) is None:
            return False
        parts, pulled = self._parts, []
        for peer in self._others():
            rows, _, flags, *_ = heads[peer]
            where: Where = self._where[peer]
            expected = parts.rows_for(peer) if isinstance(parts, Routed) else parts[peer].rows
            if flags or rows != expected or (rows and not self._may_pull(peer)):
                return False
            if not rows:
                continue
            if where.extent != rows * self._row or where.start % self._alignment:
                return False
            pulled.append(peer)
        nbytes = self._make_target()
        if not nbytes:
            return True
        if self._aside:
            return False
        return not await self._landed([self._add_up({}, pulled, nbytes, LINGER_S)])
