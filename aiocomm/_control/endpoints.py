"""Where this process accepts pair connections, and how it reaches those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiocomm._control.address import TcpAddress, UnixAddress, parse
from aiocomm._control.auth import Purpose
from aiocomm._control.dialing import reach
from aiocomm._control.host import look_up
from aiocomm._control.listener import Listener, bind, private_unix_address

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from aiocomm._control.address import Address
    from aiocomm._control.engine import Engine
    from aiocomm._control.limit import Step
    from aiocomm._control.messages import PeerCard
    from aiocomm._control.stream import Stream
    from aiocomm.config import Settings

__all__ = ["Endpoints"]

_REACH_PART: Final = 0.8


class Endpoints:
    """An abstract Unix socket for this host, and a TCP port if a link uses TCP or the world spans hosts.

    Bound before the process is admitted, since its card names them; opened after, since the pair key comes
    with the admission. Connections wait in the backlog meanwhile.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._sockets: list[socket.socket] = []
        self._addresses: list[TcpAddress | UnixAddress] = []
        self._listeners: list[Listener] = []
        self._key = b""
        self._host_id = ""
        self._interface = ""  # to the link of those whose address is one of a link
        self._rendezvous_at: tuple[str, str] | None = None
        self._worked: dict[int, TcpAddress] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """What the card says."""
        return tuple(map(str, self._addresses))

    def bind(self, local_host: str, further: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Bind, once; returns the addresses.

        Args:
            local_host: this host's address on the way to the rendezvous, empty if that is on this host by
                construction.
            further: its other ones, where the way to the rendezvous does not tell which of them others reach.

        Raises:
            OSError: no socket can be had.
        """
        if not self._sockets:
            told = (self._settings.host or "", local_host)
            self._interface = next(filter(None, (TcpAddress(host, 0).interface for host in told)), "")
            try:
                self._bind_all(local_host, further)
            except BaseException:  # all of them, or none: whoever tries again would miss those that failed
                self._unbind()
                raise
        return self.addresses

    def _bind_all(self, local_host: str, further: tuple[str, ...]) -> None:
        self._take(bind(private_unix_address()))
        if local_host or any(
            self._engine.link_streams(link)[0] == "tcp" for link in self._engine.link_names()
        ):
            advertised = self._settings.host or local_host or "127.0.0.1"
            try:
                if further and not self._settings.host:
                    first = (local_host,) if local_host in further else ()
                    self._take(bind(TcpAddress("", 0)), *dict.fromkeys((*first, *further)))
                else:
                    self._take(bind(TcpAddress(advertised, 0)), advertised)
            except OSError:  # not an address of this host itself, as behind address translation
                self._take(bind(TcpAddress("", 0)), advertised)

    def _unbind(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        self._addresses.clear()

    async def look_up_host(self) -> None:
        """Warn if the name that others are told means nothing here: they will hardly know more."""
        name = self._settings.host
        if name is None or TcpAddress(name, 0).is_literal:
            return
        await look_up(name, "AIOCOMM_HOST")

    def _take(self, bound: tuple[socket.socket, TcpAddress | UnixAddress], *hosts: str) -> None:
        sock, address = bound
        self._sockets.append(sock)
        if isinstance(address, TcpAddress):
            self._addresses += [TcpAddress(host, address.port).bare for host in hosts]
        else:
            self._addresses.append(address)

    def open(self, key: bytes, host_id: str, serve: Callable[[Stream], Awaitable[None]]) -> None:
        """Start to accept connections that know the pair key."""
        self._key = key
        self._host_id = host_id
        limits = self._settings
        for sock in self._sockets:
            self._listeners.append(
                Listener(sock, key, Purpose.PAIR, limits.handshake_timeout_s, limits.max_pending, serve)
            )

    def rendezvous_is(self, host_id: str, found_at: str) -> None:
        """Say where this process has reached the host of the rendezvous: its other processes are likely
        reached there, too.
        """
        if found_at:
            self._rendezvous_at = (host_id, found_at)

    async def dial(
        self, card: PeerCard, kind: str | None, step: Step, reach_s: float | None = None
    ) -> Stream:
        """An authenticated connection to a peer. The caller bounds each step of it.

        Args:
            card: of the peer.
            kind: "unix" or "tcp"; None for whichever can be had, Unix first.
            step: is told of each step.
            reach_s: seconds that an address may be without an answer; None: of a handshake's time, so much
                that what has no answer can be told before that is over.

        Raises:
            OSError: it does not listen, or cannot be reached like that.
            AuthenticationError: something else listens there.
        """
        if reach_s is None:
            reach_s = _REACH_PART * self._settings.handshake_timeout_s
        step("connecting with it")

        async def greet(stream: Stream) -> None:
            await stream.authenticate_caller(self._key, Purpose.PAIR, step)

        known = [parse(text) for text in card.addresses]
        near = [address for address in known if isinstance(address, UnixAddress)]
        if kind == "tcp" or card.host_id != self._host_id:
            near = []
        far = [] if kind == "unix" else self._by_likelihood(card, known)
        failure: OSError = ConnectionError(
            f"it accepts no {kind or 'pair'} connections that could be reached from here"
        )
        for addresses in (near, far):
            if addresses:
                try:
                    stream, found = await reach(addresses, greet, reach_s)
                except OSError as error:
                    failure = error
                    continue
                if isinstance(found, TcpAddress):
                    self._worked[card.rank] = found
                return stream
        raise failure

    def _by_likelihood(self, card: PeerCard, known: Sequence[Address]) -> list[TcpAddress | UnixAddress]:
        """A peer's TCP addresses in the order in which to try them."""
        found = [address.on(self._interface) for address in known if isinstance(address, TcpAddress)]
        guess: TcpAddress | None = None
        if found and self._rendezvous_at is not None and self._rendezvous_at[0] == card.host_id:
            guess = TcpAddress(self._rendezvous_at[1], found[0].port)
            found.append(guess)
            if guess not in found[:-1]:  # then it may be wrong, as where ports are translated: at last
                guess = None
        first = [address for address in (self._worked.get(card.rank), guess) if address in found]
        return [*dict.fromkeys(first), *(address for address in found if address not in first)]

    async def aclose(self) -> None:
        """Accept nothing more."""
        for listener in self._listeners:
            await listener.aclose()
        self._unbind()
