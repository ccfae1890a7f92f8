"""Scatter and all-gather in one: the root gives each chunk to one rank, which gives it to all the others.

The root sends the data once, whatever the size of the group, and a chunk is passed on once: for large data
where a switch stands between ranks, as it does between GPUs. What decides there is that no two ranks write to
the same third one at a time, since whoever waits holds up what it has for others. While the root gives a
chunk to rank t of those behind it, rank t - 1 passes its own on to t + 1, rank t - 2 to t + 2, and so on: all
different ones, if their number is odd.
"""

from __future__ import annotations

from aiocomm.collectives.steps import OUT, Problem, Recv, Schedule, Send, Span, Step, pieces

__all__ = ["broadcast"]


def broadcast(p: Problem) -> Schedule:
    """Chunk by chunk, each by way of the next rank behind the root."""
    others = [(p.root + away) % p.size for away in range(1, p.size)]
    step = 1 + len(others) % 2
    steps: list[Step] = []
    for number, (a, b) in enumerate(pieces(p.receives[0], p.chunk) if others else ()):
        turn = number % len(others)
        through, span = others[turn], Span(OUT, a, b)
        if p.rank == p.root:
            steps.append(Send(through, span))
        elif p.rank == through:
            steps.append(Recv(p.root, span))
            targets = (others[(turn + step * away) % len(others)] for away in range(1, len(others)))
            steps += [Send(target, span) for target in targets]
        else:
            steps.append(Recv(through, span))
    return Schedule(tuple(steps))
