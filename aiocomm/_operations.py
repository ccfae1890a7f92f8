"""Operations of a communicator: what is submitted, and what is refused."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm._device import describe, is_read_only, part_of
from aiocomm._exchange import exchange
from aiocomm._loop.backend import elsewhere
from aiocomm._numbers import integer
from aiocomm._queues import Share
from aiocomm.arrays import as_buffer
from aiocomm.channel import Channel
from aiocomm.errors import ClosedError, UsageError, UsageTypeError, WouldBlock
from aiocomm.region import Region, RemoteRegion, check_notification
from aiocomm.types import ANY_SOURCE, ANY_TAG, MAX_TAG, Notification, Peer, Priority, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiocomm._device import Description
    from aiocomm._exchange import Exchanges
    from aiocomm._queues import Mailbox
    from aiocomm.pages.streaming import LayerNotes
    from aiocomm.types import Feed
    from aiocomm_native import Transfer
    from aiocomm_native._core import Engine

__all__ = ["NO_DEADLINE", "Operations", "limit_of", "on_gpu", "overlapping"]

_SYNCHRONOUS, _NO_WAIT = 1, 2
_NOT_GIVEN: Final = object()
_GPUS: Final = 1 << 31  # more than there can be
NO_DEADLINE = -1.0
_REAL: Final = (int, float, Real)  # NumPy's are the last


class Operations:
    """The operations of a `Communicator`, which owns the state that is declared here."""

    _engine: Engine
    _send: Callable[..., Transfer[None]]
    _recv: Callable[..., Transfer[Any]]
    _here: Callable[[], bool]
    _catch_up: Callable[[], None]  # takes notice of what the control thread has told
    _closed: bool
    _forked: bool  # this process is a child of that which opened it
    _rank: int
    _ranks: int  # one more than the largest rank ever known
    _generation: int
    _peers: dict[int, Peer]
    _notes: Mailbox[Notification]
    _regions: dict[int, Region]
    _layer_notes: dict[int, LayerNotes]  # by lease
    _channels: dict[str, Channel]
    _exchanges: dict[tuple[int, int | None], Exchanges]  # by rank and generation
    _close_channel: Callable[[Channel], None]  # and what is under way on it

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._rank

    @property
    def closed(self) -> bool:
        """Whether the communicator was closed."""
        return self._closed

    def send(
        self,
        array: Any,
        dst: int,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
        synchronous: bool = False,
        stream: Any = None,
    ) -> Transfer[None]:
        """Send an array.

        A message of at most `eager_max` bytes of host memory ends when the runtime has a copy of it; a larger
        one, one of GPU memory, or a `synchronous` one, when the receiver has it.

        Args:
            array: host or GPU array, or buffer, of any shape and dtype, contiguous in C order.
            dst: rank of the receiver; may be one's own.
            tag: 0 to MAX_TAG.
            stream: of a GPU array: the bytes are those after the work that this stream has now. Default: the
                current stream of the array's library.
        """
        if stream is not None:
            array = on_stream(array, False, stream)
        return self._submit_send(array, dst, tag, channel, deadline, _SYNCHRONOUS if synchronous else 0)

    def send_nowait(
        self,
        array: Any,
        dst: int,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[None]:
        """Send, but only if the link takes it at once.

        Raises:
            WouldBlock: the peer is not connected yet, its queue is full, it holds as many unread bytes of
                small messages as it may (`unexpected_bytes`), or this is a larger one and `queue_depth`
                operations are under way on its link; nothing was submitted.
        """
        if stream is not None:
            array = on_stream(array, False, stream)
        transfer = self._submit_send(array, dst, tag, channel, deadline, _NO_WAIT)
        if transfer.done() and isinstance(error := transfer.exception(), WouldBlock):
            raise error
        return transfer

    def _submit_send(
        self, array: Any, dst: int, tag: int, channel: Channel | None, deadline: float | None, flags: int
    ) -> Transfer[Any]:
        try:
            fine = not self._closed and self._here() and 0 <= tag <= MAX_TAG and 0 <= dst < self._ranks
        except TypeError:  # not numbers
            fine = False
        if not fine:
            self._refuse(dst=dst, tag=tag)
        index = 0 if channel is None else self._index_of(channel)
        limit = limit_of(deadline)
        try:
            return self._send(array, dst, index, tag, limit, flags)
        except UsageError:
            raise
        except (TypeError, ValueError, BufferError):
            _integers(dst=dst, tag=tag)
            return self._send(as_buffer(array, False), dst, index, tag, limit, flags)

    def recv(
        self,
        out: Any,
        src: int = ANY_SOURCE,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[Status]:
        """Receive into an array; returns `Status(source, tag, nbytes)`.

        Args:
            out: writable host or GPU array, or buffer, contiguous in C order, no smaller than the message.
                Only bytes are matched: its dtype and shape are not compared with it.
            src: rank of the sender, or ANY_SOURCE, which fails once all other members are lost, but in an
                elastic world waits for whoever joins.
            tag: the message's tag, by default 0 as for `send`, or ANY_TAG.
            stream: of a GPU array: nothing is written before the work that this stream has now is done.
                Default: the current stream of the array's library. When the await returns, every stream sees
                the data.
        """
        if stream is not None:
            out = on_stream(out, True, stream)
        try:
            fine = not self._closed and self._here() and -1 <= tag <= MAX_TAG and -1 <= src < self._ranks
        except TypeError:
            fine = False
        if not fine:
            self._refuse(src=src, tag=tag)
        index = 0 if channel is None else self._index_of(channel)
        limit = limit_of(deadline)
        if out is None:
            raise UsageTypeError("recv needs a buffer; recv_array allocates one")
        try:
            return self._recv(out, src, index, tag, limit)
        except UsageError:
            raise
        except (TypeError, ValueError, BufferError) as error:
            overlapping(error)
            _integers(src=src, tag=tag)
            try:
                return self._recv(as_buffer(out, True), src, index, tag, limit)
            except ValueError as again:
                overlapping(again)
                raise

    def recv_array(
        self,
        src: int = ANY_SOURCE,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
        device: int | None = None,
    ) -> Transfer[Any]:
        """Receive into a new array of the sender's dtype and shape; returns the array.

        `status` of the transfer tells source and tag. Structured dtypes, datetime64, bfloat16, and others
        that have no buffer format of at most 8 characters, come as bytes, row by row: `.view(dtype)` makes
        them what they were.

        Args:
            src: rank of the sender, or ANY_SOURCE.
            tag: the message's tag, or ANY_TAG.
            device: index of the GPU on which to make a `DeviceArray`; None makes a NumPy array. Where the
                sender's memory is does not matter.
        """
        try:
            fine = not self._closed and self._here() and -1 <= tag <= MAX_TAG and -1 <= src < self._ranks
        except TypeError:
            fine = False
        if not fine:
            self._refuse(src=src, tag=tag)
        index = 0 if channel is None else self._index_of(channel)
        limit = limit_of(deadline)
        if device is None:
            return self._recv(None, src, index, tag, limit)
        if not hasattr(device, "__index__"):
            raise UsageTypeError(f"device={device!r} is not the index of a GPU: pass an integer, such as 0")
        number = device.__index__()
        if not 0 <= number < _GPUS:
            raise UsageError(f"device={device!r} is not the index of a GPU")
        try:
            return self._engine.recv_on(src, index, tag, limit, number)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def channel(self, name: str, *, priority: Priority = Priority.NORMAL, weight: float = 1.0) -> Channel:
        """Open a channel: a matching scope of its own, with a scheduling class. Both ends open it by name.

        Args:
            priority: its class; higher classes go first.
            weight: its share among the channels of its class, 1/1024 to 1024.

        Raises:
            UsageError: it is open with another priority or weight.
        """
        if self._closed or not self._here():
            self._refuse()
        if not isinstance(name, str) or not name or name.startswith("\0"):
            raise UsageError(f"a channel needs a name, not {name!r}")
        if not isinstance(weight, _REAL) or not 1 / 1024 <= weight <= 1024:
            raise UsageError(f"weight {weight!r} is outside 1/1024 to 1024")
        if priority not in Priority.__members__.values():
            known = ", ".join(Priority.__members__)
            raise UsageError(f"priority={priority!r} is none of Priority's {known}")
        try:
            index = self._engine.open_channel(name, int(Priority(priority)), float(weight))
        except ValueError as error:
            raise UsageError(str(error)) from None
        channel = self._channels.get(name)
        if channel is None or channel.closed:
            channel = self._channels[name] = Channel(self, name, index, Priority(priority), float(weight))
        return channel

    # ------------------------------------------------------------ one-sided

    def register(self, array: Any, *, writable: bool | None = None, stream: Any = None) -> Region:
        """Register an array for puts and gets of peers.

        Close the region before the memory is used for anything else.

        Args:
            array: host or GPU array, or buffer, contiguous in C order.
            writable: whether peers may put; default: whether the array is writable.
            stream: of a GPU array: peers' accesses wait for the work that this stream has now. Default: the
                current stream of the array's library. Work that is queued later is not waited for: let it end
                before peers are told to access what it writes, or reads.
        """
        if self._closed or not self._here():
            self._refuse()
        if (described := on_gpu(self._engine, array, bool(writable), stream)) is not None:
            if writable is None:
                writable = not is_read_only(array)
            writable = bool(writable)  # NumPy's True is another
            number, nbytes = self._engine.add_device_region(described, writable)
            region = Region(self, number, nbytes, writable, described)
            self._regions[number] = region
            return region
        view = as_buffer(array, False)
        if writable is None:
            writable = not view.readonly
        elif writable and view.readonly:
            raise UsageError("the array is read-only: register it with writable=False")
        writable = bool(writable)
        number, nbytes = self._engine.add_region(view, writable)
        region = Region(self, number, nbytes, writable, view)
        self._regions[number] = region
        return region

    async def exchange(self, region: Region, with_: int, *, deadline: float | None = None) -> RemoteRegion:
        """Swap regions with a peer, who calls it, too: each gets the other's."""
        return await exchange(self, region, with_, limit_of(deadline))

    def remote(self, handle: bytes) -> RemoteRegion:
        """Make a remote region of another process's `region.handle`.

        Raises:
            UsageError: these bytes are no handle.
            PeerLostError: its owner was gone before this process joined.
            StaleHandleError: it belongs to an earlier incarnation of its owner.
        """
        return RemoteRegion.from_handle(self, handle)

    def put(
        self,
        array: Any,
        remote: RemoteRegion,
        *,
        notify: bytes | None = None,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[None]:
        """Write an array into a peer's region; ends when the bytes are in place there.

        Args:
            array: host or GPU array, or buffer, contiguous in C order, no larger than `remote`, which may be
                host or GPU memory.
            notify: at most 4,096 bytes that the owner gets from `notifications()` after the data.
            stream: of a GPU array: as for `send`.
        """
        index = self._check_remote(remote, channel)
        check_notification(notify)
        view = on_gpu(self._engine, array, False, stream)
        if view is None:
            view = as_buffer(array, False)
            nbytes = view.nbytes
        else:
            nbytes = view[2]
        if nbytes > remote.nbytes:
            raise UsageError(f"{nbytes} bytes do not fit into a remote region of {remote.nbytes}")
        limit = limit_of(deadline)
        return self._engine.put(view, remote.rank, index, remote._number, remote._start, notify, limit)

    def get(
        self,
        remote: RemoteRegion,
        into: Any,
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
        stream: Any = None,
    ) -> Transfer[None]:
        """Read a peer's region into an array of the same number of bytes or more.

        Args:
            into: writable host or GPU array, or buffer, contiguous in C order; `remote` may be host or GPU
                memory.
            stream: of a GPU array: as for `recv`.
        """
        index = self._check_remote(remote, channel)
        wanted = remote.nbytes
        described = on_gpu(self._engine, into, True, stream)
        if described is not None:
            have, view = described[2], part_of(described, 0, min(wanted, described[2]))
        else:
            view = as_buffer(into, True)
            have = view.nbytes
            view = (view.cast("B") if have else view)[:wanted]
        if have < wanted:
            raise UsageError(f"a remote region of {wanted} bytes does not fit into {have}: narrow it")
        limit = limit_of(deadline)
        try:
            return self._engine.get(view, remote.rank, index, remote._number, remote._start, limit)
        except ValueError as error:
            overlapping(error)
            raise

    def _generation_of(self, rank: int) -> int | None:
        """The incarnation of a rank that is known now. None: nobody has had it since this process is here."""
        if rank == self._rank:
            return self._generation
        if rank not in self._peers:
            self._catch_up()
        peer = self._peers.get(rank)
        return None if peer is None else peer.generation

    def _is_gone(self, rank: int) -> bool:
        """Whether nobody has a rank now."""
        return self._generation_of(rank) is None or (rank != self._rank and not self._peers[rank].alive)

    def _is_member(self, rank: int, generation: int | None) -> bool:
        """Whether an incarnation of a rank is there."""
        return self._generation_of(rank) == generation and not self._is_gone(rank)

    def _check_remote(self, remote: RemoteRegion, channel: Channel | None) -> int:
        if self._closed or not self._here():
            self._refuse()
        if not isinstance(remote, RemoteRegion):
            raise UsageTypeError("expected a RemoteRegion, from comm.exchange() or comm.remote()")
        remote._check_fresh(self)
        return 0 if channel is None else self._index_of(channel)

    def _index_of(self, channel: Channel) -> int:
        if not isinstance(channel, Channel):
            raise UsageTypeError(f"channel={channel!r} is no channel: open one by comm.channel(name)")
        if channel._comm is not self:
            raise UsageError(f"channel {channel.name!r} belongs to another communicator")
        return channel._index

    def notifications(self) -> Feed[Notification]:
        """Notifications of peers' puts, in the order of their arrival; each is given to one iterator only.

        Those that nobody iterates over are kept, without a bound: what a peer pays with a put, the owner pays
        with memory. Iterate wherever peers notify, if only to drop what comes, or have them put without
        `notify`. The iteration ends when the communicator closes; leaving it loses nothing.
        """
        return Share(self._notes)

    # ------------------------------------------------------------ refusals

    def _refuse(self, dst: Any = _NOT_GIVEN, src: Any = _NOT_GIVEN, tag: Any = _NOT_GIVEN) -> None:
        """Say which of the conditions of a call does not hold.

        Returns if all do by now: a message of a peer may be sooner than the word that it has come.
        """
        if self._closed:
            raise ClosedError("the communicator was closed: connect() again")
        if self._forked:
            raise UsageError(
                "this process was forked from the one that opened the communicator, which stays there: "
                "connect() here, in a loop of its own, or start processes by spawn (multiprocessing)"
            )
        if not self._here():
            raise UsageError(elsewhere())
        for rank, low, hint in ((dst, 0, ""), (src, -1, ", or ANY_SOURCE")):
            if rank is _NOT_GIVEN:
                continue
            _integers(rank=rank)
            if rank >= self._ranks:
                self._catch_up()
            if not low <= rank < self._ranks:
                if rank == ANY_SOURCE:
                    hint = "; ANY_SOURCE is for receiving only: pass the receiver's"
                known = f"0 to {self._ranks - 1}" if self._ranks > 1 else "only 0, this process"
                raise UsageError(f"no rank {rank} in this world: ranks are {known}{hint}")
        if tag is not _NOT_GIVEN:
            _integers(tag=tag)
            if not (0 if src is _NOT_GIVEN else ANY_TAG) <= tag <= MAX_TAG:
                wild = "" if src is _NOT_GIVEN else " and ANY_TAG"
                if tag == ANY_TAG:
                    wild = "; ANY_TAG is for receiving only: pass one tag, that the receiver asks for"
                raise UsageError(f"tag {tag} is outside 0 to MAX_TAG = {MAX_TAG}{wild}")


def on_stream(array: Any, writable: bool, stream: Any) -> Any:
    """A GPU array with the stream that a call names for it."""
    described = describe(array, writable, stream)
    if described is None:
        raise UsageError(
            f"stream= belongs to GPU arrays, and {type(array).__name__} is in host memory: leave it out"
        )
    return described


def on_gpu(engine: Engine, array: Any, writable: bool, stream: Any) -> Description | None:
    """Describe a GPU array; None: it is a host array.

    Raises:
        UsageError: it is not contiguous, or `stream` is given for a host array.
    """
    if stream is not None:
        return on_stream(array, writable, stream)  # type: ignore[no-any-return]
    if isinstance(array, np.ndarray | bytes | bytearray | memoryview) or not engine.has_mover():
        return None
    return describe(array, writable)


def _seconds(deadline: float) -> float:
    if not isinstance(deadline, _REAL) or not deadline >= 0:  # which nothing is that is not a number
        raise UsageError(f"deadline={deadline!r}: seconds from now, 0 or more")
    return float(min(deadline, 1e9))


def limit_of(deadline: float | None) -> float:
    """A deadline as the native side takes it."""
    return NO_DEADLINE if deadline is None else _seconds(deadline)


def _integers(**values: Any) -> None:
    for name, value in values.items():
        integer(name, value)


def overlapping(error: Exception) -> None:
    """Say what the native side's refusal means, if it is that of memory that is written already."""
    if isinstance(error, ValueError) and str(error) == "overlap":
        raise UsageError(
            "another receive or get that has not ended writes into this memory: await it, or use another "
            "buffer"
        ) from None
