"""Facts about this host and the processes on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import select
import socket
import threading
from pathlib import Path
from typing import Any, Final

__all__ = [
    "EXHAUSTED",
    "STILL_LOOKED_UP",
    "host_id",
    "hostname",
    "look_up",
    "numeric_host",
    "numeric_sockaddrs",
    "open_pidfd",
    "pid_namespace",
    "resolve",
    "start_time",
    "what_to_do",
]

_log: Final = logging.getLogger("aiocomm.control")
_LOOK_UP_S: Final = 2.0
STILL_LOOKED_UP: Final = "the name in {} is still looked up, and no name server answers"
EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""What fails like this says something of this process, and nothing of what it was about."""


@functools.cache
def hostname() -> str:
    """The host's name, for people."""
    return socket.gethostname()


def host_id() -> str:
    """Equal for two processes that share a kernel and a network namespace, and so can reach abstract Unix
    sockets.

    Raises:
        OSError: there is no descriptor left to read it by.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        _refuse_exhausted(error)
        boot = hostname()
    return f"{boot}/{_namespace('net')}"


def pid_namespace() -> int:
    """Equal for two processes whose process ids mean the same."""
    return _namespace("pid")


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, this names a process for good. 0 if
    there is none, or none that this process is shown.

    Raises:
        OSError: there is no descriptor left to read it by.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError as error:
        _refuse_exhausted(error)
        return 0
    # The second field is the command in parentheses and may hold anything, parentheses too.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


async def resolve(name: str, port: int | None) -> list[tuple[int, tuple[Any, ...]]]:
    """The families and sockets' addresses that a name stands for.

    Each look-up has a thread that nobody waits for, nor does the interpreter's end, as it would for those of
    the loop: no name server may answer for minutes, and no look-up can be broken off.

    Raises:
        OSError: nobody knows it, or this process cannot ask.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[tuple[Any, ...]]] = loop.create_future()

    def look() -> None:
        found, failure = [], None
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is no more
            loop.call_soon_threadsafe(_answer, answer, found, failure)

    try:
        threading.Thread(target=look, name=f"aiocomm-name {name}", daemon=True).start()
        found = await answer
    except UnicodeError as error:
        raise socket.gaierror(socket.EAI_NONAME, f"no host can have that name ({error})") from error
    except RuntimeError as error:
        raise ConnectionError(f"the name {name} cannot be looked up: {error}") from error
    return [(family, sockaddr) for family, *_, sockaddr in found]


def _answer(
    future: asyncio.Future[list[tuple[Any, ...]]], found: list[tuple[Any, ...]], failure: Exception | None
) -> None:
    if future.done():  # whoever asked is gone
        return
    if failure is None:
        future.set_result(found)
    else:
        future.set_exception(failure)


def numeric_sockaddrs(host: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
    """The same as `resolve`, of a host given by number: at once, since nothing is looked up but an interface.

    Raises:
        OSError: this host has no such interface.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [(family, sockaddr) for family, *_, sockaddr in found]


def numeric_host(sockaddr: tuple[Any, ...]) -> str:
    """The host of an IP socket's address, with this host's interface where it is one of a link."""
    host, _, *further = sockaddr
    if not (further and further[1]):
        return str(host)
    try:
        return f"{host}%{socket.if_indextoname(further[1])}"
    except OSError:  # it is gone
        return f"{host}%{further[1]}"


async def look_up(name: str, whose: str) -> list[str]:
    """The addresses of a name that others are told. None, and a warning, if it means nothing here: they will
    hardly know more.

    Args:
        whose: what gives it to others.
    """
    try:
        async with asyncio.timeout(_LOOK_UP_S):
            return [numeric_host(at) for _, at in await resolve(name, None)]
    except OSError as error:  # also: nobody knows within the time
        _log.warning(
            "the name that %s gives to others, %s, is not known here: %s", whose, name, what_to_do(error)
        )
        return []


def open_pidfd(pid: int, started: int) -> int | None:
    """A descriptor that becomes readable when the process ends, or None if that process is no more.

    Raises:
        OSError: the kernel does not offer it, is out of descriptors, or hides when the process has started.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):  # the latter: no process can have such an id
        return None
    # Read after the open: the descriptor keeps naming this process, so an id that was used again shows here.
    try:
        found = start_time(pid)
        if found != started and not (found and started) and not _has_ended(descriptor):
            raise PermissionError(errno.EACCES, "it is hidden when the process has started")
    except OSError:
        os.close(descriptor)
        raise
    if found == started:
        return descriptor
    os.close(descriptor)
    return None


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _refuse_exhausted(error: OSError) -> None:
    if error.errno in EXHAUSTED:
        raise error


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0


def what_to_do(error: Exception) -> str:
    """What the system has refused, and the remedy if it is a limit of this process."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    # What asyncio and socket add to it is said better by who asks.
    text = os.strerror(error.errno) if error.errno and error.errno in errno.errorcode else error.strerror
    if error.errno != errno.EMFILE:
        return text
    return (
        f"{text}: raise the limit of open files (ulimit -n, LimitNOFILE= in a unit, "
        "--ulimit nofile= for a container)"
    )
