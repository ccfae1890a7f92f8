"""Getting through to a process that listens at one of several addresses, past those that do not answer.

A name may have several addresses, and a process several names; a firewall that drops what it does not like
makes a connect wait for minutes. So the next address is tried while the one before it is still silent, and
whichever connects and passes the handshake first is taken.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Final

from aiocomm._control.address import TcpAddress, UnixAddress
from aiocomm._control.host import numeric_host, numeric_sockaddrs, resolve, what_to_do
from aiocomm._control.limit import StepLimit
from aiocomm._control.stream import Stream
from aiocomm.errors import AuthenticationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

__all__ = ["UnansweredError", "no_answer", "reach"]

_STAGGER_S: Final = 0.5
_BACKLOG_PAUSE_S: Final = 0.01


class UnansweredError(ConnectionError):
    """An address said nothing at all, not even that nobody listens there."""


def no_answer(addresses: Iterable[object]) -> str:
    """What is to be said of addresses that say nothing."""
    text = f"no answer from {', '.join(map(str, addresses))}"
    return f"{text}: is a firewall between, is the address right?" if "tcp://" in text else text


async def reach(
    addresses: Iterable[TcpAddress | UnixAddress],
    greet: Callable[[Stream], Awaitable[None]],
    limit_s: float,
    looked_up: Callable[[], None] = lambda: None,
) -> tuple[Stream, TcpAddress | UnixAddress]:
    """A connection to the first of the addresses, by order and time, that can be had and greeted.

    Args:
        addresses: of one process, the likeliest first. Names may stand for several.
        greet: authenticates; what it raises counts as that address's failure.
        limit_s: seconds that a connect may be without an answer. The caller bounds the rest.
        looked_up: is called once it is known what all names stand for.

    Raises:
        AuthenticationError: something else listens there.
        UnansweredError: none could be had, and some did not answer.
        OSError: nobody listens, or a name is unknown.
    """
    failures: dict[str, Exception] = {}
    waiting: list[tuple[TcpAddress | UnixAddress, int, object]] = []
    for address in dict.fromkeys(addresses):
        try:
            waiting += await _resolve(address)
        except OSError as error:
            failures[str(address)] = error
    looked_up()
    waiting.reverse()
    attempts: dict[asyncio.Task[Stream], TcpAddress | UnixAddress] = {}
    first: Stream | None = None
    try:
        while waiting or attempts:
            if waiting:
                address, family, sockaddr = waiting.pop()
                task = asyncio.create_task(_attempt(family, sockaddr, greet, limit_s))
                attempts[task] = address
            patience = _STAGGER_S if waiting else None
            done, _ = await asyncio.wait(attempts, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                address = attempts.pop(task)
                try:
                    first = task.result()
                    return first, address
                except (OSError, AuthenticationError) as error:
                    failures[str(address)] = error
    finally:
        for task in attempts:
            if task.done():
                _let_go(task)
            else:  # whoever is cancelled once more does not wait for this
                task.cancel()
                task.add_done_callback(_let_go)
        try:
            await asyncio.gather(*attempts, return_exceptions=True)
        except asyncio.CancelledError:
            if first is not None:
                first.close()
            raise
    raise _sum_up(failures)


def _let_go(attempt: asyncio.Task[Stream]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _attempt(
    family: int, sockaddr: object, greet: Callable[[Stream], Awaitable[None]], limit_s: float
) -> Stream:
    try:
        async with StepLimit(limit_s, "connecting"):
            stream = await _connect(family, sockaddr)
    except TimeoutError:  # also the kernel's
        raise UnansweredError("no answer") from None
    try:
        await greet(stream)
    except BaseException:
        stream.close()
        raise
    return stream


def _sum_up(failures: dict[str, Exception]) -> Exception:
    """One error for all addresses."""
    errors = list(failures.values())
    for error in errors:
        own = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if own or isinstance(error, AuthenticationError):
            return error
    silent = [address for address, error in failures.items() if isinstance(error, UnansweredError)]
    if len(errors) == 1 and not silent:
        return errors[0]
    told = [f"{address}: {what_to_do(error)}" for address, error in failures.items() if address not in silent]
    if not silent:
        return ConnectionError("; ".join(told) or "there is no address to try")
    return UnansweredError("; ".join([no_answer(silent), *told]))


async def _resolve(
    address: TcpAddress | UnixAddress,
) -> list[tuple[TcpAddress | UnixAddress, int, object]]:
    """The sockets' addresses that an address stands for, each with what to call it."""
    if isinstance(address, UnixAddress):
        return [(address, socket.AF_UNIX, address.sockaddr)]
    if address.is_link_local and not address.interface:
        raise ConnectionError(
            f"{address.host} is an address of one link, and it is not known by which interface of this host: "
            f"write [{address.host}%eth0], say, or give this host's own address of that link by AIOCOMM_HOST"
        )
    if address.is_literal and not address.is_wildcard:
        found = numeric_sockaddrs(address.host, address.port)
    else:
        found = await resolve(address.host if not address.is_wildcard else "localhost", address.port)
    return [
        (TcpAddress(numeric_host(sockaddr), address.port), family, sockaddr) for family, sockaddr in found
    ]


async def _connect(family: int, sockaddr: object) -> Stream:
    """A connection, not yet authenticated."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, sockaddr)  # type: ignore[arg-type]
        else:
            await _connect_unix(sock, sockaddr)
    except BaseException:
        sock.close()
        raise
    return Stream(sock)


async def _connect_unix(sock: socket.socket, sockaddr: object) -> None:
    """Connect at once, or wait for room in a full backlog, which nothing but another try can tell of."""
    while True:
        try:
            return sock.connect(sockaddr)  # type: ignore[arg-type]
        except BlockingIOError:
            await asyncio.sleep(_BACKLOG_PAUSE_S)
