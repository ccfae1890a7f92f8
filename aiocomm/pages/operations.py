"""The public operations on pages, as methods of a communicator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from aiocomm.pages import transfers
from aiocomm.pages.lease import PageLease, RemotePages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.channel import Channel
    from aiocomm.pages.indices import Indices
    from aiocomm.pages.layout import Pages

__all__ = ["PageOperations"]


class PageOperations:
    """What a communicator does with `Pages`."""

    async def lease_pages(
        self,
        pages: Pages,
        indices: Indices | None = None,
        *,
        deadline: float | None = None,
        stream: Any = None,
    ) -> PageLease:
        """Let peers reach pages of this process, and end the leases that held any of them.

        Waits for accesses under way through those, also if their end was begun elsewhere and is not over;
        afterwards what their holders send is refused with `StaleHandleError`. Of calls that wait for one page
        at a time the last has it: the leases that the others return have ended.

        Args:
            indices: pages; default: all.
            deadline: seconds from now, for that wait. The earlier leases have ended even if it passes.
            stream: of GPU pages: as for `register`.
        """
        return await PageLease.assign(cast("Any", self), pages, indices, deadline, stream)

    def remote_pages(self, handle: bytes) -> RemotePages:
        """Make remote pages of a peer's `lease.handle`.

        Raises:
            UsageError: these bytes are no handle.
            PeerLostError: its owner was gone before this process joined.
            StaleHandleError: it belongs to an earlier incarnation of its owner.
        """
        return RemotePages.from_handle(cast("Any", self), handle)

    async def put_pages(
        self,
        pages: Pages,
        give: Indices,
        remote: RemotePages,
        take: Indices,
        *,
        notify: bytes | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Write pages into a peer's pages; ends when all bytes are in place there.

        Args:
            give: pages of this process: integers, in a list or a NumPy array, which is copied first.
            take: the peer's pages, for each page of `give`; with other page sizes, for as many tokens.
            notify: at most 4,096 bytes that the owner gets from `notifications()` after all data.
            stream: of GPU pages: nothing is read before the work that this stream has when it is submitted is
                done. Default: the current stream of the arrays' library.
            sm_budget: streaming multiprocessors of this side's GPU that may copy rows without a common
                stride, between GPUs that reach each other. Default: none, copy engines do it. Compiled on
                first use.

        Raises:
            UsageError: an index is no integer, out of range or not leased, a target comes twice, the layouts
                do not fit, or a kernel cannot be compiled; nothing was written.
            StaleHandleError: a page was assigned to somebody else, or the lease has ended.

        Cancelling stops between chunks; pages that were under way are undefined.
        """
        comm = cast("Any", self)
        await transfers.put_pages(
            comm, pages, give, remote, take, notify, channel, deadline, stream, sm_budget
        )

    async def put_layers(
        self,
        layers: Sequence[Pages],
        give: Indices,
        remotes: Sequence[RemotePages],
        take: Indices,
        *,
        notify: bytes | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Write pages layer by layer; the owner sees each as it arrives, by `lease.layers()`.

        All layers are checked and planned before a byte moves, and move without a pause between them.

        Args:
            layers: views of this process's pages, in the order in which they go: `pages.layers(...)`.
            give: pages of this process, the same for all layers.
            remotes: views of the peer's pages, one per layer: `remote.layers(...)`.
            take: the peer's pages, as for `put_pages`.
            notify: as for `put_pages`: once, after the last layer.
            stream: as for `put_pages`.
            sm_budget: as for `put_pages`.

        Errors and cancellation are those of `put_pages`; the owner's iteration then ends with
        `TransferCancelled`.
        """
        comm = cast("Any", self)
        await transfers.put_layers(
            comm, layers, give, remotes, take, notify, channel, deadline, stream, sm_budget
        )

    async def get_pages(
        self,
        remote: RemotePages,
        give: Indices,
        pages: Pages,
        take: Indices,
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
        sm_budget: int | None = None,
    ) -> None:
        """Read a peer's pages into pages of this process. Arguments and errors as for `put_pages`."""
        await transfers.get_pages(
            cast("Any", self), remote, give, pages, take, channel, deadline, stream, sm_budget
        )
