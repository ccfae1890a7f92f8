"""Moves pages between processes with the communicator's one-sided transfers.

One put or get per range that is contiguous at the peer. Where the local side is scattered, rows are packed
into (or unpacked from) staging memory. Several are under way at once, across layers, too; a layer's note
follows when all of the layer has ended, and the notification when all has.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio.lowlevel
import numpy as np

from aiocomm._operations import limit_of, overlapping
from aiocomm.collectives.gate import Gate
from aiocomm.errors import AiocommError, DeadlineExceeded, UsageError
from aiocomm.pages.ranges import plan_ranges
from aiocomm.pages.streaming import note
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from aiocomm.channel import Channel
    from aiocomm.communicator import Communicator
    from aiocomm.pages.layout import Pages
    from aiocomm.pages.lease import RemotePages
    from aiocomm.pages.ranges import Ranges
    from aiocomm_native import Transfer

    Bytes = NDArray[np.uint8]

__all__ = ["get_pages", "put_layers", "put_pages"]

_WINDOW: Final = 64  # transfers under way
_BREATH_S: Final = 1e-3  # of work after which other tasks get a turn


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
    mover = _Mover(comm, channel, deadline)
    _check_notification(notify)
    remote.check(take)
    ranges = await plan_ranges(pages.layout, give, remote.layout, take, at_target=True)
    mover.check(remote)
    await mover.run(_puts(mover, pages, remote, ranges, _nothing))
    await mover.notify(remote, notify)


async def put_layers(
    comm: Communicator,
    layers: Sequence[Pages],
    give: Sequence[int],
    remotes: Sequence[RemotePages],
    take: Sequence[int],
    notify: bytes | None,
    channel: Channel | None,
    deadline: float | None,
) -> None:
    """See `Communicator.put_layers`."""
    if len(layers) != len(remotes) or not layers:
        raise UsageError(
            f"{len(layers)} layers here and {len(remotes)} at the peer: one each, in their order"
        )
    if len({remote._number for remote in remotes}) != 1:
        raise UsageError("the peer's layers are of different leases: use remote.layers() of one")
    mover = _Mover(comm, channel, deadline)
    _check_notification(notify)
    planned = []
    for pages, remote in zip(layers, remotes, strict=True):  # all are checked before a byte moves
        remote.check(take)
        planned.append(await plan_ranges(pages.layout, give, remote.layout, take, at_target=True))
        mover.check(remote)
    notes = _Notes(mover, remotes[0], len(layers))

    def jobs() -> Iterator[Transfer[Any]]:
        for layer, (pages, remote, ranges) in enumerate(zip(layers, remotes, planned, strict=True)):
            yield from _puts(mover, pages, remote, ranges, partial(notes.part_ended, layer), notes.begun)
            yield from notes.all_begun(layer)

    try:
        await mover.run(jobs())
        await mover.notify(remotes[0], notify)
    except BaseException:
        notes.give_up()
        raise


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
    mover = _Mover(comm, channel, deadline)
    remote.check(give)
    if not all(pages.arrays[array].flags.writeable for array in pages.layout.planes):
        raise UsageError("an array of the target pages is read-only: pages are got into writable ones")
    ranges = await plan_ranges(remote.layout, give, pages.layout, take, at_target=False)
    mover.check(remote)

    def jobs() -> Iterator[Transfer[Any]]:
        for array, plane in zip(pages.layout.planes, remote.layout.planes, strict=True):
            local, region = _flat(pages.arrays[array]), remote._regions[plane]
            for far, nbytes, first, last in _each(ranges):
                if last - first == 1:
                    at = int(ranges.near[first])
                    yield mover.get(region, far, local[at : at + nbytes], _nothing)
                else:
                    staged = np.empty(nbytes, np.uint8)
                    rows = ranges.near[first:last], ranges.rows[first:last]
                    yield mover.get(region, far, staged, partial(_core.unpack_rows, *rows, local, staged))

    await mover.run(jobs())


def _puts(
    mover: _Mover,
    pages: Pages,
    remote: RemotePages,
    ranges: Ranges,
    ended: Callable[[], object],
    begun: Callable[[], object] | None = None,
) -> Iterator[Transfer[Any]]:
    for array, plane in zip(pages.layout.planes, remote.layout.planes, strict=True):
        local, region = _flat(pages.arrays[array]), remote._regions[plane]
        for far, nbytes, first, last in _each(ranges):
            if last - first == 1:
                at = int(ranges.near[first])
                data = local[at : at + nbytes]
            else:
                data = np.empty(nbytes, np.uint8)
                _core.pack_rows(ranges.near[first:last], ranges.rows[first:last], local, data)
            if begun is not None:
                begun()
            yield mover.put(region, far, data, None, ended)


def _check_notification(notify: bytes | None) -> None:
    if notify is not None and not (isinstance(notify, bytes) and len(notify) <= 4096):
        raise UsageError("notify takes at most 4,096 bytes")


def _each(ranges: Ranges) -> Iterator[tuple[int, int, int, int]]:
    return zip(ranges.far, ranges.nbytes, ranges.first, ranges.first[1:], strict=False)


def _flat(array: NDArray[Any]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def _nothing() -> None:
    pass


class _Notes:
    """Sends a layer's note when all of it has ended, in the order of the layers."""

    def __init__(self, mover: _Mover, remote: RemotePages, layers: int) -> None:
        self._mover = mover
        self._remote = remote
        self._layers = layers
        self._call = secrets.randbits(64)
        self._open = [0] * layers  # transfers that have begun and not ended
        self._layer = 0  # that is being begun
        self._next = 0  # whose note is the next

    def begun(self) -> None:
        self._open[self._layer] += 1

    def part_ended(self, layer: int) -> None:
        self._open[layer] -= 1
        if layer == self._next:
            self._mover.later(self._due())

    def all_begun(self, layer: int) -> Iterator[Transfer[Any]]:
        self._layer = layer + 1
        return self._due()

    def _due(self) -> Iterator[Transfer[Any]]:
        while self._next < self._layer and not self._open[self._next]:
            layer, self._next = self._next, self._next + 1
            yield self._send(layer)

    def _send(self, layer: int | None) -> Transfer[Any]:
        region = self._remote._regions[self._remote.layout.planes[0]]
        text = note(self._remote._number, self._call, layer, self._layers)
        return self._mover.put(region, 0, b"", text, _nothing)

    def give_up(self) -> None:
        """Let the owner know, if that is still possible; nobody waits for it."""
        if not self._mover.comm.closed:
            self._mover.forever()
            with contextlib.suppress(AiocommError):
                self._send(None).add_done_callback(_look_away)


