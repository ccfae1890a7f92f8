"""What is said on control connections. `wire` gives it bytes, by the fields' order and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

__all__ = [
    "Attached",
    "Farewell",
    "Gone",
    "Goodbye",
    "Heartbeat",
    "Join",
    "Joined",
    "LinkReady",
    "LinkTry",
    "Message",
    "Offer",
    "OfferAnswer",
    "PeerCard",
    "Ready",
    "Refused",
    "StreamHello",
    "Unattached",
    "Watch",
    "Welcome",
]


@dataclass(frozen=True, slots=True)
class PeerCard:
    """A process as the others need to know it. `addresses` are where it accepts pair connections."""

    rank: int
    generation: int
    name: str | None
    host: str
    host_id: str
    pid: int
    pid_namespace: int
    start_time: int
    devices: tuple[str, ...]
    links: tuple[str, ...]
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """Member to rendezvous: let me in. `rank` and `size` are None in an elastic world.

    `left` names the worlds that this process has left for good, so that a second world at the same address is
    not mistaken for the first one, which may still be closing.
    """

    CODE: ClassVar[int] = 1
    rank: int | None
    size: int | None
    left: tuple[str, ...]
    card: PeerCard


@dataclass(frozen=True, slots=True)
class Welcome:
    """Rendezvous to member: you are in. `host_rank` lives in the process of the rendezvous; None if it stands
    alone.

    `session_key` is empty where the group has a token.
    """

    CODE: ClassVar[int] = 2
    rank: int
    size: int | None
    generation: int
    host_rank: int | None
    world: str
    session_key: bytes


@dataclass(frozen=True, slots=True)
class Refused:
    """Rendezvous to member: you are not in. With `retry`, another try may succeed."""

    CODE: ClassVar[int] = 3
    reason: str
    retry: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """Rendezvous to member: these peers are in the world. A card may come twice."""

    CODE: ClassVar[int] = 4
    cards: tuple[PeerCard, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """Rendezvous to member: everyone that belongs to the world from the start has been told of."""

    CODE: ClassVar[int] = 5


@dataclass(frozen=True, slots=True)
class Gone:
    """Rendezvous to member: this peer left (`graceful`) or was lost."""

    CODE: ClassVar[int] = 6
    rank: int
    generation: int
    graceful: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Both ways, across hosts: the kernel of the other end must acknowledge it in time."""

    CODE: ClassVar[int] = 7


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Member to rendezvous: I leave."""

    CODE: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class Farewell:
    """Rendezvous to member: your goodbye is known to all, or this rendezvous closes. Nothing follows."""

    CODE: ClassVar[int] = 9


@dataclass(frozen=True, slots=True)
class Offer:
    """Caller to called: let us connect. `attempt` names this try and is secret enough to be claimed by its
    maker only.
    """

    CODE: ClassVar[int] = 16
    attempt: bytes
    rank: int
    generation: int
    to_rank: int
    to_generation: int


@dataclass(frozen=True, slots=True)
class OfferAnswer:
    """Called to caller. `verdict` is "accept", "yield" (my own call to you takes precedence), "done" or
    "refuse".
    """

    CODE: ClassVar[int] = 17
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkTry:
    """Caller to called: use this link; its `streams` connections follow as connections of their own.

    `tls` says whether the caller will talk TLS on them.
    """

    CODE: ClassVar[int] = 18
    link: str
    streams: int
    tls: bool
    card: bytes


@dataclass(frozen=True, slots=True)
class StreamHello:
    """First and only frame of a connection that then belongs to the link."""

    CODE: ClassVar[int] = 19
    attempt: bytes
    link: str
    index: int


@dataclass(frozen=True, slots=True)
class LinkReady:
    """Called to caller: all streams are here; attach."""

    CODE: ClassVar[int] = 20
    link: str
    card: bytes


@dataclass(frozen=True, slots=True)
class Attached:
    """Both ways: my engine has taken the link."""

    CODE: ClassVar[int] = 21
    link: str


@dataclass(frozen=True, slots=True)
class Unattached:
    """Both ways: this link cannot be used between us; try the next."""

    CODE: ClassVar[int] = 22
    link: str
    reason: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Caller to called, without a rendezvous: let us hold this connection, to notice each other's end. A
    `Heartbeat` answers.
    """

    CODE: ClassVar[int] = 23
    rank: int
    generation: int
    to_rank: int
    to_generation: int


Message: TypeAlias = (
    Join
    | Welcome
    | Refused
    | Joined
    | Ready
    | Gone
    | Heartbeat
    | Goodbye
    | Farewell
    | Offer
    | OfferAnswer
    | LinkTry
    | StreamHello
    | LinkReady
    | Attached
    | Unattached
    | Watch
)
