"""Spread: the root gives each chunk to one rank, in turn, which gives it to all others.

A scatter and an all-gather at once: the root sends the data once, and every other rank less than once, so they
keep up with the root even where passing a chunk on takes a moment. The best for large data where a rank's own
link is what is slow. GPUs choose it, whose copy engines do one copy after the other.
"""

from __future__ import annotations

from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, Step, pieces

__all__ = ["broadcast"]


def broadcast(p: Problem) -> Schedule:
    """From the root to all, by way of all."""
    others = [(p.root + away) % p.size for away in range(1, p.size)]
    steps: list[Step] = []
    for number, (a, b) in enumerate(pieces(p.receives[0], p.chunk)):
        if not others:
            break
        span = Span(OUT, a, b)
        first = others[number % len(others)]
        if p.rank == p.root:
            steps.append(Send(first, span))
        elif p.rank != first:
            steps.append(Recv(first, span))
        else:
            steps.append(Recv(p.root, span))
            place = others.index(first)
            steps += [Send(other, span) for other in (*others[place + 1 :], *others[:place])]
    return Schedule(tuple(steps))
