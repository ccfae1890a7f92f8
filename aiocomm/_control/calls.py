"""The part of a call after it is accepted: trying the links that both sides have, in order. See `pairing` for
the exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from aiocomm._control import messages, wire
from aiocomm._control.limit import Step
from aiocomm._control.wire import MAX_ITEMS, ProtocolError
from aiocomm.errors import AiocommError, LinkError

if TYPE_CHECKING:
    from aiocomm._control.engine import Engine
    from aiocomm._control.stream import Stream

__all__ = ["Arrivals", "Dial", "Opening", "YieldedError", "answer_links", "call_links", "common_links"]

Dial: TypeAlias = Callable[[messages.PeerCard, str | None, Step], Awaitable["Stream"]]
"""Opens an authenticated pair connection to a peer by "unix", by "tcp", or (None) by whichever is best."""
_ENCRYPTED: Final = "tcp"
Fallback: TypeAlias = Callable[[str, int, str, str], None]


class YieldedError(Exception):
    """The peer has a call to us under way, and its rank is lower."""


class Opening:
    """Opens the streams of a call.

    Args:
        dial: opens one.
        peer: is called.
        attempt: names the call.
        width: streams that may be on their way at a time.
        step: is told of each step.
    """

    def __init__(self, dial: Dial, peer: messages.PeerCard, attempt: bytes, width: int, step: Step) -> None:
        self._dial = dial
        self._peer = peer
        self._attempt = attempt
        self._width = width
        self.step = step

    async def open(self, link: str, kind: str, count: int, into: list[Stream]) -> list[Stream]:
        """The streams of a link, side by side.

        Args:
            link: that needs them.
            kind: "unix" or "tcp".
            count: how many.
            into: gets each as soon as there is one, for the caller to close whatever happens.

        Raises:
            OSError: one cannot be had; the others are given up.
            AiocommError: something else listens there.
        """
        opened: dict[int, Stream] = {}
        due = iter(range(count))

        async def open_due() -> None:
            for index in due:
                opened[index] = stream = await self._dial(self._peer, kind, self.step)
                into.append(stream)
                await stream.send(messages.StreamHello(self._attempt, link, index))

        opening = [asyncio.create_task(open_due()) for _ in range(min(self._width, count))]
        try:
            await asyncio.gather(*opening)
        finally:
            for task in opening:
                task.cancel()
            await asyncio.gather(*opening, return_exceptions=True)
        return [opened[index] for index in range(count)]


class Arrivals:
    """Streams that have come for a call which is being answered. `step` is told of those still waited for."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._streams: dict[tuple[str, int], Stream] = {}
        self._changed = asyncio.Event()

    def put(self, stream: Stream, link: str, index: int) -> None:
        """Take a stream over.

        Raises:
            ProtocolError: there is one already, or there are too many.
        """
        if (link, index) in self._streams or len(self._streams) >= MAX_ITEMS:
            raise ProtocolError("a stream that no call needs")
        self._streams[link, index] = stream.take_over()
        self._changed.set()

    async def collect(self, link: str, count: int) -> list[Stream]:
        """The streams of a link, once all have come. Their descriptors are the caller's to take."""
        wanted = [(link, index) for index in range(count)]
        while not all(key in self._streams for key in wanted):
            self._step(f"waiting for its connections of {link}")
            self._changed.clear()
            await self._changed.wait()
        return [self._streams[key] for key in wanted]

    def close(self) -> None:
        """Close all whose descriptors nobody took: who collected them may have been cancelled meanwhile."""
        for stream in self._streams.values():
            stream.close()


def common_links(me: messages.PeerCard, peer: messages.PeerCard, engine: Engine) -> list[str]:
    """Links that can join the two, this side's cheapest first."""
    same_host = me.host_id == peer.host_id
    return [
        link
        for link in engine.link_names()
        if link in peer.links
        and (kind := engine.link_streams(link)[0])  # none: it moves memory beside another link
        and (kind != "unix" or same_host)
    ]


async def call_links(
    stream: Stream,
    opening: Opening,
    me: messages.PeerCard,
    peer: messages.PeerCard,
    engine: Engine,
    commit: Callable[[], None],
    on_fallback: Fallback,
    choose: Callable[[list[str]], list[str]],
    tls: bool,
) -> str:
    """Try links as the caller. Returns the one that both engines took.

    `choose` may leave out some of those that both have. `tls` is whether this process encrypts TCP.

    Raises:
        LinkError: none works; the message says why for each.
        OSError, ProtocolError: the peer broke off.
    """
    links = choose(common_links(me, peer, engine))
    if not links:
        ours, theirs = ", ".join(me.links) or "none", ", ".join(peer.links) or "none"
        where = "one host" if me.host_id == peer.host_id else "different hosts"
        raise LinkError(f"the two have no link in common (here: {ours}; there: {theirs}; on {where})")
    reasons: list[str] = []
    for link, following in zip(links, [*links[1:], ""], strict=True):
        secured = tls and link == _ENCRYPTED
        reason = await _call_link(stream, opening, link, peer, engine, commit, secured)
        if reason is None:
            return link
        reasons.append(f"{link}: {reason}")
        if following:
            on_fallback(link, peer.rank, following, reason)
    raise LinkError("; ".join(reasons))


