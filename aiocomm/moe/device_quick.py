"""The usual dispatch and combine of GPU arrays, of a decode batch for example, in few native calls.

What is waited for meanwhile, own kernels and the others' messages, is looked for by these calls, without a
turn of the loop, for up to `LINGER_S`. They decide nothing but plain success: where anything is unusual (rows
that copy engines are to get, lists that do not ride, memory out of reach, ranks that called differently), the
steps of `device_exchange` begin again from the same messages.

Calls like those before begin in `repeating`, by one call into the extension; they come here where it stops.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.errors import LinkError, UsageError
from aiocomm.moe.arguments import move
from aiocomm.moe.device_exchange import LINGER_S, DeviceExchange, Where
from aiocomm.moe.device_moving import ENTRY_BYTES, DeviceCombine, DeviceDispatch
from aiocomm.moe.reading import host_array
from aiocomm.moe.routing import MOST_CHOICES, Arrangement, Part, Routed
from aiocomm.moe.tables import Tables
from aiocomm.moe.wire import LISTS_RIDE
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm._device import Description
    from aiocomm.moe.device_exchange import Kernel
    from aiocomm.moe.memory import Block, Lease, Pinned, Pool

__all__ = [
    "GIVING",
    "LINGER_S",
    "MOST_CHOICES_AT_ONCE",
    "NOT_BEGUN",
    "PART_BYTES",
    "PULLING",
    "Kit",
    "Listed",
    "QuickCombine",
    "QuickDispatch",
    "RoutedOver",
    "new_part",
    "part_over",
]

_ROUTE_BYTES, _ARRANGE_BYTES = 64, 16  # of memory traffic per choice, per assignment
MOST_CHOICES_AT_ONCE: Final = 1 << 16  # of a call that is one call into the extension: a millisecond's work
PART_BYTES: Final = 18  # of `part_over`
_LISTS: Final = ("starts", "rows", "offsets", "weights", "order", "first")
# Where a call into the extension has stopped; it says which is what.
NOT_BEGUN: Final = _core.NOT_BEGUN
GIVING: Final = _core.GIVING
PULLING: Final = _core.PULLING


class _Quick(DeviceExchange):
    """What both have in common: going on from where a call into the extension has stopped."""

    _swapped = False
    _begun: Any = None  # what the extension has made of it, which was called first
    _outcome: tuple[Any, ...] | None = None  # where the last stage was reached
    _packed: bool

    def take_over(self, number: int, slots: Any, outcome: Any) -> None:
        """Go on with a call that was begun: `outcome` is what the extension has returned, or raised."""
        self._number, self._begun = number, outcome
        if slots is not None:
            self._slots = slots
            self._borrowed.append(slots)

    def _keep_known(self, outcome: tuple[Any, ...]) -> Any:
        """Keep what is known once messages were swapped; returns those that have not come."""
        raise NotImplementedError

    def _begin_quickly(self) -> bool:
        if self._begun is None:
            return super()._begin_quickly()
        if isinstance(self._begun, BaseException):
            if isinstance(self._begun, LinkError):  # about the caller's arrays, or their streams
                self._refused = UsageError(f"cannot {self._operation} these arrays: {self._begun}")
            elif isinstance(self._begun, UsageError):
                self._refused = self._begun
            else:
                raise self._begun
            return False
        stage, *outcome = self._begun
        if stage == NOT_BEGUN:
            return super()._begin_quickly()
        if self._made is not None:
            self._after = []
        self._given = []
        if stage == GIVING:
            self._given = self._launched(outcome[0])
            self._raise_any()
        if stage in (GIVING, _core.REFUSED):
            return False
        self._swapped = True
        self._swapped_but(self._keep_known(tuple(outcome)))
        if stage == PULLING:
            self._outcome = tuple(outcome)
        return True

    def _has_received(self) -> bool:
        """Whether that was all, well done."""
        if self._outcome is None or self._aborted is not None or not self._is_done(self._outcome):
            return False
        self._judged = self.may_repeat = True
        return True

    def _is_done(self, outcome: tuple[Any, ...]) -> bool:
        """Keep what a call has made that has come to its end. False: something is under way, or wrong."""
        raise NotImplementedError

    async def _read(self, pending: Any) -> bool:
        """Judge a call whose last kernel was launched, and wait for it. False: it was out of reach."""
        keys = self._launched(pending)
        self._judged = True
        self._raise_trouble()
        return not await self._landed(keys)


class Kit:
    """Host memory of the dispatches of one kind, one after the other, and how it is seen."""

    def __init__(self, pool: Pool, shape: tuple[int, ...], rows: int) -> None:
        count = math.prod(shape)
        self.ids, self.weights = pool.take_pinned(8 * count), pool.take_pinned(4 * count)
        self.moves = pool.take_pinned(rows * ENTRY_BYTES)
        self.seen_ids = self.ids.bytes[: 8 * count].view(np.int64).reshape(shape)
        self.seen_weights = self.weights.bytes[: 4 * count].view(np.float32).reshape(shape)
        self.ones = np.ones(shape, np.float32)
        self._show()

    def _show(self) -> None:
        """As the extension takes it."""
        where = self.ids.address, self.weights.address, self.seen_ids, self.seen_weights, self.ones
        self.seen = *where, self.moves.bytes, self.moves.address

    @classmethod
    def taken(cls, pool: Pool, kind: tuple[int, ...], shape: tuple[int, ...], rows: int) -> Kit:
        """One for so many rows."""
        kit: Kit = pool.take_kit(kind) or cls(pool, shape, rows)
        if kit.moves.nbytes < rows * ENTRY_BYTES:  # more comes than at first
            kit.moves = pool.take_pinned(rows * ENTRY_BYTES)
            kit._show()
        return kit


class QuickDispatch(_Quick, DeviceDispatch):
    """A dispatch whose rows are read by kernels, and whose lists ride."""

    _kit: Kit | None = None

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

    def take_memory(
        self,
        kit: Kit,
        slab: Block,
        lease: Lease | None,
        room: int,
        tables: Tables | None,
        made: Kernel,
        whole: Part,
    ) -> None:
        """Have what the extension was given, or was to be given."""
        self._kit, self._kind = kit, self.kind
        self._slab, self._lease = slab, lease
        if lease is not None:
            self._into = lease.part(room)
        self._lent.append(slab)
        self._moves, self._spare, self._whole = kit.moves, tables, whole
        self._made, self._is_made, self._after = made, True, list(made[3])
        for name, memory in (("_ids", kit.ids), ("_weights", kit.weights)):
            if isinstance(described := getattr(self, name), tuple):
                self._pinned_arrays.append((name, described, memory))

    def _keep_known(self, outcome: tuple[Any, ...]) -> Any:
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
        whole = new_part(ids.size)
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
        self._pool.heard_all(ended, self._group.rank)
        size, held = self._group.size, len(self._placed.held[self._group.rank])
        self.found = Listed(lists, size, held, total, count)
        assert self._spare is not None
        self.tables = self._spare
        self.tables.resize(count, total, self._tokens.rows, size)
        self._begins = [0, total]

    async def _receive_quickly(self) -> bool:
        if self._outcome is not None:
            *_, pending, fine = self._outcome
            if await self._read(pending) and fine:
                self._keep(self._outcome)
                self.may_repeat = True
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
        self._note_usual(total, count)
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

    def take_memory(
        self,
        slab: Block | None,
        lease: Lease | None,
        target: int,
        made: Kernel | None,
        after: Sequence[Description],
    ) -> None:
        """Have what the extension was given."""
        self._made, self._is_made, self._after = made, True, list(after)
        self._target = target
        if slab is not None:
            self._slab = slab
            self._lent.append(slab)
        if lease is not None:
            self._hold(lease)

    def _keep_known(self, outcome: tuple[Any, ...]) -> Any:
        return outcome[0]

    def _is_done(self, outcome: tuple[Any, ...]) -> bool:
        return outcome[-1] is None

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
        if self._outcome is not None and await self._read(self._outcome[-1]):
            self.may_repeat = True
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
        self.may_repeat = not await self._landed([self._add_up({}, pulled, nbytes, LINGER_S)])
        return self.may_repeat


def new_part(count: int) -> Part:
    return Part(
        np.empty(count, np.int64),
        np.empty(count, np.uint16),
        np.empty(count, np.int32),
        np.empty(count, np.float32),
    )


def part_over(whole: bytearray, count: int) -> Part:
    """Over memory of `PART_BYTES` for each: tokens, experts, weights, counts."""
    return Part(
        np.frombuffer(whole, np.int64, count),
        np.frombuffer(whole, np.uint16, count, 16 * count),
        np.frombuffer(whole, np.int32, count, 8 * count),
        np.frombuffer(whole, np.float32, count, 12 * count),
    )


class RoutedOver(Routed):
    """Parts over memory of `PART_BYTES` for each expert of each token; arrays are made once asked for."""

    __slots__ = ("_choices", "_memory")

    def __init__(self, memory: bytearray, choices: int, rows: list[int], assignments: list[int]) -> None:
        self._memory, self._choices = memory, choices
        self.rows, self.assignments = rows, assignments
        self._made: dict[int, Part] = {}

    @property
    def whole(self) -> Part:  # type: ignore[override]
        """See `Routed`."""
        return part_over(self._memory, self._choices)


class Listed(Arrangement):
    """Lists one after the other, each at a multiple of eight bytes; they are made arrays once asked for."""

    __slots__ = ("_sizes", "lists")

    def __init__(self, lists: bytearray, size: int, held: int, rows: int, count: int) -> None:
        object.__setattr__(self, "lists", lists)
        object.__setattr__(self, "_sizes", (size + 1, count, held + 1, count, count, rows + 1))

    def __getattr__(self, name: str) -> Any:
        at = 0
        for one, length in zip(_LISTS, self._sizes, strict=True):
            dtype = np.float32 if one == "weights" else np.int64
            nbytes = length * (4 if one == "weights" else 8)
            if one == name:
                found: Any = np.frombuffer(self.lists, dtype, length, at)
                object.__setattr__(self, name, found)
                return found
            at += (nbytes + 7) & ~7
        raise AttributeError(name)

    @property
    def count(self) -> int:
        """Assignments."""
        return int(self._sizes[1])

    def begins(self) -> list[int]:
        """`starts` as numbers."""
        length = self._sizes[0]
        return memoryview(self.lists)[: 8 * length].cast("q").tolist()
