"""Connections between two processes: who calls whom, over which link, with which sockets.

A call uses one connection to talk about the pair, and one more for each stream that the link in question
needs. A stream connection authenticates, says which call it belongs to, and is never read again here: from
then on it is the link's.

    caller                                      called
    Offer(attempt)                      ───►
                                        ◄───    OfferAnswer(accept | yield | done | refuse)
    for each link that both have, cheapest first:
      LinkTry(link, tls, card)          ───►
      StreamHello(attempt, link, i)     ═══►    on connections of their own
                                        ◄───    LinkReady(link, card)
      attaches; Attached                ───►    attaches
      starts                            ◄───    Attached, starts
      (either side: Unattached(reason): detaches; go on to the next link)

Rules:
1. A pair is started at most once per generation of the peer. One that is attached and not started carries
   nothing, so it is dropped without harm if the other side cannot attach.
2. When both call at once, the lower rank's call wins: the called side yields to nobody with a higher rank
   while its own call is under way, and gives its own up for one with a lower rank.
3. Each call has a task and a time limit of its own, which begins anew with each step; a pair that cannot be
   made is reported, never left pending. The limit ends with an attach: from then on a slow peer is waited
   for, and a dead one closes the connection, so that the two never disagree about what is attached for longer
   than one of them lives. Where that link cannot be used after all, nothing is attached, and the next one has
   a limit again.
4. A newer offer of a peer replaces its older one: a caller has one call at a time.
5. The streams of a link are opened side by side, so many that all peers together, should they call one
   process at the same time, take half of the places that its listener has.
6. A pair whose link fails while its peer lives is made anew when it is next wanted, over another link where
   that is allowed. Whichever end calls first waits until the other's engine has let go of the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiocomm._control import messages
from aiocomm._control.calls import Arrivals, Opening, YieldedError, answer_links, call_links
from aiocomm._control.dialing import UnansweredError
from aiocomm._control.engine import NOT_CONNECTED
from aiocomm._control.limit import StepLimit, StepTimeoutError
from aiocomm._control.stream import ConnectionClosedError
from aiocomm._control.wire import ProtocolError
from aiocomm.errors import AiocommError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiocomm._control.calls import Dial
    from aiocomm._control.engine import Engine
    from aiocomm._control.stream import Stream

__all__ = ["Pairing"]

_log: Final = logging.getLogger("aiocomm.control")
_TRIES: Final = 3
_PAUSE_S: Final = 0.05
_SLOW: Final = (
    f", in the last of {_TRIES} tries: is the process stopped, or busy for longer (raise "
    "AIOCOMM_HANDSHAKE_TIMEOUT_S), or called by more at a time than it lets wait (raise AIOCOMM_MAX_PENDING)?"
)
_HUNG_UP: Final = (
    f", in the last of {_TRIES} tries: did the process end, was the time over that it gives a step "
    "(AIOCOMM_HANDSHAKE_TIMEOUT_S), or do more call at a time than it lets wait (AIOCOMM_MAX_PENDING)?"
)


class _LeftError(ConnectionError):
    """The peer has said goodbye."""


@dataclass(eq=False)
class _Pair:
    """One peer's incarnation, and how far the connection with it is."""

    card: messages.PeerCard
    connected: asyncio.Future[str]
    wanted: bool = False
    calling: asyncio.Task[None] | None = None
    answering: asyncio.Task[None] | None = None
    committed: bool = False  # an attach has been handed to the engine
    failed: list[str] = field(default_factory=list)  # links that it had, until they failed


