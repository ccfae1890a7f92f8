"""The control plane of one communicator: joins the world, keeps track of peers, makes pair connections.

Everything runs on one thread with a private loop; methods may be called from any thread, events are told on
that thread.

    start ─► [rendezvous, at rank 0] ─► client.join ─► identity, peers ─► ready
    request_pair ─► pairing ─► engine.attach
    control connection, pidfds; without a rendezvous, vigil ─► engine.lose_peer / leave_peer

Events told here are `PeerJoined`, `Fallback`, and `LinkDown` of the link "rendezvous". The engine tells of
links that are up or down and of lost peers, since it may be the first to see them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from aiocomm._control import host, interfaces
from aiocomm._control.address import TcpAddress, UnixAddress, parse
from aiocomm._control.auth import GIVE_TOKEN, derive_key
from aiocomm._control.client import Client
from aiocomm._control.endpoints import Endpoints
from aiocomm._control.hosting import Host
from aiocomm._control.liveness import ProcessWatch
from aiocomm._control.loopthread import LoopThread
from aiocomm._control.messages import PeerCard
from aiocomm._control.pairing import Pairing
from aiocomm._control.vigil import Vigil
from aiocomm._control.wire import ProtocolError
from aiocomm._world import World
from aiocomm.errors import ClosedError, DeadlineExceeded, LinkError, PeerLostError, UsageError
from aiocomm.types import Event, Fallback, LinkDown, Peer, PeerJoined

if TYPE_CHECKING:
    from aiocomm._control.engine import Engine
    from aiocomm._control.stream import Stream
    from aiocomm.config import Settings

__all__ = ["ControlPlane", "PeerCard", "Welcome", "World", "peer_of"]

_TAKEN_S: Final = 5.0
"""For which an address that is taken is tried: the rendezvous of a world that is just closing may have it."""
_TAKEN_PART: Final = 0.9
"""Of the time to join, at most: why it cannot be had is to be told, not that the time is over."""

OnEvent: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Welcome:
    """This process's place in the world, and everyone else who is known so far."""

    rank: int
    size: int | None
    generation: int
    peers: tuple[PeerCard, ...]
    card: PeerCard


