"""Dispatches and combines of GPU arrays like those before, each by one native call.

What a call needs beside its arrays is prepared once, by the first of its form. A repeat describes its arrays,
takes memory, and has the extension do the rest: own kernel, messages, the kernel that reads the others' rows.
It decides nothing but plain success. Whatever has not come soon, or is wrong, becomes a `QuickDispatch` or
`QuickCombine`, which goes on from the stage that was reached, or from the messages that came.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._device import DeviceArray
from aiocomm._operations import limit_of
from aiocomm.collectives.gpu import form_of, itemsize_in
from aiocomm.collectives.headers import header
from aiocomm.collectives.kernels import THREADS
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.moe import device_quick
from aiocomm.moe.arguments import MOVE_BYTES, move, of_weighing
from aiocomm.moe.device_exchange import PIECE_BYTES, Matrix, kernels_may_read
from aiocomm.moe.device_moving import array_over
from aiocomm.moe.device_quick import (
    GIVING,
    NOT_BEGUN,
    PART_BYTES,
    PULLING,
    Kit,
    Listed,
    QuickCombine,
    QuickDispatch,
    RoutedOver,
    part_over,
)
from aiocomm.moe.dispatched import Dispatched, named
from aiocomm.moe.exchange import HEAD_TAG
from aiocomm.moe.memory import TURN_S, Lease, size_class
from aiocomm.moe.rooms import LONG, Rooms
from aiocomm.moe.routing import Routed
from aiocomm.moe.sources import MOST_RANKS
from aiocomm.moe.tables import Tables
from aiocomm_native import _core

if TYPE_CHECKING:
    from aiocomm._device import Description
    from aiocomm.errors import AiocommError
    from aiocomm.moe.device_exchange import Kernel
    from aiocomm.moe.memory import Block

__all__ = ["Begun", "CombineRepeat", "DispatchRepeat"]

ExpertCalls = _core.ExpertCalls
_MORE: Final = 1.25  # that may come than in calls before, so that memory can be had before it is known
_NOTHING: Any = None  # yet


def _stopped(own: Any, error: BaseException) -> Any:
    """The outcome of a call that this error has stopped: its own kernel, if nothing was made of that."""
    pending = own.transfer() if own is not None and isinstance(error, Exception) else None
    return error if pending is None else (GIVING, pending)


class Begun:
    """A repeat that the extension has made, or has left to be gone on with.

    Args:
        result: what the operation returns; None where it is not over.
        call: to be run then.
        turn: other tasks have waited for long.
    """

    __slots__ = ("call", "result", "turn")

    def __init__(self, result: Any = None, call: Any = None, turn: bool = False) -> None:
        self.result, self.call, self.turn = result, call, turn


class _Underway:
    """Stands for a call in its scope while the extension makes it: others may have it ended meanwhile."""

    __slots__ = ("has_deadline", "told")

    def __init__(self, has_deadline: bool) -> None:
        self.has_deadline = has_deadline
        self.told: list[tuple[AiocommError, int]] = []

    def abort(self, error: AiocommError, source: int) -> None:
        self.told.append((error, source))

    def lose(self, rank: int) -> None:
        """See `Flight.lose`: the call that goes on hears of it as it is entered."""


class _Repeat:
    """What repeats of one form have in common."""

    def __init__(self, call: QuickDispatch | QuickCombine) -> None:
        self._scope, self._pool, self._group = scope, pool, group = call._scope, call._pool, call._group
        self._setting = call._setting
        self._streams = call._setting.streams
        self._engine = scope.comm._engine
        self.backend = scope.comm._backend.name
        self._entries = list(call._entries)
        self._slots_bytes = call._slot_bytes * group.size
        self._others = frozenset(call._others())
        self._counted = f"{call.operation}/latency"
        if pool.calls is None:
            where = scope.index, group.rank, list(group.ranks), call._slot_bytes
            pool.calls = ExpertCalls(*where, pool.home)
        self._native = pool.calls

    def _begin(self, deadline: float | None) -> tuple[int, _Underway]:
        """Number a call, and enter it."""
        under = _Underway(deadline is not None)
        scope = self._scope
        number = scope.begin(None)
        scope.calls[number] = under  # type: ignore[assignment]
        return number, under

    def _slots(self) -> Any:
        pool = self._pool
        if pool.slots is None:
            return self._scope.scratch(self._slots_bytes)[: self._slots_bytes]
        slots, pool.slots = pool.slots, None
        return slots

    def _ended(self, number: int, slots: Any, slab: Block | None) -> bool:
        """Note that a call is over, all well; returns whether other tasks are to have a turn."""
        scope, pool = self._scope, self._pool
        del scope.calls[number]
        pool.slots = slots
        if slab is not None:
            pool.lend(number, slab, set(self._others))
        if scope._asked:
            scope.answer()
        scope.comm._collective_calls[self._counted] += 1
        return self._engine.turn_due(False, TURN_S)

    def _hand_over(self, call: Any, begun: Any, under: _Underway) -> Begun:
        """Let a call go on with what was begun: its number, its memory for messages, and the outcome."""
        number, slots, outcome = begun
        self._scope.enter(number, call)
        call.take_over(number, slots, outcome)
        for error, source in under.told:
            call.abort(error, source)
        return Begun(call=call)


class DispatchRepeat(_Repeat):
    def __init__(self, call: QuickDispatch, text: str, rows: int, assignments: int) -> None:
        super().__init__(call)
        tokens, group, placed = call._tokens, self._group, call._placed
        self._text = text
        self._count = tokens.rows
        self._width, self._nbytes = call._width, tokens.nbytes
        self._shape = call._shape(call._ids)
        self._choices = math.prod(self._shape)
        self._kind = tokens.rows, self._shape[1], group.size
        self._rows = int(_MORE * rows)
        self._room = self._rows * self._width
        self._slab_size, self._room_size = size_class(self._nbytes), size_class(self._room)
        self._table_bytes = size_class(
            _core.sum_tables(int(_MORE * assignments), self._rows, self._count, group.size)[-1]
        )
        self._held = len(placed.held[group.rank])
        self._named = named(self._scope)
        self._long = Rooms()
        self._lists_bytes = 0
        if assignments * 20 >= LONG:  # lists of so many take as many bytes, and more
            count, rows = int(_MORE * assignments), self._rows
            self._lists_bytes = 20 * count + 8 * (rows + self._held + group.size) + 64
        self._placed = placed
        assert call._lease is not None
        form = tokens.description[5]
        shown = array_over(call._lease, self._pool.device, form, (1, tokens.hidden), tokens.itemsize)
        self._shown = form_of(np.dtype(shown.typestr).name), shown.shape[1]
        kernels = self._pool.kernels
        self._native_form = _core.DispatchForm(
            call._header,
            self._entries[0],
            self._setting.sm_budget,
            THREADS,
            MOVE_BYTES,
            MOST_RANKS,
            PIECE_BYTES,
            call._width,
            self._nbytes,
            self._count,
            self._choices,
            placed.owner,
            placed.here(group.rank),
            self._held,
            self._room,
            kernels.context,
            kernels.stream,
        )

    def _to_give(self) -> tuple[Kit, Block, int, list[bytes | None], bytearray]:
        """Memory that the own kernel writes, what others need to read it, and memory for what is told."""
        pool, group = self._pool, self._group
        kit, slab = Kit.taken(pool, self._kind, self._shape, self._rows), None
        try:
            slab = pool.take_sized(self._slab_size, self._streams)
            places = slab.places_for(group.ranks, group.rank)
            return kit, slab, slab.region, places, self._long.take(PART_BYTES * self._choices)
        except BaseException:
            self._give_back(kit, slab)
            raise

    def _give_back(self, kit: Kit, slab: Block | None) -> None:
        if slab is not None:
            self._pool.give_back(slab)
        self._pool.give_back_kit(self._kind, kit)

    def _to_take(self) -> tuple[Lease, Tables, bytearray | None]:
        """Memory for the rows that come, for what their sums will need, and for long lists of them."""
        pool, streams = self._pool, self._streams
        lease = Lease(pool, pool.take_sized(self._room_size, streams), streams)
        tables = Tables.of_bytes(pool, self._table_bytes)
        return lease, tables, self._long.take(self._lists_bytes) if self._lists_bytes else None

    def go_ahead(self) -> None:
        """Take memory for the next call now, when there is time for it: for one at a time of a pool."""
        if (ahead := self._taken_ahead()) is None:
            try:
                ahead = self._to_give(), self._to_take()
            except Exception:  # as the next call finds out
                return
        self._pool.ahead = self, *ahead

    def _taken_ahead(self) -> Any:
        """What was taken for this call; what was for another goes back."""
        ahead, self._pool.ahead = self._pool.ahead, None
        if ahead is None:
            return None
        owner, to_give, to_take = ahead
        if owner is self:
            return to_give, to_take
        owner._give_back(*to_give[:2])
        return None

    def attempt(self, tokens: Description, ids: Any, weights: Any, deadline: float | None) -> Begun | None:
        """Make a dispatch, or as much of it as goes at once. None: memory is short, nothing was begun."""
        pool, scope, group = self._pool, self._scope, self._group
        native, form = self._native, self._native_form
        try:  # streams first: what they have to tell takes a while
            behind = [one for one in (tokens, ids, weights) if type(one) is tuple]
            followed = _core.Followed(self._engine, behind)
            to_give, to_take = self._taken_ahead() or (self._to_give(), None)
            kit, slab, region, places, whole = to_give
        except Exception:  # as the usual call finds out, and says
            return None
        number, under = self._begin(deadline)
        seconds = limit_of(deadline)
        lease: Lease | None = None
        tables: Tables | None = None
        own = slots = None
        outcome: Any = (NOT_BEGUN,)
        try:
            own = native.give_tokens(
                self._engine, form, seconds, followed, tokens, ids, weights, kit.seen, slab.address
            )
            if own is not None:  # while it runs, all that does not need it
                lease, tables, lists = to_take or self._to_take()
                slots = self._slots()
                shown, width = self._shown
                came = DeviceArray(lease, lease.address, 0, pool.device, shown, (0, width))
                more = self._placed, (), self._count, came, _NOTHING, tables, self._named
                result = Dispatched(group, number, *more)
                outcome = native.dispatch(
                    self._engine,
                    own,
                    form,
                    number << TAG_BITS | HEAD_TAG,
                    min(scope.calls) - 1,
                    device_quick.LINGER_S,
                    kit.seen,
                    region,
                    places,
                    slots,
                    whole,
                    lists,
                    lease.address,
                    tables.bytes,
                    tables.address,
                )
        except BaseException as error:
            outcome = _stopped(own, error)
        if under.told or type(outcome) is not tuple or outcome[0] != PULLING or outcome[-2:] != (None, True):
            setting = self._setting._replace(deadline=deadline)
            matrix = Matrix(tokens, "tokens")
            call = QuickDispatch(scope, setting, self._text, matrix, self._placed, ids, weights)
            kernel = self._made(tokens, ids, weights, kit, slab)
            call.take_memory(kit, slab, lease, self._room, tables, kernel, part_over(whole, self._choices))
            return self._hand_over(call, (number, slots, outcome), under)
        _, rows, assignments, _, ended, total, count, found, _, _ = outcome
        assert tables is not None
        tables.resize(count, total, self._count, group.size)
        came.nbytes, came.shape = total * self._width, (total, width)
        result._sent = RoutedOver(whole, self._choices, rows, assignments)
        result._found = Listed(found, group.size, self._held, total, count)
        pool.give_back_kit(self._kind, kit)
        pool.last_dispatch = self
        pool.heard_all(ended, group.rank)
        return Begun(result, turn=self._ended(number, slots, slab))

    def _made(self, tokens: Description, ids: Any, weights: Any, kit: Kit, slab: Block) -> Kernel:
        """The kernel that brings this rank's arrays to where they are read; the extension has launched it."""
        runs, after = [(slab.address, tokens[1], self._nbytes)], [tokens]
        for array, memory in ((ids, kit.ids), (weights, kit.weights)):
            if type(array) is tuple:
                runs.append((memory.address, array[1], array[2]))
                after.append(array)
        nbytes = sum(run[2] for run in runs)
        return self._entries[0], move(0, self._width, {}, 0, 0, runs), nbytes, after


