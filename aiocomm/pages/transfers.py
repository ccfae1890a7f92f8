"""Moves pages between processes with the communicator's one-sided transfers.

GPU to GPU, or to and from arrays of `aiocomm.empty()` on the same host: one operation per pair of arrays,
whose rows this side's engine moves by itself, or between GPUs with a budget of multiprocessors a kernel where
they have no common stride. Over RDMA likewise, of GPU and host memory: the
adapter gathers or scatters several rows of ours in one request, about one stretch of the peer's memory.
Between processes of one host likewise, of host memory: the copy threads of whoever writes read the rows where
they are. Else, or where these do not reach the peer's memory, one put or get per range that is contiguous at
the peer; small ranges go many in a message, which the peer's engine, or its GPU's, copies to or from their
places. Where the local side is scattered, rows are packed into (or unpacked from) host memory, those of a GPU
by its engine.
Several transfers are under way at once, across layers, too; a layer's note follows when all of the layer has
ended, and the notification when all has.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._device import part_of
from aiocomm.collectives.kernels import check_budget
from aiocomm.errors import AiocommError, UsageError, UsageTypeError
from aiocomm.pages.gather import gather_of
from aiocomm.pages.indices import own_list
from aiocomm.pages.layout import Pages
from aiocomm.pages.lease import RemotePages, of_handles
from aiocomm.pages.memory import bytes_of
from aiocomm.pages.mover import Mover
from aiocomm.pages.ranges import ENTRY_BYTES, Ranges, plan_pages
from aiocomm.pages.streaming import note
from aiocomm.pages.within import check_apart
from aiocomm.region import check_notification, look_away
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aiocomm._device import Description
    from aiocomm.channel import Channel
    from aiocomm.communicator import Communicator
    from aiocomm.pages.gather import Gather
    from aiocomm.pages.indices import Indices
    from aiocomm.pages.layout import Layout
    from aiocomm.pages.memory import Bytes
    from aiocomm.pages.planner import Integers
    from aiocomm.pages.ranges import Plan
    from aiocomm_native import Transfer

    Jobs = Iterator[Transfer[Any]]

_LEAST_ROW: Final = 512  # bytes of rows of host memory that are better gathered by an adapter than packed
_LEAST_ROW_OF_GPU: Final = 2048  # between a GPU and shared host memory, that are better copied one by one
# Between processes' host memory, that are better read where they are than packed: by gets, and by puts, whose
# packed rows are copied once less.
_LEAST_ROW_READ: Final = {False: 2048, True: 4096}
_MOST_GROUPS: Final = 256  # of equal rows, that ride in the frame of a put

__all__ = ["get_pages", "put_layers", "put_pages"]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What moves one view of pages.

    Args:
        found: rows that are moved as they are, or ranges.
        ranges: of the same plan, which are made off the loop where there are many.
    """

    found: _core.Rows | Ranges
    ranges: Callable[[], Awaitable[Ranges]]


async def put_pages(
    comm: Communicator,
    pages: Pages,
    give: Indices,
    remote: RemotePages,
    take: Indices,
    notify: bytes | None,
    channel: Channel | None,
    deadline: float | None,
    stream: Any,
    sm_budget: int | None,
) -> None:
    """See `Communicator.put_pages`."""
    _check_sides(pages, remote)
    give, take = own_list(give), own_list(take)
    sm_budget = check_budget(sm_budget)
    mover = Mover(comm, "put_pages", channel, deadline)
    check_notification(notify)
    remote.layout.check_target()
    remote.check(take)
    plan = await _planned(mover, pages, remote, pages.layout, give, remote.layout, take, at_target=True)
    await check_apart(comm, [(pages, remote, plan.ranges)])
    mover.check([remote])
    await mover.run(_puts(mover, pages, remote, plan, stream, sm_budget, _nothing, _nothing))
    await mover.notify(remote, notify)


