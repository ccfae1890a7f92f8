"""A listening socket whose connections authenticate before they reach anyone.

Each connection has a task and a time limit of its own, so that none can hold up another. Connections that
have not yet authenticated are bounded in number: past the bound the oldest is dropped, since an honest one
takes milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import secrets
import socket
import stat
from typing import TYPE_CHECKING, Final

from aiocomm._control.address import TcpAddress, UnixAddress
from aiocomm._control.host import EXHAUSTED, numeric_sockaddrs, what_to_do
from aiocomm._control.limit import StepLimit
from aiocomm._control.stream import Stream
from aiocomm._control.wire import ProtocolError
from aiocomm._forked import tell_of_fork
from aiocomm.errors import AuthenticationError, UsageError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiocomm._control.auth import Purpose

__all__ = ["Listener", "bind", "private_unix_address"]

_log: Final = logging.getLogger("aiocomm.control")
_BACKLOG: Final = 256
_BATCH: Final = 16
_RETRY_S: Final = 0.05


def private_unix_address() -> UnixAddress:
    """An abstract name that no other process has, and that vanishes with this one."""
    return UnixAddress(f"@aiocomm-{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}")


def bind(address: TcpAddress | UnixAddress) -> tuple[socket.socket, TcpAddress | UnixAddress]:
    """A listening socket, and the address with the port that it got.

    A host *name* listens on all interfaces: the name may stand for an address that this host does not have
    itself (a load balancer's), or for a loopback one (Debian's 127.0.1.1).

    Raises:
        OSError: the address is taken or not this host's.
    """
    if isinstance(address, UnixAddress):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if not address.is_abstract:
                _remove_stale(address.path)
            sock.bind(address.sockaddr)
            if not address.is_abstract:
                os.chmod(address.path, 0o600)
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock, address
    if address.is_literal and not address.is_wildcard:
        try:  # with the number of the interface, which a host and a port lack
            family, at = numeric_sockaddrs(address.host, address.port)[0]
        except socket.gaierror as error:  # there is nothing to look up but the interface
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from error
        sock = socket.create_server(at, family=family, backlog=_BACKLOG)
    elif address.host == "localhost":
        sock = socket.create_server(("127.0.0.1", address.port), backlog=_BACKLOG)
    elif address.host != "0.0.0.0" and socket.has_dualstack_ipv6():
        sock = socket.create_server(
            ("", address.port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
        )
    else:
        sock = socket.create_server(("", address.port), backlog=_BACKLOG)
    return sock, TcpAddress(address.host, sock.getsockname()[1])


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens at any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # somebody's file, which refuses a connect like a socket without a listener
    except OSError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with probe:
        probe.setblocking(False)  # whose backlog is full has a listener, and may be stopped
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return  # absent, busy, or not ours to judge: bind says so


class Listener:
    """Accepts, authenticates, and hands over.

    Args:
        sock: listening.
        key: of the group, or None to accept only this user's processes by Unix socket.
        purpose: the only kind of connection that is wanted here.
        timeout_s: seconds that a connection may take for each step of authenticating.
        max_pending: connections that may be authenticating at a time.
        serve: what to do with an authenticated connection; its stream is closed when this returns, unless
            detached.
    """

    def __init__(
        self,
        sock: socket.socket,
        key: bytes | None,
        purpose: Purpose,
        timeout_s: float,
        max_pending: int,
        serve: Callable[[Stream], Awaitable[None]],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._key = key
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._max_pending = max_pending
        self._serve = serve
        self._pending: dict[asyncio.Task[None], None] = {}  # by age
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pausing: asyncio.TimerHandle | None = None
        self._warned = False
        self.starved = ""  # why connections wait, while they do
        self.refused = 0
        self._loop.add_reader(sock, self._accept)
        tell_of_fork(self)

    def _on_fork(self) -> None:
        """Leave the address to the parent: it is taken for as long as anyone has the socket."""
        self._sock.close()

    async def aclose(self) -> None:
        """Stop accepting and drop every connection that is still served. Idempotent."""
        if self._pausing is not None:
            self._pausing.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # a child may have it that was forked unseen, by C
            self._sock.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        """Take what waits in the backlog. Each accepted socket has an owner before this returns."""
        for _ in range(_BATCH):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in EXHAUSTED:  # connections wait in the backlog meanwhile
                    self._starve(what_to_do(error))
                    self._loop.remove_reader(self._sock)
                    self._pausing = self._loop.call_later(_RETRY_S, self._resume)
                    return
                continue  # that connection failed before it was accepted
            self.starved = ""
            while len(self._pending) >= self._max_pending:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                oldest.cancel()
                self.refused += 1
            task = self._loop.create_task(self._handle(sock), name="aiocomm connection")
            self._pending[task] = None
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._ended, sock))

    def _starve(self, why: str) -> None:
        self.starved = why
        if not self._warned:  # others wait for this process, and cannot know why
            self._warned = True
            _log.warning("connections to this process wait: %s", why)

    def _resume(self) -> None:
        self._pausing = None
        self._loop.add_reader(self._sock, self._accept)

    def _ended(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        sock.close()  # here, since a task that is cancelled before it starts runs no code of its own
        self._pending.pop(task, None)
        self._tasks.discard(task)

    async def _handle(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(sock)
            async with StepLimit(self._timeout_s, "waiting for its hello") as limit:
                await stream.authenticate_called(self._key, self._purpose, limit.step)
            self._pending.pop(task, None)
            await self._serve(stream)
        except (OSError, ProtocolError, AuthenticationError, UsageError) as error:
            self.refused += 1  # whoever it was, it has been told what it may know; nobody here waits for it
            _log.debug("a connection ended: %s", error)
        except Exception:
            _log.exception("a connection failed unexpectedly")
