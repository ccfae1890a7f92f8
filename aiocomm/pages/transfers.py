"""Moves pages between processes with the communicator's one-sided transfers.

One put or get per range that is contiguous at the peer. Where the local side is scattered, rows are packed
into (or unpacked from) staging memory. Several are under way at once; the notification follows when all have
ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.collectives.gate import Gate
from aiocomm.errors import DeadlineExceeded
from aiocomm.pages.planner import plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from aiocomm.channel import Channel
    from aiocomm.communicator import Communicator
    from aiocomm.pages.layout import Pages
    from aiocomm.pages.lease import RemotePages
    from aiocomm.pages.planner import Copies
    from aiocomm_native import Transfer

__all__ = ["get_pages", "put_pages"]

_WINDOW: Final = 64  # transfers under way
_STAGED: Final = 1 << 20  # bytes of one staging buffer, at most

_Bytes = Any


async def put_pages(
    comm: Communicator,
    pages: Pages,
    give: Sequence[int],
    remote: RemotePages,
    take: Sequence[int],
    notify: bytes | None,
    channel: Channel | None,
    deadline: float | None,
) -> None:
    """See `Communicator.put_pages`."""
    remote.check(take)
    copies = plan(pages.layout, give, remote.layout, take)
    local = _flat(pages)
    mover = _Mover(comm, deadline)

    def jobs() -> Iterator[Any]:
        for plane, start, rows in _ranges(copies, at_target=True):
            region = remote._regions[plane]
            nbytes = sum(n for _, _, n in rows)
            if len(rows) == 1:
                (array, at, n), *_ = rows
                data = local[array][at : at + n]
            else:
                data = np.concatenate([local[array][at : at + n] for array, at, n in rows])
            yield comm.put(data, region[start : start + nbytes], channel=channel, deadline=mover.left()), None

    await mover.run(jobs())
    if notify is not None:
        region = remote._regions[remote.layout.planes[0]]
        await comm.put(b"", region[0:0], notify=notify, channel=channel, deadline=mover.left())


async def get_pages(
    comm: Communicator,
    remote: RemotePages,
    give: Sequence[int],
    pages: Pages,
    take: Sequence[int],
    channel: Channel | None,
    deadline: float | None,
) -> None:
    """See `Communicator.get_pages`."""
    remote.check(give)
    copies = plan(remote.layout, give, pages.layout, take)
    local = _flat(pages)
    mover = _Mover(comm, deadline)

    def jobs() -> Iterator[Any]:
        for plane, start, rows in _ranges(copies, at_target=False):
            nbytes = sum(n for _, _, n in rows)
            source = remote._regions[plane][start : start + nbytes]
            if len(rows) == 1:
                (array, at, n), *_ = rows
                into = local[array][at : at + n]
                yield comm.get(source, into, channel=channel, deadline=mover.left()), None
            else:
                staged = np.empty(nbytes, np.uint8)
                yield comm.get(source, staged, channel=channel, deadline=mover.left()), (staged, rows)

    def unpack(work: tuple[_Bytes, list[tuple[int, int, int]]]) -> None:
        staged, rows = work
        done = 0
        for array, at, n in rows:
            local[array][at : at + n] = staged[done : done + n]
            done += n

    await mover.run(jobs(), unpack)


def _flat(pages: Pages) -> list[NDArray[np.uint8]]:
    return [array.reshape(-1).view(np.uint8) for array in pages.arrays]


def _ranges(copies: Copies, at_target: bool) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Ranges that are contiguous at the peer: its array, offset, and local rows (array, offset, bytes)."""
    give_array, give, take_array, take, nbytes = copies.flat()
    here, far = (
        ((give_array, give), (take_array, take)) if at_target else ((take_array, take), (give_array, give))
    )
    order = np.lexsort((far[1], far[0]))
    columns = [one[order].tolist() for one in (*far, *here, nbytes)]
    rows: list[tuple[int, int, int]] = []
    plane, start, end = -1, 0, -1
    for far_array, far_at, array, at, n in zip(*columns, strict=True):
        if far_array != plane or far_at != end or end - start + n > _STAGED:
            if rows:
                yield plane, start, rows
            plane, start, rows = far_array, far_at, []
        rows.append((array, at, n))
        end = far_at + n
    if rows:
        yield plane, start, rows


class _Mover:
    """Keeps a window of transfers under way; the first failure ends all."""

    def __init__(self, comm: Communicator, deadline: float | None) -> None:
        self._gate = Gate(comm._backend)
        self._ends = None if deadline is None else time.monotonic() + deadline
        self._flying: dict[Transfer[Any], Any] = {}
        self._ended: list[Any] = []
        self._error: BaseException | None = None

    def left(self) -> float | None:
        """Seconds until the deadline."""
        if self._ends is None:
            return None
        if (left := self._ends - time.monotonic()) <= 0:
            raise DeadlineExceeded("the deadline passed before all pages had moved")
        return left

    async def run(self, jobs: Iterator[tuple[Transfer[Any], Any]], finish: Any = None) -> None:
        """Do all jobs; `finish` is called with what a job carries once it has ended.

        Whatever happens, nothing is under way afterwards.
        """
        try:
            more = True
            while more or self._flying:
                while more and len(self._flying) < _WINDOW and self._error is None:
                    job = next(jobs, None)
                    if more := job is not None:
                        assert job is not None
                        transfer, work = job
                        self._flying[transfer] = work
                        transfer.add_done_callback(self._done)
                if self._error is not None:
                    raise self._error
                if self._flying:
                    await self._gate.wait()
                while self._ended:
                    work = self._ended.pop()
                    if work is not None:
                        finish(work)
        finally:
            for transfer in list(self._flying):
                transfer.cancel()
            await self._gate.wait_shielded(lambda: not self._flying)
        if self._error is not None:
            raise self._error

    def _done(self, transfer: Transfer[Any]) -> None:
        work = self._flying.pop(transfer)
        self._gate.ring()
        if transfer.cancelled():
            return
        if (error := transfer.exception()) is not None:
            self._error = self._error or error
        else:
            self._ended.append(work)
