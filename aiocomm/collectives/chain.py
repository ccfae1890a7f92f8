"""Chain: the root's data goes from rank to rank, chunk by chunk.

Every rank sends the data once, and all do so at the same time: the best for large data where a rank's own
link is what is slow, and the group is small. GPUs choose it: each writes to one other and is written to by
one, so no two meet on their way.
"""

from __future__ import annotations

from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, Step, pieces

__all__ = ["broadcast"]


def broadcast(p: Problem) -> Schedule:
    """Along the ranks, beginning with the root."""
    place = (p.rank - p.root) % p.size
    steps: list[Step] = []
    for a, b in pieces(p.receives[0], p.chunk):
        span = Span(OUT, a, b)
        if place:
            steps.append(Recv((p.rank - 1) % p.size, span))
        if place + 1 < p.size:
            steps.append(Send((p.rank + 1) % p.size, span))
    return Schedule(tuple(steps))
