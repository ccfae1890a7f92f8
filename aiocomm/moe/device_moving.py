"""Dispatch and combine of one rank whose tokens are on a GPU, on the steps of `device_exchange`."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._device import DeviceArray, part_of
from aiocomm.collectives.gpu import form_of, itemsize_in
from aiocomm.errors import PeerError
from aiocomm.moe.arguments import move, of_adding, of_weighing
from aiocomm.moe.device_exchange import (
    DEVICE_HEAD_BYTES,
    PACKED,
    DeviceExchange,
    Matrix,
    kernels_may_read,
)
from aiocomm.moe.exchange import LISTS
from aiocomm.moe.memory import Lease
from aiocomm.moe.reading import host_array, read_back
from aiocomm.moe.routing import arrange, routed
from aiocomm.moe.sources import MOVE_SOURCE, sums_source
from aiocomm.moe.tables import Tables
from aiocomm.moe.wire import LISTS_RIDE, Head, lists_bytes, pack_lists, unpack_lists, view_lists
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from aiocomm._device import Description
    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.device_exchange import Kernel, Setting
    from aiocomm.moe.dispatched import Dispatched
    from aiocomm.moe.memory import Block, Pinned
    from aiocomm.moe.placement import Placement
    from aiocomm.moe.routing import Arrangement, Part

    Bytes = NDArray[np.uint8]

__all__ = ["ENTRY_BYTES", "DeviceCombine", "DeviceDispatch", "array_over"]

ENTRY_BYTES = 16


class DeviceDispatch(DeviceExchange):
    """Rows go out as bytes of any dtype.

    Args:
        tokens: on a GPU; shape (tokens, hidden).
        ids: the experts of each token, and their weights; host arrays, or descriptions of GPU arrays.
    """

    def __init__(
        self,
        scope: Scope,
        setting: Setting,
        text: str,
        tokens: Matrix,
        placement: Placement,
        ids: Any,
        weights: Any,
    ) -> None:
        super().__init__(scope, setting, "dispatch", text, placement, ())
        self._tokens = tokens
        self._pinned_arrays: list[tuple[str, Description, Pinned]] = []  # what is read back
        self._placed = placement
        self._ids, self._weights = ids, weights
        self._width = tokens.hidden * tokens.itemsize
        self._slab: Block | None = None
        self._packed = False
        self._starts = [0] * (scope.group.size + 1)  # of what is packed for each rank, in rows
        self._lists: dict[int, Bytes] = {}
        self._following: list[int] = []  # ranks whose lists do not ride
        self._lease: Lease | None = None
        self._moves: Pinned | None = None
        self._spare: Tables | None = None  # of a size that is likely
        self.tokens: DeviceArray
        self.parts: Sequence[Part] = ()
        self.found: Arrangement
        self.tables: Tables

    @property
    def placed(self) -> Placement:
        """Of the experts."""
        return self._placed

    @property
    def count(self) -> int:
        """Tokens of this rank."""
        return self._tokens.rows

    # ------------------------------------------------------------ what this rank gives

    def _sources(self) -> tuple[str, tuple[str, ...]]:
        return MOVE_SOURCE, ("move_rows",)

    def _giving(self) -> Kernel | None:
        tokens, runs = self._tokens, []
        self._after = [tokens.description]
        alone = self._group.size == 1
        shape = self._shape(self._ids)
        lists = 4 * tokens.rows + lists_bytes(tokens.rows, tokens.rows * (shape[-1] if len(shape) > 1 else 1))
        fits = DEVICE_HEAD_BYTES + lists <= self._slot_bytes
        self._packed = not (fits and kernels_may_read(self._setting.path, tokens.nbytes)) and not alone
        if not self._packed and not alone and tokens.nbytes:
            self._slab = self._lend(tokens.nbytes)
            runs.append((self._slab.address, tokens.address, tokens.nbytes))
        for name in ("_ids", "_weights"):
            if isinstance(described := getattr(self, name), tuple):
                memory = self._pinned_for(name, described[2])
                runs.append((memory.address, described[1], described[2]))
                self._pinned_arrays.append((name, described, memory))
                self._after.insert(0, described)
        if not runs:
            return None
        argument = move(0, self._width, {}, 0, 0, runs)
        return self._entries[0], argument, sum(run[2] for run in runs), self._after

    def _pinned_for(self, _name: str, nbytes: int) -> Pinned:
        """Where one of the small arrays is read back to; calls that repeat have a place for each name."""
        return self._borrow_pinned(nbytes)

    async def _prepare(self, keys: list[int]) -> list[int]:
        if self._pinned_arrays:
            await self._landed(keys)
            for name, described, memory in self._pinned_arrays:
                setattr(self, name, host_array(described, memory.bytes))
            keys = []
        await self._route()
        return [*keys, *self._pack()] if self._packed else keys

    @staticmethod
    def _shape(array: Any) -> tuple[int, ...]:
        return tuple(array[6]) if isinstance(array, tuple) else np.shape(array)

    async def _route(self) -> None:
        def work() -> None:
            self._parts = self.parts = routed(self._tokens.rows, self._ids, self._weights, self._placed)

        await self._work(64 * math.prod(self._shape(self._ids)), work)

    async def _find_parts(self) -> bool:
        small: list[Any] = []
        for one in (self._ids, self._weights):
            read = await read_back(self._pool, one) if type(one) is tuple else one
            if read is None and one is not None:
                return False
            small.append(read)
        ids, weights = small
        self._parts = self.parts = routed(self._tokens.rows, ids, weights, self._placed)
        return True

    def _pack(self) -> list[int]:
        """Bring the rows for each rank together."""
        rank = self._group.rank
        rows = [0 if peer == rank else part.rows for peer, part in enumerate(self.parts)]
        self._starts = list(itertools.accumulate(rows, initial=0))
        count = self._starts[-1]
        if not count or not self._width:
            return []
        memory = self._borrow_pinned(count * ENTRY_BYTES)
        packed = [
            (0, p.tokens, s)
            for r, (p, s) in enumerate(zip(self.parts, self._starts, strict=False))
            if r != rank
        ]
        _core.list_moves(memory.bytes, packed)
        self._slab = self._lend(count * self._width)
        argument = move(self._slab.address, self._width, {0: self._tokens.address}, memory.address, count)
        key = self._launch(self._entries[0], argument, count * self._width, self._after)
        self._after = []
        return [key]

    def _message(self, peer: int) -> Any:
        part = self.parts[peer]
        lists = lists_bytes(part.rows, len(part.experts))
        indices = 0 if self._packed else 4 * part.rows
        rides = DEVICE_HEAD_BYTES + indices + lists <= self._slot_bytes
        head = Head(self._header, part.rows, len(part.experts), LISTS_RIDE * rides | PACKED * self._packed)
        if self._packed:
            start, extent = self._starts[peer] * self._width, part.rows * self._width
        else:
            start, extent = 0, self._tokens.nbytes * bool(part.rows)
        where = self._where_of(self._slab, peer, start, extent, self._packed)
        if not rides:
            self._following.append(peer)
        return _core.pack_message(head.pack() + where.pack(), *part, rides and not self._packed, rides)

    def _follow(self, peer: int) -> None:
        if peer in self._following:
            part = self.parts[peer]
            lists = self._borrow(lists_bytes(part.rows, len(part.experts)))
            pack_lists(part, lists)
            self._send_following(peer, LISTS, lists)

    # ------------------------------------------------------------ what it gets

    async def _receive(self) -> None:
        self.may_repeat = False
        self._learn()
        heads, rank, own = self._heads, self._group.rank, self.parts[self._group.rank]
        counts = [heads[r].rows if r in heads else own.rows for r in range(self._group.size)]
        self._begins = list(itertools.accumulate(counts, initial=0))
        self._take_place(self._begins[-1] * self._width)
        keys, indices = [], {rank: own.tokens}
        for peer, head in heads.items():
            lists = lists_bytes(head.rows, head.assignments)
            at = DEVICE_HEAD_BYTES if head.flags & PACKED else DEVICE_HEAD_BYTES + 4 * head.rows
            if head.flags & LISTS_RIDE:
                self._lists[peer] = self._slot(peer)[at : at + lists]
            else:
                self._lists[peer] = self._borrow(lists)
                self._receive_following(peer, LISTS, self._lists[peer])
            if not head.rows or not self._width:
                continue
            if head.flags & PACKED:
                self._expect(peer, head.rows * self._width, True)
                into = part_of(self._into, self._begins[peer] * self._width, head.rows * self._width)
                keys.append(self._get(peer, into, self._where[peer].start))
            else:
                indices[peer] = self._slot(peer)[DEVICE_HEAD_BYTES:at].view(np.uint32)
        moves = self._list_moves(indices)
        copies, more = self._copies([peer for peer in indices if peer != rank and not self._may_pull(peer)])
        at_once = not copies
        if at_once:
            more.append(self._pull(indices, moves, copies))
        riding = all(head.flags & LISTS_RIDE for head in heads.values())
        if riding:
            await self._work(16 * sum(head.assignments for head in heads.values()), self._arrange)
        unreached = await self._landed(keys + more)
        if not at_once:
            unreached = await self._landed([self._pull(indices, moves, copies)])
        while unreached:  # one more each time
            rest, more = self._copies(unreached)
            copies |= rest
            await self._landed(more)
            unreached = await self._landed([self._pull(indices, moves, copies)])
        if not riding:
            await self._rest()
            await self._work(16 * sum(head.assignments for head in heads.values()), self._arrange)

    @property
    def kind(self) -> tuple[int, ...]:
        """By which it is noted how much comes."""
        return self._tokens.rows, self._shape(self._ids)[1], self._group.size

    def _note_usual(self, rows: int, assignments: int) -> None:
        """Note how much has come, all by kernels: calls like this one can have memory before they know."""
        if len(self._shape(self._ids)) != 2:
            return
        self.may_repeat = self._group.size > 1
        self._pool.note_usual(self.kind, rows, assignments)

    def _take_place(self, nbytes: int) -> None:
        """For the tokens that come, once it is known how many, or as many as are likely."""
        if self._lease is None or self._lease.nbytes < nbytes:
            block = self._pool.take(nbytes, self._setting.streams)
            self._lease = Lease(self._pool, block, self._setting.streams)
        self._into = self._lease.part(nbytes)

    def _take_moves(self, count: int) -> Pinned:
        """For a table of rows; likewise."""
        if self._moves is None or self._moves.nbytes < count * ENTRY_BYTES:
            self._moves = self._borrow_pinned(count * ENTRY_BYTES)
        return self._moves

    def _list_moves(self, indices: dict[int, Any]) -> tuple[Pinned, int]:
        """A table of rows and their places, and their number; all are where their rank has memory.

        Args:
            indices: of the tokens of each rank.
        """
        count = sum(len(of_rank) for of_rank in indices.values())
        memory = self._take_moves(count)
        parts = [(source, tokens, self._begins[source]) for source, tokens in indices.items()]
        extents = _core.list_moves(memory.bytes, parts)
        for source, extent in zip(indices, extents, strict=True):
            if source != self._group.rank:
                self._expect(source, extent * self._width, False)
                self._where[source] = self._where[source]._replace(extent=extent * self._width)
        return memory, count

    def _pull(self, indices: Iterable[int], moves: tuple[Pinned, int], copies: dict[int, int]) -> int:
        """Have a kernel bring rows into place.

        Args:
            indices: the ranks that have any.
            copies: where a rank's tokens are on this GPU; of the others they are read where they are.
        """
        memory, count = moves
        base = {self._group.rank: self._tokens.address} | copies
        far = [self._far(peer, 8 * peer) for peer in indices if peer not in base]
        nbytes = count * self._width
        argument = move(self._into[1], self._width, base, memory.address, count if self._width else 0)
        key = self._launch(self._entries[0], argument, nbytes, self._after, far)
        self._after = []
        return key

    def _arrange(self) -> None:
        rank = self._group.rank
        came = [
            self.parts[rank] if peer == rank else view_lists(self._heads[peer], self._lists[peer])
            for peer in range(self._group.size)
        ]
        try:
            self.found = arrange(came, self._placed, rank)
        except ValueError:
            for peer, head in self._heads.items():
                try:
                    unpack_lists(head, self._lists[peer], self._placed, rank)
                except ValueError as error:
                    raise PeerError(
                        f"dispatch: {self._group.names[peer]}: {error}", self._group.ranks[peer]
                    ) from None
            raise
        self.tables = Tables.made(self._pool, self.found, self.parts, self._tokens.rows, self._spare)

    async def _finish(self) -> None:
        given, lease = self._tokens, self._lease
        assert lease is not None
        form, shape = given.description[5], (self._begins[-1], given.hidden)
        self.tokens = array_over(lease, self._pool.device, form, shape, given.itemsize)


class DeviceCombine(DeviceExchange):
    """Partial sums go back to where the tokens came from.

    Args:
        outputs: one row per assignment; shape (assignments, hidden).
        wire: dtype in which partial sums travel.
        out: receives the result; shape (tokens, hidden). None: memory is made for it.
    """

    def __init__(
        self,
        scope: Scope,
        setting: Setting,
        text: str,
        outputs: Matrix,
        dispatched: Dispatched,
        wire: str,
        out: Matrix | None,
        result: str,
    ) -> None:
        super().__init__(scope, setting, "combine", text, dispatched._placement, dispatched._sent)
        self._outputs = outputs
        self._found = dispatched._found
        self._count = dispatched._count
        assert dispatched._tables is not None
        self._tables = dispatched._tables
        self._wire, self._result = wire, result
        self._out = out
        self._row = outputs.hidden * itemsize_in(form_of(wire))
        self._slab: Block | None = None
        self._packed = False
        self.result: DeviceArray | None = None

    @property
    def _alignment(self) -> int:
        """Of what other ranks give: their rows are read by groups of eight where they consist of such."""
        return 16 if self._outputs.hidden % 8 == 0 else itemsize_in(form_of(self._wire))

    def _whole(self, *addresses: int) -> int:
        return int(self._outputs.hidden % 8 == 0 and not any(address % 16 for address in addresses))

    def _sources(self) -> tuple[str, tuple[str, ...]]:
        return sums_source(self._outputs.dtype, self._wire, self._result), ("weigh_rows", "add_rows")

    def _giving(self) -> Kernel | None:
        outputs, tables, rank = self._outputs, self._tables, self._group.rank
        starts = self._found.starts.tolist()
        own = starts[rank + 1] - starts[rank]
        travels = starts[-1] * self._row
        self._packed = not kernels_may_read(self._setting.path, travels) and self._group.size > 1
        self._after = [outputs.description, tables.ready]
        if self._out is not None:
            self._after.append(self._out.description)
        if own == starts[-1] or not outputs.hidden:
            return None
        self._slab = self._lend(travels)
        numbers = starts[rank], own, starts[-1], outputs.hidden, self._whole(outputs.address)
        argument = of_weighing((outputs.address, *tables.of_terms, self._slab.address), numbers)
        return self._entries[0], argument, outputs.nbytes, self._after

    async def _prepare(self, keys: list[int]) -> list[int]:
        return keys

    def _message(self, peer: int) -> Any:
        starts = self._found.starts
        rows = int(starts[peer + 1] - starts[peer])
        head = Head(self._header, rows, 0, PACKED * self._packed)
        start = int(starts[peer]) * self._row
        where = self._where_of(self._slab, peer, start, rows * self._row, self._packed)
        return head.pack() + where.pack()

    async def _receive(self) -> None:
        self._learn()
        pulled: list[int] = []
        copied: list[int] = []
        for peer, head in self._heads.items():
            rows = self._parts[peer].rows
            self._check_rows(peer, head.rows, rows)
            if not rows or not self._row:
                continue
            self._expect(peer, rows * self._row, True, self._alignment)
            (pulled if not head.flags & PACKED and self._may_pull(peer) else copied).append(peer)
        nbytes = self._make_target()
        if not nbytes:
            return
        if self._aside:  # rows are still read when others are written
            self._target = self._borrow_block(nbytes).address
        bases, keys = self._copies(copied)
        await self._landed(keys)
        self.may_repeat = not (self._packed or copied or self._aside) and self._group.size > 1
        while unreached := await self._landed([self._add_up(bases, pulled, nbytes)]):
            self.may_repeat = False
            more, keys = self._copies(unreached)
            bases |= more
            pulled = [peer for peer in pulled if peer not in unreached]
            await self._landed(keys)
        if self._aside:
            assert self._out is not None
            entry = self._pool.kernels.loaded(MOVE_SOURCE, "move_rows")  # as the dispatch has left it
            if not entry:
                (entry,) = await self._compiled(MOVE_SOURCE, ("move_rows",))
            argument = move(0, 0, {}, 0, 0, [(self._out.address, self._target, nbytes)])
            await self._landed([self._launch(entry, argument, nbytes)])

    def _make_target(self) -> int:
        """Where the result is to be; returns its bytes."""
        form = form_of(self._result)
        nbytes = self._count * self._outputs.hidden * itemsize_in(form)
        self._aside = self._out is not None and _meet(self._out, self._outputs)
        if self._out is not None:
            self._target = self._out.address
            return nbytes
        block = self._pool.take(nbytes, self._setting.streams)
        self._hold(Lease(self._pool, block, self._setting.streams))
        self._target = block.address
        return nbytes

    def _hold(self, lease: Lease) -> None:
        """Have the result in this memory."""
        form, shape = form_of(self._result), (self._count, self._outputs.hidden)
        self.result = array_over(lease, self._pool.device, form, shape, itemsize_in(form))

    def _adding(self, bases: dict[int, int], nbytes: int) -> Kernel:
        """The kernel that adds the ranks' partial sums."""
        outputs, tables, size, rank = self._outputs, self._tables, self._group.size, self._group.rank
        own_first = int(self._found.starts[rank])
        whole = self._whole(self._target, outputs.address)
        addresses = self._target, tables.parts, outputs.address, *tables.of_terms
        argument = of_adding(addresses, (own_first, size, rank, self._count, outputs.hidden, whole), bases)
        return self._entries[1], argument, nbytes * size, self._after

    def _add_up(self, bases: dict[int, int], pulled: Sequence[int], nbytes: int, seconds: float = 0.0) -> int:
        far = [self._far(peer, 8 * peer, self._alignment) for peer in pulled]
        key = self._launch(*self._adding(bases, nbytes), far, seconds)
        self._after = []
        return key

    async def _finish(self) -> None:
        pass


def _meet(one: Matrix, other: Matrix) -> bool:
    """Whether two arrays have bytes in common."""
    return one.address < other.address + other.nbytes and other.address < one.address + one.nbytes


def array_over(lease: Lease, device: int, form: str, shape: tuple[int, int], itemsize: int) -> DeviceArray:
    """An array over a lease; of a dtype that NumPy has not, of its bytes, row by row."""
    nbytes = shape[0] * shape[1] * itemsize
    made = DeviceArray(lease, lease.address, nbytes, device, form, shape)
    if made.typestr == "|u1" and form != "B":
        made = DeviceArray(lease, lease.address, nbytes, device, "B", (shape[0], shape[1] * itemsize))
    return made
