"""The rendezvous: where processes of a world meet, and which tells each of them about the others.

It runs beside rank 0 or alone. Decisions are `membership`'s; this module carries them over connections. A
member that does not read what it is told is dropped once `_OUTBOX_BYTES` wait for it, beside who was there
when it came, so that it can cost no more than that.

Everyone is told of everyone: n members cost n² cards on the wire, and nothing else may grow like that. So a
card is encoded once; arrivals are gathered for a while that grows with the number of those to be told, and
told in few frames; and frames are the same objects in all outboxes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
from typing import TYPE_CHECKING, Final

from aiocomm._control import messages, wire
from aiocomm._control.address import UnixAddress
from aiocomm._control.auth import GIVE_TOKEN, Purpose
from aiocomm._control.host import what_to_do
from aiocomm._control.limit import StepLimit
from aiocomm._control.listener import Listener, bind
from aiocomm._control.membership import Announcement, Became, Came, JoinRefusedError, Membership, Went
from aiocomm._control.stream import how_it_broke
from aiocomm._control.wire import ProtocolError
from aiocomm.errors import AuthenticationError, LinkError, UsageError

if TYPE_CHECKING:
    from aiocomm._control.address import TcpAddress
    from aiocomm._control.stream import Stream
    from aiocomm.config import Settings

__all__ = ["Rendezvous"]

_OUTBOX_BYTES: Final = 4 << 20
_GATHER_S: Final = 100e-6
"""Per member to be told: arrivals wait so long for others, since telling all takes about so long."""
_FLUSH_S: Final = 1.0
_BIND_RETRY_S: Final = 0.1
_REMEDIES: Final = {
    errno.EADDRINUSE: "; end the program that listens there, or choose another address",
    errno.EADDRNOTAVAIL: "; start it on the host that has that address, or listen on all of its own: tcp://*:port",
    errno.EACCES: "; choose a port from 1024 on, or a folder that this user may write to",
    errno.ENOENT: "; make the folder, or choose another one",
    errno.EINVAL: "; an address of one link needs this host's interface to it: tcp://[fe80::1%eth0]:port",
    errno.ENODEV: "; this host has no such interface: `ip link` lists those that it has",
}
_GENERATION_SPACE: Final = (
    1 << 30
)  # generations of a world start below; they fit 32 bits with room for restarts


class _Seat:
    """A member's connection."""

    def __init__(self, card: messages.PeerCard, stream: Stream) -> None:
        self.card = card
        self.stream = stream
        self._outbox: list[bytes] = []
        self._waiting = 0
        self._most = _OUTBOX_BYTES
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.overrun = False
        self._broken = False

    def post(self, message: messages.Message) -> None:
        """Queue a message; drop the member if too much waits."""
        self.post_frames([wire.encode(message)])

    def post_world(self, frames: list[bytes]) -> None:
        """Queue who is there already: so much waits for any newcomer, however fast it reads."""
        self._most += sum(map(len, frames))
        self.post_frames(frames)

    def post_frames(self, frames: list[bytes]) -> None:
        """Queue frames that are encoded already; drop the member if too much waits."""
        if self._broken or not frames:
            return
        self._waiting += sum(map(len, frames))
        if self._waiting > self._most:
            self.overrun = True
            self._task.cancel()
            return
        self._outbox += frames
        self._empty.clear()
        self._more.set()

    async def write(self) -> None:
        """Send what is queued, until the connection fails; the reader sees that too and reports it."""
        try:
            while True:
                await self._more.wait()
                self._more.clear()
                frames, self._outbox = self._outbox, []
                await self.stream.send_frames(frames)
                self._waiting -= sum(map(len, frames))
                if not self._outbox:
                    self._empty.set()
        except OSError:
            self._broken = True
            self._empty.set()

    async def flushed(self) -> None:
        """Wait, not for long, until all is handed to the kernel."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._empty.wait()


class Rendezvous:
    """One world's meeting point.

    Args:
        size: ranks of a fixed world, None for an elastic one.
        key: of the group, or None to accept only this user's processes by Unix socket.
        settings: limits and intervals.
        host_rank: rank of the member in whose process this runs, None if it stands alone.
    """

    def __init__(
        self, size: int | None, key: bytes | None, settings: Settings, host_rank: int | None
    ) -> None:
        first_generation = 1 + secrets.randbelow(_GENERATION_SPACE)
        self.world = secrets.token_hex(8)
        self.members = Membership(size, first_generation, reserve_zero=host_rank == 0)
        self._key = key
        self._session_key = secrets.token_bytes(32) if key is None else b""
        self._settings = settings
        self._host_rank = host_rank
        self._seats: dict[int, _Seat] = {}
        self._cards: dict[int, bytes] = {}  # of those present, encoded, by rank
        self._arrivals: list[bytes] = []  # cards that not all have been told of yet
        self._gathering: asyncio.TimerHandle | None = None
        self._listener: Listener | None = None
        self._distant = asyncio.Event()  # a member on another host is, or was lately, here
        self._beating: asyncio.Task[None] | None = None
        self._closing = False
        self._socket_file: str | None = None

    async def listen(
        self, address: TcpAddress | UnixAddress, timeout_s: float = 0.0
    ) -> TcpAddress | UnixAddress:
        """Start to listen; returns the address with the port that was got.

        Args:
            address: where.
            timeout_s: seconds to wait for an address that is taken, as by a world that is just closing.

        Raises:
            UsageError: it would have to trust anyone who connects.
            LinkError: the address cannot be had.
        """
        if self._key is None and not isinstance(address, UnixAddress):
            raise UsageError(f"listening at {address} needs a token: {GIVE_TOKEN}")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                sock, bound = bind(address)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or loop.time() >= deadline:
                    code = errno.errorcode.get(error.errno or 0)
                    message = f"{self.who} cannot listen at {address}: {what_to_do(error)}"
                    message += _REMEDIES.get(error.errno or 0, "")
                    raise LinkError(message, error.errno, code) from error
            await asyncio.sleep(min(_BIND_RETRY_S, max(0.0, deadline - loop.time())))
        if isinstance(bound, UnixAddress) and not bound.is_abstract:
            self._socket_file = bound.path
        limits = self._settings
        self._listener = Listener(
            sock, self._key, Purpose.CONTROL, limits.handshake_timeout_s, limits.max_pending, self._serve
        )
        self._beating = asyncio.create_task(self._beat(), name="aiocomm heartbeats")
        return bound

    @property
    def who(self) -> str:
        """What to call this in messages."""
        return "rank 0" if self._host_rank == 0 else "the rendezvous"

    @property
    def starved(self) -> str:
        """Why members that come have to wait at the door; empty if they need not."""
        return self._listener.starved if self._listener is not None else ""

    async def aclose(self) -> None:
        """Tell the members that this rendezvous ends, and end it."""
        self._closing = True
        self._tell_arrivals()
        seats = list(self._seats.values())
        for seat in seats:
            seat.post(messages.Farewell())
        await asyncio.gather(*(seat.flushed() for seat in seats))
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        if self._socket_file is not None:  # while it is ours: the next world may be waiting for the path
            with contextlib.suppress(OSError):
                os.unlink(self._socket_file)
        if self._listener is not None:
            await self._listener.aclose()

    async def _beat(self) -> None:
        # On one host the kernel tells of deaths: a world without members elsewhere never wakes for this.
        while True:
            await self._distant.wait()
            await asyncio.sleep(self._settings.heartbeat_s)
            distant = [seat for seat in self._seats.values() if not seat.stream.is_unix]
            for seat in distant:
                seat.post(messages.Heartbeat())
            if not distant:
                self._distant.clear()

    async def _serve(self, stream: Stream) -> None:
        async with StepLimit(self._settings.handshake_timeout_s, "waiting for it to ask to join"):
            join = await stream.receive()
        if not isinstance(join, messages.Join):
            raise ProtocolError(f"expected a request to join, not {type(join).__name__}")
        try:
            if self._closing:
                raise JoinRefusedError("this world is closing", retry=True)
            if self.members.size is not None and self.world in join.left:
                raise JoinRefusedError(
                    "this process has left the world there, and can only join the next one", retry=True
                )
            card, announcements = self.members.admit(join.rank, join.size, join.card)
        except JoinRefusedError as refusal:
            await stream.send(messages.Refused(str(refusal)[: wire.MAX_TEXT // 4], refusal.retry))
            return
        stream.watch_silence(self._settings.heartbeat_s)
        seat = _Seat(card, stream)
        if not stream.is_unix:
            self._distant.set()
        writing = asyncio.create_task(seat.write(), name="aiocomm member")
        reason = "the rendezvous closed"
        try:
            self._admit(seat, announcements)
            reason = await self._listen_to(seat)
        except asyncio.CancelledError:
            if not seat.overrun:
                raise
            reason = "did not read what it was told"
        finally:
            if self._seats.get(card.rank) is seat:  # else the rank may have been taken anew
                del self._seats[card.rank]
            writing.cancel()
            self._announce(self.members.lose(card.rank, card.generation, reason))

    def _admit(self, seat: _Seat, announcements: list[Announcement]) -> None:
        card = seat.card
        was_ready = (
            not any(isinstance(announcement, Became) for announcement in announcements) and self.members.ready
        )
        seat.post(
            messages.Welcome(
                rank=card.rank,
                size=self.members.size,
                generation=card.generation,
                host_rank=self._host_rank,
                world=self.world,
                session_key=self._session_key,
            )
        )
        seat.post_world(wire.encode_joined(self._cards.values()))
        self._cards[card.rank] = wire.encode_card(card)
        if was_ready:
            seat.post(messages.Ready())
        self._announce([announcement for announcement in announcements if isinstance(announcement, Came)])
        self._seats[card.rank] = seat  # after its own arrival was announced: it knows
        self._announce([announcement for announcement in announcements if isinstance(announcement, Became)])

    async def _listen_to(self, seat: _Seat) -> str:
        """Serve a member until it is gone; returns how it went."""
        card = seat.card
        try:
            while True:
                message = await seat.stream.receive()
                match message:
                    case messages.Heartbeat():
                        pass
                    case messages.Goodbye():
                        del self._seats[card.rank]
                        self._announce(self.members.leave(card.rank, card.generation))
                        seat.post(messages.Farewell())
                        await seat.flushed()
                        return "left"
                    case _:
                        return f"broke the control protocol ({type(message).__name__})"
        except (ProtocolError, AuthenticationError) as error:
            return f"broke the control protocol ({error})"
        except OSError as error:
            how = how_it_broke(error, self._settings.heartbeat_s)
            return f"process {card.pid} on {card.host} {how}"

    def _announce(self, announcements: list[Announcement]) -> None:
        for announcement in announcements:
            message: messages.Message
            match announcement:
                case Came(card):
                    self._gather(self._cards[card.rank])
                    continue
                case Went(card, graceful, reason):
                    self._cards.pop(card.rank, None)
                    message = messages.Gone(
                        card.rank, card.generation, graceful, reason[: wire.MAX_TEXT // 4]
                    )
                case Became():
                    message = messages.Ready()
            self._tell_arrivals()  # what is told next may be about them
            self._tell([wire.encode(message)])

    def _gather(self, card: bytes) -> None:
        self._arrivals.append(card)
        if self._gathering is None and self._seats:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(_GATHER_S * len(self._seats), self._tell_arrivals)

    def _tell_arrivals(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        arrivals, self._arrivals = self._arrivals, []
        self._tell(wire.encode_joined(arrivals))

    def _tell(self, frames: list[bytes]) -> None:
        for seat in list(self._seats.values()) if frames else ():
            seat.post_frames(frames)
