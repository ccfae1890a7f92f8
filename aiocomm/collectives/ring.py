"""Ring: every rank talks to its two neighbours only, `size - 1` rounds.

The fewest bytes, evenly over the ring's links: the best for large data where links are shared or far apart.
Messages are cut into chunks, so that a chunk is passed on while the next one comes. Bandwidth-optimal; see
Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009). A block is
reduced along the ring from the rank after its owner to its owner: an order that does not change between runs,
and one result for all.
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
    pieces,
)

__all__ = ["all_gather", "all_reduce", "reduce_scatter"]

_SLOTS = 4  # chunks that may be in scratch memory at once


def _pass_on(p: Problem, first: int) -> list[Step]:
    """Pass blocks of `OUT` round the ring, beginning with block `first` of this rank."""
    out = blocks(OUT, p.receives)
    right, left = (p.rank + 1) % p.size, (p.rank - 1) % p.size
    steps: list[Step] = []
    for round_ in range(p.size - 1):
        give, take = out[(first - round_) % p.size], out[(first - round_ - 1) % p.size]
        steps += [Send(right, give.part(a, b)) for a, b in pieces(give.nbytes, p.chunk)]
        steps += [Recv(left, take.part(a, b)) for a, b in pieces(take.nbytes, p.chunk)]
    return steps


def all_gather(p: Problem) -> Schedule:
    """Blocks go round, each rank passing on what it got before."""
    steps: list[Step] = []
    if not p.in_place and p.receives[p.rank]:
        own = p.receives[p.rank]
        steps.append(Copy(blocks(OUT, p.receives)[p.rank], Span(IN, 0, own)))
    return Schedule(tuple(steps + _pass_on(p, p.rank)))


def _reduce_rounds(p: Problem, partial: list[Span], last: Span) -> tuple[list[Step], int]:
    """Partial sums of block b go from rank b + 1 to rank b; `partial` says where they are kept meanwhile."""
    give = blocks(p.source, p.receives)
    right, left = (p.rank + 1) % p.size, (p.rank - 1) % p.size
    steps: list[Step] = []
    slot = 0
    for round_ in range(p.size - 1):
        sent, taken = (p.rank - round_ - 1) % p.size, (p.rank - round_ - 2) % p.size
        source = give[sent] if round_ == 0 else partial[sent]
        steps += [Send(right, source.part(a, b)) for a, b in pieces(source.nbytes, p.chunk)]
        target = last if round_ == p.size - 2 else partial[taken]
        for a, b in pieces(give[taken].nbytes, p.chunk):
            start = slot % _SLOTS * p.chunk
            slot += 1
            came = Span(TMP, start, start + b - a)
            steps += [Recv(left, came), Reduce(target.part(a, b), came, give[taken].part(a, b))]
    return steps, min(slot, _SLOTS) * p.chunk


def reduce_scatter(p: Problem) -> Schedule:
    """Partial sums go round; each ends at its owner."""
    own = p.receives[p.rank]
    if p.size == 1:
        return _alone(p, own)
    # Partial sums must not touch the user's input: they lie behind the slots of the chunks that come.
    kept = [Span(TMP, s.start + _SLOTS * p.chunk, s.stop + _SLOTS * p.chunk) for s in blocks(TMP, p.receives)]
    steps, _ = _reduce_rounds(p, kept, Span(OUT, 0, own))
    return Schedule(tuple(steps), _SLOTS * p.chunk + sum(p.receives))


def all_reduce(p: Problem) -> Schedule:
    """A ring reduce-scatter into `OUT`, then a ring all-gather."""
    if p.size == 1:
        return _alone(p, sum(p.receives))
    out = blocks(OUT, p.receives)
    steps, scratch = _reduce_rounds(p, out, out[p.rank])
    return Schedule(tuple(steps + _pass_on(p, p.rank)), scratch)


def _alone(p: Problem, nbytes: int) -> Schedule:
    if p.in_place or not nbytes:
        return Schedule(())
    return Schedule((Copy(Span(OUT, 0, nbytes), Span(IN, 0, nbytes)),))
