"""Direct: every block goes straight from its owner to its user, in one message or one per chunk.

The fewest bytes and the fewest copies, `size - 1` messages per rank: the best where every pair has a path of
its own, as over shared memory. Reductions are computed by the block's owner alone, in the order of the ranks,
so every rank gets the same bits in every run.
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

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "gather",
    "one_shot",
    "reduce",
    "reduce_scatter",
    "scatter",
]

_DEPTH = 2  # chunks of which the parts of all ranks may be in scratch memory at once


def all_gather(p: Problem) -> Schedule:
    """Each rank's block to every other."""
    out = blocks(OUT, p.receives)
    own = out[p.rank] if p.in_place else Span(IN, 0, p.receives[p.rank])
    steps: list[Step] = []
    for away in range(1, p.size):
        source, target = (p.rank - away) % p.size, (p.rank + away) % p.size
        if own.nbytes:
            steps.append(Send(target, own))
        if out[source].nbytes:
            steps.append(Recv(source, out[source]))
    if not p.in_place and own.nbytes:
        steps.append(Copy(out[p.rank], own))
    return Schedule(tuple(steps))


def all_to_all(p: Problem) -> Schedule:
    """Block j of rank i becomes block i of rank j."""
    give, take = blocks(IN, p.sends), blocks(OUT, p.receives)
    steps: list[Step] = []
    for away in range(1, p.size):
        source, target = (p.rank - away) % p.size, (p.rank + away) % p.size
        if give[target].nbytes:
            steps.append(Send(target, give[target]))
        if take[source].nbytes:
            steps.append(Recv(source, take[source]))
    if give[p.rank].nbytes:
        steps.append(Copy(take[p.rank], give[p.rank]))
    return Schedule(tuple(steps))


def broadcast(p: Problem) -> Schedule:
    """The root's buffer to every other rank."""
    whole = Span(OUT, 0, p.receives[0])
    if not whole.nbytes:
        return Schedule(())
    if p.rank != p.root:
        return Schedule((Recv(p.root, whole),))
    return Schedule(tuple(Send((p.root + away) % p.size, whole) for away in range(1, p.size)))


def gather(p: Problem) -> Schedule:
    """Each rank's block to the root."""
    if p.rank != p.root:
        own = Span(IN, 0, p.sends[0])
        return Schedule((Send(p.root, own),) if own.nbytes else ())
    out = blocks(OUT, p.receives)
    steps: list[Step] = [Recv(r, span) for r, span in enumerate(out) if r != p.root and span.nbytes]
    if not p.in_place and out[p.root].nbytes:
        steps.append(Copy(out[p.root], Span(IN, 0, out[p.root].nbytes)))
    return Schedule(tuple(steps))


def scatter(p: Problem) -> Schedule:
    """Each block of the root to its rank."""
    if p.rank != p.root:
        own = Span(OUT, 0, p.receives[0])
        return Schedule((Recv(p.root, own),) if own.nbytes else ())
    give = blocks(IN, p.sends)
    steps: list[Step] = [Send(r, span) for r, span in enumerate(give) if r != p.root and span.nbytes]
    if give[p.root].nbytes:
        steps.append(Copy(Span(OUT, 0, give[p.root].nbytes), give[p.root]))
    return Schedule(tuple(steps))


def _collect(p: Problem, own: Span, target: Span, number: int) -> list[Step]:
    """Receive every other rank's part of a chunk and reduce all, in the order of the ranks, into `target`."""
    width = p.chunk * (p.size - 1)
    base = number % _DEPTH * width
    steps: list[Step] = []
    parts = []
    for rank in range(p.size):
        if rank == p.rank:
            parts.append(own)
            continue
        slot = (rank - p.rank - 1) % p.size
        start = base + slot * p.chunk
        parts.append(Span(TMP, start, start + own.nbytes))
    for away in range(1, p.size):
        peer = (p.rank - away) % p.size
        steps.append(Recv(peer, parts[peer]))
    total = parts[0]
    for rank in range(1, p.size):
        last = rank == p.size - 1
        into = target if last else parts[rank] if total == own else total
        steps.append(Reduce(into, total, parts[rank]))
        total = into
    return steps


