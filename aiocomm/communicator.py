"""The communicator: one process's membership in a world, and every operation with the other processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import anyio

from aiocomm import _outcome
from aiocomm._control.plane import ControlPlane, peer_of
from aiocomm._loop.backend import current_backend
from aiocomm._queues import Broadcast, Mailbox
from aiocomm.arrays import as_buffer
from aiocomm.channel import Channel
from aiocomm.config import Settings, resolve_world
from aiocomm.errors import ClosedError, UsageError, UsageTypeError, WouldBlock
from aiocomm.link import LinkHandle
from aiocomm.region import Region, RemoteRegion, exchange
from aiocomm.statistics import Statistics
from aiocomm.threads import ThreadedCommunicator
from aiocomm.types import (
    ANY_SOURCE,
    ANY_TAG,
    MAX_TAG,
    Event,
    Fallback,
    LinkDown,
    LinkUp,
    Notification,
    Peer,
    PeerJoined,
    PeerLost,
    Priority,
    Status,
    Undelivered,
)
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Mapping
    from types import TracebackType

    from aiocomm._control.plane import Welcome
    from aiocomm._loop.backend import Backend
    from aiocomm._world import World
    from aiocomm_native import Transfer

__all__ = ["Communicator", "connect"]

_SYNCHRONOUS, _NO_WAIT = 1, 2
_NO_DEADLINE = -1.0


def connect(
    address: str | None = None,
    *,
    rank: int | None = None,
    size: int | None = None,
    name: str | None = None,
    token: str | None = None,
    links: tuple[str, ...] | list[str] | None = None,
    warmup: bool = False,
    deadline: float | None = None,
) -> Connecting:
    """Join a world: `comm = await connect(...)`, or `async with connect(...) as comm`.

    Without arguments rank, size and rendezvous come from the environment (`aiocomm run`, torchrun, Slurm,
    Open MPI); a process that nobody launched is a world of its own.

    Args:
        address: where rank 0 listens: `tcp://host:port`, `unix://path`, `unix://@name`, `file://path`, `env://`.
        rank: this process's rank in a world of fixed size; 0 hosts an elastic world.
        size: processes in the world; None: elastic, ranks grow and are never reused.
        name: shown to the peers.
        token: the group's secret. Without one only processes of the same user on the same host are accepted.
        links: links that may be used, e.g. `("tcp",)`; default: all that work, the cheapest first.
        warmup: connect with all peers now instead of on first use.
        deadline: seconds that joining may take, by default AIOCOMM_TIMEOUT_S.

    Raises:
        UsageError: arguments and environment contradict themselves or the world.
        AuthenticationError: the other side does not know the token.
        DeadlineExceeded: not all came in time.

    Cancelling the await leaves the world again and releases everything.
    """
    world = resolve_world(
        address,
        rank=rank,
        size=size,
        name=name,
        token=token,
        links=tuple(links) if links is not None else None,
        warmup=warmup,
        timeout_s=deadline,
    )
    return Connecting(world, Settings.from_environment())


class Connecting:
    """What `connect` returns: await it, or enter it."""

    def __init__(self, world: World, settings: Settings) -> None:
        self._world = world
        self._settings = settings
        self._comm: Communicator | None = None

    def __await__(self) -> Generator[Any, Any, Communicator]:
        return self._open().__await__()

    async def _open(self) -> Communicator:
        comm = Communicator(self._world, self._settings)
        try:
            await comm._start()
        except BaseException:
            await comm._abandon()
            raise
        return comm

    async def __aenter__(self) -> Communicator:
        self._comm = await self._open()
        return await self._comm.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._comm is not None
        await self._comm.__aexit__(kind, error, trace)


class Communicator:
    """Every operation with the other processes of a world. Made by `connect`.

    Belongs to the loop that opened it. Operations are submitted when called and return a `Transfer`, which is
    awaitable any number of times. Common to all of them:

    - `channel=`: the channel whose order and priority apply, default `comm.default`.
    - `deadline=`: seconds from now; then the operation ends with `DeadlineExceeded`.
    - Cancelling the awaiting task cancels the transfer; the await ends once nothing touches the buffer any
      more.
    - Errors: `UsageError` at the call; at the await `PeerLostError`, `TransferCancelled`, `TruncationError`,
      `StaleHandleError`, `LinkError`, `DeadlineExceeded`, `ClosedError`.
    """

    def __init__(self, world: World, settings: Settings) -> None:
        _outcome.install()
        self._backend: Backend = current_backend()
        self._settings = settings
        self._world = world
        native = settings.native()
        numbers = {key: float(value) for key, value in native.items() if not isinstance(value, str)}
        texts = {key: value for key, value in native.items() if isinstance(value, str)}
        for key in ("tls_cert", "tls_key", "tls_ca"):
            if (value := getattr(settings, key)) is not None:
                texts[key] = value
        wanted = list(world.links or settings.links or ())
        if unknown := sorted(set(wanted) - set(_core.available_links())):
            built = ", ".join(name for name in _core.available_links() if name != "self")
            raise UsageError(f"unknown link {unknown[0]!r}: this build has {built}")
        self._engine = _core.Engine(wanted, numbers, texts)
        self._plane = ControlPlane(world, self._engine, settings, self._on_control_event)
        self._rank = 0
        self._size: int | None = None
        self._generation = 0
        self._ranks = 1  # one more than the largest rank ever known
        self._peers: dict[int, Peer] = {}
        self._gone: set[tuple[int, int]] = set()
        self._closed = False
        self._unretrieved: list[BaseException] = []
        self._notes: Mailbox[Notification] = Mailbox()
        self._events: Broadcast[Event] = Broadcast()
        self._regions: dict[int, Region] = {}
        self._channels: dict[str, Channel] = {}
        self._links: dict[str, LinkHandle] = {}
        engine = self._engine
        engine.on_connect_wanted(self._plane.request_pair)
        engine.on_events(self._on_native_events)
        engine.on_unretrieved(self._unretrieved.append)
        # Bound once: they are looked up for every message.
        self._send = engine.send
        self._recv = engine.recv
        self._here = self._backend.running_here
        self._default = Channel(
            self, "", engine.open_channel("", int(Priority.NORMAL), 1.0), Priority.NORMAL, 1.0
        )
        # Operations of the runtime itself; users cannot open it.
        self._internal = engine.open_channel("\0internal", int(Priority.NORMAL), 1.0)

    # ------------------------------------------------------------ opening and closing

    async def _start(self) -> None:
        self._backend.attach(self._engine)
        welcome: Welcome = await self._backend.wait(self._plane.start())
        self._rank, self._size, self._generation = welcome.rank, welcome.size, welcome.generation
        self._ranks = max(self._ranks, self._rank + 1, self._size or 0)
        for card in welcome.peers:
            self._meet(peer_of(card))
        self._links = {name: LinkHandle(name, self._engine) for name in [*self._engine.link_names(), "self"]}
        if self._world.warmup:
            await self._backend.wait(self._plane.warm_up())

    async def _abandon(self) -> None:
        self._closed = True
        self._plane.close().add_done_callback(lambda _: None)
        self._engine.close()
        self._backend.detach(self._engine)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self._close(drain=False)
            return
        await self._close(drain=True)
        if failures := [e for e in self._unretrieved if not isinstance(e, ClosedError)]:
            self._unretrieved.clear()
            raise ExceptionGroup("transfers failed and nobody awaited them", failures)  # type: ignore[type-var]

    async def aclose(self) -> None:
        """Leave the world.

        Outgoing transfers get `drain_timeout_s` to end, everything else ends with `ClosedError`. Idempotent;
        releases everything even if it is cancelled or fails.
        """
        await self._close(drain=True)

    async def _close(self, drain: bool) -> None:
        if self._closed:
            return
        try:
            if drain:
                await self._drain()
        finally:
            self._closed = True
            closing = self._plane.close()
            try:
                await self._backend.wait(closing)
            finally:
                self._engine.close()
                self._engine.drain()
                self._backend.detach(self._engine)
                for hook in (
                    self._engine.on_connect_wanted,
                    self._engine.on_events,
                    self._engine.on_unretrieved,
                ):
                    hook(None)
                self._notes.close()
                self._events.close()
                for link in self._links.values():
                    link._close()

    async def _drain(self) -> None:
        """Wait until what was sent has been fetched: it may still lie in this process's memory."""
        if not (pending := self._engine.outgoing()):
            return
        with anyio.move_on_after(self._settings.drain_timeout_s):
            for transfer in pending:
                await _ended(transfer)

    # ------------------------------------------------------------ who is there

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Processes in the world; in an elastic world, those alive now."""
        return self._size if self._size is not None else 1 + sum(peer.alive for peer in self._peers.values())

    @property
    def peers(self) -> tuple[Peer, ...]:
        """The other processes, by rank, also those that are gone (`alive` False)."""
        return tuple(self._peers[rank] for rank in sorted(self._peers))

    @property
    def links(self) -> Mapping[str, LinkHandle]:
        """Links that are in use, by name."""
        return self._links

    @property
    def closed(self) -> bool:
        """Whether the communicator was closed."""
        return self._closed

    @property
    def default(self) -> Channel:
        """The channel of operations that name none: priority NORMAL, weight 1."""
        return self._default

    @property
    def from_thread(self) -> ThreadedCommunicator:
        """Blocking twins of the operations, for threads other than the loop's."""
        return ThreadedCommunicator(self, self._backend)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{sum(p.alive for p in self._peers.values())} peers"
        return f"<aiocomm.Communicator rank={self._rank} size={self._size} {state}>"

    # ------------------------------------------------------------ two-sided

    def send(
        self,
        array: Any,
        dst: int,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
        synchronous: bool = False,
    ) -> Transfer[None]:
        """Send an array.

        A message of at most `eager_max` bytes ends when the runtime has a copy of it; a larger one, or a
        `synchronous` one, when the receiver has it.

        Args:
            array: host array or buffer of any shape and dtype, contiguous in C order.
            dst: rank of the receiver; may be one's own.
            tag: 0 to MAX_TAG.
        """
        return self._submit_send(array, dst, tag, channel, deadline, _SYNCHRONOUS if synchronous else 0)

    def send_nowait(
        self,
        array: Any,
        dst: int,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
    ) -> Transfer[None]:
        """Send, but only if the link takes it at once.

        Raises:
            WouldBlock: the peer is not connected yet, or its queue is full; nothing was submitted.
        """
        transfer = self._submit_send(array, dst, tag, channel, deadline, _NO_WAIT)
        if transfer.done() and isinstance(error := transfer.exception(), WouldBlock):
            raise error
        return transfer

    def _submit_send(
        self, array: Any, dst: int, tag: int, channel: Channel | None, deadline: float | None, flags: int
    ) -> Transfer[Any]:
        index = 0 if channel is None else channel._index
        if self._closed or not self._here() or not 0 <= tag <= MAX_TAG or not 0 <= dst < self._ranks:
            self._refuse(dst=dst, tag=tag)
        if channel is not None and channel._comm is not self:
            raise UsageError(f"channel {channel.name!r} belongs to another communicator")
        limit = _NO_DEADLINE if deadline is None else _seconds(deadline)
        try:
            return self._send(array, dst, index, tag, limit, flags)
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
    ) -> Transfer[Status]:
        """Receive into an array; returns `Status(source, tag, nbytes)`.

        Args:
            out: writable host array or buffer, contiguous in C order, at least as large as the message. Only
                bytes are matched: the message's dtype and shape are not compared with it.
            src: rank of the sender, or ANY_SOURCE.
            tag: the message's tag, by default 0 as for `send`, or ANY_TAG.
        """
        index = 0 if channel is None else channel._index
        if self._closed or not self._here() or not -1 <= tag <= MAX_TAG or not -1 <= src < self._ranks:
            self._refuse(src=src, tag=tag)
        if channel is not None and channel._comm is not self:
            raise UsageError(f"channel {channel.name!r} belongs to another communicator")
        limit = _NO_DEADLINE if deadline is None else _seconds(deadline)
        if out is None:
            raise UsageTypeError("recv needs a buffer; recv_array allocates one")
        try:
            return self._recv(out, src, index, tag, limit)
        except (TypeError, ValueError, BufferError) as error:
            _overlapping(error)
            _integers(src=src, tag=tag)
            try:
                return self._recv(as_buffer(out, True), src, index, tag, limit)
            except ValueError as again:
                _overlapping(again)
                raise

    def recv_array(
        self,
        src: int = ANY_SOURCE,
        *,
        tag: int = 0,
        channel: Channel | None = None,
        deadline: float | None = None,
    ) -> Transfer[Any]:
        """Receive into a new array of the sender's dtype and shape; returns the array.

        `status` of the transfer tells source and tag.
        """
        index = 0 if channel is None else channel._index
        if self._closed or not self._here() or not -1 <= tag <= MAX_TAG or not -1 <= src < self._ranks:
            self._refuse(src=src, tag=tag)
        if channel is not None and channel._comm is not self:
            raise UsageError(f"channel {channel.name!r} belongs to another communicator")
        return self._recv(None, src, index, tag, _NO_DEADLINE if deadline is None else _seconds(deadline))

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
        if not name or name.startswith("\0"):
            raise UsageError("a channel needs a name")
        if not (math.isfinite(weight) and 1 / 1024 <= weight <= 1024):
            raise UsageError(f"weight {weight} is outside 1/1024 to 1024")
        try:
            index = self._engine.open_channel(name, int(Priority(priority)), float(weight))
        except ValueError as error:
            raise UsageError(str(error)) from None
        channel = self._channels.get(name)
        if channel is None or channel.closed:
            channel = self._channels[name] = Channel(self, name, index, Priority(priority), float(weight))
        return channel

    # ------------------------------------------------------------ one-sided

    def register(self, array: Any, *, writable: bool | None = None) -> Region:
        """Register an array for puts and gets of peers.

        Close the region before the memory is used for anything else.

        Args:
            array: host array or buffer, contiguous in C order.
            writable: whether peers may put; default: whether the array is writable.
        """
        if self._closed or not self._here():
            self._refuse()
        view = as_buffer(array, False)
        if writable is None:
            writable = not view.readonly
        elif writable and view.readonly:
            raise UsageError("the array is read-only: register it with writable=False")
        number, nbytes = self._engine.add_region(view, writable)
        region = Region(self, number, nbytes, writable, view)
        self._regions[number] = region
        return region

    async def exchange(self, region: Region, with_: int, *, deadline: float | None = None) -> RemoteRegion:
        """Swap regions with a peer, who calls it, too: each gets the other's."""
        return await exchange(self, region, with_, deadline)

    def remote(self, handle: bytes) -> RemoteRegion:
        """Make a remote region of another process's `region.handle`.

        Raises:
            UsageError: these bytes are no handle.
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
    ) -> Transfer[None]:
        """Write an array into a peer's region; ends when the bytes are in place there.

        Args:
            array: host array or buffer, contiguous in C order, no larger than `remote`.
            notify: at most 4,096 bytes that the owner gets from `notifications()` after the data.
        """
        index = self._check_remote(remote, channel)
        if notify is not None and not (isinstance(notify, bytes) and len(notify) <= 4096):
            raise UsageError("notify takes at most 4,096 bytes")
        view = as_buffer(array, False)
        if view.nbytes > remote.nbytes:
            raise UsageError(f"{view.nbytes} bytes do not fit into a remote region of {remote.nbytes}")
        limit = _NO_DEADLINE if deadline is None else _seconds(deadline)
        return self._engine.put(view, remote.rank, index, remote._number, remote._start, notify, limit)

    def get(
        self,
        remote: RemoteRegion,
        into: Any,
        *,
        channel: Channel | None = None,
        deadline: float | None = None,
    ) -> Transfer[None]:
        """Read a peer's region into an array of the same number of bytes or more."""
        index = self._check_remote(remote, channel)
        view = as_buffer(into, True)
        if view.nbytes < remote.nbytes:
            raise UsageError(
                f"a remote region of {remote.nbytes} bytes does not fit into {view.nbytes}: narrow it"
            )
        limit = _NO_DEADLINE if deadline is None else _seconds(deadline)
        flat = view.cast("B") if view.nbytes else view
        try:
            return self._engine.get(
                flat[: remote.nbytes], remote.rank, index, remote._number, remote._start, limit
            )
        except ValueError as error:
            _overlapping(error)
            raise

    def _check_remote(self, remote: RemoteRegion, channel: Channel | None) -> int:
        if self._closed or not self._here():
            self._refuse()
        if not isinstance(remote, RemoteRegion):
            raise UsageTypeError("expected a RemoteRegion, from comm.exchange() or comm.remote()")
        if channel is not None and channel._comm is not self:
            raise UsageError(f"channel {channel.name!r} belongs to another communicator")
        remote._check_fresh(self)
        return 0 if channel is None else channel._index

    def notifications(self) -> AsyncIterator[Notification]:
        """Notifications of peers' puts, in the order of their arrival; each is given to one iterator only."""
        return self._notes

    # ------------------------------------------------------------ events and statistics

    def events(self) -> AsyncIterator[Event]:
        """What happens in the world from now on: peers that come and go, links, fallbacks. See `Event`."""
        return self._events.subscribe()

    def statistics(self) -> Statistics:
        """Counters of every link and of matching, as of now."""
        return Statistics.collect(self._engine, self._links)

    async def barrier(self, *, deadline: float | None = None) -> None:
        """Wait until every process of the world has called it (dissemination, ⌈log2 size⌉ rounds)."""
        size = self.size
        if self._size is None:
            raise UsageError("barrier needs a world of fixed size")
        step = 1
        token, answer = b"\0", bytearray(1)
        while step < size:
            receive = self._recv(answer, (self._rank - step) % size, self._internal, step, _limit(deadline))
            await self._send(token, (self._rank + step) % size, self._internal, step, _limit(deadline), 0)
            await receive
            step *= 2

    def _meet(self, peer: Peer) -> None:
        self._peers[peer.rank] = peer
        self._ranks = max(self._ranks, peer.rank + 1)

    def _on_control_event(self, event: Event) -> None:
        self._backend.call_threadsafe(lambda: self._on_event(event))

    def _on_event(self, event: Event) -> None:
        if isinstance(event, PeerJoined):
            self._meet(event.peer)
        elif isinstance(event, PeerLost):
            key = (event.rank, event.generation)
            if key in self._gone:
                return
            self._gone.add(key)
            peer = self._peers.get(event.rank)
            if peer is not None and peer.generation == event.generation:
                self._peers[event.rank] = Peer(
                    peer.rank,
                    peer.host,
                    peer.pid,
                    peer.devices,
                    peer.links,
                    False,
                    peer.name,
                    peer.generation,
                )
        self._events.publish(event)

    def _on_native_events(self, events: list[tuple[int, int, int, Any, str]]) -> None:
        for kind, rank, number, text, more in events:
            match kind:
                case 0:
                    self._notes.put(Notification(rank, text, number))
                case 1:
                    self._on_event(PeerLost(rank, number, text))
                case 2:
                    self._on_event(LinkUp(text, rank))
                case 3:
                    self._on_event(LinkDown(text, rank, more))
                case 4:
                    link = self._engine.link_of(rank) or "none"
                    self._on_event(Fallback(link, rank, text, more))
                case 5:
                    self._on_event(Undelivered(rank, text, number, more))
                case 6:
                    if (region := self._regions.pop(number, None)) is not None:
                        region._freed()

    # ------------------------------------------------------------ refusals

    def _refuse(self, dst: int | None = None, src: int | None = None, tag: int | None = None) -> None:
        """Say which of the conditions of a call does not hold."""
        if self._closed:
            raise ClosedError("the communicator was closed: connect() again")
        if not self._here():
            raise UsageError(
                "this communicator belongs to another event loop or thread: use comm.from_thread there, or "
                "open one communicator per loop"
            )
        rank = dst if dst is not None else src
        if rank is not None:
            _integers(rank=rank)
            low = 0 if dst is not None else -1
            if not low <= rank < self._ranks:
                known = f"0 to {self._ranks - 1}" if self._ranks > 1 else "only 0, this process"
                hint = "" if dst is not None else ", or ANY_SOURCE"
                raise UsageError(f"no rank {rank} in this world: ranks are {known}{hint}")
        if tag is not None:
            _integers(tag=tag)
            raise UsageError(
                f"tag {tag} is outside 0 to MAX_TAG = {MAX_TAG}" + ("" if dst is not None else " and ANY_TAG")
            )


async def _ended(transfer: Transfer[Any]) -> None:
    done = anyio.Event()
    transfer.add_done_callback(lambda _: done.set())
    if not transfer.done():
        await done.wait()


def _seconds(deadline: float) -> float:
    if not isinstance(deadline, int | float) or math.isnan(deadline) or deadline < 0:
        raise UsageError(f"deadline={deadline!r}: seconds from now, 0 or more")
    return min(float(deadline), 1e9)


def _limit(deadline: float | None) -> float:
    return _NO_DEADLINE if deadline is None else _seconds(deadline)


def _integers(**values: Any) -> None:
    for name, value in values.items():
        if not hasattr(value, "__index__"):
            raise UsageTypeError(f"{name}={value!r} is not an integer")


def _overlapping(error: Exception) -> None:
    if isinstance(error, ValueError) and str(error) == "overlap":
        raise UsageError(
            "another receive or get that has not ended writes into this memory: await it, or use another "
            "buffer"
        ) from None
