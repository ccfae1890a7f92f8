"""The communicator: one process's membership in a world, and every operation with the other processes."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self
from weakref import WeakSet

import anyio

from aiocomm import _outcome
from aiocomm._control.plane import ControlPlane, peer_of
from aiocomm._forked import tell_of_fork
from aiocomm._log import EventLog
from aiocomm._loop.backend import current_backend, import_early
from aiocomm._operations import Operations
from aiocomm._queues import Broadcast, Mailbox
from aiocomm._unawaited import Unawaited
from aiocomm.channel import Channel
from aiocomm.collectives.closing import pause
from aiocomm.collectives.operations import Collectives
from aiocomm.config import unknown_variables, variable
from aiocomm.errors import AiocommError, LinkError, UsageError, UsageTypeError
from aiocomm.group import Group
from aiocomm.link import LinkHandle, check_links
from aiocomm.moe.operations import ExpertOperations
from aiocomm.pages import streaming
from aiocomm.pages.operations import PageOperations
from aiocomm.statistics import Statistics
from aiocomm.threads import ThreadedCommunicator
from aiocomm.types import (
    Event,
    Fallback,
    LinkDown,
    LinkUp,
    Notification,
    Peer,
    PeerJoined,
    PeerLost,
    Priority,
    Undelivered,
)
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from aiocomm._control.plane import Welcome
    from aiocomm._exchange import Exchanges
    from aiocomm._loop.backend import Backend
    from aiocomm._world import World
    from aiocomm.collectives.scope import Scope
    from aiocomm.config import Settings
    from aiocomm.pages.streaming import LayerNotes
    from aiocomm.region import Region
    from aiocomm.types import Feed
    from aiocomm_native import Transfer

__all__ = ["Communicator"]

_POPULATED: Final = 16  # ranks, between which `warmup` takes the memory of all rings
_ABANDON_S: Final = 1.0  # for which the control plane's thread is waited for


class Communicator(Operations, Collectives, ExpertOperations, PageOperations):
    """Every operation with the other processes of a world. Made by `connect`.

    Belongs to the loop that opened it. Operations are submitted when called and return a `Transfer`, which is
    awaitable any number of times. Common to all of them:

    - `channel=`: the channel whose order and priority apply, default `comm.default`.
    - `deadline=`: seconds from now; then the operation ends with `DeadlineExceeded`.
    - Cancelling the awaiting task cancels the transfer; the await ends once nothing touches the buffer any
      more.
    - Errors: `UsageError` at the call; at the await `PeerLostError`, `TransferCancelled`, `TruncationError`,
      `StaleHandleError`, `LinkError`, `DeadlineExceeded`, `ClosedError`.

    The collective operations are those of the group of all ranks, see `Group`.
    """

    def __init__(self, world: World, settings: Settings) -> None:
        _outcome.install()
        self._backend: Backend = current_backend()
        import_early()
        self._settings = settings
        self._log = EventLog(settings.log_level)
        self._log.unknown(unknown_variables())
        self._world = world
        numbers, texts = settings.native_arguments()
        numbers["populates"] = float(world.warmup and (world.size or 0) <= _POPULATED)
        wanted = list(world.links or settings.links or ())
        check_links(wanted)
        if wanted and not set(wanted) - {"cuda"}:
            wanted += ["shm", "tcp"]  # it moves memory beside another link
        self._engine = _core.Engine(wanted, numbers, texts)
        try:
            if "cuda" in wanted:
                self._engine.devices()  # raises where it cannot work: it was asked for
            if settings.tls_cert is not None and "tcp" in self._engine.link_names():
                _check_tls(settings)
        except AiocommError:
            self._engine.close()
            self._engine.release_descriptors()
            raise
        self._plane = ControlPlane(world, self._engine, settings, self._on_control_event)
        self._rank = 0
        self._size: int | None = None
        self._generation = 0
        self._ranks = 1
        self._peers: dict[int, Peer] = {}
        self._gone: set[tuple[int, int]] = set()
        self._left: set[int] = set()  # ranks that said goodbye
        self._closed = self._forked = False
        self._closers = 0  # that wait for the end of the closing
        self._released = False
        self._unretrieved = Unawaited(lambda error: self._log.unawaited(self._rank, error))
        self._notes: Mailbox[Notification] = Mailbox()
        self._staged = 0  # bytes that pages are packed in
        self._events: Broadcast[Event] = Broadcast()
        self._told: deque[Event] = deque()  # by the control thread, and not taken notice of yet
        self._regions: dict[int, Region] = {}
        self._layer_notes: dict[int, LayerNotes] = {}
        self._channels: dict[str, Channel] = {}
        self._exchanges: dict[tuple[int, int | None], Exchanges] = {}
        self._groups: dict[str, int] = {}  # groups made so far, by members
        self._world_group: Group | None = None
        self._collective_calls: Counter[str] = Counter()
        self._scopes: WeakSet[Scope] = WeakSet()
        self._standing: set[Transfer[Any]] = set()  # receives, while there are groups
        self._lenders: set[Scope] = set()  # whose memory others may read after a call
        self._links: dict[str, LinkHandle] = {}
        engine = self._engine
        engine.on_connect_wanted(self._plane.request_pair)
        engine.on_events(self._on_native_event)
        engine.on_unretrieved(self._unretrieved.add)
        # Bound once: they are looked up for every message.
        self._send = engine.send
        self._recv = engine.recv
        self._here = self._backend.running_here
        self._default = Channel(
            self, "", engine.open_channel("", int(Priority.NORMAL), 1.0), Priority.NORMAL, 1.0
        )
        tell_of_fork(self)

    def _on_fork(self) -> None:
        """This is a child that was forked; nothing here works any more. For the runtime's own use."""
        self._forked = True

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
        self._closed = self._released = True
        try:
            self._plane.close().add_done_callback(lambda _: None)
            with anyio.move_on_after(_ABANDON_S, shield=True):
                await self._backend.wait(self._plane.ended)
        finally:
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
        if failures := self._unawaited():
            raise ExceptionGroup("transfers failed and nobody awaited them", failures)

    async def aclose(self) -> None:
        """Leave the world.

        Outgoing transfers get `drain_timeout_s` to end, everything else ends with `ClosedError`. Idempotent;
        several calls at once end together. Releases everything even if it is cancelled or fails; unless
        others wait for it, which go on then.

        Raises:
            UsageError: another event loop than the communicator's is running.
        """
        await self._close(drain=True)

    def _unawaited(self) -> list[AiocommError]:
        """Errors of transfers that nobody has looked at; they are told once."""
        return self._unretrieved.take()

    async def _close(self, drain: bool) -> None:
        """Close, or wait for the end of that if others are at it.

        A caller that is cancelled leaves it to the others; without any, it still releases everything.
        """
        if self._released:
            return
        if not self._here():  # its descriptors are watched there
            self._refuse()
        self._closers += 1
        try:
            try:
                if drain and not self._closed:
                    await self._drain()
            except BaseException:
                if self._closers == 1:
                    await self._leave()
                raise
            await self._leave()
        finally:
            self._closers -= 1
            if not self._closers:
                self._release()

    async def _leave(self) -> None:
        self._closed = True
        for scope in self._scopes:
            scope.forget(all_memory=True)
        for notes in self._layer_notes.values():  # before peers are seen to leave: it is not they who do
            notes.close("the communicator was closed")
        await self._backend.wait(self._plane.close())
        with anyio.move_on_after(_ABANDON_S):  # nothing should keep it, and this not for ever
            await self._backend.wait(self._plane.ended)
            self._plane.join()
        self._release()

    def _release(self) -> None:
        if self._released:
            return
        self._released = True
        self._engine.close()
        while self._engine.drain():  # everything has ended by now, and nothing wakes this loop again
            pass
        self._backend.detach(self._engine)
        for region in list(self._regions.values()):
            region._end()
        self._regions.clear()
        for scope in self._lenders:
            scope.close()
        self._lenders.clear()
        for hook in (self._engine.on_connect_wanted, self._engine.on_events, self._engine.on_unretrieved):
            hook(None)
        self._notes.close()
        self._events.close()
        for link in self._links.values():
            link._close()

    async def _drain(self) -> None:
        """Wait until what was sent has been fetched: it may still lie in this process's memory."""
        pending = self._engine.outgoing()
        if not pending and not self._lenders:
            return
        with anyio.move_on_after(self._settings.drain_timeout_s):
            for transfer in pending:
                await _ended(transfer)
            for scope in list(self._lenders):  # another closer may be sooner, and forget them
                await scope.settle()

    # ------------------------------------------------------------ who is there

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
    def default(self) -> Channel:
        """The channel of operations that name none: priority NORMAL, weight 1."""
        return self._default

    @property
    def from_thread(self) -> ThreadedCommunicator:
        """Blocking twins of the operations, for threads other than the loop's."""
        return ThreadedCommunicator(self, self._backend)

    def __reduce__(self) -> NoReturn:
        raise UsageTypeError(
            "a communicator, and what belongs to it, stays in its process: it cannot be pickled or copied. "
            "Others connect() by themselves; of regions and leases the handle travels"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{sum(p.alive for p in self._peers.values())} peers"
        return f"<aiocomm.Communicator rank={self._rank} size={self.size} {state}>"

    # ------------------------------------------------------------ events and statistics

    def events(self) -> Feed[Event]:
        """What happens in the world from now on: peers that come and go, links, fallbacks. See `Event`."""
        return self._events.subscribe()

    def statistics(self) -> Statistics:
        """Counters of every link and of matching, as of now."""
        standing = sum(not receive.done() for receive in list(self._standing))
        return Statistics.collect(self._engine, self._links, self._collective_calls, standing)

    async def group(self, ranks: Sequence[int], *, deadline: float | None = None) -> Group:
        """Make a group of some ranks; exactly these call it, each with the same list.

        Args:
            ranks: world ranks; their order gives the ranks in the group.

        Raises:
            UsageError: a rank is unknown, comes twice, or this one is not among them.
            PeerLostError: a member is gone, may be since before this process joined.
            DeadlineExceeded: a member has not called in time, or with another list.
        """
        return await Group.create(self, ranks, deadline)

    def _members(self) -> Group:
        if self._world_group is None:
            self._world_group = Group.world(self)
        return self._world_group

    def _meet(self, peer: Peer) -> None:
        # The control plane tells who comes, the engine who goes: of one that goes at once, either is sooner.
        if (peer.rank, peer.generation) in self._gone:
            peer = replace(peer, alive=False)
        else:
            self._left.discard(peer.rank)
        self._peers[peer.rank] = peer
        self._ranks = max(self._ranks, peer.rank + 1)
        self._tell_scopes(peer.rank)

    def _close_channel(self, channel: Channel) -> None:
        for scope in list(self._scopes):
            if scope.channel is not None and scope.channel.name == channel.name:
                pause(scope, channel)
        self._engine.close_channel(channel._index)
        self._engine.drain()

    def _tell_scopes(self, rank: int) -> None:
        for scope in list(self._scopes):
            scope.look_for(rank)

    def _on_control_event(self, event: Event) -> None:
        self._told.append(event)
        self._backend.call_threadsafe(self._catch_up)

    def _catch_up(self) -> None:
        while self._told:
            self._on_event(self._told.popleft())

    def _on_event(self, event: Event) -> None:
        if isinstance(event, PeerJoined):
            self._meet(event.peer)
        elif isinstance(event, PeerLost):
            key = (event.rank, event.generation)
            if key in self._gone:
                return
            self._gone.add(key)
            if event.reason == "left":
                self._left.add(event.rank)
            for notes in self._layer_notes.values():
                notes.lose(event.rank)
            peer = self._peers.get(event.rank)
            if peer is not None and peer.generation == event.generation:
                self._peers[event.rank] = replace(peer, alive=False)
                self._tell_scopes(event.rank)
            if (exchanges := self._exchanges.get(key)) is not None:
                exchanges.tidy()
        self._events.publish(event)
        self._log(self._rank, event)  # last: the application's handlers may raise

    def _on_native_event(self, event: tuple[int, int, int, Any, str]) -> None:
        kind, rank, number, text, more = event
        match kind:
            case 0:
                if (layer := streaming.parse(text)) is None:
                    self._notes.put(Notification(rank, text, number))
                elif (notes := self._layer_notes.get(layer[0])) is not None:
                    notes.put(rank, *layer[1:])
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


def _check_tls(settings: Settings) -> None:
    """Read the files now: a pair that cannot be made later would look like a peer that is lost."""
    try:
        _core.check_tls(settings.tls_cert or "", settings.tls_key or "", settings.tls_ca or "")
    except LinkError as error:
        name, _, what = str(error).partition(":")
        if name in ("tls_cert", "tls_key", "tls_ca"):
            raise UsageError(f"{variable(name)}:{what}") from None
        raise


async def _ended(transfer: Transfer[Any]) -> None:
    done = anyio.Event()
    transfer.add_done_callback(lambda _: done.set())
    if not transfer.done():
        await done.wait()
