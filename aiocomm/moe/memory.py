"""GPU memory that dispatch and combine use again and again, since getting it from the driver takes long.

Rules:
- A block that was lent to peers comes back once each of them has said, in the header of a later call, that
  the call has ended there: they only read it, so a late reader spoils nothing but its own call.
- A block that the caller had comes back with the last array over it, and is used again for calls on the same
  streams, once the work is done that those have by then. So does torch's allocator, which knows no other
  streams. They are not touched when the array goes: the caller may have destroyed them.
- What comes back when an object goes is the pool's meanwhile, not only that object's: a collector of cycles
  calls all finalizers of what it has found, and memory whose own has run would be used again.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._device import NO_STREAM
from aiocomm.collectives.driver import driver
from aiocomm.collectives.kernels import Scratch, kernels_of
from aiocomm.errors import LinkError
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm._device import Description
    from aiocomm.collectives.kernels import Kernels
    from aiocomm_native._core import Engine

    Bytes = NDArray[np.uint8]

__all__ = ["TURN_S", "Block", "Lease", "Pinned", "Pool", "size_class"]

_NONE: Final[frozenset[int]] = frozenset()
_LEAST: Final = 64 << 10
_LEAST_PINNED: Final = 16 << 10
_PORTABLE_MAPPED: Final = 3
_NO_TIMING: Final = 2
_NOT_READY: Final = 600
_KEPT_BYTES: Final = 2 << 30  # by a pool, that nobody uses
TURN_S: Final = 2e-3  # after which calls that never wait let other tasks run
_KINDS: Final = 64  # of calls, of which something is kept
_OUT_OF_MEMORY: Final = 2
_REST_S: Final = 1.0  # in which the GPU may come to rest, where memory is short


def size_class(nbytes: int) -> int:
    """Bytes of the block that `Pool.take` gives for so many."""
    return _size_class(nbytes, _LEAST)


def _size_class(nbytes: int, least: int) -> int:
    step = 1 << max(0, max(0, nbytes - 1).bit_length() - 3)  # a quarter of the power of two below
    return max(least, -(-nbytes // step) * step)


class Block:
    """Device memory, its region, and what must be over before it is used again."""

    def __init__(self, kernels: Kernels, engine: Engine, nbytes: int) -> None:
        self._region: int | None = None
        self.after: frozenset[int] = frozenset()  # streams, before whose work it is not used again
        self._events: list[ctypes.c_void_p] = []
        self._recorded = 0  # of them, the first ones: behind that work
        self._kernels = kernels
        self._engine = engine
        self.memory = Scratch(kernels, nbytes)
        self.nbytes = nbytes
        self.turn = 0  # in which it was given back
        self.address = self.memory.address
        self._places: dict[int, bytes] = {}  # by rank of the world
        self._places_of_all: list[bytes | None] = []  # once all are known

    def part(self, start: int, nbytes: int) -> Description:
        """Bytes of it."""
        return (self.memory, self.address + start, nbytes, self._kernels.device, NO_STREAM, "B", (nbytes,))

    def place_for(self, rank: int) -> bytes | None:
        """What a peer's kernels need in order to read it; None: they cannot."""
        place = self._places.get(rank)
        if place is None:
            place = self._engine.place_for(self.part(0, self.nbytes), rank)
            if place is not None:
                self._places[rank] = place
        return place

    def places_for(self, ranks: Sequence[int], own: int) -> list[bytes | None]:
        """The same of all ranks of the group to which the pool belongs, but its own."""
        if not self._places_of_all:
            places = [None if peer == own else self.place_for(rank) for peer, rank in enumerate(ranks)]
            if places.count(None) > 1:
                return places
            self._places_of_all = places
        return self._places_of_all

    @property
    def region(self) -> int:
        """Number of the region by which peers get from it."""
        if self._region is None:
            self._region, _ = self._engine.add_device_region(self.part(0, self.nbytes), False)
        return self._region

    def _record(self) -> bool:
        """Record events behind the work of those streams that have any. False: that cannot be done now."""
        capturing = ctypes.c_int()
        with self._kernels.current():
            for stream in map(ctypes.c_void_p, self.after):
                try:
                    driver()("cuStreamIsCapturing", stream, ctypes.byref(capturing))
                    if capturing.value:
                        raise LinkError("a graph is captured")
                    driver()("cuStreamQuery", stream)
                except LinkError as error:
                    if error.code != _NOT_READY:
                        self._recorded = 0
                        return False
                    self._record_behind(stream)
        return True

    def _record_behind(self, stream: ctypes.c_void_p) -> None:
        if self._recorded == len(self._events):
            event = ctypes.c_void_p()
            driver()("cuEventCreate", ctypes.byref(event), _NO_TIMING)
            self._events.append(event)
        driver()("cuEventRecord", self._events[self._recorded], stream)
        self._recorded += 1

    def idle(self, streams: frozenset[int]) -> bool:
        """Whether the work that it waited for is over; `streams` are those of a call that is being made."""
        if not self.after:
            return True
        if not self.after <= streams:  # may be destroyed by now
            return False
        if not self._recorded:
            context = self._kernels.context
            for stream in self.after:
                if not _core.stream_is_idle(context, stream):
                    break
            else:
                self.after = _NONE
                return True
            if not self._record():
                return False
        with self._kernels.current():
            while self._recorded:
                try:
                    driver()("cuEventQuery", self._events[self._recorded - 1])
                except LinkError as error:
                    if error.code == _NOT_READY:
                        return False
                self._recorded -= 1
        self.after = frozenset()
        return True

    def __del__(self) -> None:
        if self._region is not None:
            self._engine.close_region(self._region)  # before its memory goes
        with contextlib.suppress(LinkError), self._kernels.current():
            for event in self._events:
                driver()("cuEventDestroy_v2", event)


