"""The usual dispatch and combine of GPU arrays, of a decode batch for example, in few native calls.

What is waited for meanwhile, own kernels and the others' messages, is looked for by these calls, without a
turn of the loop, for up to `LINGER_S`. They decide nothing but plain success: where anything is unusual (rows
that copy engines are to get, lists that do not ride, memory out of reach, ranks that called differently), the
steps of `device_exchange` begin again from the same messages.

The first call of a kind goes in single steps. Later ones, which know how much is likely to come, are one.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.collectives.kernels import THREADS
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.errors import LinkError, UsageError
from aiocomm.moe.device_exchange import LINGER_S, PIECE_BYTES, DeviceExchange, Where
from aiocomm.moe.device_moving import ENTRY_BYTES, DeviceCombine, DeviceDispatch, host_array, move
from aiocomm.moe.exchange import HEAD_TAG
from aiocomm.moe.memory import Pinned, Pool, Tables
from aiocomm.moe.routing import MOST_CHOICES, Arrangement, Part, Routed
from aiocomm.moe.sources import MOST_RANKS
from aiocomm.moe.wire import LISTS_RIDE
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["QuickCombine", "QuickDispatch"]

_ROUTE_BYTES, _ARRANGE_BYTES = 64, 16  # of memory traffic per choice, per assignment
_COUNT_AT: Final = 8 * (MOST_RANKS + 2)  # where the number of rows is in an argument of `move_rows`
_MOST_CHOICES: Final = 1 << 14  # of a call that is made by one call into the extension, which holds the GIL
_MORE: Final = 1.25  # that may come than in calls before, so that memory can be had before it is known
_NOT_BEGUN, _GIVING, _REFUSED, _SWAPPING, _PULLING = range(-1, 4)  # stages


class _Quick(DeviceExchange):
    """What both have in common: one call into the extension, and what is done with its outcome."""

    _swapped = False
    _outcome: tuple[Any, ...] | None = None  # where the last stage was reached

    def _attempt(self) -> tuple[Any, ...]:
        """Do the call as far as that goes; returns the stage that was reached, and what belongs to it."""
        raise NotImplementedError

    def _take_over(self, outcome: tuple[Any, ...]) -> Any:
        """Keep what is known once messages were swapped; returns those that have not come."""
        raise NotImplementedError

    def _begin_quickly(self) -> bool:
        usual = all(self._entries) and self._group.size > 1 and not any(self._pool.missed.values())
        if not usual or self._scope.comm._backend.name != "asyncio":
            return super()._begin_quickly()
        try:
            stage, *outcome = self._attempt()
        except LinkError as error:  # about the caller's arrays, or their streams
            self._refused = UsageError(f"cannot {self._operation} these arrays: {error}")
            return False
        except UsageError as error:
            self._refused = error
            return False
        if stage == _NOT_BEGUN:
            return super()._begin_quickly()
        self._after = []
        self._given = []
        if stage == _GIVING:
            self._given = self._launched(outcome[0])
            self._raise_any()
        if stage in (_GIVING, _REFUSED):
            return False
        self._swapped = True
        self._swapped_but(self._take_over(tuple(outcome)))
        if stage == _PULLING:
            self._outcome = tuple(outcome)
        return True

    def _has_received(self) -> bool:
        """Whether that was all, well done."""
        if self._outcome is None or self._aborted is not None or not self._is_done(self._outcome):
            return False
        self._judged = True
        return True

    def _is_done(self, outcome: tuple[Any, ...]) -> bool:
        """Keep what a call has made that has come to its end. False: something is under way, or wrong."""
        raise NotImplementedError

    def _calls(self) -> _core.ExpertCalls:
        pool = self._pool
        if pool.calls is None:
            where = self._scope.index, self._group.rank, self._group.ranks, self._slot_bytes
            pool.calls = _core.ExpertCalls(*where, pool.home)
        return pool.calls

    def _tag(self) -> int:
        return self._number << TAG_BITS | HEAD_TAG

    async def _read(self, pending: Any) -> bool:
        """Judge a call whose last kernel was launched, and wait for it. False: it was out of reach."""
        keys = self._launched(pending)
        self._judged = True
        self._raise_trouble()
        return not await self._landed(keys)

    def _hear(self, ended: list[int]) -> None:
        """Note which calls the others had ended."""
        heard, rank = self._pool.heard, self._group.rank
        for peer, number in enumerate(ended):
            if peer != rank:
                heard(peer, number)


class _Kit:
    """Host memory of the dispatches of one kind, one after the other, and how it is seen."""

    def __init__(self, pool: Pool, shape: tuple[int, ...], rows: int) -> None:
        count = math.prod(shape)
        self.ids, self.weights = pool.take_pinned(8 * count), pool.take_pinned(4 * count)
        self.moves = pool.take_pinned(rows * ENTRY_BYTES)
        self.seen_ids = self.ids.bytes[: 8 * count].view(np.int64).reshape(shape)
        self.seen_weights = self.weights.bytes[: 4 * count].view(np.float32).reshape(shape)
        self.ones = np.ones(shape, np.float32)


class QuickDispatch(_Quick, DeviceDispatch):
    """A dispatch whose rows are read by kernels, and whose lists ride."""

    _kit: _Kit | None = None

    async def run(self) -> None:
        """See `Exchange.run`."""
        try:
            await super().run()
        finally:
            if self._kit is not None:
                self._pool.give_back_kit(self._kind, self._kit)

    def _pinned_for(self, name: str, nbytes: int) -> Pinned:
        if self._kit is None:
            return super()._pinned_for(name, nbytes)
        return self._kit.ids if name == "_ids" else self._kit.weights

    def _attempt(self) -> tuple[Any, ...]:
        tokens, ids, weights = self._tokens, self._ids, self._weights
        shape = self._shape(ids)
        count = math.prod(shape)
        plain = len(shape) == 2 and shape[0] == tokens.rows and 0 < count <= _MOST_CHOICES
        plain = plain and _holds(ids, "q", np.int64) and _holds(weights, "f", np.float32)
        if not plain or not self._width:
            return (_NOT_BEGUN,)
        pool, rank, width = self._pool, self._group.rank, self._width
        self._kind = kind = tokens.rows, shape[1], self._group.size
        guess = pool.usual.get(kind)
        if guess is None or (weights is not None and self._shape(weights) != shape):
            return (_NOT_BEGUN,)
        rows, assignments = (int(_MORE * one) for one in guess)
        kit: _Kit = pool.take_kit(kind) or _Kit(pool, shape, rows)
        self._kit = kit
        self._made, self._is_made = self._giving(), True
        slab = self._slab
        if slab is None or self._made is None:
            return (_NOT_BEGUN,)
        if isinstance(ids, tuple):
            ids = kit.seen_ids
        if weights is None:
            weights = kit.ones
        elif isinstance(weights, tuple):
            weights = kit.seen_weights
        room = rows * width
        self._take_place(room)
        moves = self._moves = kit.moves
        self._spare = tables = Tables(pool, assignments, rows, tokens.rows, self._group.size)
        self._whole = _new_part(count)
        argument = move(self._into[1], width, {rank: tokens.address}, moves.address, 0)
        return self._calls().dispatch(
            self._scope.comm._engine,
            self._tag(),
            self._header,
            self._ended_call(),
            self._left(),
            LINGER_S,
            self._in_full(*self._made),
            ids,
            weights,
            tokens.rows,
            self._placed.owner,
            slab.region,
            tokens.nbytes,
            self._places(slab),
            self._slots,
            self._whole,
            (self._entries[0], self._setting.sm_budget, THREADS, argument, (), 0),
            _COUNT_AT,
            PIECE_BYTES,
            width,
            room,
            moves.bytes,
            self._placed.here(rank),
            len(self._placed.held[rank]),
            tables.bytes,
            tables.way,
        )

    def _take_over(self, outcome: tuple[Any, ...]) -> Any:
        rows, assignments, left, *_ = outcome
        self._parts = self.parts = Routed(self._whole, rows, assignments)
        return left

    def _swap_quickly(self) -> bool:
        """In single steps: the first call of a kind, and those that are large."""
        if self._packed:
            return False
        small = self._small_arrays()
        if small is None:
            return False
        ids, weights = small
        given, slab, size = self._tokens, self._slab, self._group.size
        whole = _new_part(ids.size)
        region, nbytes = (0, 0) if slab is None else (slab.region, given.nbytes)
        where = self._group.rank, self._header, self._ended_call(), region, nbytes, self._places(slab)
        found = _core.route_messages(
            ids, weights, given.rows, self._placed.owner, *where, self._slot_bytes, *whole
        )
        if found is None:
            return False
        rows, assignments, messages = found
        assert len(rows) == size + 1
        self._parts = self.parts = Routed(whole, rows, assignments)
        self._swapped = messages is not None and self._swap(messages)
        return self._swapped

    def _small_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Numbers and weights of the experts. None: something about them is unusual."""
        found = {"_ids": self._ids, "_weights": self._weights}
        for name, described, memory in self._pinned_arrays:
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

    def _is_done(self, outcome: tuple[Any, ...]) -> bool:
        *_, pending, fine = outcome
        if pending is not None or not fine:
            return False
        self._keep(outcome)
        return True

    def _keep(self, outcome: tuple[Any, ...]) -> None:
        *_, ended, total, count, lists, _, _ = outcome
        self._hear(ended)
        size, held = self._group.size, len(self._placed.held[self._group.rank])
        self.found = _arrangement(lists, size, held, total, count)
        assert self._spare is not None
        self.tables = self._spare
        self.tables.resize(count, total, self._tokens.rows, size)
        self._begins = [0, total]

    async def _receive_quickly(self) -> bool:
        if self._outcome is not None:
            *_, pending, fine = self._outcome
            if await self._read(pending) and fine:
                self._keep(self._outcome)
                return True
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
        moves = self._take_moves(total)
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
        self._take_place(total * width)
        base = {rank: self._tokens.address}
        far = [self._far(peer, 8 * peer) for peer in pulled]
        argument = move(self._into[1], width, base, moves.address, total)
        key = self._launch(self._entries[0], argument, total * width, self._after, far)
        self._after = []
        # While it runs.
        if not self._arrange_quickly(own, total, count):
            return False
        choices = len(parts.whole.tokens) // self._tokens.rows
        self._pool.note_usual((self._tokens.rows, choices, size), total, count)
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
        tables = Tables.of_size(self._pool, (count, rows, tokens, size), self._spare)
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


