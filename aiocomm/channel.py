"""Channels: matching scope and scheduling class in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiocomm.errors import ClosedError
from aiocomm.types import ANY_SOURCE, Priority, Status

if TYPE_CHECKING:
    from aiocomm._operations import Operations
    from aiocomm.region import RemoteRegion
    from aiocomm_native import Transfer

__all__ = ["Channel"]


class Channel:
    """A scope of its own for tags and order, with a priority and a weight. Made by `comm.channel`.

    Its operations are the communicator's, with this channel: arguments, errors and cancellation are those of
    the method of the same name there, and what all operations have in common is with `Communicator`. Besides,
    `ClosedError` ends them once the channel is closed. Channels do not order or block each other.
    """

    def __init__(self, comm: Operations, name: str, index: int, priority: Priority, weight: float) -> None:
        self._comm = comm
        self._index = index
        self._closed = False
        self.name = name
        self.priority = priority
        self.weight = weight

    def send(
        self,
        array: Any,
        dst: int,
        *,
        tag: int = 0,
        deadline: float | None = None,
        synchronous: bool = False,
        stream: Any = None,
    ) -> Transfer[None]:
        """`Communicator.send` on this channel.

        Cancelling the await cancels the transfer, and ends once the array is the caller's again.

        Raises (from the transfer, but the first from the call):
            UsageError: the arguments are wrong.
            PeerLostError, TransferCancelled, TruncationError: the receiver is gone, gave up, or has no room.
            LinkError, DeadlineExceeded, ClosedError: the link failed, the deadline passed, this was closed.
        """
        return self._comm.send(
            array, dst, tag=tag, channel=self, deadline=deadline, synchronous=synchronous, stream=stream
        )

    def send_nowait(
        self, array: Any, dst: int, *, tag: int = 0, deadline: float | None = None, stream: Any = None
    ) -> Transfer[None]:
        """`Communicator.send_nowait` on this channel: as `send`.

        Raises:
            WouldBlock: the message cannot be handed over at once; nothing was submitted.
        """
        return self._comm.send_nowait(array, dst, tag=tag, channel=self, deadline=deadline, stream=stream)

    def recv(
        self,
        out: Any,
        src: int = ANY_SOURCE,
        *,
        tag: int = 0,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[Status]:
        """`Communicator.recv` on this channel.

        Cancelling the await cancels the transfer, and ends once nothing writes into `out` any more.

        Raises (from the transfer, but the first from the call):
            UsageError: the arguments are wrong.
            PeerLostError, TransferCancelled, TruncationError: the sender is gone, gave up, or sent too much.
            LinkError, DeadlineExceeded, ClosedError: the link failed, the deadline passed, this was closed.
        """
        return self._comm.recv(out, src, tag=tag, channel=self, deadline=deadline, stream=stream)

    def recv_array(
        self,
        src: int = ANY_SOURCE,
        *,
        tag: int = 0,
        deadline: float | None = None,
        device: int | None = None,
    ) -> Transfer[Any]:
        """`Communicator.recv_array` on this channel: errors and cancellation as of `recv`."""
        return self._comm.recv_array(src, tag=tag, channel=self, deadline=deadline, device=device)

    def put(
        self,
        array: Any,
        remote: RemoteRegion,
        *,
        notify: bytes | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[None]:
        """`Communicator.put` on this channel.

        Cancelling the await cancels the transfer, and ends once the array is the caller's again; a
        notification whose data were on their way may arrive all the same.

        Raises (from the transfer, but the first from the call):
            UsageError: the arguments are wrong, or the region is read-only or too small.
            PeerLostError, StaleHandleError: the owner is gone, or has closed the region.
            LinkError, DeadlineExceeded, ClosedError: the link failed, the deadline passed, this was closed.
        """
        return self._comm.put(array, remote, notify=notify, channel=self, deadline=deadline, stream=stream)

    def get(
        self, remote: RemoteRegion, into: Any, *, deadline: float | None = None, stream: Any = None
    ) -> Transfer[None]:
        """`Communicator.get` on this channel.

        Cancelling the await cancels the transfer, and ends once nothing writes into `into` any more. Raises
        what `put` does.
        """
        return self._comm.get(remote, into, channel=self, deadline=deadline, stream=stream)

    @property
    def closed(self) -> bool:
        """Whether the channel was closed."""
        return self._closed

    def close(self) -> None:
        """End this side's operations on the channel with `ClosedError`, and refuse new ones. Idempotent.

        Collective operations, dispatches and combines on it, which other ranks wait for this one to do, or
        have it do next, end with `TransferCancelled` there, in all groups that have used it. Once it is
        opened again by its name, calls meet again; they keep the priority that they had.

        `comm.channel` opens its name again, also with another priority or weight. Messages that nobody has
        received wait for that.
        """
        if self._closed:
            return
        if self._index == 0:
            raise ClosedError("the default channel closes with its communicator")
        self._closed = True
        if self._comm._channels.get(self.name) is self:
            del self._comm._channels[self.name]
        if not self._comm.closed:
            self._comm._close_channel(self)

    def __repr__(self) -> str:
        return f"<aiocomm.Channel {self.name!r} {self.priority.name} weight={self.weight:g}>"
