"""What a scheduler tells its workers for one step, and what they tell back."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field

__all__ = ["Fetch", "Figures", "Origin", "Outcome", "Step", "lent_name", "request_of"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request's blocks are: the engine that computed them, and the name by which it lends them."""

    engine: str
    ranks: int  # of its tensor parallelism
    request: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Blocks to get: `there[n]` of the origin into `here[n]`."""

    request: str
    origin: Origin
    there: tuple[int, ...]
    here: tuple[int, ...]


def lent_name(request: str) -> str:
    """A name by which a request's blocks are lent once.

    Requests may have the names of older ones, whose blocks somebody may come for yet; so may those of an
    engine that was started anew.
    """
    return f"{request}/{secrets.token_hex(8)}"


def request_of(name: str) -> str:
    """The request whose blocks have a `lent_name`."""
    return name.rpartition("/")[0]


@dataclass(slots=True)
class Step:
    """All that the workers have to begin in one step."""

    claim: list[Origin] = field(default_factory=list)  # somebody here will come for them
    fetch: list[Fetch] = field(default_factory=list)
    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)  # blocks to lend, by a `lent_name` each
    cancel: list[str] = field(default_factory=list)  # fetches that nobody waits for any more
    release: list[Origin] = field(default_factory=list)  # nobody here comes for them

    def __bool__(self) -> bool:
        return self != Step()


@dataclass(slots=True)
class Figures:
    """What a worker has done in a while.

    Args:
        seconds: of each fetch that brought its blocks, from when it was asked for until they were there.
        nbytes: of each of these.
        failed: fetches that did not bring them; those that were aborted do not count.
        unclaimed: requests whose blocks were freed since nobody came for them.
    """

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    failed: int = 0
    unclaimed: int = 0


class Outcome:
    """Requests whose blocks were fetched from here, and to here; told by one thread and taken by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._figures = Figures()
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed: set[str] = set()

    def of_sent(self, request: str) -> None:
        """Nobody reads its blocks any more."""
        with self._lock:
            self._sent.add(request)

    def of_received(self, request: str, *, failed: bool) -> None:
        """Nothing writes to its blocks any more."""
        with self._lock:
            self._received.add(request)
            if failed:
                self._failed.add(request)
                self._figures.failed += 1

    def of_fetch(self, seconds: float, nbytes: int) -> None:
        """A fetch has brought its blocks."""
        with self._lock:
            self._figures.seconds.append(seconds)
            self._figures.nbytes.append(nbytes)

    def of_unclaimed(self) -> None:
        """A request's blocks are freed since nobody came for them."""
        with self._lock:
            self._figures.unclaimed += 1

    def taken(self) -> tuple[set[str], set[str], set[str]]:
        """What has ended since the last call: sent, received, and those of the received that failed."""
        with self._lock:
            ended = self._sent, self._received, self._failed
            self._sent, self._received, self._failed = set(), set(), set()
        return ended

    def figures(self) -> Figures:
        """What has been done since the last call."""
        with self._lock:
            figures, self._figures = self._figures, Figures()
        return figures
