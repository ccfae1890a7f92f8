"""Recursive doubling: partners at distance 1, 2, 4, … exchange all that they have; ⌈log2 size⌉ rounds.

The fewest rounds for middling sizes where a message costs more than its bytes. See Thakur, Rabenseifner and
Gropp, "Optimization of collective communication operations in MPICH" (2005). Both partners put the part of
the lower ranks first, so all ranks compute the same bits.
"""

from __future__ import annotations

from aiocomm.collectives.steps import (
    IN,
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
    blocks,
)

__all__ = ["all_gather", "all_reduce"]


def all_gather(p: Problem) -> Schedule:
    """Groups of 1, 2, 4, … ranks swap all their blocks; the group's size is a power of two."""
    out = blocks(OUT, p.receives)
    steps: list[Step] = []
    if not p.in_place and p.receives[p.rank]:
        steps.append(Copy(out[p.rank], Span(IN, 0, p.receives[p.rank])))
    width = 1
    while width < p.size:
        partner = p.rank ^ width
        mine, theirs = p.rank // width * width, partner // width * width
        give = Span(OUT, out[mine].start, out[mine + width - 1].stop)
        take = Span(OUT, out[theirs].start, out[theirs + width - 1].stop)
        if give.nbytes:
            steps.append(Send(partner, give))
        if take.nbytes:
            steps.append(Recv(partner, take))
        width *= 2
    return Schedule(tuple(steps))


def all_reduce(p: Problem) -> Schedule:
    """Swap and reduce whole buffers; ranks beyond a power of two hand theirs to a neighbour first."""
    nbytes = sum(p.receives)
    whole, came = Span(OUT, 0, nbytes), Span(TMP, 0, nbytes)
    steps: list[Step] = []
    if not p.in_place and nbytes:
        steps.append(Copy(whole, Span(IN, 0, nbytes)))
    if p.size == 1 or not nbytes:
        return Schedule(tuple(steps))
    power = 1 << (p.size.bit_length() - 1)
    extra = p.size - power
    if p.rank < 2 * extra and p.rank % 2 == 0:
        steps += [Send(p.rank + 1, whole), Recv(p.rank + 1, whole)]
        return Schedule(tuple(steps))
    if p.rank < 2 * extra:
        steps += [Recv(p.rank - 1, came), Reduce(whole, came, whole)]
    number = p.rank // 2 if p.rank < 2 * extra else p.rank - extra
    width = 1
    while width < power:
        other = number ^ width
        partner = 2 * other + 1 if other < extra else other + extra
        left, right = (came, whole) if other < number else (whole, came)
        steps += [Send(partner, whole), Recv(partner, came), Reduce(whole, left, right)]
        width *= 2
    if p.rank < 2 * extra:
        steps.append(Send(p.rank - 1, whole))
    return Schedule(tuple(steps), nbytes)