async def put_layers(
    comm: Communicator,
    layers: Sequence[Pages],
    give: Indices,
    remotes: Sequence[RemotePages],
    take: Indices,
    notify: bytes | None,
    channel: Channel | None,
    deadline: float | None,
    stream: Any,
    sm_budget: int | None,
) -> None:
    """See `Communicator.put_layers`."""
    for name, views in (("layers", layers), ("remotes", remotes)):
        if not isinstance(views, Sequence):
            raise UsageTypeError(f"{name}: a list of views, as layers() gives, not {type(views).__name__}")
    if len(layers) != len(remotes) or not layers:
        raise UsageError(
            f"{len(layers)} layers here and {len(remotes)} at the peer: one each, in their order"
        )
    for pages, remote in zip(layers, remotes, strict=True):
        _check_sides(pages, remote)
    give, take = own_list(give), own_list(take)
    if len({remote._number for remote in remotes}) != 1:
        raise UsageError("the peer's layers are of different leases: use remote.layers() of one")
    sm_budget = check_budget(sm_budget)
    mover = Mover(comm, "put_layers", channel, deadline)
    check_notification(notify)
    notes = _Notes(mover, remotes[0], len(layers))
    planned = []
    try:
        for remote in remotes:  # all are checked before a byte moves
            remote.layout.check_target()
        for remote in of_handles(remotes):
            remote.check(take)
        for pages, remote in zip(layers, remotes, strict=True):
            sides = pages.layout, give, remote.layout, take
            planned.append(await _planned(mover, pages, remote, *sides, at_target=True))
        moves = list(zip(layers, remotes, planned, strict=True))
        await check_apart(comm, [(pages, remote, plan.ranges) for pages, remote, plan in moves])
        mover.check(remotes)
    except BaseException:  # the owner may wait already
        with contextlib.suppress(AiocommError):
            mover.check(remotes)
            notes.give_up()
        raise

    def jobs() -> Jobs:
        for layer, (pages, remote, plan) in enumerate(moves):
            begun, ended = partial(notes.part_begun, layer), partial(notes.part_ended, layer)
            yield from _puts(mover, pages, remote, plan, stream, sm_budget, begun, ended)
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
    give: Indices,
    pages: Pages,
    take: Indices,
    channel: Channel | None,
    deadline: float | None,
    stream: Any,
    sm_budget: int | None,
) -> None:
    """See `Communicator.get_pages`."""
    _check_sides(pages, remote)
    give, take = own_list(give), own_list(take)
    sm_budget = check_budget(sm_budget)
    mover = Mover(comm, "get_pages", channel, deadline)
    remote.check(give)
    if len(pages._writable) < len(pages.layout.planes):
        raise UsageError("an array of the target pages is read-only: pages are got into writable ones")
    pages._check_target()
    plan = await _planned(mover, pages, remote, remote.layout, give, pages.layout, take, at_target=False)
    await check_apart(comm, [(pages, remote, plan.ranges)])
    mover.check([remote])

    def jobs() -> Jobs:
        for array, plane in zip(pages.layout.planes, remote.layout.planes, strict=True):
            local = bytes_of(pages.arrays[array], pages.layout.start, True, stream)
            region = remote.region(plane)
            one_by_one = partial(_get_ranges, mover, remote, region, local)
            if isinstance(plan.found, Ranges):
                yield from one_by_one(plan.found)
            elif len(plan.found):
                instead = partial(_instead, remote, plan, one_by_one, _nothing)
                yield mover.get_rows(region, local, plan.found, _gather(local, remote, sm_budget), instead)

    await mover.run(jobs())


async def _planned(
    mover: Mover,
    pages: Pages,
    remote: RemotePages,
    source: Layout,
    give: Integers,
    target: Layout,
    take: Integers,
    at_target: bool,
) -> _Plan:
    """Plan for the way that is to be tried first."""
    ranges, rows, least = "at_target" if at_target else "at_source", "", 0
    if mover.takes_rows(remote):
        rows = f"rows_{ranges}"
        least = 0 if pages.on_gpu else _LEAST_ROW
    elif remote.by_rows and _by_engine(pages, remote, mover):
        rows = "rows"
        if not remote.on_gpu:
            least = _LEAST_ROW_OF_GPU if pages.on_gpu else _LEAST_ROW_READ[at_target]

    def form(plan: Plan) -> str:
        return rows if rows and plan.mean >= least else ranges

    plan = await plan_pages(source, give, target, take, form)

    async def as_ranges() -> Ranges:
        made = await plan_pages(source, give, target, take, lambda _: ranges)
        return getattr(made, ranges)  # type: ignore[no-any-return]

    return _Plan(getattr(plan, form(plan)), as_ranges)