class ControlPlane:
    """Membership and connections of one communicator.

    Args:
        world: what to join.
        engine: is told of peers and gets the pair connections.
        settings: limits and intervals.
        on_event: is told of events, on the control thread; must not block.
    """

    def __init__(self, world: World, engine: Engine, settings: Settings, on_event: OnEvent) -> None:
        self._world = world
        self._engine = engine
        self._settings = settings
        self._on_event = on_event
        self._thread = LoopThread("aiocomm-control")
        self._closing: concurrent.futures.Future[None] | None = None
        # The rest belongs to the control thread.
        self._stack = contextlib.AsyncExitStack()  # what was opened, to be closed in reverse
        self._starting: asyncio.Task[Welcome] | None = None
        self._client: Client | None = None
        self._hosting: Host | None = None
        self._endpoints: Endpoints | None = None
        self._pairing: Pairing | None = None
        self._vigil: Vigil | None = None
        self._peers: dict[int, PeerCard] = {}
        self._early: set[int] = set()  # pairs asked for before this process was admitted
        self._host_rank: int | None = None
        self._ready = False
        self._closed = False
        self._watch = ProcessWatch(self._lost)

    def start(self) -> concurrent.futures.Future[Welcome]:
        """Join the world, in the background. A world of fixed size is joined once all its processes have
        come.

        Cancelling the future gives up; `close` is needed all the same.

        Raises (from the future):
            UsageError: the world differs from what this process expects, or cannot be had like this.
            AuthenticationError: the rendezvous belongs to another group.
            DeadlineExceeded: it was not complete within `timeout_s`.
            LinkError: the address cannot be listened at, or there are no descriptors left.
        """
        return self._thread.submit(self._start())

    def request_pair(self, rank: int) -> None:
        """Connect with a peer, in the background. Any thread; idempotent."""
        self._thread.call(self._want, rank)

    def warm_up(self) -> concurrent.futures.Future[None]:
        """Connect with all peers that do not leave meanwhile; in an elastic world, with those who stay.

        Raises (from the future):
            PeerLostError: a pair could not be made; the message says which and why.
        """
        if self._closing is not None:
            raise ClosedError("the communicator was closed")
        return self._thread.submit(self._warm_up())

    def close(self) -> concurrent.futures.Future[None]:
        """Say goodbye, close everything, end the thread. Idempotent."""
        if self._closing is None and not self._thread.started:
            self._thread.stop()
            self._closing = self._thread.ended
        elif self._closing is None:
            work = self._thread.submit(self._close())
            closing: concurrent.futures.Future[None] = concurrent.futures.Future()
            self._closing = closing
            closing.set_running_or_notify_cancel()  # so that a cancelled wait does not break it off
            work.add_done_callback(lambda _: self._thread.stop())
            work.add_done_callback(lambda done: _pass_on(done, closing))
        return self._closing

    @property
    def ended(self) -> concurrent.futures.Future[None]:
        """When the thread has given back all that it had; after `close`, in whose time that is."""
        return self._thread.ended

    def join(self, timeout_s: float | None = None) -> None:
        """Wait, blocking, until the thread has ended; after `ended` that takes microseconds."""
        self._thread.join(timeout_s)

    # Joining, on the control thread

    async def _start(self) -> Welcome:
        self._starting = asyncio.current_task()
        self._stack.callback(self._watch.close)
        world = self._world
        try:
            if world.address is None:
                self._engine.set_identity(0, 1)
                return Welcome(0, 1, 1, (), self._card(0, 1))
            async with asyncio.timeout(world.timeout_s):
                return await self._join(world.address)
        except TimeoutError:
            raise DeadlineExceeded(self._waited_for()) from None
        except (ConnectionError, ProtocolError) as error:
            raise PeerLostError(
                f"the world at {world.address} broke up while it was joined: {error}"
            ) from error
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0)
            message = f"could not join {world.address or 'a world of one'}: {host.what_to_do(error)}"
            raise LinkError(message, error.errno, code) from error

    async def _join(self, text: str) -> Welcome:
        world = self._world
        address = asked = parse(text)
        key = world.token.encode() if world.token is not None else None
        if world.rank == 0:
            hosting = self._hosting = Host(world.size, address, key, self._settings, host_rank=0)
            self._stack.push_async_callback(hosting.aclose)
            _, key = await hosting.start(min(_TAKEN_S, _TAKEN_PART * world.timeout_s))
            address = hosting.near
        if key is None and isinstance(address, TcpAddress):
            raise UsageError(f"{address} needs a token: {GIVE_TOKEN}")
        endpoints = self._endpoints = Endpoints(self._engine, self._settings)
        await endpoints.look_up_host()
        self._client = Client(world, address, key, self._settings, self)
        self._stack.push_async_callback(self._client.aclose)
        self._stack.push_async_callback(endpoints.aclose)
        exact = isinstance(asked, UnixAddress) or (isinstance(asked, TcpAddress) and asked.is_exact)

        def make_card(stream: Stream) -> PeerCard:
            # Through an address that the user has not spelt out, a rendezvous on this host may be found by
            # another interface than that by which others find this host.
            here = stream.remote_host == stream.local_host or stream.remote_host.startswith("127.")
            further = interfaces.outward_addresses() if here and not exact else ()
            return self._card(0, 0, endpoints.bind(stream.local_host, further))

        welcome = await self._client.join(make_card)
        self._host_rank = welcome.host_rank
        secret = self._client.key if self._client.key is not None else welcome.session_key
        pair_key = derive_key(secret, f"pair {welcome.world}")
        card = self._card(welcome.rank, welcome.generation, endpoints.addresses)
        self._engine.set_identity(welcome.rank, welcome.generation)
        self._engine.set_open(welcome.size is None)
        self._vigil = Vigil(
            card, endpoints.dial, self._settings, self._unwatched, self._peers.get, self.on_gone, self._fail
        )
        self._stack.push_async_callback(self._vigil.aclose)
        self._pairing = Pairing(
            card,
            self._engine,
            endpoints.dial,
            self._settings.handshake_timeout_s,
            self._settings.max_pending,
            self._fell_back,
            self._settings.link_fallback == "on",
            self._vigil.serve,
            self._settings.tls_cert is not None,
        )
        self._stack.push_async_callback(self._pairing.aclose)
        for rank in self._early:
            self._pairing.want(rank)
        endpoints.open(pair_key, card.host_id, self._pairing.serve)
        await self._client.collect()
        self._ready = True
        peers = tuple(sorted(self._peers.values(), key=lambda peer: peer.rank))
        return Welcome(welcome.rank, welcome.size, welcome.generation, peers, card)

    def _card(self, rank: int, generation: int, addresses: tuple[str, ...] = ()) -> PeerCard:
        return PeerCard(
            rank=rank,
            generation=generation,
            name=self._world.name,
            host=host.hostname(),
            host_id=host.host_id(),
            pid=os.getpid(),
            pid_namespace=host.pid_namespace(),
            start_time=host.start_time(os.getpid()),
            devices=(),
            links=tuple(self._engine.link_names()),
            addresses=addresses,
        )

    def _waited_for(self) -> str:
        world = self._world
        if self._client is None or self._client.welcome is None:
            trouble = self._trouble()
            who = "rank 0" if world.size is not None else "the rendezvous (rank 0 or `aiocomm rendezvous`)"
            return (
                f"could not join {world.address} within {world.timeout_s:g} s: {trouble}; is {who} running?"
            )
        if world.size is None:
            return f"rank 0 did not join its own world at {world.address} within {world.timeout_s:g} s"
        missing = sorted(set(range(world.size)) - set(self._peers) - {self._client.welcome.rank})
        ranks = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        count = f"{len(missing)} of {world.size} processes"
        starved = self._hosting.rendezvous.starved if self._hosting is not None else ""
        why = f"; connections to this process wait: {starved}" if starved else ""
        return f"{count} did not come within {world.timeout_s:g} s: rank {ranks}{why}"

    def _trouble(self) -> str:
        """Why this process has not been let in yet."""
        if self._client is not None:
            return self._client.trouble
        if self._endpoints is None and self._hosting is not None:
            return self._hosting.trouble
        return host.STILL_LOOKED_UP.format("AIOCOMM_HOST")

    async def _close(self) -> None:
        self._closed = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._stack.aclose()

    # What the rendezvous and the kernel tell, on the control thread

    def on_joined(self, card: PeerCard) -> None:
        """A peer is in the world."""
        assert self._pairing is not None
        before = self._peers.get(card.rank)
        if card.rank == self._pairing.rank or (before is not None and before.generation >= card.generation):
            return
        if before is not None:
            self.on_gone(before.rank, before.generation, False, "a new process has taken its rank")
        self._peers[card.rank] = card
        if card.rank == self._host_rank and self._client is not None and self._endpoints is not None:
            self._endpoints.rendezvous_is(card.host_id, self._client.found_at)
        self._engine.add_peer(card.rank, card.generation)
        if self._ready:
            self._tell(PeerJoined(peer_of(card)))  # before there can be a message of it
        self._pairing.add(card)
        self._watch.add(card)

    def on_gone(self, rank: int, generation: int, graceful: bool, reason: str) -> None:
        """A peer is out of the world. Only the first to say so is heard."""
        card = self._peers.get(rank)
        if card is None or card.generation != generation:
            return
        del self._peers[rank]
        self._watch.remove(rank, generation)
        if graceful:
            self._engine.leave_peer(rank, generation)
        else:
            self._engine.lose_peer(rank, generation, reason)
        if self._pairing is not None:
            self._pairing.drop(rank, generation, graceful, f"rank {rank} is gone: {reason}")
        if self._vigil is not None:
            self._vigil.drop(rank, generation)

    def on_rendezvous_lost(self, graceful: bool, reason: str) -> None:
        """Nothing more will be told: peers go on with what they have, and watch each other."""
        if self._closed:
            return
        if self._vigil is not None:
            self._vigil.begin()
        self._engine.set_open(False)
        host_card = self._peers.get(self._host_rank) if self._host_rank is not None else None
        if host_card is not None:
            self.on_gone(host_card.rank, host_card.generation, graceful, reason)
        elif not (graceful and self._host_rank is not None):
            self._tell(LinkDown("rendezvous", -1, reason))

    def _unwatched(self) -> list[PeerCard]:
        """Peers whose end neither a process descriptor nor a pair would tell."""
        return [
            card
            for card in self._peers.values()
            if not self._watch.watches(card) and self._engine.pair_state(card.rank, card.generation) != "up"
        ]

    def _want(self, rank: int) -> None:
        if self._pairing is None:
            self._early.add(rank)
        elif not self._closed:
            self._pairing.want(rank)

    async def _warm_up(self) -> None:
        if self._pairing is None:
            return
        try:
            await self._pairing.warm_up(all_stay=self._world.size is not None)
        except ConnectionError as error:
            raise PeerLostError(str(error)) from error

    def _lost(self, rank: int, generation: int, reason: str) -> None:
        self.on_gone(rank, generation, False, reason)

    def _fail(self, reason: str) -> None:
        """Rather than be waited for for ever, all peers count as lost."""
        for card in list(self._peers.values()):
            self.on_gone(card.rank, card.generation, False, reason)

    def _fell_back(self, link: str, rank: int, following: str, reason: str) -> None:
        self._tell(Fallback(link, rank, following, reason))

    def _tell(self, event: Event) -> None:
        if not self._closed:
            self._on_event(event)


def peer_of(card: PeerCard, alive: bool = True) -> Peer:
    """A card as the public interface shows it."""
    return Peer(card.rank, card.host, card.pid, card.devices, card.links, alive, card.name, card.generation)


def _pass_on(done: concurrent.futures.Future[None], to: concurrent.futures.Future[None]) -> None:
    """Give one future the end of another."""
    if not done.cancelled() and (error := done.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(None)
