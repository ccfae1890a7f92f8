"""The vocabulary of collective schedules.

A schedule is one rank's list of steps. Its meaning is that of running them in order; what may overlap follows
from it: a step waits for the earlier steps that touch the same bytes, unless both only read. The k-th `Send`
from one rank to another meets the k-th `Recv` there. Nothing here moves a byte.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "IN",
    "OUT",
    "TMP",
    "Copy",
    "Problem",
    "Recv",
    "Reduce",
    "Schedule",
    "Send",
    "Span",
    "Step",
    "blocks",
    "dependencies",
    "even",
    "pieces",
]

Name: TypeAlias = Literal["in", "out", "tmp"]
IN: Final[Name] = "in"
OUT: Final[Name] = "out"
TMP: Final[Name] = "tmp"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `stop` of a named buffer."""

    buffer: Name
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.stop - self.start

    def part(self, start: int, stop: int) -> Span:
        """Bytes `start` to `stop` of this span."""
        return Span(self.buffer, self.start + start, self.start + stop)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a span to a rank of the group."""

    peer: int
    source: Span


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive a span from a rank of the group."""

    peer: int
    target: Span


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `source` to `target`, of one length."""

    target: Span
    source: Span


@dataclass(frozen=True, slots=True)
class Reduce:
    """`target = left (op) right`, elementwise; `target` may be either of them."""

    target: Span
    left: Span
    right: Span


Step: TypeAlias = Send | Recv | Copy | Reduce


@dataclass(frozen=True, slots=True)
class Schedule:
    """One rank's steps, and how many bytes of scratch memory they need."""

    steps: tuple[Step, ...]
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """What a schedule is to achieve, seen from one rank.

    Args:
        rank: this rank in the group.
        size: ranks of the group.
        root: the rank that has or gets everything, where there is one.
        sends: bytes of the blocks of `IN`, by the rank that they are for; for gather the one own block; empty
            where this rank gives nothing.
        receives: bytes of the blocks of `OUT`, by the rank they come from, or whose result they are.
        item: bytes of an element; nothing is cut inside one.
        chunk: bytes beyond which messages are cut so that steps overlap; a multiple of `item`.
        in_place: `IN` and `OUT` are the same memory; only `OUT` is named then.
        hosts: a number for the host of each rank; empty where all are on one.
    """

    rank: int
    size: int
    root: int = 0
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()
    item: int = 1
    chunk: int = 1 << 20
    in_place: bool = False
    hosts: tuple[int, ...] = ()

    @property
    def source(self) -> Name:
        """The buffer that holds this rank's contribution."""
        return OUT if self.in_place else IN


def blocks(buffer: Name, sizes: Sequence[int]) -> list[Span]:
    """Consecutive spans of these sizes, in bytes."""
    ends = list(accumulate(sizes, initial=0))
    return [Span(buffer, start, stop) for start, stop in pairwise(ends)]


@functools.lru_cache(256)
def even(nbytes: int, item: int, parts: int) -> tuple[int, ...]:
    """Cut a vector into blocks of nearly one size, in bytes, between elements."""
    whole, more = divmod(nbytes // item, parts)
    return tuple((whole + (part < more)) * item for part in range(parts))


def pieces(nbytes: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut `nbytes` into runs of at most `chunk` bytes."""
    for start in range(0, nbytes, chunk):
        yield start, min(start + chunk, nbytes)


def _touched(step: Step) -> tuple[tuple[Span, bool], ...]:
    match step:
        case Send():
            return ((step.source, False),)
        case Recv():
            return ((step.target, True),)
        case Copy():
            return ((step.source, False), (step.target, True))
        case Reduce():
            return ((step.left, False), (step.right, False), (step.target, True))


def dependencies(steps: Sequence[Step]) -> tuple[tuple[int, ...], ...]:
    """For each step, the earlier steps that must have ended before it may begin.

    A write that covers an earlier access supersedes it: whoever waits for the write waits for both.
    """
    accesses: dict[Name, list[tuple[int, int, int, bool]]] = {}
    found = []
    for index, step in enumerate(steps):
        needed: set[int] = set()
        touched = _touched(step)
        for span, writes in touched:
            for start, stop, earlier, wrote in accesses.get(span.buffer, ()):
                if start < span.stop and span.start < stop and (writes or wrote):
                    needed.add(earlier)
        for span, writes in touched:
            known = accesses.setdefault(span.buffer, [])
            if writes:
                known[:] = [a for a in known if not (span.start <= a[0] and a[1] <= span.stop)]
            known.append((span.start, span.stop, index, writes))
        needed.discard(index)
        found.append(tuple(sorted(needed)))
    return tuple(found)
