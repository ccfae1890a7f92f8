"""Dispatch and combine of GPU arrays: what both have in common.

A rank's kernel brings what it gives into memory that the runtime keeps for that; once it is over, the headers
say where that memory is, and with them go the counts and lists. Who has all headers reads the rows, by a
kernel that reaches the memory of all, or where that is more, or not possible, by gets, which copy engines do.
So a call takes two launches and one message per pair, and nobody waits until others have read.

Rules:
- What a kernel of another rank reads is memory of the pool, never an array of the caller.
- It is lent until the readers have ended the call, which they say in the headers of later ones: see `memory`.
- Kernels write memory of their own GPU only.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio.to_thread

from aiocomm._device import itemsize_of
from aiocomm.collectives import flight
from aiocomm.collectives.gpu import name_of
from aiocomm.collectives.headers import REFUSED, header
from aiocomm.collectives.kernels import THREADS
from aiocomm.collectives.scope import TAG_BITS
from aiocomm.errors import LinkError, PeerError, UsageError
from aiocomm.moe.exchange import HEAD_TAG, Exchange
from aiocomm.moe.memory import TURN_S
from aiocomm.moe.sources import MOST_RANKS
from aiocomm.moe.wire import HEAD_BYTES, Head
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from aiocomm._device import Description
    from aiocomm.collectives.scope import Scope
    from aiocomm.moe.memory import Block, Pinned, Pool
    from aiocomm.moe.placement import Placement
    from aiocomm.moe.routing import Part
    from aiocomm_native import Transfer

    Far = tuple[int, bytes, int, int, int, int]
    Kernel = tuple[int, bytes, int, Sequence[Description]]  # function, argument, bytes, memory to follow

__all__ = [
    "DEVICE_HEAD_BYTES",
    "LINGER_S",
    "PACKED",
    "PIECE_BYTES",
    "DeviceExchange",
    "Matrix",
    "Setting",
    "Where",
    "kernels_may_read",
]

PACKED: Final = 4  # flag of a head: the rows for its receiver lie together, and are to be got
_LATENCY_BYTES: Final = 256 << 20  # that a rank gives, up to which kernels read it
_WHERE: Final = struct.Struct("<QQQQ136s")
_NOWHERE: Final = bytes(136)
DEVICE_HEAD_BYTES: Final = HEAD_BYTES + _WHERE.size
LINGER_S: Final = 1e-3  # that is looked for news before the task is suspended: layers are close
PIECE_BYTES: Final = 4096 * THREADS // 32  # that a block has to do, at least
_KERNELS: Final = 1 << 20  # keys of launches; below are messages, above gets
_GETS: Final = 1 << 21
_TRIES: Final = 3  # of kernels on a rank's memory: access may be on its way to being opened


class Where(NamedTuple):
    """Where a rank's rows are.

    Args:
        ended: the last call of those that it has ended, without a gap.
        region: of all of that memory.
        start: of what is for the receiver of the header, in bytes.
        extent: how many bytes that is.
        place: for kernels; empty: they do not reach it.
    """

    ended: int
    region: int = 0
    start: int = 0
    extent: int = 0
    place: bytes = b""

    def pack(self) -> bytes:
        """The bytes that travel."""
        return _WHERE.pack(*self)

    @classmethod
    def unpack(cls, message: Any) -> Where:
        """Parse what is behind a head."""
        ended, region, start, extent, place = _WHERE.unpack_from(message, HEAD_BYTES)
        return cls(ended, region, start, extent, b"" if place == _NOWHERE else place)


class Matrix:
    """A GPU array of two dimensions."""

    __slots__ = ("address", "description", "dtype", "hidden", "itemsize", "nbytes", "rows", "stream")

    def __init__(self, description: Description, name: str) -> None:
        _, self.address, self.nbytes, _, self.stream, _, shape = description
        if len(shape) != 2:
            raise UsageError(f"{name} has shape {shape}: pass two dimensions, (rows, hidden)")
        self.description = description
        self.rows, self.hidden = shape
        self.dtype = name_of(description[5])
        self.itemsize = itemsize_of(description)


class Setting(NamedTuple):
    """What the calls of one rank on one GPU have in common.

    Args:
        sm_budget: streaming multiprocessors that a kernel may take.
        streams: handles of the caller's streams.
    """

    pool: Pool
    bulk: int
    path: str
    deadline: float | None
    sm_budget: int
    streams: frozenset[int]


class DeviceExchange(Exchange):
    """One dispatch or combine of this rank."""

    _linger_s = LINGER_S

    def __init__(
        self,
        scope: Scope,
        setting: Setting,
        operation: str,
        text: str,
        placement: Placement,
        parts: Sequence[Part],
    ) -> None:
        super().__init__(
            scope,
            setting.bulk,
            operation,
            header(text + " on GPUs"),
            placement,
            parts,
            setting.path,
            setting.deadline,
        )
        self._setting = setting
        self._pool = setting.pool
        self._lent: list[Block] = []  # once this call is over
        self._temporary: list[Block] = []
        self._pinned: list[Pinned] = []
        self._brief = True
        self.may_repeat = False  # calls like this one can be made by the extension
        self._entries: list[int] = []  # handles of its kernels
        self._given: list[int] | None = None  # keys of what was launched first
        self._made: Kernel | None = None
        self._is_made = False
        self._after: list[Description] = []  # behind the work on whose streams the next kernel is
        self._refused: UsageError | None = None
        self._unreached: set[int] = set()  # ranks of the group whose memory a kernel has not reached
        self._told: set[int] = set()  # ranks that have a header with a place
        scope.comm._lenders.add(scope)
        self._launches = _KERNELS
        self._behind: set[int] = set()  # keys of launches that wait for work of the caller's
        self._getting = _GETS
        self._where: dict[int, Where] = {}
        if scope.group.size > MOST_RANKS:
            raise UsageError(
                f"{operation} of GPU arrays takes groups of at most {MOST_RANKS}, not {scope.group.size}"
            )

    async def run(self) -> None:
        """Do the call; raises as `Exchange.run`."""
        try:
            await super().run()
        finally:  # nothing of this rank is under way any more
            for block in self._lent:
                self._pool.lend(self._number, block, set(self._told))
            for block in self._temporary:
                self._pool.give_back(block)
            for memory in self._pinned:
                self._pool.give_back_pinned(memory)
            self._scope.answer()
            if self._group.closed:
                self._scope.ask()
        comm = self._scope.comm
        if comm._engine.turn_due(self.suspended, TURN_S):
            await comm._backend.turn()

    # ------------------------------------------------------------ of each operation

    def _sources(self) -> tuple[str, tuple[str, ...]]:
        """The source of its kernels, and their names."""
        raise NotImplementedError

    def _giving(self) -> Kernel | None:
        """What brings this rank's part into place, as far as that is known."""
        raise NotImplementedError

    def _give(self) -> list[int]:
        """Launch that; returns keys."""
        if not self._is_made:
            self._made, self._is_made = self._giving(), True
        if self._made is None:
            return []
        self._after = []
        return [self._launch(*self._made, seconds=self._linger_s)]

    async def _prepare(self, keys: list[int]) -> list[int]:
        """Do what headers wait for, but for these launches; returns keys of all that is left to wait for.

        Raises:
            UsageError: the arguments are wrong, which all ranks are told.
        """
        raise NotImplementedError

    def _message(self, peer: int) -> Any:
        """A rank's header and what goes with it."""
        raise NotImplementedError

    def _follow(self, peer: int) -> None:
        """Send what did not go with it."""

    def _start(self) -> None:
        source, names = self._sources()
        self._entries = [self._pool.kernels.loaded(source, name) for name in names]

    def _begin_quickly(self) -> bool:
        if not all(self._entries):  # they are compiled first
            return False
        try:
            self._given = self._give()
        except UsageError as error:
            self._refused = error
            return False
        self._raise_any()
        if self._group.size == 1 or any((False, key) in self._flying for key in self._given):
            return False
        return self._swap_quickly()

    def _swap_quickly(self) -> bool:
        """What `_prepare` and sending do, once this rank's part is in place. False: nothing is sent."""
        return False

    def _swapped_but(self, left: Any) -> None:
        """Note that messages are on their way to and from all; `left`: those that are not there."""
        self._told.update(self._others())
        pending = {key for key, _ in left}
        self._wanted &= pending
        self._missing &= pending
        for key, transfer in left:
            self._watch((True, key), transfer)

    def _swap(self, messages: Any) -> bool:
        """Swap messages without a turn of the loop, as far as that goes. False: nothing is sent."""
        left = self._scope.comm._engine.swap_heads(
            self._scope.index,
            self._number << TAG_BITS | HEAD_TAG,
            self._group.rank,
            self._group.ranks,
            messages,
            self._slots,
            self._slot_bytes,
            self._left(),
            LINGER_S,
        )
        if left is None:
            return False
        self._swapped_but(left)
        return True

    def _read_heads(self) -> list[Any] | None:
        """What the messages begin with, by rank. None: one is about another call."""
        heads = _core.read_heads(
            self._slots, self._slot_bytes, self._group.rank, self._group.size, self._header
        )
        if heads is not None:
            self._judged = True
            self._raise_trouble()
            for peer in self._others():
                where = self._where[peer] = Where(*heads[peer][3:])
                self._pool.heard(peer, where.ended)
        return heads

    def _ended_call(self) -> int:
        """The last call of those that this rank has ended, without a gap."""
        return min(self._scope.calls) - 1

    def _places(self, block: Block | None) -> list[bytes | None]:
        """By rank, what its kernels need in order to read a block."""
        rank, ranks = self._group.rank, self._group.ranks
        if block is None:
            return [None] * len(ranks)
        return [None if peer == rank else block.place_for(one) for peer, one in enumerate(ranks)]

    async def _send(self) -> None:
        try:
            if self._refused is not None:
                raise self._refused
            if self._given is None:
                source, names = self._sources()
                self._entries = await self._compiled(source, names)
                self._given = self._give()
            keys = await self._prepare(self._given)
            messages = [(peer, self._message(peer)) for peer in self._others()]
            await self._landed(keys)
        except UsageError as error:
            self._header = header(f"{REFUSED}{error}")
            for peer in self._others():
                self._send_head(peer, Head(self._header, 0, 0, 0).pack())
            return
        for peer, message in messages:
            self._told.add(peer)
            self._send_head(peer, message)
        for peer, _ in messages:
            self._follow(peer)

    # ------------------------------------------------------------ memory

    def _lend(self, nbytes: int) -> Block:
        block = self._pool.take(nbytes, self._setting.streams)
        self._lent.append(block)
        return block

    def _borrow_block(self, nbytes: int) -> Block:
        block = self._pool.take(nbytes, self._setting.streams)
        self._temporary.append(block)
        return block

    def _borrow_pinned(self, nbytes: int) -> Pinned:
        memory = self._pool.take_pinned(nbytes)
        self._pinned.append(memory)
        return memory

    def _where_of(self, block: Block | None, peer: int, start: int, extent: int, packed: bool) -> Where:
        """Tell a rank where what is for it lies."""
        ended = self._ended_call()
        if block is None or not extent:
            return Where(ended)
        place = None if packed else block.place_for(self._group.ranks[peer])
        return Where(ended, block.region, start, extent, place or b"")

    def _learn(self) -> None:
        """Read where the others' rows are."""
        for peer in self._heads:
            where = self._where[peer] = Where.unpack(self._slot(peer))
            self._pool.heard(peer, where.ended)

    def _expect(self, peer: int, extent: int, exact: bool, alignment: int = 1) -> None:
        where = self._where[peer]
        if where.start % alignment:
            raise PeerError(
                f"{self._operation}: {self._group.names[peer]} has its rows at {where.start}, "
                f"not at a multiple of {alignment}",
                self._group.ranks[peer],
            )
        if where.extent != extent if exact else where.extent < extent:
            raise PeerError(
                f"{self._operation}: {self._group.names[peer]} has {where.extent} bytes where {extent} are "
                "needed",
                self._group.ranks[peer],
            )

    # ------------------------------------------------------------ kernels and gets

    def _left(self) -> float:
        return -1.0 if self._ends is None else max(0.0, self._ends - time.monotonic())

    async def _compiled(self, source: str, names: Sequence[str]) -> list[int]:
        """Handles of kernels, which are compiled on another thread."""
        kernels = self._pool.kernels
        try:
            return await anyio.to_thread.run_sync(kernels.entries, source, names)
        except (LinkError, OSError) as error:
            raise UsageError(f"cannot {self._operation} on this GPU: {error}") from error

    def _launch(
        self,
        function: int,
        argument: bytes,
        nbytes: int,
        after: Iterable[Description] = (),
        far: Iterable[Far] = (),
        seconds: float = 0.0,
    ) -> int:
        """Launch a kernel; returns the key under which its end is told, unless it comes within `seconds`."""
        comm = self._scope.comm
        self._launches += 1
        blocks = max(1, min(self._setting.sm_budget, -(-nbytes // PIECE_BYTES)))
        where = self._pool.home, list(after), list(far), comm.rank, self._scope.index
        try:
            transfer, waits = comm._engine.launch(
                function, blocks, THREADS, argument, *where, nbytes, self._left(), seconds
            )
        except LinkError as error:  # about the caller's arrays, or their streams
            raise UsageError(f"cannot {self._operation} these arrays: {error}") from error
        if transfer is not None:
            if waits:
                self._behind.add(self._launches)
            self._watch((False, self._launches), transfer)
        return self._launches

    def _launched(self, transfer: Any) -> list[int]:
        """Watch a kernel that the extension has launched; returns keys. None: it has ended well."""
        if transfer is None:
            return []
        self._launches += 1
        self._watch((False, self._launches), transfer)
        return [self._launches]

    def _get(self, peer: int, into: Description, start: int) -> int:
        """Get what lies at `start` in a rank's memory; returns the key."""
        comm, where = self._scope.comm, self._where[peer]
        self.rode = False
        self._getting += 1
        transfer = comm._engine.get(
            into, self._group.ranks[peer], self._bulk, where.region, start, self._left()
        )
        self._watch((False, self._getting), transfer)
        return self._getting

    def _copies(self, peers: Iterable[int]) -> tuple[dict[int, int], list[int]]:
        """Get what these ranks give; returns where it will be, by rank, and keys."""
        places, keys = {}, []
        for peer in peers:
            extent = self._where[peer].extent
            block = self._borrow_block(extent)
            places[peer] = block.address
            keys.append(self._get(peer, block.part(0, extent), self._where[peer].start))
        return places, keys

    async def _landed(self, keys: Iterable[int]) -> set[int]:
        """Wait for launches and gets; returns ranks whose memory a kernel does not reach, so has not run."""
        wanted = [(False, key) for key in keys]
        if self._behind:  # the caller's work takes as long as it takes
            self._linger_s = flight.LINGER_S
        while any(key in self._flying for key in wanted):
            self._settle_sends()
            self._raise_any()
            await self._wait()
        self._linger_s = LINGER_S
        self._behind.clear()
        self._raise_any()
        self._pool.missed.update(self._unreached)
        unreached, self._unreached = self._unreached, set()
        return unreached

    def _ended(self, key: tuple[bool, int], transfer: Transfer[Any]) -> None:
        if _KERNELS <= key[1] < _GETS and self._flying.get(key) is transfer and not transfer.cancelled():
            error = transfer.exception()
            if isinstance(error, LinkError) and error.code == errno.EXDEV:
                del self._flying[key]
                self._unreached.add(self._group.ranks.index(transfer.peer))
                self._gate.ring()
                return
        super()._ended(key, transfer)

    def _raise_any(self) -> None:
        if self._judged:
            self._raise_trouble()
            return
        self._raise_header_trouble()
        if self._data_error is not None:
            raise self._explained(self._data_error)

    def _may_pull(self, peer: int) -> bool:
        return bool(self._where[peer].place) and self._pool.missed[peer] < _TRIES

    def _far(self, peer: int, at: int, alignment: int = 1) -> Far:
        where = self._where[peer]
        return self._group.ranks[peer], where.place, where.start, where.extent, at, alignment


def kernels_may_read(path: str, nbytes: int) -> bool:
    """Whether what a rank gives is read by kernels, as far as it decides that."""
    return path == "latency" or (path != "bandwidth" and nbytes <= _LATENCY_BYTES)


def aligned(nbytes: int, to: int = 256) -> int:
    """The next multiple."""
    return (nbytes + to - 1) // to * to
