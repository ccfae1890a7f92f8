"""Who may reach which pages: leases of the owner, and what a peer holds of one.

A lease registers the memory anew. Assigning a page to somebody else closes the leases that held it, so that
what a peer still sends for them is refused by the owner's engine with `StaleHandleError`, before a byte
moves.
"""

from __future__ import annotations

import functools
import json
import math
import secrets
import struct
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import anyio
import numpy as np

from aiocomm._numbers import integer
from aiocomm._operations import limit_of
from aiocomm.errors import ClosedError, DeadlineExceeded, UsageError, UsageTypeError
from aiocomm.pages.indices import own_list, page_list
from aiocomm.pages.layout import Layout, Pages
from aiocomm.pages.streaming import LayerNotes
from aiocomm.region import whole_handle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from aiocomm._operations import Operations
    from aiocomm.pages.indices import Indices
    from aiocomm.region import Region, RemoteRegion
    from aiocomm.types import Feed

__all__ = ["PageLease", "RemotePages", "of_handles"]

# magic, version, number of the lease, bytes of the layout, pages, bytes of a region's handle, on a GPU
_HEAD: Final = struct.Struct("<4sHQIII?")
_MAGIC: Final = b"aioP"
_VERSION: Final = 3
_FIRST_S: Final = 0.05  # after which rows of host memory are tried again, twice as long each time, up to
_LONGEST_S: Final = 5.0
# What comes of looking at other bytes: numbers may be infinite, and lists nest deeper than Python follows.
_NO_HANDLE: Final = (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, struct.error)


