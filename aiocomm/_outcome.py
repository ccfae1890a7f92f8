"""What the native side needs of Python: errors of transfers, arrays over received memory, waiting on trio."""

from __future__ import annotations

import asyncio
import enum
import errno
import os
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from aiocomm import errors
from aiocomm._control.engine import NOT_CONNECTED
from aiocomm._device import DeviceArray, describe
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Generator

    from aiocomm_native import Transfer

__all__ = ["install", "told_of"]

E = TypeVar("E", bound=errors.AiocommError)

# What a driver answers where memory may not be locked, which is what operations over rdma mostly fail of.
_NOT_LOCKED = (errno.ENOMEM, errno.EPERM)
_LOCKED = (
    ": its memory could not be registered, that is locked; allow more (ulimit -l unlimited, "
    "LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a container)"
)


class _Code(enum.IntEnum):
    """The order of `enum class Code` in core/op.hpp."""

    OK = 0
    CANCELLED = 1
    DEADLINE = 2
    PEER_CANCELLED = 3
    PEER_LOST = 4
    TRUNCATED = 5
    STALE = 6
    OUT_OF_RANGE = 7
    LINK_FAILED = 8
    CLOSED = 9
    WOULD_BLOCK = 10
    READ_ONLY = 11
    UNREACHABLE = 12


def make_error(
    transfer: Transfer[Any], code: int, number: int, link: str, capacity: int, reason: str
) -> errors.AiocommError:
    """Say what happened, to which operation, with which peer, on which link, and what to do next."""
    what = _subject(transfer)
    error = _failure(transfer, what, code, number, link, capacity, reason)
    error._subject = what
    return error


def told_of(error: E, what: str) -> E:
    """The error of a transfer as that of the user's operation which it is part of.

    Args:
        what: names the operation.
    """
    if not error._subject:
        return error
    told = copy(error)
    told.args = (what + str(error).removeprefix(error._subject), *error.args[1:])
    told._subject = what
    return told


def _subject(transfer: Transfer[Any]) -> str:
    direction = "from" if transfer.kind in ("recv", "get") else "to"
    whom = f"rank {transfer.peer}" if transfer.peer >= 0 else "any rank"
    # Of an array that is yet to be made nobody knows the size.
    size = "" if transfer.kind == "recv" and not transfer.nbytes else f" of {transfer.nbytes} bytes"
    what = f"{transfer.kind}{size} {direction} {whom} on channel {transfer.channel!r}"
    if transfer.kind in ("send", "recv") and transfer.tag >= 0:
        what += f", tag {transfer.tag}"
    return what


def _failure(
    transfer: Transfer[Any], what: str, code: int, number: int, link: str, capacity: int, reason: str
) -> errors.AiocommError:
    peer: int | None = transfer.peer if transfer.peer >= 0 else None
    over = f" (link {link})" if link != "self" else ""
    match code:
        case _Code.DEADLINE:
            return errors.DeadlineExceeded(
                f"{what}{over}: the deadline passed; the buffer is yours again. Is the other side still "
                "working, and does it post the matching operation?"
            )
        case _Code.CANCELLED:
            return errors.TransferCancelled(f"{what}{over}: cancelled by this side", peer)
        case _Code.PEER_CANCELLED:
            return errors.TransferCancelled(
                f"{what}{over}: the peer cancelled its side, or its deadline passed; the buffer's content is "
                "undefined",
                peer,
            )
        case _Code.PEER_LOST if reason.startswith(NOT_CONNECTED):
            return errors.PeerLostError(f"{what}{over}: {reason}; the next operation tries again", peer)
        case _Code.PEER_LOST:
            return errors.PeerLostError(
                f"{what}{over}: the peer is gone{f' ({reason})' if reason else ''}; if it comes back it is a "
                "new peer: exchange regions anew",
                peer,
            )
        case _Code.TRUNCATED:
            return errors.TruncationError(
                f"{what}{over}: the message has {transfer.nbytes} bytes"
                + (f", the buffer {capacity}: receive into a larger one" if transfer.kind == "recv" else "")
                + ("" if transfer.kind == "recv" else ", the receiver's buffer is smaller"),
                peer,
            )
        case _Code.STALE:
            return errors.StaleHandleError(
                f"{what}{over}: the region was closed by its owner, or belongs to an earlier incarnation: "
                "exchange it anew",
                peer,
            )
        case _Code.OUT_OF_RANGE:
            return errors.UsageError(
                f"{what}{over}: outside the remote region; narrow it with remote[start:stop]"
            )
        case _Code.READ_ONLY:
            return errors.UsageError(
                f"{what}{over}: the remote region is read-only; register a writable array"
            )
        case _Code.CLOSED:
            return errors.ClosedError(f"{what}{over}: the communicator or the channel was closed")
        case _Code.WOULD_BLOCK:
            return errors.WouldBlock(f"{what}{over}: cannot be handed over at once; await send() instead")
        case _Code.UNREACHABLE:
            return errors.LinkError(
                f"{what}{over}: this process's GPU does not reach the peer's memory: move each row by itself",
                errno.EXDEV,
                "EXDEV",
            )
        case _ if link == "cuda":
            return _device_failure(what + over, number)
        case _:
            name = os.strerror(number) if number else "unknown"
            why = reason or f"{name} (errno {number})"
            advice = _LOCKED if link == "rdma" and number in _NOT_LOCKED else ""
            return errors.LinkError(
                f"{what}{over}: the link failed: {why}{advice}; see `aiocomm doctor`", number, name
            )


