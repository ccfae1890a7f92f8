"""Keeps transfers of pages under way."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._operations import limit_of, overlapping
from aiocomm._outcome import told_of
from aiocomm.collectives.gate import Gate
from aiocomm.errors import AiocommError, DeadlineExceeded, LinkError
from aiocomm.pages.lease import of_handles

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from aiocomm.channel import Channel
    from aiocomm.communicator import Communicator
    from aiocomm.pages.gather import Gather
    from aiocomm.pages.lease import RemotePages
    from aiocomm.pages.planner import Integers
    from aiocomm.region import RemoteRegion
    from aiocomm_native import Transfer
    from aiocomm_native._core import Rows

    Bytes = NDArray[np.uint8]
    Rows_ = tuple[Integers, Integers]
    Instead = Callable[[], Awaitable[Iterator[Transfer[Any]]]]

__all__ = ["Mover"]

_WINDOW: Final = 64  # transfers under way
_STAGED: Final = 2 << 20  # bytes that these are packed in, about: what stays in a cache
_BOUNCED: Final = 16 << 20  # bytes of GPU memory that are in host memory, about
_STAGED_BY_ALL: Final = 256 << 20  # by all that one communicator moves
_BREATH_S: Final = 1e-3  # of work after which other tasks get a turn


def _nothing() -> None:
    pass


class Staging:
    """Memory that rows are packed in, and used again: touching new memory takes longer than packing."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._free: dict[int, list[Bytes]] = {}
        self._used = 0  # bytes

    @property
    def has_room(self) -> bool:
        """Whether more may be taken: where all have taken much, what each needs to go on."""
        return not self._used or (self._used < _STAGED and self._comm._staged < _STAGED_BY_ALL)

    def take(self, nbytes: int) -> Bytes:
        """So many bytes, to be given back."""
        size = 1 << (nbytes - 1).bit_length()
        self._used += size
        self._comm._staged += size
        free = self._free.get(size)
        return (free.pop() if free else np.empty(size, np.uint8))[:nbytes]

    def give_back(self, taken: Bytes) -> None:
        """Nobody uses it any more."""
        whole = taken if taken.base is None else taken.base
        self._used -= len(whole)
        self._comm._staged -= len(whole)
        self._free.setdefault(len(whole), []).append(whole)

    def close(self) -> None:
        """No transfer uses any of it."""
        self._comm._staged -= self._used
        self._used = 0


