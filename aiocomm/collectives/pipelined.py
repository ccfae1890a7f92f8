"""Pipelined binary trees: chunks follow each other down or up a tree of depth log2 size.

For large rooted operations in groups where the root's own link is the bottleneck: every rank sends at most
two copies.
"""

from __future__ import annotations

from aiocomm.collectives.steps import (
    OUT,
    TMP,
    Copy,
    Problem,
    Recv,
    Reduce,
    Schedule,
    Send,
    Span,
    Step,
    pieces,
)

__all__ = ["broadcast", "reduce"]

_SLOTS = 2  # chunks of each child in scratch memory


def _tree(p: Problem) -> tuple[int | None, list[int]]:
    relative = (p.rank - p.root) % p.size
    parent = None if relative == 0 else (p.root + (relative - 1) // 2) % p.size
    below = [(p.root + c) % p.size for c in (2 * relative + 1, 2 * relative + 2) if c < p.size]
    return parent, below


def broadcast(p: Problem) -> Schedule:
    """Down the tree, chunk by chunk."""
    parent, below = _tree(p)
    steps: list[Step] = []
    for a, b in pieces(p.receives[0], p.chunk):
        span = Span(OUT, a, b)
        if parent is not None:
            steps.append(Recv(parent, span))
        steps += [Send(child, span) for child in below]
    return Schedule(tuple(steps))


def reduce(p: Problem) -> Schedule:
    """Up the tree, chunk by chunk: a rank's own part first, then its children's in their order."""
    parent, below = _tree(p)
    steps: list[Step] = []
    nbytes = p.receives[0]
    inner = _SLOTS * len(below) * p.chunk
    for number, (a, b) in enumerate(pieces(nbytes, p.chunk)):
        total = own = Span(p.source, a, b)
        start = inner + number % _SLOTS * p.chunk
        kept = Span(OUT, a, b) if parent is None else Span(TMP, start, start + b - a)
        for order, child in enumerate(below):
            start = (number % _SLOTS * len(below) + order) * p.chunk
            came = Span(TMP, start, start + b - a)
            steps += [Recv(child, came), Reduce(kept, total, came)]
            total = kept
        if parent is not None:
            steps.append(Send(parent, total))
        elif not below and not p.in_place:
            steps.append(Copy(kept, own))
    return Schedule(tuple(steps), (_SLOTS * len(below) + _SLOTS) * p.chunk if below and nbytes else 0)
