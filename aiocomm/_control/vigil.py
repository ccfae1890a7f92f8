"""Who notices a death once the rendezvous is gone, of peers that this process has no pair with.

A pair notices the end of its peer, and so does a pidfd on one host; of all others the rendezvous used to
tell. When it is gone, each process opens a connection to each of these others, or has one opened by it, and
then holds it: nothing travels on it but the kernels' own signs of life, until it ends or one says goodbye.

Rules:
1. It begins one heartbeat after the rendezvous has gone: a world that just closes needs no watch.
2. The lower rank calls. The higher one calls too if it has not been called within another heartbeat, since a
   firewall may let only one of them through.
3. Who has no such connection within three heartbeats is gone. A process that is there but busy is not: its
   kernel accepts the connection, and it may take the time of three steps of a handshake to answer.
4. A connection that ends without a goodbye is the end of the peer.
5. What nobody has foreseen counts as the end: of the peer that it is about, or of all.
6. What fails because this process has no descriptors left says nothing about a peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from typing import TYPE_CHECKING, Final

from aiocomm._control import messages
from aiocomm._control.host import EXHAUSTED, what_to_do
from aiocomm._control.limit import StepLimit
from aiocomm._control.stream import how_it_broke
from aiocomm._control.wire import ProtocolError
from aiocomm.errors import AiocommError, AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiocomm._control.limit import Step
    from aiocomm._control.stream import Stream
    from aiocomm.config import Settings

__all__ = ["Vigil"]

_log: Final = logging.getLogger("aiocomm.control")
_GOODBYE_S: Final = 1.0
_OWN: Final = EXHAUSTED | {errno.EADDRNOTAVAIL}


class Vigil:
    """Watches peers by connections of its own. Lives on the control thread's loop.

    Args:
        card: this process's.
        dial: opens an authenticated connection to a peer, given a kind (None), whom to tell of its steps, and
            the seconds that an address may be silent.
        settings: intervals.
        unwatched: the peers of whose end nothing else would tell now.
        find: the card of a rank that is in the world.
        on_gone: told of (rank, generation, graceful, reason); may be more than once.
        on_failed: told why no end would be noticed any more.
    """

    def __init__(
        self,
        card: messages.PeerCard,
        dial: Callable[[messages.PeerCard, str | None, Step, float | None], Awaitable[Stream]],
        settings: Settings,
        unwatched: Callable[[], Iterable[messages.PeerCard]],
        find: Callable[[int], messages.PeerCard | None],
        on_gone: Callable[[int, int, bool, str], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._card = card
        self._dial = dial
        self._heartbeat_s = settings.heartbeat_s
        self._answer_s = 3 * max(settings.heartbeat_s, settings.handshake_timeout_s)
        self._unwatched = unwatched
        self._find = find
        self._on_gone = on_gone
        self._on_failed = on_failed
        self._watching: asyncio.Task[None] | None = None
        self._calls: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._held: dict[Stream, messages.PeerCard] = {}
        self._leaving = False

    def begin(self) -> None:
        """The rendezvous is gone. Idempotent."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="aiocomm vigil")

    def drop(self, rank: int, generation: int) -> None:
        """A peer is out of the world."""
        task = self._calls.pop((rank, generation), None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def serve(self, stream: Stream, watch: messages.Watch) -> None:
        """Be watched by a peer, and so watch it."""
        me, card = self._card, self._find(watch.rank)
        meant = (watch.to_rank, watch.to_generation) == (me.rank, me.generation)
        if meant and card is not None and card.generation == watch.generation:
            await stream.send(messages.Heartbeat())
            await self._hold(stream, card)

    async def aclose(self) -> None:
        """Say goodbye to all that are watched, and watch nobody any more."""
        self._leaving = True  # whoever has heard it hangs up
        tasks = [*self._calls.values(), *([self._watching] if self._watching is not None else [])]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                goodbyes = (stream.send(messages.Goodbye()) for stream in self._held)
                await asyncio.gather(*goodbyes, return_exceptions=True)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _hold(self, stream: Stream, card: messages.PeerCard) -> None:
        """Keep a connection until it ends, and tell how."""
        stream.watch_silence(self._heartbeat_s)
        stream.keep_alive(self._heartbeat_s)
        self._held[stream] = card
        graceful, reason = False, ""
        try:
            message = await stream.receive()
            graceful = isinstance(message, messages.Goodbye)
            reason = "left" if graceful else f"broke the control protocol ({type(message).__name__})"
        except (ProtocolError, AuthenticationError) as error:
            reason = f"broke the control protocol ({error})"
        except OSError as error:
            how = how_it_broke(error, self._heartbeat_s)
            reason = f"process {card.pid} on {card.host} {how}"
        finally:
            del self._held[stream]
        if not self._leaving:
            self._on_gone(card.rank, card.generation, graceful, reason)

    async def _watch(self) -> None:
        try:
            await self._call_all()
        except Exception as error:
            _log.exception("the vigil failed unexpectedly")
            self._on_failed(f"deaths of peers would not be noticed any more ({error!r})")

    async def _call_all(self) -> None:
        """Call, each heartbeat, those whose end nothing would tell."""
        loop = asyncio.get_running_loop()
        end = loop.time() + 3 * self._heartbeat_s
        late = False
        while True:
            await asyncio.sleep(self._heartbeat_s)
            held = {(card.rank, card.generation) for card in self._held.values()}
            for card in list(self._unwatched()):
                key = (card.rank, card.generation)
                if key not in held and key not in self._calls and (late or self._card.rank < card.rank):
                    call = self._call(card, max(end, loop.time() + self._heartbeat_s))
                    self._calls[key] = asyncio.create_task(call, name=f"aiocomm vigil of {card.rank}")
            late = True

    async def _call(self, card: messages.PeerCard, end: float) -> None:
        """Hold a connection to a peer until it ends; or find that none can be had until `end`."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with StepLimit(self._answer_s, "connecting with it") as limit:
                    stream = await self._open(card, max(end - loop.time(), self._heartbeat_s), limit.step)
            except Exception as error:
                reason = what_to_do(error)
                if not isinstance(error, (OSError, AiocommError)):
                    _log.exception("the call to rank %d failed unexpectedly", card.rank)
                    break
                if isinstance(error, OSError) and error.errno in _OWN:
                    end = loop.time() + 3 * self._heartbeat_s
                elif card in self._held.values():  # it has called meanwhile
                    self._calls.pop((card.rank, card.generation), None)
                    return
                elif loop.time() >= end:
                    break
                await asyncio.sleep(min(self._heartbeat_s, max(0.0, end - loop.time())))
            else:
                with contextlib.closing(stream):
                    return await self._hold(stream, card)
        whom = f"process {card.pid} on {card.host}"
        self._on_gone(
            card.rank,
            card.generation,
            False,
            f"{whom} cannot be reached, and there is no rendezvous any more ({reason})",
        )

    async def _open(self, card: messages.PeerCard, reach_s: float, step: Step) -> Stream:
        """A connection that the peer has agreed to hold."""
        me = self._card
        stream = await self._dial(card, None, step, reach_s)
        try:
            step("waiting for it to agree to be watched")
            await stream.send(messages.Watch(me.rank, me.generation, card.rank, card.generation))
            await stream.receive()
        except BaseException:
            stream.close()
            raise
        return stream