class Mover:
    """Keeps a window of transfers under way; the first failure ends all.

    Args:
        operation: the user's, for messages: most transfers are of sizes that nobody has asked for.
    """

    def __init__(
        self, comm: Communicator, operation: str, channel: Channel | None, deadline: float | None
    ) -> None:
        self.comm = comm
        self._operation = operation
        self._channel = channel
        self._index = 0
        self._of_owners: list[RemoteRegion] = []
        self._gate = Gate(comm._backend)
        limit = limit_of(deadline)
        self._ends = None if deadline is None else time.monotonic() + limit
        self._flying: dict[Transfer[Any], Callable[[], object]] = {}
        self._instead: dict[Transfer[Any], Instead] = {}
        self._refused: list[Instead] = []
        self._ended: list[Callable[[], object]] = []
        self._later: list[Iterator[Transfer[Any]]] = []
        self._error: BaseException | None = None
        self._staging = Staging(comm)
        self._bounced = 0  # bytes of GPU memory on their way through host memory

    def check(self, remotes: Sequence[RemotePages]) -> None:
        """Refuse what no transfer of these pages could do, now and whenever more is submitted.

        A peer that comes back in the meantime numbers its regions from the beginning: what was planned for
        the earlier one must not be written into those.
        """
        self._of_owners = [remote.of_owner for remote in of_handles(remotes)]
        self._check_owners()

    def _check_owners(self) -> None:
        for region in self._of_owners:
            self._index = self.comm._check_remote(region, self._channel)

    def _left(self) -> float:
        if self._ends is None:
            return -1.0
        if (left := self._ends - time.monotonic()) <= 0:
            raise DeadlineExceeded(f"{self._operation}: the deadline passed before all pages had moved")
        return left

    def forever(self) -> None:
        """Drop the deadline."""
        self._ends = None

    def put(
        self, region: Any, far: int, data: Any, text: bytes | None, ended: Callable[[], object]
    ) -> Transfer[Any]:
        """Submit a put; `ended` is called when it has ended well."""
        engine, at = self.comm._engine, region._start + far
        transfer = engine.put(data, region.rank, self._index, region._number, at, text, self._left())
        self._flying[transfer] = ended
        return transfer

    def put_rows(
        self,
        region: Any,
        data: Any,
        rows: Rows,
        gather: Gather | None,
        ended: Callable[[], object],
        instead: Instead,
    ) -> Transfer[Any]:
        """Submit a put of rows, as `put`.

        Args:
            gather: a kernel for rows without a common stride.
            instead: makes what follows if it cannot be done.
        """
        where = data, region.rank, self._index, region._number, region._start
        transfer = self.comm._engine.put_rows(*where, rows, None, self._left(), gather)
        self._flying[transfer], self._instead[transfer] = ended, instead
        return transfer

    def get_rows(
        self,
        region: Any,
        into: Any,
        rows: Rows,
        gather: Gather | None,
        instead: Instead,
    ) -> Transfer[Any]:
        """Submit a get of rows, as `put_rows`."""
        where = into, region.rank, self._index, region._number, region._start
        transfer = self.comm._engine.get_rows(*where, rows, self._left(), gather)
        self._flying[transfer], self._instead[transfer] = _nothing, instead
        return transfer

    def takes_rows(self, remote: RemotePages) -> bool:
        """Whether adapters of this process move rows to and from the pages by themselves."""
        return remote.by_rows and self.comm._engine.takes_rows(remote.rank)

    def shares_memory(self, remote: RemotePages) -> bool:
        """Whether the owner's arrays may be memory that this process has, too."""
        return self.comm._engine.link_of(remote.rank) == "shm"

    def is_far(self, remote: RemotePages) -> bool:
        """Whether a network is between."""
        return self.comm._engine.link_of(remote.rank) not in ("self", "shm")

    def takes_lists(self, remote: RemotePages) -> bool:
        """Whether the owner moves many ranges of one message."""
        return not self.takes_rows(remote)

    def put_listed(self, region: Any, message: Any, ended: Callable[[], object]) -> Transfer[Any]:
        """Submit a put of many ranges: see core/listed.hpp."""
        where = region.rank, self._index, region._number
        transfer = self.comm._engine.put_listed(message, *where, self._left())
        self._flying[transfer] = ended
        return transfer

    def get_listed(
        self, region: Any, ranges: Integers, into: Any, ended: Callable[[], object]
    ) -> Transfer[Any]:
        """Submit a get of many ranges, (offset, bytes) each, which arrive close together."""
        where = region.rank, self._index, region._number
        transfer = self.comm._engine.get_listed(into, ranges, *where, self._left())
        self._flying[transfer] = ended
        return transfer

    def put_listed_from(
        self, region: Any, memory: Any, ranges: Integers, rows: Rows_, ended: Callable[[], object]
    ) -> Transfer[Any]:
        """Submit a put of many ranges of GPU memory.

        Args:
            memory: as it is described.
            ranges: their list, as it begins the message.
            rows: where those of `memory` begin, and their bytes.
        """
        where = region.rank, self._index, region._number
        transfer = self.comm._engine.put_listed_from(memory, ranges, *rows, *where, self._left())
        self._flying[transfer] = self._on_device(int(rows[1].sum()), ended)
        return transfer

    def get_listed_into(
        self, region: Any, memory: Any, ranges: Integers, rows: Rows_, ended: Callable[[], object]
    ) -> Transfer[Any]:
        """Submit a get of many ranges, (offset, bytes) each, into GPU memory; as `put_listed_from`."""
        where = region.rank, self._index, region._number
        transfer = self.comm._engine.get_listed_into(memory, ranges, *rows, *where, self._left())
        self._flying[transfer] = self._on_device(int(rows[1].sum()), ended)
        return transfer

    def _on_device(self, nbytes: int, ended: Callable[[], object]) -> Callable[[], object]:
        self._bounced += nbytes

        def give_back() -> None:
            ended()
            self._bounced -= nbytes

        return give_back

    def get(self, region: Any, far: int, into: Any, ended: Callable[[], object]) -> Transfer[Any]:
        """Submit a get, as `put`."""
        engine, at = self.comm._engine, region._start + far
        try:
            transfer = engine.get(into, region.rank, self._index, region._number, at, self._left())
        except ValueError as error:
            overlapping(error)
            raise
        self._flying[transfer] = ended
        return transfer

    def staged(self, nbytes: int) -> Bytes:
        """Memory to pack rows in, until `packed` of it has ended."""
        return self._staging.take(nbytes)

    def packed(self, staged: Bytes, ended: Callable[[], object]) -> Callable[[], object]:
        """What is called at the end of a transfer of such memory."""

        def give_back() -> None:
            ended()
            self._staging.give_back(staged)

        return give_back

    def later(self, more: Iterator[Transfer[Any]]) -> None:
        """Submit these before what is left of `run`'s jobs."""
        self._later.append(more)

    async def notify(self, remote: RemotePages, text: bytes | None) -> None:
        """Tell the owner that all is in place."""
        if text is not None:
            self._check_owners()
            await self.run(iter([self.put(remote.of_owner, 0, b"", text, _nothing)]))

    async def run(self, jobs: Iterator[Transfer[Any]]) -> None:
        """Submit what `jobs` yields, a window at a time.

        Nothing is under way afterwards, whatever happens. Other tasks get a turn also where transfers end as
        fast as they are submitted.
        """
        more = True
        breath = time.monotonic() + _BREATH_S
        try:
            while more or self._flying or self._ended or self._later or self._refused:
                while self._refused and self._error is None:
                    self._later.append(await self._refused.pop()())
                if (more or self._later) and self._error is None:
                    self._check_owners()  # nothing may have been under way meanwhile, to fail with its peer
                tired = False  # packing takes time, too
                while (more or self._later) and self._has_room() and self._error is None and not tired:
                    transfer = self._next(jobs)
                    if more := transfer is not None:
                        assert transfer is not None
                        transfer.add_done_callback(self._done)
                    tired = time.monotonic() > breath
                if self._error is not None:
                    raise self._error
                if self._flying and not tired:
                    await self._gate.wait()
                self._finish()
                if time.monotonic() > breath:
                    await self.comm._backend.turn()
                    breath = time.monotonic() + _BREATH_S
        finally:
            for transfer in list(self._flying):
                transfer.cancel()
            try:
                await self._gate.wait_shielded(lambda: not self._flying)
            finally:  # a second cancellation is raised there
                self._staging.close()
        if self._error is not None:
            raise self._error

    def _has_room(self) -> bool:
        # What has ended counts until it was dealt with: transfers may end as fast as they are submitted.
        few = len(self._flying) + len(self._ended) < _WINDOW
        return few and self._staging.has_room and self._bounced < _BOUNCED

    def _next(self, jobs: Iterator[Transfer[Any]]) -> Transfer[Any] | None:
        while self._later:
            if (transfer := next(self._later[0], None)) is not None:
                return transfer
            del self._later[0]
        return next(jobs, None)

    def _finish(self) -> None:
        while self._ended:
            self._ended.pop()()

    def _done(self, transfer: Transfer[Any]) -> None:
        ended, instead = self._flying.pop(transfer), self._instead.pop(transfer, None)
        self._gate.ring()
        if transfer.cancelled():
            return
        if (error := transfer.exception()) is not None:
            if instead is not None and isinstance(error, LinkError) and error.code == errno.EXDEV:
                self._refused.append(instead)
                return
            self._error = self._error or self._told(transfer, error)
        else:
            self._ended.append(ended)

    def _told(self, transfer: Transfer[Any], error: BaseException) -> BaseException:
        if not isinstance(error, AiocommError):
            return error
        direction = "from" if transfer.kind == "get" else "to"
        # The transfer's own name of it is gone once it is closed.
        channel = transfer.channel if self._channel is None else self._channel.name
        return told_of(error, f"{self._operation} {direction} rank {transfer.peer} on channel {channel!r}")
