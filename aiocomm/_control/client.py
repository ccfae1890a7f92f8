"""A member's side of the control connection: join, follow what the rendezvous tells, say goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import stat
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from aiocomm._control import messages
from aiocomm._control.address import Address, FileAddress, TcpAddress, UnixAddress, parse
from aiocomm._control.auth import Purpose
from aiocomm._control.dialing import no_answer, reach
from aiocomm._control.host import STILL_LOOKED_UP, what_to_do
from aiocomm._control.limit import StepLimit, StepTimeoutError
from aiocomm._control.stream import how_it_broke
from aiocomm._control.wire import ProtocolError
from aiocomm._world import MAX_RANKS
from aiocomm.errors import AuthenticationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiocomm._control.stream import Stream
    from aiocomm.config import Settings, World

__all__ = ["Client", "Follower", "read_address_file", "remove_address_file", "write_address_file"]

_log: Final = logging.getLogger("aiocomm.control")
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1
_GOODBYE_S: Final = 1.0
_GIVE_UP_S: Final = 0.5
_QUIET_S: Final = 0.5
"""After which a connect is one that gets no answer: refusals come within a round trip."""
_SILENT: Final = "what listens there does not answer as a rendezvous would"

_left: Final[deque[str]] = deque(maxlen=16)
"""Worlds of fixed size that this process was in and has left. It joins none of them again: it waits for the
next one at the same address, while rank 0 may still be closing the old one."""


class Follower(Protocol):
    """Who is told what the rendezvous says."""

    def on_joined(self, card: messages.PeerCard) -> None:
        """A peer is in the world."""

    def on_gone(self, rank: int, generation: int, graceful: bool, reason: str) -> None:
        """A peer is out of the world."""

    def on_rendezvous_lost(self, graceful: bool, reason: str) -> None:
        """Nothing more will be told."""


class Client:
    """The control connection of one process.

    Args:
        world: what to join.
        address: where; a `FileAddress` is looked up before each try.
        key: of the group, or None.
        settings: limits and intervals.
        follower: is told of peers, on the control thread's loop.
    """

    def __init__(
        self, world: World, address: Address, key: bytes | None, settings: Settings, follower: Follower
    ) -> None:
        self._world = world
        self._address = address
        self.key = key
        self._settings = settings
        self._follower = follower
        self._stream: Stream | None = None
        self._following: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._farewell = asyncio.Event()
        self._leaving = False
        self._was_refused = False  # by what listened there last
        self.welcome: messages.Welcome | None = None
        self.trouble = "nobody listens there"
        """Why this process is not in yet, as far as is known."""
        self.found_at = ""
        """The numeric address at which the rendezvous was reached; empty for a Unix socket."""

    async def join(self, make_card: Callable[[Stream], messages.PeerCard]) -> messages.Welcome:
        """Find the rendezvous and be admitted, trying again while nobody listens.

        The caller bounds the time. Cancelling leaves no connection behind.

        Args:
            make_card: this process's card, given the connection, which tells the address that others reach.

        Raises:
            AuthenticationError: the rendezvous belongs to another group.
            UsageError: the rendezvous refused, or the address cannot be used.
        """
        pause = _FIRST_PAUSE_S
        while True:
            try:
                stream = await self._reach()
            except AuthenticationError as error:
                if not isinstance(self._address, FileAddress):
                    raise AuthenticationError(f"{self._address}: {error}") from error
                self.trouble = str(error)  # the file may still be the one of an earlier run
            except (OSError, ProtocolError) as error:
                self._was_refused = False
                self.trouble = what_to_do(error)
            else:
                welcome = await self._ask(stream, make_card)
                if welcome is not None:
                    return welcome
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def collect(self) -> None:
        """Follow until the world is ready, then go on in the background.

        Raises:
            ConnectionError: the rendezvous is gone.
            ProtocolError: it broke the protocol.
        """
        assert self._stream is not None
        while True:
            try:
                message = await self._stream.receive()
            except OSError as error:  # one that the kernel timed out is not the end of the time to join
                how = how_it_broke(error, self._settings.heartbeat_s)
                raise ConnectionError(f"the rendezvous {how}") from error
            if isinstance(message, messages.Ready):
                break
            if isinstance(message, messages.Farewell):
                raise ConnectionError("the rendezvous closed before all had come")
            self._take(message)
        self._following = asyncio.create_task(self._follow(), name="aiocomm membership")
        if not self._stream.is_unix:
            self._beating = asyncio.create_task(self._beat(), name="aiocomm heartbeat")

    async def aclose(self) -> None:
        """Say goodbye and close. Does not wait long for an answer."""
        self._leaving = True
        if self._stream is None:
            return
        assert self.welcome is not None
        if self._following is None:
            await self._give_up()
        elif self.welcome.size is not None:
            _left.append(self.welcome.world)
        await _cancel(self._beating)  # before the goodbye: a stream has one writer at a time
        if self._following is not None:  # also if that has failed: the rendezvous may know nothing of it
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    await self._stream.send(messages.Goodbye())
                    await self._farewell.wait()
        await _cancel(self._following)
        self._stream.close()

    async def _give_up(self) -> None:
        """Say goodbye to a world that is not ready: once that is answered, the rank is free again."""
        assert self._stream is not None
        with contextlib.suppress(OSError, ProtocolError, AuthenticationError):
            async with asyncio.timeout(_GIVE_UP_S):
                await self._stream.send(messages.Goodbye())
                while not isinstance(await self._stream.receive(), messages.Farewell):
                    pass

    async def _reach(self) -> Stream:
        address = self._address
        if isinstance(address, FileAddress):
            told, token = read_address_file(address.path)
            own = TcpAddress(self._settings.host or "", 0).interface
            addresses = tuple(one.on(own) if isinstance(one, TcpAddress) else one for one in told)
            self.key = self.key if token is None or self._world.token is not None else token
        else:
            assert isinstance(address, (TcpAddress, UnixAddress))
            addresses = (address,)
        limit_s = self._settings.handshake_timeout_s
        later = asyncio.get_running_loop().call_later
        # Should the time be over in the middle of this.
        quiet = later(_QUIET_S, self._is_quiet, STILL_LOOKED_UP.format("the address"))

        def looked_up() -> None:
            nonlocal quiet
            quiet.cancel()
            quiet = later(_QUIET_S, self._is_quiet, no_answer(addresses))

        async def greet(stream: Stream) -> None:
            quiet.cancel()
            if not self._was_refused:  # else it is about to say the same again
                self.trouble = _SILENT
            try:
                async with StepLimit(limit_s, "connecting") as limit:
                    await stream.authenticate_caller(self.key, Purpose.CONTROL, limit.step)
            except StepTimeoutError as error:
                raise ConnectionError(f"{_SILENT} ({error})") from None

        try:
            stream, _ = await reach(addresses, greet, limit_s, looked_up)
        finally:
            quiet.cancel()
        return stream

    def _is_quiet(self, trouble: str) -> None:
        self.trouble = trouble

    async def _ask(
        self, stream: Stream, make_card: Callable[[Stream], messages.PeerCard]
    ) -> messages.Welcome | None:
        """Ask to be let in. None if it is worth another try."""
        # Not given up for being slow: it may let this process in at any moment, and would then tell all
        # others that it is gone. The end of its host breaks the connection.
        limit_s = self._settings.handshake_timeout_s
        slow = asyncio.get_running_loop().call_later(limit_s, self._is_quiet, _SILENT)
        try:
            self.found_at = stream.remote_host
            join = messages.Join(self._world.rank, self._world.size, tuple(_left), make_card(stream))
            stream.watch_silence(self._settings.heartbeat_s)
            stream.keep_alive(self._settings.heartbeat_s)
            await stream.send(join)
            answer = await stream.receive()
        except (OSError, ProtocolError) as error:
            stream.close()
            self.trouble = _SILENT if isinstance(error, TimeoutError) else what_to_do(error)
            return None
        except BaseException:
            stream.close()
            raise
        finally:
            slow.cancel()
        if isinstance(answer, messages.Welcome) and self._is_asked_for(answer):
            self._stream = stream
            self.welcome = answer
            return answer
        stream.close()
        if isinstance(answer, messages.Refused) and not answer.retry:
            raise UsageError(answer.reason)
        self._was_refused = isinstance(answer, messages.Refused)
        self.trouble = answer.reason if isinstance(answer, messages.Refused) else "it broke the protocol"
        return None

    def _is_asked_for(self, place: messages.Welcome) -> bool:
        asked = self._world
        return place.size == asked.size and asked.rank in (None, place.rank) and place.rank < MAX_RANKS

    async def _follow(self) -> None:
        assert self._stream is not None
        graceful = False
        try:
            while True:
                message = await self._stream.receive()
                if isinstance(message, messages.Farewell):
                    graceful, reason = True, "the rendezvous closed"
                    break
                self._take(message)
        except (ProtocolError, AuthenticationError) as error:
            reason = f"the rendezvous broke the control protocol ({error})"
        except OSError as error:
            reason = f"the rendezvous {how_it_broke(error, self._settings.heartbeat_s)}"
        except Exception as error:  # whatever it is: nothing more will be told, and that must be known
            _log.exception("following the rendezvous failed unexpectedly")
            reason = f"this process cannot follow the rendezvous any more ({error!r})"
        self._farewell.set()
        if not self._leaving:
            self._follower.on_rendezvous_lost(graceful, reason)

    async def _beat(self) -> None:
        assert self._stream is not None
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(self._settings.heartbeat_s)
                await self._stream.send(messages.Heartbeat())

    def _take(self, message: messages.Message) -> None:
        match message:
            case messages.Joined(cards):
                for card in cards:
                    if card.rank >= MAX_RANKS:
                        raise ProtocolError(f"a peer of rank {card.rank}")
                    self._follower.on_joined(card)
            case messages.Gone(rank, generation, graceful, reason):
                self._follower.on_gone(rank, generation, graceful, reason)
            case messages.Heartbeat() | messages.Ready():
                pass
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__}")


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def write_address_file(path: str, addresses: Sequence[TcpAddress | UnixAddress], token: bytes | None) -> None:
    """Publish the addresses of one rendezvous, the likeliest first, and the token that was made for it, to
    this user's processes.

    Raises:
        OSError: the file cannot be written, or is one that no rendezvous has written.
    """
    _refuse_foreign(path)
    first, *others = map(str, addresses)
    text = "\n".join([first, token.decode() if token is not None else "", *others, ""])
    folder, name = os.path.split(path)
    descriptor, temporary = tempfile.mkstemp(".tmp", f"{name}.", folder or ".")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)  # readers see the old file or the new one, never a part
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _refuse_foreign(path: str) -> None:
    """Raise if a file is there that holds something else than an address: it would be gone for good."""
    if not os.path.exists(path):
        return
    with contextlib.suppress(UsageError):
        if os.path.isfile(path):  # a pipe would be waited for
            with open(path, errors="replace") as file:
                text = file.read(4096)
            if text:  # an empty one is as mktemp makes it
                parse(text.partition("\n")[0])
            return
    what = "it exists and holds no address: delete it, or choose another path"
    raise FileExistsError(errno.EEXIST, what, path)


def read_address_file(path: str) -> tuple[tuple[TcpAddress | UnixAddress, ...], bytes | None]:
    """The addresses in a file, and the token if it holds one.

    Raises:
        OSError: there is no file (yet).
        AuthenticationError: it is another user's, or open to others.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise ConnectionError(f"{path} is not a file")
    with open(descriptor, errors="replace") as file:
        if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise AuthenticationError(f"{path} is not this user's alone; it would not be safe to trust")
        lines = file.read(4096).splitlines()
    try:
        found = [parse(line) for line in (*lines[:1], *lines[2:])]
    except UsageError as error:
        raise ConnectionError(f"{path} holds no address") from error
    addresses = tuple(address for address in found if isinstance(address, (TcpAddress, UnixAddress)))
    if not addresses or len(addresses) != len(found):
        raise ConnectionError(f"{path} holds no address")
    token = lines[1].encode() if len(lines) > 1 and lines[1] else None
    return addresses, token


def remove_address_file(path: str, address: TcpAddress | UnixAddress) -> None:
    """Remove the file if it still holds this address."""
    with contextlib.suppress(OSError, AuthenticationError):
        if read_address_file(path)[0][0] != address:
            return
        # The next world may write its own at any moment: what is taken away is looked at once more.
        taken = f"{path}.{secrets.token_hex(8)}.tmp"
        os.rename(path, taken)
        if read_address_file(taken)[0][0] == address:
            Path(taken).unlink()
        else:
            os.rename(taken, path)