class CombineRepeat(_Repeat):
    def __init__(self, call: QuickCombine, text: str) -> None:
        super().__init__(call)
        self._text, self._hidden = text, call._outputs.hidden
        self._wire, self._result = call._wire, call._result
        self._row = call._row
        self._nowhere: list[bytes | None] = [None] * self._group.size
        self._form = form_of(call._result)
        self._itemsize = itemsize_in(self._form)
        self._native_form = _core.CombineForm(
            self._entries[0],
            self._entries[1],
            self._setting.sm_budget,
            THREADS,
            MOST_RANKS,
            PIECE_BYTES,
            self._row,
            call._alignment,
            self._hidden,
            self._itemsize,
        )

    def attempt(
        self, outputs: Description, dispatched: Dispatched, out: Description | None, deadline: float | None
    ) -> Begun | None:
        """Make a combine, or as much of it as goes at once. None: nothing was begun."""
        pool, streams, group, hidden = self._pool, self._streams, self._group, self._hidden
        rank, count, sent = group.rank, dispatched._count, dispatched._sent
        found, tables = dispatched._found, dispatched._tables
        nbytes = count * hidden * self._itemsize
        fits = outputs[6][0] == found.count and (out is None or out[6] == (count, hidden))
        if tables is None or tables.device != pool.device or not (fits and nbytes):
            return None
        if type(found) is not Listed or not isinstance(sent, Routed):
            return None
        begins = found.begins()
        travels = begins[-1] * self._row
        if not kernels_may_read(self._setting.path, travels):
            return None
        if out is not None and outputs[1] < out[1] + out[2] and out[1] < outputs[1] + outputs[2]:
            return None
        slab: Block | None = None
        region, places = 0, self._nowhere
        after = [outputs, tables.ready] if out is None else [outputs, tables.ready, out]
        kernels = pool.kernels
        try:
            behind = after
            if _core.stream_is_idle(kernels.context, kernels.stream):  # mostly: tables were uploaded long ago
                behind = [outputs] if out is None else [outputs, out]
            followed = _core.Followed(self._engine, behind)
            if begins[rank + 1] - begins[rank] != begins[-1]:
                slab = pool.take(travels, streams)
                region, places = slab.region, slab.places_for(group.ranks, rank)
        except Exception:
            if slab is not None:
                pool.give_back(slab)
            return None
        at = 0 if slab is None else slab.address
        number, under = self._begin(deadline)
        seconds = limit_of(deadline)
        native, form = self._native, self._native_form
        lease: Lease | None = None
        target = 0 if out is None else out[1]
        own = slots = result = None
        outcome: Any = (NOT_BEGUN,)
        text = f"combine of {dispatched._label}: {self._text}"
        try:
            own = native.give_terms(
                self._engine, form, seconds, followed, outputs, after[1], found.lists, count, at
            )
            if own is not None:  # while it runs, all that does not need it
                if out is None:
                    lease = Lease(pool, pool.take(nbytes, streams), streams)
                    target = lease.address
                    result = array_over(lease, pool.device, self._form, (count, hidden), self._itemsize)
                slots = self._slots()
                outcome = native.combine(
                    self._engine,
                    own,
                    form,
                    number << TAG_BITS | HEAD_TAG,
                    header(text + " on GPUs"),
                    min(self._scope.calls) - 1,
                    device_quick.LINGER_S,
                    sent.rows,
                    region,
                    places,
                    target,
                    slots,
                    self._meanwhile,
                )
        except BaseException as error:
            outcome = _stopped(own, error)
        if under.told or type(outcome) is not tuple or outcome[0] != PULLING or outcome[-1] is not None:
            into = None if out is None else Matrix(out, "out")
            setting = self._setting._replace(deadline=deadline)
            matrix = Matrix(outputs, "outputs")
            call = QuickCombine(
                self._scope, setting, text, matrix, dispatched, self._wire, into, self._result
            )
            made = None if slab is None else self._made(outputs, begins, tables, slab, after)
            call.take_memory(slab, lease, target, made, after)
            return self._hand_over(call, (number, slots, outcome), under)
        return Begun(result, turn=self._ended(number, slots, slab))

    def _meanwhile(self, ended: list[int]) -> None:
        """While the last kernel runs, what does not need it."""
        pool = self._pool
        pool.heard_all(ended, self._group.rank)
        if pool.last_dispatch is not None:
            pool.last_dispatch.go_ahead()

    def _made(
        self,
        outputs: Description,
        begins: list[int],
        tables: Tables,
        slab: Block,
        after: list[Description],
    ) -> Kernel:
        """The kernel that weighs this rank's terms. The extension has launched it."""
        rank, hidden, address = self._group.rank, self._hidden, outputs[1]
        straight = hidden % 8 == 0 and address % 16 == 0
        numbers = begins[rank], begins[rank + 1] - begins[rank], begins[-1], hidden, int(straight)
        argument = of_weighing((address, *tables.of_terms, slab.address), numbers)
        return self._entries[0], argument, outputs[2], after