class QuickCombine(_Quick, DeviceCombine):
    """A combine whose sums are read by kernels."""

    def _attempt(self) -> tuple[Any, ...]:
        self._made, self._is_made = self._giving(), True
        if self._packed or not self._row:
            return (_NOT_BEGUN,)
        nbytes = self._make_target()
        if not nbytes or self._aside:
            return (_NOT_BEGUN,)
        made = self._made
        add, argument, size, after = self._adding({}, nbytes)
        return self._calls().combine(
            self._scope.comm._engine,
            self._tag(),
            self._header,
            self._left(),
            LINGER_S,
            None if made is None else self._in_full(*made),
            self._messages(),
            self._slots,
            [self._rows_for(peer) for peer in range(self._group.size)],
            self._row,
            self._alignment,
            self._in_full(add, argument, size, after if made is None else ()),
        )

    def _take_over(self, outcome: tuple[Any, ...]) -> Any:
        return outcome[0]

    def _is_done(self, outcome: tuple[Any, ...]) -> bool:
        _, ended, pending = outcome
        if pending is None:
            self._hear(ended)
        return pending is None

    def _messages(self) -> list[bytes | None]:
        slab = self._slab
        region, row = (0, 0) if slab is None else (slab.region, self._row)
        where = self._ended_call(), region, self._places(slab)
        return _core.sum_messages(self._found.starts, row, self._group.rank, self._header, *where)

    def _rows_for(self, peer: int) -> int:
        parts = self._parts
        return parts.rows_for(peer) if isinstance(parts, Routed) else parts[peer].rows

    def _swap_quickly(self) -> bool:
        if not self._packed:
            self._swapped = self._swap(self._messages())
        return self._swapped

    async def _receive_quickly(self) -> bool:
        if self._outcome is not None:
            _, ended, pending = self._outcome
            if await self._read(pending):
                self._hear(ended)
                return True
        if not self._swapped or not self._row or (heads := self._read_heads()) is None:
            return False
        pulled = []
        for peer in self._others():
            rows, _, flags, *_ = heads[peer]
            where: Where = self._where[peer]
            if flags or rows != self._rows_for(peer) or (rows and not self._may_pull(peer)):
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


def _holds(array: Any, form: str, dtype: Any) -> bool:
    """Whether an array, or the description of a GPU array, is as the extension takes it."""
    if isinstance(array, tuple):
        return bool(array[5] == form)
    return array is None or (
        isinstance(array, np.ndarray) and array.dtype == dtype and bool(array.flags.c_contiguous)
    )


def _new_part(count: int) -> Part:
    return Part(
        np.empty(count, np.int64),
        np.empty(count, np.uint16),
        np.empty(count, np.int32),
        np.empty(count, np.float32),
    )


def _arrangement(lists: bytearray, size: int, held: int, rows: int, count: int) -> Arrangement:
    """See lists that lie one after the other, each at a multiple of eight bytes."""
    found, at = [], 0
    for length, dtype in (
        (size + 1, np.int64),
        (count, np.int64),
        (held + 1, np.int64),
        (count, np.float32),
        (count, np.int64),
        (rows + 1, np.int64),
    ):
        one: Any = np.frombuffer(lists, dtype, length, at)
        found.append(one)
        at += (one.nbytes + 7) & ~7
    return Arrangement(*found)
