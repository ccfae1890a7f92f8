"""Scatter and all-gather in one: the root gives each chunk to one rank, which gives it to all the others.

The root sends the data once, whatever the size of the group, and every other rank sends less than that: the best
for large data where a rank may send to several others at once without one being held up by another, as GPUs
between which a switch stands do. Chunks go to the ranks in turn, so that all ways are in use from the first chunks
to the last.
"""

from __future__ import annotations

from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, Step, pieces

__all__ = ["broadcast"]


def broadcast(p: Problem) -> Schedule:
    """Chunk by chunk, each by way of the next rank behind the root."""
    others = [(p.root + away) % p.size for away in range(1, p.size)]
    steps: list[Step] = []
    for number, (a, b) in enumerate(pieces(p.receives[0], p.chunk) if others else ()):
        turn = number % len(others)
        through, span = others[turn], Span(OUT, a, b)
        if p.rank == p.root:
            steps.append(Send(through, span))
        elif p.rank == through:
            steps.append(Recv(p.root, span))
            odd = len(others) % 2
            steps += [Send(others[(turn + away * (1 + odd)) % len(others)], span) for away in range(1, len(others))]
        else:
            steps.append(Recv(through, span))
    return Schedule(tuple(steps))
