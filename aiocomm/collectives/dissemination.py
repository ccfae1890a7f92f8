"""Dissemination: in round k every rank sends what it has to the rank 2^k places on; ⌈log2 size⌉ rounds.

Carries the headers of collectives, and so is the barrier, in groups too large for a message from each rank to
each (Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988).
"""

from __future__ import annotations

from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, Step

__all__ = ["exchange"]


def exchange(p: Problem) -> Schedule:
    """All-gather of slots of one size; slot k of `OUT` is from the rank k places back, slot 0 one's own."""
    slot = p.receives[0]
    steps: list[Step] = []
    have = 1
    while have < p.size:
        count = min(have, p.size - have)
        steps.append(Send((p.rank + have) % p.size, Span(OUT, 0, count * slot)))
        steps.append(Recv((p.rank - have) % p.size, Span(OUT, have * slot, (have + count) * slot)))
        have += count
    return Schedule(tuple(steps))
