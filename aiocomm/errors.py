"""Every error that aiocomm raises.

The tree says who has to act: `UsageError` is the caller's, `PeerError` the other process's, `LinkError` the
device's. Each message says what happened, to which operation, with which peer, on which link, and what to do
next.
"""

from __future__ import annotations

__all__ = [
    "AiocommError",
    "AuthenticationError",
    "ClosedError",
    "DeadlineExceeded",
    "ExpertsLostError",
    "LinkError",
    "PeerError",
    "PeerLostError",
    "StaleHandleError",
    "TransferCancelled",
    "TruncationError",
    "UsageError",
    "UsageTypeError",
    "WouldBlock",
]


class AiocommError(Exception):
    """Root of all errors of this package."""

    _subject = ""  # what its message begins with, where that is a single transfer


class UsageError(AiocommError, ValueError):
    """The call was wrong: nothing was submitted and nothing changed."""


class UsageTypeError(UsageError, TypeError):
    """The call was wrong in the type of an argument: nothing was submitted and nothing changed."""


class PeerError(AiocommError):
    """The other process caused it. `peer` is its rank, or None where it is not known."""

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class PeerLostError(PeerError):
    """The peer died, left, or cannot be reached.

    Its later incarnation is another peer: exchange regions anew.
    """


class ExpertsLostError(PeerLostError):
    """A rank that holds experts is gone in the middle of a dispatch or combine.

    `experts` are those it held; `tokens` are the caller's tokens, by index, that were routed to them. Shrink
    the group, place the experts anew, and dispatch again.
    """

    def __init__(
        self,
        message: str,
        peer: int | None = None,
        tokens: tuple[int, ...] = (),
        experts: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, peer)
        self.tokens = tokens
        self.experts = experts


class TransferCancelled(PeerError):
    """The peer cancelled its side of the matched operation, or its deadline ran out.

    The buffer's content is undefined.
    """


class TruncationError(PeerError):
    """The message was larger than the receive buffer.

    Only this transfer failed; receive with a larger buffer.
    """


class StaleHandleError(PeerError):
    """The remote region was closed, or belongs to an earlier incarnation of the peer.

    Exchange regions anew.
    """


class AuthenticationError(PeerError):
    """The other end of a connection did not prove that it knows the group's token."""


class LinkError(AiocommError):
    """A link or device failed. `code` and `code_name` are the driver's or the system's.

    What was under way on that link has ended; other links go on.
    """

    def __init__(self, message: str, code: int | None = None, code_name: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.code_name = code_name


class DeadlineExceeded(AiocommError, TimeoutError):
    """The operation's `deadline=` passed. It was cancelled, and the buffer is the caller's again."""


class ClosedError(AiocommError):
    """The communicator, channel or region was closed before or while the operation ran."""


class WouldBlock(AiocommError):
    """`send_nowait` could not hand the message over at once. Nothing was submitted; await `send` instead."""