class PageLease:
    """Pages that a peer may read and write. Made by `comm.lease_pages`; `async with`, or `aclose()`."""

    def __init__(self, comm: Operations, pages: Pages, indices: NDArray[np.int64]) -> None:
        self._number = secrets.randbits(64)
        self._notes = LayerNotes()
        self._comm = comm
        self._pages = pages
        self._indices = indices
        self._regions: list[Region] = []
        self._closed = False

    @classmethod
    async def assign(
        cls,
        comm: Operations,
        pages: Pages,
        indices: Indices | None,
        deadline: float | None,
        stream: Any,
    ) -> PageLease:
        """Lease pages, and end the leases that hold any of them, also those that still wait to begin.

        So the last call has the pages; it waits for what is under way through any earlier lease, since these
        are known until they have ended, whoever ends them.
        """
        limit = limit_of(deadline)
        if comm.closed or not comm._here():
            comm._refuse()  # before it ends other leases
        if not isinstance(pages, Pages):
            raise UsageTypeError(f"{type(pages).__name__} in place of Pages: aiocomm.Pages(array)")
        wanted = np.arange(pages.count) if indices is None else own_list(indices)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= pages.count):
            raise UsageError(f"pages are 0 to {pages.count - 1}")
        if len(np.unique(wanted)) != len(wanted):
            raise UsageError("a page comes twice")
        pages._check_target()
        lease, leases = cls(comm, pages, wanted), pages._leases
        held = np.zeros(pages.count, bool)
        held[wanted] = True
        leases[:] = [one for one in leases if not one._ended]
        earlier = [one for one in leases if held[one._indices].any()]
        leases.append(lease)
        try:
            for one in earlier:
                one._refuse()
            with anyio.move_on_after(None if deadline is None else limit) as waiting:
                for one in earlier:
                    if not one._ended:  # a time that is up finds nothing wrong with one that has
                        await one.aclose()
                    one._forget_ended()
            if waiting.cancelled_caught:
                raise DeadlineExceeded(
                    "lease_pages: accesses through an earlier lease of these pages were under way when the "
                    "deadline passed; no new ones are taken, and the next lease_pages waits for the rest"
                )
            if not lease._closed:
                lease._begin(stream)
        except BaseException:
            lease._refuse()
            raise
        finally:
            lease._forget_ended()
        return lease

    def _begin(self, stream: Any) -> None:
        for plane in self._pages.layout.planes:
            self._regions.append(self._comm.register(self._pages.arrays[plane], stream=stream))
        self._comm._layer_notes[self._number] = self._notes

    def _refuse(self) -> None:
        """Refuse new accesses, to all arrays at once."""
        self._closed = True
        self._notes.close()
        self._comm._layer_notes.pop(self._number, None)
        for region in self._regions:
            region._refuse()

    @property
    def _ended(self) -> bool:
        """Whether no access is under way, nor can begin."""
        return self._closed and all(region._free.is_set() for region in self._regions)

    @property
    def handle(self) -> bytes:
        """What a peer needs for `comm.remote_pages`. Send it however you like."""
        if self._closed:
            raise ClosedError("the lease has ended")
        layout = _text(self._pages.layout)
        handles = [region.handle for region in self._regions]
        sizes = len(layout), len(self._indices), len(handles[0])
        head = _HEAD.pack(_MAGIC, _VERSION, self._number, *sizes, self._pages.on_gpu)
        return b"".join((head, layout, self._indices.tobytes(), *handles))

    def layers(
        self, sources: int | Sequence[int] | None = None, *, deadline: float | None = None
    ) -> Feed[int]:
        """Iterate over the layers that `put_layers` of peers brings, in their order: their data is in place.

        Ends after the last layer. One iteration per `put_layers`, also if several follow each other, or some
        were stopped: an iteration that has heard of all its sources has had a call of each, and what more
        comes of those is not the next one's. Of calls that nobody iterates over, the newest 256 of each
        source are kept.

        Cancelling a wait for a layer loses nothing: the iteration may be taken up again. Once it has failed,
        it fails again with the same error.

        Args:
            sources: the rank that sends, or all that do, each its part of every layer: a layer is there when
                all have brought it. Default: the rank that is heard of first.
            deadline: seconds from now, the call, for all layers.

        Raises:
            TransferCancelled: a source gave up in the middle.
            PeerLostError: a source is gone (without `sources`, only once it has been heard of).
            DeadlineExceeded, ClosedError: the deadline passed, or the lease has ended, or the communicator.
            UsageError: `sources` are no ranks of this world, none at all, or one comes twice; nobody waits.
        """
        if deadline is not None:
            deadline = limit_of(deadline)
        wanted = None if sources is None else self._ranks(sources)
        for rank in wanted or ():
            if self._comm._is_gone(rank):
                self._notes.lose(rank)  # before the lease was there to be told of it
        return self._notes.layers(wanted, deadline)

    def _ranks(self, sources: int | Sequence[int]) -> list[int]:
        try:
            given: list[int] = [sources] if isinstance(sources, int | np.integer) else list(sources)
        except TypeError:
            raise UsageTypeError(f"sources={sources!r}: a rank, or a list of ranks") from None
        wanted = [integer("rank", rank) for rank in given]
        for rank in wanted:
            if not 0 <= rank < self._comm._ranks:
                self._comm._refuse(dst=rank)
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"sources={wanted}: a rank comes twice")
        if not wanted:
            raise UsageError("sources has no rank: leave it out for the rank that is heard of first")
        return wanted

    async def aclose(self) -> None:
        """End it: new accesses are refused; waits for those under way. Idempotent.

        If it is cancelled, new accesses are refused all the same, but some may still be under way: another
        call waits for them, and `lease_pages` of these pages does.
        """
        self._refuse()
        for region in self._regions:
            await region.aclose()
        self._forget_ended()

    def _forget_ended(self) -> None:
        if self._ended and self in self._pages._leases:
            self._pages._leases.remove(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "ended" if self._closed else f"{len(self._indices)} of {self._pages.count} pages"
        return f"<aiocomm.PageLease {state}>"


@dataclass(slots=True)
class _ByRows:
    """When rows of a peer's pages are to be tried as one operation again.

    Host memory is pinned in the background: what asks for that goes another way.
    """

    not_before: float = 0.0
    pause_s: float = _FIRST_S


class RemotePages:
    """A peer's leased pages: the target of `put_pages` and the source of `get_pages`."""

    def __init__(
        self,
        number: int,
        layout: Layout,
        leased: Any,
        regions: dict[int, RemoteRegion],
        on_gpu: bool,
        by_rows: _ByRows,
    ) -> None:
        self._number = number
        self.layout = layout
        self._leased = leased
        self._regions = regions
        self.on_gpu = on_gpu
        self._by_rows = by_rows  # shared with all views

    @classmethod
    def from_handle(cls, comm: Operations, handle: bytes) -> Self:
        """Parse and check a handle."""
        handle = whole_handle(handle)
        try:
            magic, version, number, layout_bytes, count, handle_bytes, on_gpu = _HEAD.unpack_from(handle)
            if (magic, version) != (_MAGIC, _VERSION):
                raise ValueError("magic")
            start = _HEAD.size + layout_bytes
            layout = _layout(handle[_HEAD.size : start])
            indices = np.frombuffer(handle, np.int64, count, start)
            start += indices.nbytes
            parts = [handle[at : at + handle_bytes] for at in range(start, len(handle), handle_bytes)]
            cut_off = len(handle) - start != len(layout.planes) * handle_bytes
            if cut_off or (len(indices) and indices.min() < 0):
                raise ValueError("regions")
            leased = np.zeros(layout.count, bool)
            leased[indices] = True
        except _NO_HANDLE as error:
            raise UsageError("these bytes are no handle of pages: pass lease.handle of the owner") from error
        regions = dict(zip(layout.planes, (comm.remote(part) for part in parts), strict=True))
        if len({(region.rank, region._generation) for region in regions.values()}) > 1:
            raise UsageError("these bytes are no handle of pages: their arrays are of several owners")
        return cls(number, layout, leased, regions, on_gpu, _ByRows())

    def planes(self, planes: Sequence[int]) -> RemotePages:
        """Some of the arrays, e.g. those of one layer."""
        return self._view(self.layout.chosen(planes))

    def slice(self, axis: int, start: int, stop: int) -> RemotePages:
        """A range along an axis of the arrays, e.g. of some heads. Not along the page axis."""
        return self._view(self.layout.sliced(axis, start, stop))

    def layers(self, axis: int | None = None, *, arrays: int = 1) -> list[RemotePages]:
        """Views of the layers, as `Pages.layers`."""
        return [self._view(layout) for layout in self.layout.layers(axis, arrays)]

    def _view(self, layout: Layout) -> RemotePages:
        return RemotePages(self._number, layout, self._leased, self._regions, self.on_gpu, self._by_rows)

    @property
    def by_rows(self) -> bool:
        """Whether this process's engines or adapters may move rows that lie apart, as one operation."""
        return time.monotonic() >= self._by_rows.not_before

    def refuse_rows(self) -> None:
        """Note that none of this process reaches the pages; those of a host may be reached later."""
        rows = self._by_rows
        rows.not_before = math.inf if self.on_gpu else time.monotonic() + rows.pause_s
        rows.pause_s = min(2 * rows.pause_s, _LONGEST_S)

    @property
    def rank(self) -> int:
        """The owner."""
        return self.of_owner.rank

    @property
    def of_owner(self) -> RemoteRegion:
        """Any of its arrays: all are of one owner."""
        return self._regions[self.layout.planes[0]]

    def region(self, plane: int) -> RemoteRegion:
        """One of its arrays, from where its pages begin."""
        whole, start = self._regions[plane], self.layout.start
        return whole[min(start, whole.nbytes) :] if start else whole

    def check(self, pages: Any) -> None:
        """Refuse pages that are not part of the lease."""
        wanted = page_list(pages)
        inside = wanted[(wanted >= 0) & (wanted < self.layout.count)]  # the rest is the planner's to name
        if len(inside) and not self._leased[inside].all():
            raise UsageError(f"page {inside[~self._leased[inside]][0]} is not part of the lease")

    def __repr__(self) -> str:
        return (
            f"<aiocomm.RemotePages rank={self.rank} {int(self._leased.sum())} of {self.layout.count} pages>"
        )


def of_handles(views: Sequence[RemotePages]) -> list[RemotePages]:
    """A view for each handle that they are of: all its views have its pages and its owner in common."""
    return list({id(view._regions): view for view in views}.values())


@functools.lru_cache(256)
def _text(layout: Layout) -> bytes:
    return json.dumps(asdict(layout)).encode()


@functools.lru_cache(256)
def _layout(text: bytes) -> Layout:
    """Of a handle: one owner's leases have the same, request by request."""
    fields = json.loads(text)
    numbers = {key: int(fields[key]) for key in ("count", "page_stride", "start", "item", "page_axis")}
    lists = {key: tuple(int(n) for n in fields[key]) for key in ("planes", "shape", "strides")}
    token = fields["token_axis"]
    layout = Layout(**numbers, **lists, token_axis=None if token is None else int(token))  # type: ignore[arg-type]
    sizes = (*layout.shape, *layout.strides, *layout.planes, *numbers.values())
    if (
        not layout.planes
        or len(layout.shape) != len(layout.strides)
        or min(sizes) < 0
        or layout.page_axis > len(layout.shape)
        or layout.count > 1 << 28
    ):
        raise ValueError("layout")
    at = layout.token_axis
    if at is not None and not (0 <= at < len(layout.shape) and layout.shape[at]):
        raise ValueError("token axis")
    return layout
