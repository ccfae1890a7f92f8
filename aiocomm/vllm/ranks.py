"""Where workers stand, and which of one engine read which heads of which of another. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Place", "Share", "heads_of", "readers", "shares"]


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's place: its engine, pipeline stage and tensor-parallel rank."""

    engine: str
    stage: int
    rank: int
    ranks: int
    heads: int  # KV heads of the model, over all ranks


@dataclass(frozen=True, slots=True)
class Share:
    """Heads that one rank reads of a rank of another engine: ranges along both sides' head axis."""

    rank: int
    there: tuple[int, int]
    here: tuple[int, int]


def heads_of(rank: int, ranks: int, heads: int) -> range:
    """The KV heads that a tensor-parallel rank holds; several ranks hold the same where heads are fewer."""
    if ranks <= heads:
        each = heads // ranks
        return range(rank * each, (rank + 1) * each)
    head = rank * heads // ranks
    return range(head, head + 1)


def shares(rank: int, ranks: int, others: int, heads: int) -> list[Share]:
    """What rank `rank` of `ranks` reads of an engine of `others` ranks.

    Of ranks that hold the same heads each is read by another reader, as far as they go.
    """
    wanted = heads_of(rank, ranks, heads)
    copies = max(1, others // heads)
    found: list[Share] = []
    for first in range(0, others, copies):
        held = heads_of(first, others, heads)
        start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
        if start < stop:
            there = (start - held.start, stop - held.start)
            here = (start - wanted.start, stop - wanted.start)
            found.append(Share(first + rank % copies, there, here))
    return found


def readers(rank: int, ranks: int, others: int, heads: int) -> frozenset[int]:
    """The ranks of an engine of `others` ranks that read of rank `rank` of `ranks`."""
    return frozenset(
        other for other in range(others) if any(s.rank == rank for s in shares(other, others, ranks, heads))
    )