class Pinned:
    """Host memory that kernels read and write."""

    def __init__(self, kernels: Kernels, nbytes: int) -> None:
        self._kernels = kernels
        address = ctypes.c_void_p()
        with kernels.current():
            driver()("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), _PORTABLE_MAPPED)
        self.address = address.value or 0
        self.nbytes = nbytes
        self.bytes: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            _core.free_later(self._kernels.device, address, True)


class Pool:
    """Memory of the calls of one scope on one GPU."""

    def __init__(self, engine: Engine, device: int) -> None:
        self.kernels = kernels_of(device)
        self.device = device
        self.home: Description = (None, 0, 0, device, NO_STREAM, "B", (0,))  # for launches
        self._engine = engine
        self._free: dict[int, list[Block]] = {}
        self._free_tables: dict[int, list[tuple[Pinned, Block]]] = {}
        self._away: dict[int, Block] = {}  # that leases are of, by address
        self._tables_away: dict[int, tuple[Pinned, Block]] = {}  # likewise
        self._pinned: dict[int, list[Pinned]] = {}
        self._kept = 0
        self._closed = False
        # By whatever thread lets go of the last array over it: address, and streams of the caller's calls.
        self._returned: deque[tuple[int, frozenset[int]]] = deque()
        self._turn = itertools.count()
        self._lent: list[tuple[int, Block, set[int]]] = []  # by call, to ranks of the group
        self.usual: dict[tuple[int, ...], tuple[int, int]] = {}  # by kind: rows, assignments that came
        self.calls: _core.ExpertCalls | None = None
        self._kits: dict[tuple[int, ...], list[Any]] = {}  # by kind, what serves one call at a time
        self.repeats: dict[Any, Any] = {}  # calls that may be made again, by what they are found by
        self.last_dispatch: Any = None  # of those, the one that was made last
        self.ahead: Any = None  # memory for the next one, and which that is
        self.slots: Bytes | None = None  # for the messages of one that is made at once
        self.settings: dict[Any, Any] = {}  # of calls before, by all that they follow from
        self.missed: Counter[int] = Counter()  # by rank of the group, kernels that did not reach its memory

    def take(self, nbytes: int, streams: frozenset[int]) -> Block:
        """A block of at least so many bytes, not cleared, for a call on these streams."""
        return self.take_sized(_size_class(nbytes, _LEAST), streams)

    def take_sized(self, size: int, streams: frozenset[int]) -> Block:
        """The same of a size that `size_class` has given."""
        while self._returned:
            address, after = self._returned.popleft()
            block = self._away.pop(address)
            block.after = after
            if block.nbytes == size and block.idle(streams):
                return block
            self.give_back(block)
        free = self._free.get(size, ())
        for place, block in enumerate(free):
            if not block.after or block.idle(streams):
                self._kept -= size
                return free.pop(place)  # type: ignore[union-attr]
        try:
            return Block(self.kernels, self._engine, size)
        except LinkError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            return self._squeezed_out(size, error)

    def _squeezed_out(self, size: int, error: LinkError) -> Block:
        """A block where memory is short: all that is kept goes back to the driver, whatever its size."""
        if self._kept:
            self._free.clear()
            self._kept = 0
            _core.given_back(_REST_S)
            with contextlib.suppress(LinkError):
                return Block(self.kernels, self._engine, size)
        raise LinkError(
            f"GPU {self.device} has no {size} bytes left for dispatch and combine: have the array library "
            "leave some (of torch: torch.cuda.empty_cache(), torch.cuda.set_per_process_memory_fraction)",
            code=error.code,
        ) from error

    def give_back(self, block: Block) -> None:
        """Keep it for the next; of what is too much then, those go that have not been used for longest."""
        if self._closed:
            return
        block.turn = next(self._turn)
        self._kept += block.nbytes
        self._free.setdefault(block.nbytes, []).append(block)
        while self._kept > _KEPT_BYTES:
            oldest = min((one for free in self._free.values() for one in free), key=lambda one: one.turn)
            self._free[oldest.nbytes].remove(oldest)
            self._kept -= oldest.nbytes

    def leave(self, block: Block) -> None:
        """Keep it until `returned`."""
        self._away[block.address] = block

    def returned(self, address: int, streams: frozenset[int]) -> None:
        """Give it back, on any thread: at the next call, to be used after the work of these streams."""
        if self._closed:
            self._away.pop(address, None)
        else:
            self._returned.append((address, streams))

    def take_tables(self, nbytes: int) -> tuple[Pinned, Block]:
        """Host memory, and a block that nothing but `upload` writes, in the order of the kernels' stream."""
        size = nbytes if nbytes in self._free_tables else _size_class(nbytes, _LEAST)
        try:  # maybe on another thread
            taken = self._free_tables[size].pop()
        except LookupError:
            taken = Pinned(self.kernels, size), Block(self.kernels, self._engine, size)
        self._tables_away[taken[1].address] = taken
        return taken

    def give_back_tables(self, address: int) -> None:
        """Keep those of that block for the next; no kernel reads them any more."""
        pinned, block = self._tables_away.pop(address)
        if not self._closed:
            self._free_tables.setdefault(block.nbytes, []).append((pinned, block))

    def take_kit(self, kind: tuple[int, ...]) -> Any:
        """What a call of this kind has given back, if any."""
        kits = self._kits.get(kind)
        return kits.pop() if kits else None

    def give_back_kit(self, kind: tuple[int, ...], kit: Any) -> None:
        """Keep it for the next call of the kind."""
        if self._closed:
            return
        if len(self._kits) >= _KINDS:
            self._kits.clear()
        self._kits.setdefault(kind, []).append(kit)

    def note_usual(self, kind: tuple[int, ...], rows: int, assignments: int) -> None:
        """Note how much has come in a call of this kind."""
        if len(self.usual) >= _KINDS:
            self.usual.clear()
        self.usual[kind] = rows, assignments

    def lend(self, call: int, block: Block, ranks: set[int]) -> None:
        """Give it back once these ranks have ended the call."""
        if ranks:
            self._lent.append((call, block, ranks))
        else:
            self.give_back(block)

    def lent(self) -> list[tuple[int, set[int]]]:
        """By call, the ranks that may still read memory of it."""
        return [(call, ranks) for call, _, ranks in self._lent]

    def heard(self, rank: int, ended: int, exactly: bool = False) -> None:
        """A rank has ended all calls up to this one, or `exactly` this one."""
        for call, block, ranks in self._lent:
            if call == ended or (call < ended and not exactly):
                ranks.discard(rank)
                if not ranks:
                    self.give_back(block)
        self._lent = [one for one in self._lent if one[2]]

    def heard_all(self, ended: list[int], own: int) -> None:
        """The ranks of the group, but this one, have ended all calls up to these."""
        lent = self._lent
        if not lent:
            return
        least = min(ended[:own] + ended[own + 1 :])
        if lent[-1][0] <= least and (len(lent) == 1 or max(call for call, _, _ in lent) <= least):  # mostly
            for _, block, _ in lent:
                self.give_back(block)
            lent.clear()
            return
        for peer, number in enumerate(ended):
            if peer != own:
                self.heard(peer, number)

    def take_pinned(self, nbytes: int) -> Pinned:
        """Pinned memory of at least so many bytes."""
        size = _size_class(nbytes, _LEAST_PINNED)
        try:  # maybe on another thread
            return self._pinned[size].pop()
        except LookupError:
            return Pinned(self.kernels, size)

    def give_back_pinned(self, memory: Pinned) -> None:
        """Keep it for the next."""
        if not self._closed:
            self._pinned.setdefault(memory.nbytes, []).append(memory)

    def close(self) -> None:
        """Give the driver what is not in use, and from now on what comes back; nobody reads what was lent."""
        self.let_go()
        self._lent.clear()

    def let_go(self) -> None:
        """The same, while others may read what was lent to them: that comes back as ever."""
        self._closed = True
        for address, _ in self._returned:
            self._away.pop(address, None)
        memory = self._free, self._free_tables, self._pinned, self._returned, self._kits
        for kept in (*memory, self.settings, self.repeats):
            kept.clear()
        self.slots = self.last_dispatch = self.ahead = None

    def upload(self, into: Block, data: Pinned, nbytes: int) -> None:
        """Queue a copy on the kernels' stream."""
        kernels = self.kernels
        _core.copy_on(kernels.context, kernels.stream, into.address, data.address, nbytes)


class Lease:
    """A block that an array of the caller's is over; `streams` are those of the caller's calls."""

    def __init__(self, pool: Pool, block: Block, streams: frozenset[int]) -> None:
        self._pool = pool
        self._block = block
        self.streams = streams
        pool.leave(block)

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self._block.address

    @property
    def nbytes(self) -> int:
        """Of the block."""
        return self._block.nbytes

    def part(self, nbytes: int) -> Description:
        """Its first bytes."""
        return self._block.part(0, nbytes)

    def __del__(self) -> None:
        self._pool.returned(self._block.address, self.streams)