def _by_engine(pages: Pages, remote: RemotePages, mover: Mover) -> bool:
    """Whether one process's engine or copy threads may reach the memory of both."""
    if remote.on_gpu:
        return pages.on_gpu
    return mover.shares_memory(remote)


def _puts(
    mover: Mover,
    pages: Pages,
    remote: RemotePages,
    plan: _Plan,
    stream: Any,
    sm_budget: int | None,
    begun: Callable[[], object],
    ended: Callable[[], object],
) -> Jobs:
    for array, plane in zip(pages.layout.planes, remote.layout.planes, strict=True):
        local = bytes_of(pages.arrays[array], pages.layout.start, False, stream)
        region = remote.region(plane)
        one_by_one = partial(_put_ranges, mover, remote, region, local, begun=begun, ended=ended)
        if isinstance(plan.found, Ranges):
            yield from one_by_one(plan.found)
        elif len(plan.found):
            gather = _gather(local, remote, sm_budget)
            told = not isinstance(local, tuple) and mover.shares_memory(remote)
            once = iter([one_by_one])  # for all parts
            for rows in plan.found.parts(_MOST_GROUPS) if told else [plan.found]:
                begun()
                instead = partial(_instead, remote, plan, partial(_next_of, once), ended)
                yield mover.put_rows(region, local, rows, gather, ended, instead)


def _gather(local: Bytes, remote: RemotePages, sm_budget: int | None) -> Gather | None:
    return gather_of(local, sm_budget) if isinstance(local, tuple) and remote.on_gpu else None


async def _instead(
    remote: RemotePages, plan: _Plan, one_by_one: Callable[[Ranges], Jobs], ended: Callable[[], object]
) -> Jobs:
    """What is done where rows could not be moved as one operation, which then has ended, too."""
    remote.refuse_rows()
    ranges = await plan.ranges()

    def jobs() -> Jobs:
        yield from one_by_one(ranges)
        ended()

    return jobs()


def _put_ranges(
    mover: Mover,
    remote: RemotePages,
    region: Any,
    local: Bytes,
    ranges: Ranges,
    begun: Callable[[], object],
    ended: Callable[[], object],
) -> Jobs:
    if isinstance(local, tuple):
        yield from _put_from_gpu(mover, remote, region, local, ranges, begun, ended)
        return
    for start, stop in _messages(ranges, mover.takes_lists(remote), remote.on_gpu or mover.is_far(remote)):
        begun()
        first, last = ranges.first[start], ranges.first[stop]
        if last - first == 1:
            at = int(ranges.near[first])
            data = local[at : at + int(ranges.nbytes[start])]
            yield mover.put(region, int(ranges.far[start]), data, None, ended)
            continue
        listed = stop - start > 1
        head = 8 + ENTRY_BYTES * (stop - start) if listed else 0
        data = mover.staged(head + int(ranges.nbytes[start:stop].sum()))
        _core.pack_rows(ranges.near[first:last], ranges.rows[first:last], local, data[head:])
        done = mover.packed(data, ended)
        if listed:
            data[:8].view(np.int64)[0] = stop - start
            _fill_list(data[8:head].view(np.int64).reshape(-1, 2), ranges, start, stop, region._start)
            yield mover.put_listed(region, data, done)
        else:
            yield mover.put(region, int(ranges.far[start]), data, None, done)


def _get_ranges(mover: Mover, remote: RemotePages, region: Any, local: Bytes, ranges: Ranges) -> Jobs:
    if isinstance(local, tuple):
        yield from _get_into_gpu(mover, remote, region, local, ranges)
        return
    for start, stop in _messages(ranges, mover.takes_lists(remote), remote.on_gpu or mover.is_far(remote)):
        first, last = ranges.first[start], ranges.first[stop]
        nbytes = int(ranges.nbytes[start:stop].sum())
        if last - first == 1:
            at = int(ranges.near[first])
            yield mover.get(region, int(ranges.far[start]), local[at : at + nbytes], _nothing)
            continue
        data = mover.staged(nbytes)
        rows = ranges.near[first:last], ranges.rows[first:last]
        done = mover.packed(data, partial(_core.unpack_rows, *rows, local, data))
        if stop - start > 1:
            wanted = np.empty((stop - start, 2), np.int64)
            _fill_list(wanted, ranges, start, stop, region._start)
            yield mover.get_listed(region, wanted.reshape(-1), data, done)
        else:
            yield mover.get(region, int(ranges.far[start]), data, done)