async def _call_link(
    stream: Stream,
    opening: Opening,
    link: str,
    peer: messages.PeerCard,
    engine: Engine,
    commit: Callable[[], None],
    tls: bool,
) -> str | None:
    """Try one link. None if it works, else why not."""
    kind, count = engine.link_streams(link)
    try:
        card = engine.link_card(link)
    except Exception as error:  # whatever it is, this link is out and the next one has its chance
        return str(error)
    await stream.send(messages.LinkTry(link, count, tls, card))
    streams: list[Stream] = []
    try:
        try:
            inorder = await opening.open(link, kind, count, streams)
        except (OSError, AiocommError) as error:
            await stream.send(messages.Unattached(link, _brief(error)))
            return str(error)
        opening.step(f"waiting until it is ready for {link}")
        answer = await stream.receive()
        if isinstance(answer, messages.Unattached) and answer.link == link:
            return answer.reason
        if not isinstance(answer, messages.LinkReady) or answer.link != link:
            raise ProtocolError(f"expected {link} to be ready, not {type(answer).__name__}")
        commit()
        try:
            engine.attach(
                peer.rank, peer.generation, link, [opened.detach() for opened in inorder], answer.card, True
            )
        except Exception as error:
            await stream.send(messages.Unattached(link, _brief(error)))
            return str(error)
    finally:
        for opened in streams:
            opened.close()
    await stream.send(messages.Attached(link))
    answer = await stream.receive()
    if isinstance(answer, messages.Unattached) and answer.link == link:
        engine.detach(peer.rank, peer.generation)
        return answer.reason
    if not isinstance(answer, messages.Attached) or answer.link != link:
        raise ProtocolError(f"expected {link} to be attached, not {type(answer).__name__}")
    engine.start_pair(peer.rank, peer.generation)
    return None


async def answer_links(
    stream: Stream,
    arrive: Callable[[str, int], Awaitable[list[Stream]]],
    me: messages.PeerCard,
    peer: messages.PeerCard,
    engine: Engine,
    wait_for: Callable[[], None],
    commit: Callable[[], None],
    on_fallback: Fallback,
    tls: bool,
) -> str | None:
    """Answer the caller's tries. Returns the link that both engines took, or None if the caller has run out
    of links.

    Raises:
        OSError, ProtocolError: the caller broke off or broke the protocol.
    """
    links = common_links(me, peer, engine)
    failed: tuple[str, str] | None = None
    while True:
        try:
            request = await stream.receive()
        except ConnectionError:
            if failed is not None:
                return None
            raise
        if not isinstance(request, messages.LinkTry):
            raise ProtocolError(f"expected a link to try, not {type(request).__name__}")
        link = request.link
        if failed is not None:
            on_fallback(failed[0], peer.rank, link, failed[1])
        refusal = "" if link in links else "the peer does not use it with this process"
        if not refusal and request.tls != (tls and link == _ENCRYPTED):
            refusal = "one end uses TLS, the other does not: set AIOCOMM_TLS_CERT and AIOCOMM_TLS_CA on both"
        reason = await _answer_link(stream, arrive, request, refusal, peer, engine, wait_for, commit)
        if reason is None:
            return link
        failed = (link, reason)


async def _answer_link(
    stream: Stream,
    arrive: Callable[[str, int], Awaitable[list[Stream]]],
    request: messages.LinkTry,
    refusal: str,
    peer: messages.PeerCard,
    engine: Engine,
    wait_for: Callable[[], None],
    commit: Callable[[], None],
) -> str | None:
    link = request.link
    if not refusal and request.streams != engine.link_streams(link)[1]:
        refusal = "the two do not agree on the number of its connections"
    if refusal:
        await stream.send(messages.Unattached(link, refusal))
        return refusal
    # The caller may give up while streams are still due, so its word is awaited beside them.
    word = asyncio.ensure_future(stream.receive())
    arriving = asyncio.ensure_future(arrive(link, request.streams))
    streams: list[Stream] = []
    try:
        await asyncio.wait((word, arriving), return_when=asyncio.FIRST_COMPLETED)
        if not arriving.done():
            return _given_up(await word, link)
        streams = arriving.result()
        try:
            card = engine.link_card(link)
        except Exception as error:  # as above
            await stream.send(messages.Unattached(link, _brief(error)))
            return str(error)
        wait_for()
        await stream.send(messages.LinkReady(link, card))
        said = await word  # it may break off instead, when its time is over, and call again
        if not isinstance(said, messages.Attached) or said.link != link:
            return _given_up(said, link)
        commit()
        try:
            engine.attach(
                peer.rank, peer.generation, link, [opened.detach() for opened in streams], request.card, False
            )
        except Exception as error:
            await stream.send(messages.Unattached(link, _brief(error)))
            return str(error)
    finally:
        for pending in (word, arriving):
            pending.cancel()
        await asyncio.gather(word, arriving, return_exceptions=True)
        for opened in streams:
            opened.close()
    await stream.send(messages.Attached(link))
    engine.start_pair(peer.rank, peer.generation)
    return None


def _given_up(said: messages.Message, link: str) -> str:
    if isinstance(said, messages.Unattached) and said.link == link:
        return said.reason
    raise ProtocolError(f"expected word of {link}, not {type(said).__name__}")


def _brief(error: Exception) -> str:
    return str(error)[: wire.MAX_TEXT // 4]