def _device_failure(what: str, number: int) -> errors.LinkError:
    if number == -1:
        return errors.LinkError(
            f"{what}: there is no host memory for staging it; send smaller pieces", 12, "ENOMEM"
        )
    if number <= 0:
        return errors.LinkError(
            f"{what}: the peer's GPU failed; its side of the transfer says how", 0, "peer"
        )
    text = _core.describe_device_error(number)
    return errors.LinkError(f"{what}: the GPU failed: {text}; see `aiocomm doctor`", number, text.split()[0])


_COMPLEX = {"Zf": "F", "Zd": "D", "Zg": "G"}
_STRINGS = {"s": "S", "w": "U", "x": "V"}  # of a length: 5s are 5 bytes to buffers, S5 to NumPy


def make_array(memory: Any, format: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Shape received memory as the sender's array was shaped; what is no array of these bytes stays bytes.

    The peer is not trusted: its bytes never become references to Python objects, nor is there an array of
    more elements than bytes, of which even a `repr` may have no end.
    """
    if format[-1:] in _STRINGS and (length := format[:-1].lstrip("<>=@")).isdecimal():
        format = f"{format[: -1 - len(length)]}{_STRINGS[format[-1]]}{length}"
    try:
        dtype = np.dtype(_COMPLEX.get(format, format))
        if not dtype.hasobject and dtype.itemsize and dtype.kind not in "mM":
            array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, memory)
            if array.nbytes == memoryview(memory).nbytes:
                return array
    except Exception:  # as many kinds as there are ways to be wrong, such as dimensions of 64 bits
        pass
    return np.frombuffer(memory, np.uint8)


async def trio_wait(transfer: Transfer[Any]) -> Any:
    """Await on trio: a cancelled task resumes only when nothing touches the buffer any more."""
    import trio

    task = trio.lowlevel.current_task()
    cancelled: Any = None

    def ended(_: object) -> None:
        trio.lowlevel.reschedule(task)

    def abort(raise_cancel: Any) -> trio.lowlevel.Abort:
        nonlocal cancelled
        cancelled = raise_cancel
        transfer.cancel()  # `ended` reschedules, now or when the transfer has drained
        return trio.lowlevel.Abort.FAILED

    transfer.add_done_callback(ended)
    await trio.lowlevel.wait_task_rescheduled(abort)
    if transfer.cancelled() and cancelled is not None:
        cancelled()
    return transfer.result()


def iterate(transfer: Transfer[Any]) -> Generator[Any, None, Any]:
    """Drive a transfer by `yield from`, as its `await` does; whoever only forgot to await it is told so.

    Raises:
        RuntimeError: driven on before the transfer has ended, as by `list` or `for`, which would never end.
    """
    try:
        yield next(transfer)
    except StopIteration as ended:
        return ended.value
    if not transfer.done():
        raise RuntimeError(f"{transfer!r} was iterated over: await it, and iterate over what that returns")
    return transfer.result()


def install() -> None:
    """Give the hooks to the native module. Idempotent."""
    _core.install_hooks(
        make_error,
        make_array,
        trio_wait,
        iterate,
        asyncio.CancelledError,
        errors.LinkError,
        errors.UsageError,
        describe,
        DeviceArray,
    )