def _put_from_gpu(
    mover: Mover,
    remote: RemotePages,
    region: Any,
    local: Description,
    ranges: Ranges,
    begun: Callable[[], object],
    ended: Callable[[], object],
) -> Jobs:
    """By way of host memory: what is large in pieces; else a list, whose rows the GPU brings there."""
    lists = mover.takes_lists(remote)
    for start, stop in _messages(ranges, lists, far=True):
        first, last = ranges.first[start], ranges.first[stop]
        if last - first == 1 or not lists:
            for far, piece in _pieces(local, ranges, start, first, last):
                begun()
                yield mover.put(region, far, piece, None, ended)
            continue
        begun()
        message = np.empty(1 + 2 * (stop - start), np.int64)
        message[0] = stop - start
        _fill_list(message[1:].reshape(-1, 2), ranges, start, stop, region._start)
        rows = ranges.near[first:last], ranges.rows[first:last]
        yield mover.put_listed_from(region, local, message, rows, ended)


def _get_into_gpu(mover: Mover, remote: RemotePages, region: Any, local: Description, ranges: Ranges) -> Jobs:
    """As `_put_from_gpu`."""
    lists = mover.takes_lists(remote)
    for start, stop in _messages(ranges, lists, far=True):
        first, last = ranges.first[start], ranges.first[stop]
        if last - first == 1 or not lists:
            for far, piece in _pieces(local, ranges, start, first, last):
                yield mover.get(region, far, piece, _nothing)
            continue
        wanted = np.empty((stop - start, 2), np.int64)
        _fill_list(wanted, ranges, start, stop, region._start)
        rows = ranges.near[first:last], ranges.rows[first:last]
        yield mover.get_listed_into(region, local, wanted.reshape(-1), rows, _nothing)


def _messages(ranges: Ranges, listed: bool, far: bool) -> Iterator[tuple[int, int]]:
    """The first range of each message, and the first of the next."""
    together = ranges.groups_far if far else ranges.groups
    return itertools.pairwise(together if listed else range(len(ranges.far) + 1))


def _fill_list(into: Integers, ranges: Ranges, start: int, stop: int, base: int) -> None:
    """See core/listed.hpp."""
    np.add(ranges.far[start:stop], base, out=into[:, 0])
    into[:, 1] = ranges.nbytes[start:stop]


def _check_sides(pages: Any, remote: Any) -> None:
    if not isinstance(pages, Pages):
        raise UsageTypeError(f"{type(pages).__name__} in place of Pages of this process")
    if not isinstance(remote, RemotePages):
        raise UsageTypeError(f"{type(remote).__name__} in place of RemotePages: comm.remote_pages(handle)")


def _pieces(
    local: Description, ranges: Ranges, start: int, first: int, last: int
) -> Iterator[tuple[int, Description]]:
    """Where each row of a range begins at the peer, and what it is here."""
    far = int(ranges.far[start])
    rows = ranges.near[first:last].tolist(), ranges.rows[first:last].tolist()
    for at, length in zip(*rows, strict=True):
        yield far, part_of(local, at, length)
        far += length


def _nothing() -> None:
    pass


def _next_of(ways: Iterator[Callable[[Ranges], Jobs]], ranges: Ranges) -> Jobs:
    way = next(ways, None)
    return iter(()) if way is None else way(ranges)


class _Notes:
    """Sends a layer's note when all of it has ended, in the order of the layers."""

    def __init__(self, mover: Mover, remote: RemotePages, layers: int) -> None:
        self._mover = mover
        self._remote = remote
        self._layers = layers
        self._call = secrets.randbits(64)
        self._open = [0] * layers  # transfers that have begun and not ended
        self._layer = 0  # that is being begun
        self._next = 0  # whose note is the next

    def part_begun(self, layer: int) -> None:
        self._open[layer] += 1

    def part_ended(self, layer: int) -> None:
        self._open[layer] -= 1
        if layer == self._next:
            self._mover.later(self._due())

    def all_begun(self, layer: int) -> Jobs:
        self._layer = layer + 1
        return self._due()

    def _due(self) -> Jobs:
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
                self._send(None).add_done_callback(look_away)