def _scratch(p: Problem, nbytes: int) -> int:
    # Slots of a chunk are a whole chunk apart, also where less than one is reduced.
    return (_DEPTH if nbytes > p.chunk else 1) * p.chunk * (p.size - 1) if nbytes else 0


def reduce(p: Problem) -> Schedule:
    """Every rank's buffer, chunk by chunk, to the root, which reduces."""
    nbytes = p.receives[0]
    steps: list[Step] = []
    whole = Span(p.source, 0, nbytes)
    if p.rank != p.root:
        return Schedule(tuple(Send(p.root, whole.part(a, b)) for a, b in pieces(nbytes, p.chunk)))
    if p.size == 1:
        return _alone(p, nbytes)
    for number, (a, b) in enumerate(pieces(nbytes, p.chunk)):
        steps += _collect(p, whole.part(a, b), Span(OUT, a, b), number)
    return Schedule(tuple(steps), _scratch(p, nbytes))


def _scatter_steps(p: Problem, target: Span) -> list[Step]:
    give = blocks(p.source, p.receives)
    steps: list[Step] = []
    most = max(p.receives, default=0)
    for number, (a, b) in enumerate(pieces(most, p.chunk)):
        for away in range(1, p.size):
            peer = (p.rank + away) % p.size
            if a < give[peer].nbytes:
                steps.append(Send(peer, give[peer].part(a, min(b, give[peer].nbytes))))
        own = give[p.rank]
        if a < own.nbytes:
            end = min(b, own.nbytes)
            steps += _collect(p, own.part(a, end), target.part(a, end), number)
    return steps


def reduce_scatter(p: Problem) -> Schedule:
    """Each block, from all ranks, to its owner, which reduces."""
    own = p.receives[p.rank]
    if p.size == 1:
        return _alone(p, own)
    steps = _scatter_steps(p, Span(OUT, 0, own))
    return Schedule(tuple(steps), _scratch(p, own))


def all_reduce(p: Problem) -> Schedule:
    """A reduce-scatter whose owners send each reduced chunk on to all."""
    if p.size == 1:
        return _alone(p, sum(p.receives))
    out = blocks(OUT, p.receives)
    give = blocks(p.source, p.receives)
    steps: list[Step] = []
    later: list[Step] = []
    for number, (a, b) in enumerate(pieces(max(p.receives, default=0), p.chunk)):
        for away in range(1, p.size):
            peer = (p.rank + away) % p.size
            if a < give[peer].nbytes:
                steps.append(Send(peer, give[peer].part(a, min(b, give[peer].nbytes))))
        own = out[p.rank]
        end = min(b, own.nbytes)
        if a < end:
            steps += _collect(p, give[p.rank].part(a, end), own.part(a, end), number)
        for away in range(1, p.size):
            target, source = (p.rank + away) % p.size, (p.rank - away) % p.size
            if a < end:
                later.append(Send(target, own.part(a, end)))
            if a < out[source].nbytes:
                later.append(Recv(source, out[source].part(a, min(b, out[source].nbytes))))
    return Schedule(tuple(steps + later), _scratch(p, p.receives[p.rank]))


def one_shot(p: Problem) -> Schedule:
    """All-reduce in one round: every rank gets every buffer and reduces all in the order of the ranks."""
    nbytes = sum(p.receives)
    if p.size == 1:
        return _alone(p, nbytes)
    if not nbytes:
        return Schedule(())
    own, out = Span(p.source, 0, nbytes), Span(OUT, 0, nbytes)
    steps: list[Step] = [Send((p.rank + away) % p.size, own) for away in range(1, p.size)]
    whole = Problem(p.rank, p.size, item=p.item, chunk=nbytes, in_place=p.in_place)
    steps += _collect(whole, own, out, 0)
    return Schedule(tuple(steps), nbytes * (p.size - 1))


def _alone(p: Problem, nbytes: int) -> Schedule:
    if p.in_place or not nbytes:
        return Schedule(())
    return Schedule((Copy(Span(OUT, 0, nbytes), Span(IN, 0, nbytes)),))
