"""The small values of the public interface: priorities, wildcards, peers, statuses, events."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, TypeVar

from aiocomm_native import Status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

__all__ = [
    "ANY_SOURCE",
    "ANY_TAG",
    "MAX_TAG",
    "Completion",
    "Event",
    "Fallback",
    "Feed",
    "LinkDown",
    "LinkUp",
    "Notification",
    "Peer",
    "PeerJoined",
    "PeerLost",
    "Priority",
    "Status",
    "Submission",
    "Undelivered",
]

ANY_SOURCE: Final = -1
"""Receive from whichever rank's message comes first."""
ANY_TAG: Final = -1
"""Receive a message with any tag."""
MAX_TAG: Final = 2**62 - 1
"""The largest tag."""


T_co = TypeVar("T_co", covariant=True)


class Feed(Protocol[T_co]):
    """What happens, as it happens, for `async for`. It keeps, while it lives, what was not looked at."""

    def __aiter__(self) -> AsyncIterator[T_co]:
        """Itself."""

    def __anext__(self) -> Awaitable[T_co]:
        """What comes next. Cancelling the await loses nothing."""

    async def aclose(self) -> None:
        """End the iteration, and stop keeping."""


class Priority(enum.IntEnum):
    """Scheduling class of a channel. Higher classes go first; lower ones keep a guaranteed minimum share."""

    LOW = 0
    NORMAL = 1
    HIGH = 2
    URGENT = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """Another process of the world, as known at the time of the call."""

    rank: int
    host: str
    pid: int
    devices: tuple[str, ...]
    links: tuple[str, ...]
    alive: bool
    name: str | None = None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Notification:
    """Told by a peer's `put(..., notify=payload)`, after its `nbytes` of data are in place."""

    source: int
    payload: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Submission:
    """An operation that a link's executor accepted.

    `nbytes` is what the call asked for: of a receive the size of its buffer, 0 where the message brings its
    own.
    """

    op: int
    kind: str
    peer: int
    channel: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Completion:
    """An operation that ended on a link.

    `nbytes` is what moved: all of the message if it is `ok`. Of one that failed or was cancelled it is what
    this side knows of, often 0 whatever its `Submission` said; it says nothing of the buffer's content.
    `queued_s` and `moved_s` are the seconds before and after its first byte moved.
    """

    op: int
    kind: str
    peer: int
    channel: str
    nbytes: int
    ok: bool
    queued_s: float
    moved_s: float


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A process joined the world."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerLost:
    """A process left the world: `reason` says whether it said goodbye, died, or fell silent."""

    rank: int
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link to a peer is connected, or one of its rails (`rdma/device:port`) is there again."""

    link: str
    rank: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A link to a peer was lost, or one of its rails (`rdma/device:port`); others may remain."""

    link: str
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fallback:
    """A slower path than the best is used, and why."""

    link: str
    rank: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A message that had already been handed over (a small, buffered `send`) could not be delivered.

    `send(..., synchronous=True)` reports this at the await instead.
    """

    rank: int
    channel: str
    tag: int
    reason: str


Event: TypeAlias = PeerJoined | PeerLost | LinkUp | LinkDown | Fallback | Undelivered