def _look_away(transfer: Transfer[Any]) -> None:
    if not transfer.cancelled():
        transfer.exception()


class _Mover:
    """Keeps a window of transfers under way; the first failure ends all."""

    def __init__(self, comm: Communicator, channel: Channel | None, deadline: float | None) -> None:
        self.comm = comm
        self._channel = channel
        self._index = 0
        self._gate = Gate(comm._backend)
        limit = limit_of(deadline)
        self._ends = None if deadline is None else time.monotonic() + limit
        self._flying: dict[Transfer[Any], Callable[[], object]] = {}
        self._ended: list[Callable[[], object]] = []
        self._later: list[Iterator[Transfer[Any]]] = []
        self._error: BaseException | None = None

    def check(self, remote: RemotePages) -> None:
        """Refuse what no transfer of these pages could do."""
        for plane in remote.layout.planes:
            self._index = self.comm._check_remote(remote._regions[plane], self._channel)

    def _left(self) -> float:
        if self._ends is None:
            return -1.0
        if (left := self._ends - time.monotonic()) <= 0:
            raise DeadlineExceeded("the deadline passed before all pages had moved")
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

    def get(self, region: Any, far: int, into: Bytes, ended: Callable[[], object]) -> Transfer[Any]:
        """Submit a get, as `put`."""
        engine, at = self.comm._engine, region._start + far
        try:
            transfer = engine.get(into, region.rank, self._index, region._number, at, self._left())
        except ValueError as error:
            overlapping(error)
            raise
        self._flying[transfer] = ended
        return transfer

    def later(self, more: Iterator[Transfer[Any]]) -> None:
        """Submit these before what is left of `run`'s jobs."""
        self._later.append(more)

    async def notify(self, remote: RemotePages, text: bytes | None) -> None:
        """Tell the owner that all is in place."""
        if text is not None:
            region = remote._regions[remote.layout.planes[0]]
            await self.run(iter([self.put(region, 0, b"", text, _nothing)]))

    async def run(self, jobs: Iterator[Transfer[Any]]) -> None:
        """Submit what `jobs` yields, a window at a time.

        Nothing is under way afterwards, whatever happens. Other tasks get a turn also where transfers end as
        fast as they are submitted.
        """
        more = True
        breath = time.monotonic() + _BREATH_S
        try:
            while more or self._flying or self._ended or self._later:
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
                    await anyio.lowlevel.checkpoint()
                    breath = time.monotonic() + _BREATH_S
        finally:
            for transfer in list(self._flying):
                transfer.cancel()
            await self._gate.wait_shielded(lambda: not self._flying)
        if self._error is not None:
            raise self._error

    def _has_room(self) -> bool:
        # What has ended counts until it was dealt with: transfers may end as fast as they are submitted.
        return len(self._flying) + len(self._ended) < _WINDOW

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
        ended = self._flying.pop(transfer)
        self._gate.ring()
        if transfer.cancelled():
            return
        if (error := transfer.exception()) is not None:
            self._error = self._error or error
        else:
            self._ended.append(ended)