class Pairing:
    """Makes the pair connections of this process. Lives on the control thread's loop.

    Args:
        card: this process's.
        engine: gets the links.
        dial: opens an authenticated connection to a peer, over "unix" or "tcp".
        timeout_s: of each step of a call.
        max_pending: connections that a listener lets wait.
        fall_back: whether a pair whose link has failed may take another one.
        on_fallback: told of (failed link, rank, link tried next, reason).
        on_watch: takes connections that are not for a pair, see `vigil`.
        tls: whether TCP links are encrypted here.
    """

    def __init__(
        self,
        card: messages.PeerCard,
        engine: Engine,
        dial: Dial,
        timeout_s: float,
        max_pending: int,
        on_fallback: Callable[[str, int, str, str], None],
        fall_back: bool = True,
        on_watch: Callable[[Stream, messages.Watch], Awaitable[None]] | None = None,
        tls: bool = False,
    ) -> None:
        self._on_watch = on_watch
        self._tls = tls
        self._card = card
        self._fall_back = fall_back
        self._engine = engine
        self._dial = dial
        self._timeout_s = timeout_s
        self._max_pending = max_pending
        self._on_fallback = on_fallback
        self._pairs: dict[int, _Pair] = {}
        self._wanted: set[int] = set()  # asked for before the peer was known
        self._attempts: dict[bytes, Arrivals] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._card.rank

    def add(self, card: messages.PeerCard) -> None:
        """A peer is in the world."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_retrieve)
        self._pairs[card.rank] = _Pair(card, future)
        self._changed.set()
        self._changed = asyncio.Event()
        if card.rank in self._wanted:
            self._wanted.discard(card.rank)
            self.want(card.rank)

    def drop(self, rank: int, generation: int, graceful: bool, reason: str) -> None:
        """A peer is out of the world; `graceful` if it has said so."""
        pair = self._pairs.get(rank)
        if pair is None or pair.card.generation != generation:
            return
        del self._pairs[rank]
        for task in (pair.calling, pair.answering):
            if task is not None:
                task.cancel()
        if not pair.connected.done():
            pair.connected.set_exception(_LeftError(reason) if graceful else ConnectionError(reason))

    def want(self, rank: int) -> None:
        """Connect with a peer, in the background. Idempotent."""
        pair = self._pairs.get(rank)
        if pair is None:
            self._wanted.add(rank)
            return
        self._forget_failed(pair)
        pair.wanted = True
        self._call_if_needed(pair)

    async def warm_up(self, all_stay: bool) -> None:
        """Wait until all peers that are known now are connected, or have said goodbye.

        Args:
            all_stay: whether a peer that is lost meanwhile is a failure.

        Raises:
            ConnectionError: a pair could not be made.
        """
        pairs = list(self._pairs.values())
        for pair in pairs:
            self.want(pair.card.rank)
        await asyncio.gather(*(self._connected(pair, all_stay) for pair in pairs))

    async def _connected(self, pair: _Pair, all_stay: bool) -> None:
        try:
            await asyncio.shield(pair.connected)
        except ConnectionError:
            # Calls to one that goes may fail before there is word of that, which ends the next future.
            await asyncio.wait([pair.connected], timeout=self._timeout_s)
            gone = self._pairs.get(pair.card.rank) is not pair
            error = pair.connected.exception() if pair.connected.done() else None
            if isinstance(error, _LeftError) or (gone and not all_stay):
                return
            if error is not None or not pair.connected.done():
                raise

    async def aclose(self) -> None:
        """Give up every call."""
        for pair in self._pairs.values():
            if not pair.connected.done():
                pair.connected.set_exception(ConnectionError("the communicator was closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self, stream: Stream) -> None:
        """Take a connection that has authenticated: a call, a stream of one, or a watch.

        Raises:
            ProtocolError: it is none of these.
        """
        async with StepLimit(self._timeout_s, "waiting for what it is for") as limit:
            first = await stream.receive()
            match first:
                case messages.StreamHello(attempt, link, index):
                    self._take_stream(stream, attempt, link, index)
                case messages.Offer():
                    await self._answer(stream, first, limit)
                case messages.Watch() if self._on_watch is not None:
                    limit.lift()
                    await self._on_watch(stream, first)
                case _:
                    raise ProtocolError(f"expected an offer, not {type(first).__name__}")

    # Calling

    def _call_if_needed(self, pair: _Pair) -> None:
        busy = pair.calling or pair.answering or pair.committed or pair.connected.done()
        if pair.wanted and not busy and self._pairs.get(pair.card.rank) is pair:
            task = asyncio.create_task(self._call(pair), name=f"aiocomm call to {pair.card.rank}")
            pair.calling = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, pair: _Pair) -> None:
        reason = ""
        try:
            for last in [False] * (_TRIES - 1) + [True]:
                try:
                    async with StepLimit(self._timeout_s, "connecting with it") as limit:
                        link = await self._call_once(pair, limit)
                    self._connect(pair, link)
                    return
                except YieldedError:
                    reason = "it preferred its own call, which did not come through"
                    await asyncio.wait([pair.connected], timeout=self._timeout_s)
                except UnansweredError as error:  # it would be as silent again
                    reason = f"{error} (AIOCOMM_HOST sets what address it tells)"
                    break
                except StepTimeoutError as error:  # a process may be busy for longer, and hold its GIL
                    reason = f"{error}{_SLOW}"
                except (ConnectionClosedError, ConnectionResetError) as error:
                    reason = f"{error} while this one was {limit.what}{_HUNG_UP}"
                except (OSError, ProtocolError) as error:
                    reason = str(error) or type(error).__name__
                except AiocommError as error:
                    reason = str(error)
                    break
                except Exception as error:
                    _log.exception("a call to rank %d failed unexpectedly", pair.card.rank)
                    reason = repr(error)
                    break
                if pair.connected.done():
                    return
                if pair.committed:
                    break
                if not last:
                    await asyncio.sleep(_PAUSE_S)
            self._fail(pair, reason)
        finally:
            if pair.calling is asyncio.current_task():
                pair.calling = None

    async def _call_once(self, pair: _Pair, limit: StepLimit) -> str:
        card = pair.card
        attempt = secrets.token_bytes(16)
        width = max(1, self._max_pending // (2 * max(1, len(self._pairs))))
        stream = await self._dial(card, None, limit.step)
        limit.step("waiting for its answer to the call")
        with contextlib.closing(stream):
            me = self._card
            await stream.send(messages.Offer(attempt, me.rank, me.generation, card.rank, card.generation))
            answer = await stream.receive()
            if not isinstance(answer, messages.OfferAnswer):
                raise ProtocolError(f"expected an answer to the offer, not {type(answer).__name__}")
            if answer.verdict == "yield":
                raise YieldedError
            if answer.verdict != "accept":
                raise ProtocolError(f"the peer refused: {answer.reason or answer.verdict}")
            return await call_links(
                stream,
                Opening(self._dial, card, attempt, width, limit.step),
                me,
                card,
                self._engine,
                lambda: self._commit(pair, limit),
                lambda *what: self._go_on(pair, limit, *what),
                lambda links: self._choose(pair, links),
                self._tls,
            )

    # Answering

    async def _answer(self, stream: Stream, offer: messages.Offer, limit: StepLimit) -> None:
        if (offer.to_rank, offer.to_generation) != (self._card.rank, self._card.generation):
            await stream.send(messages.OfferAnswer("refuse", "this process is not the one that was called"))
            return
        pair = await self._known(offer.rank, offer.generation)
        if pair is None:
            await stream.send(messages.OfferAnswer("refuse", "this process does not know the caller"))
            return
        if pair.connected.done():
            await self._let_go(pair)
        if pair.committed or pair.connected.done():
            await stream.send(messages.OfferAnswer("done", "the pair is connected already"))
            return
        if pair.calling is not None:
            if self._card.rank < offer.rank:
                await stream.send(messages.OfferAnswer("yield", ""))
                return
            pair.calling.cancel()
            pair.calling = None
        if pair.answering is not None:
            pair.answering.cancel()
        pair.answering = asyncio.current_task()
        arrivals = self._attempts[offer.attempt] = Arrivals(limit.step)
        try:
            limit.step("waiting for it to name a link")
            await stream.send(messages.OfferAnswer("accept", ""))
            link = await answer_links(
                stream,
                arrivals.collect,
                self._card,
                pair.card,
                self._engine,
                lambda: self._wait_for(pair, limit),
                lambda: self._commit(pair, limit),
                lambda *what: self._go_on(pair, limit, *what),
                self._tls,
            )
            if link is None:
                self._fail(pair, "no link works between the two")
            else:
                self._connect(pair, link)
        finally:
            if pair.answering is asyncio.current_task():
                pair.answering = None
            if self._attempts.get(offer.attempt) is arrivals:  # else another offer has the same name
                del self._attempts[offer.attempt]
            arrivals.close()
            if pair.committed and not pair.connected.done():  # attached, and it broke off before the start
                pair.committed = False
                self._engine.detach(pair.card.rank, pair.card.generation)
            self._call_if_needed(pair)

    async def _known(self, rank: int, generation: int) -> _Pair | None:
        """The pair of a caller, of whom the rendezvous may not have told yet."""
        while True:
            pair = self._pairs.get(rank)
            if pair is not None and pair.card.generation >= generation:
                return pair if pair.card.generation == generation else None
            if rank == self._card.rank:
                return None
            try:
                async with asyncio.timeout(self._timeout_s / 2):
                    await self._changed.wait()
            except TimeoutError:
                return None

    def _take_stream(self, stream: Stream, attempt_id: bytes, link: str, index: int) -> None:
        arrivals = self._attempts.get(attempt_id)
        if arrivals is None:
            raise ProtocolError("a stream that belongs to no call")
        arrivals.put(stream, link, index)

    # Outcomes

    def _wait_for(self, pair: _Pair, limit: StepLimit) -> None:
        """Called when an end may attach. Raises if the pair may not be attached any more."""
        if self._pairs.get(pair.card.rank) is not pair or pair.connected.done():
            raise ConnectionError("the peer is gone")
        limit.lift()

    def _commit(self, pair: _Pair, limit: StepLimit) -> None:
        """Called when the next thing is an attach here. Raises as above."""
        self._wait_for(pair, limit)
        pair.committed = True

    def _go_on(
        self, pair: _Pair, limit: StepLimit, failed: str, rank: int, following: str, reason: str
    ) -> None:
        """Called when a link has failed, and with it an attach, before the next one is tried."""
        limit.step(f"going on to {following}")
        pair.committed = False
        self._on_fallback(failed, rank, following, reason)

    def _connect(self, pair: _Pair, link: str) -> None:
        if not pair.connected.done():
            pair.connected.set_result(link)
            if pair.failed and link not in pair.failed:
                self._on_fallback(pair.failed[-1], pair.card.rank, link, "the link failed")

    # Links that fail

    def _choose(self, pair: _Pair, links: list[str]) -> list[str]:
        """Of the links that both ends have, those that the pair may take."""
        if not pair.failed:
            return links
        if not self._fall_back:
            return [link for link in links if link == pair.failed[-1]]
        return [link for link in links if link not in pair.failed] or links

    def _forget_failed(self, pair: _Pair) -> bool:
        """Whether the pair can be made anew: it was connected, and its link has failed."""
        connected = pair.connected
        if not connected.done() or connected.cancelled() or connected.exception() is not None:
            return False
        match self._engine.pair_state(pair.card.rank, pair.card.generation):
            case "up":
                return False
            case "failed":
                pair.failed.append(connected.result())
        pair.connected = asyncio.get_running_loop().create_future()
        pair.connected.add_done_callback(_retrieve)
        pair.wanted = pair.committed = False
        return True

    async def _let_go(self, pair: _Pair) -> None:
        """A peer that calls again has seen the link fail, perhaps before this end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s / 2):
                while pair.connected.done() and not self._forget_failed(pair):  # noqa: ASYNC110  (no event tells)
                    await asyncio.sleep(_PAUSE_S / 5)

    def _fail(self, pair: _Pair, reason: str) -> None:
        """No connection. A later wish tries again."""
        if pair.connected.done() or self._pairs.get(pair.card.rank) is not pair:
            return
        message = f"{NOT_CONNECTED}{pair.card.rank} ({pair.card.host}, process {pair.card.pid}): {reason}"
        pair.connected.set_exception(ConnectionError(message))
        pair.connected = asyncio.get_running_loop().create_future()
        pair.connected.add_done_callback(_retrieve)
        pair.wanted = False
        pair.committed = False
        self._engine.fail_connect(pair.card.rank, message)


def _retrieve(future: asyncio.Future[str]) -> None:
    if not future.cancelled():
        future.exception()  # whoever waits gets it; with nobody waiting it is no news
