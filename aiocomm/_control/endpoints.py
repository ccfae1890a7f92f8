"""Where this process accepts pair connections, and how it reaches those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiocomm._control.address import TcpAddress, UnixAddress, parse
from aiocomm._control.auth import Purpose
from aiocomm._control.listener import Listener, bind, private_unix_address
from aiocomm._control.stream import Stream, connect

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from aiocomm._control.engine import Engine
    from aiocomm._control.messages import PeerCard
    from aiocomm.config import Settings

__all__ = ["Endpoints"]


class Endpoints:
    """An abstract Unix socket for this host, and a TCP port if a link uses TCP or the world spans hosts.

    Bound before the process is admitted, since its card names them; opened after, since the pair key comes
    with the admission. Connections wait in the backlog meanwhile.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._bound: list[tuple[socket.socket, TcpAddress | UnixAddress]] = []
        self._listeners: list[Listener] = []
        self._key = b""
        self._host_id = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """What the card says."""
        return tuple(str(address) for _, address in self._bound)

    def bind(self, local_host: str) -> tuple[str, ...]:
        """Bind, once; returns the addresses.

        Args:
            local_host: this host's address on the way to the rendezvous, empty if that is on this host.

        Raises:
            OSError: no socket can be had.
        """
        if not self._bound:
            self._bound.append(bind(private_unix_address()))
            if local_host or any(
                self._engine.link_streams(link)[0] == "tcp" for link in self._engine.link_names()
            ):
                advertised = self._settings.host or local_host or "127.0.0.1"
                try:
                    self._bound.append(bind(TcpAddress(advertised, 0)))
                except OSError:  # not an address of this host itself, as behind address translation
                    sock, address = bind(TcpAddress("", 0))
                    assert isinstance(address, TcpAddress)
                    self._bound.append((sock, TcpAddress(advertised, address.port)))
        return self.addresses

    def open(self, key: bytes, host_id: str, serve: Callable[[Stream], Awaitable[None]]) -> None:
        """Start to accept connections that know the pair key."""
        self._key = key
        self._host_id = host_id
        limits = self._settings
        for sock, _ in self._bound:
            self._listeners.append(
                Listener(sock, key, Purpose.PAIR, limits.handshake_timeout_s, limits.max_pending, serve)
            )

    async def dial(self, card: PeerCard, kind: str | None) -> Stream:
        """An authenticated connection to a peer.

        Args:
            card: of the peer.
            kind: "unix" or "tcp"; None for whichever can be had, Unix first.

        Raises:
            OSError: it does not listen, or cannot be reached like that.
            AuthenticationError: something else listens there.
        """
        failure: OSError = ConnectionError(
            f"it accepts no {kind or 'pair'} connections that could be reached from here"
        )
        for text in card.addresses:
            address = parse(text)
            if isinstance(address, UnixAddress):
                usable = kind in (None, "unix") and card.host_id == self._host_id
            else:
                usable = kind in (None, "tcp")
            if not usable or not isinstance(address, (TcpAddress, UnixAddress)):
                continue
            try:
                stream = await connect(address)
            except OSError as error:
                failure = error
                continue
            try:
                await stream.authenticate_caller(self._key, Purpose.PAIR)
            except BaseException:
                stream.close()
                raise
            return stream
        raise failure

    async def aclose(self) -> None:
        """Accept nothing more."""
        for listener in self._listeners:
            await listener.aclose()
        for sock, _ in self._bound:
            sock.close()
