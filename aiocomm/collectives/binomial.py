"""Binomial trees: ⌈log2 size⌉ rounds, in each of which every rank that has the data passes it on.

For rooted operations on small data in groups where the root's `size - 1` messages one after the other cost
more than the rounds. Trees are those of the ranks relative to the root; a subtree is a contiguous range of
them.
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

__all__ = ["broadcast", "gather", "reduce", "scatter"]


def _tree(p: Problem) -> tuple[int, int, list[int]]:
    """This rank relative to the root, its parent's distance (0: root), and the distances of its children."""
    relative = (p.rank - p.root) % p.size
    low = relative & -relative if relative else 1 << max(0, (p.size - 1).bit_length())
    children = []
    width = 1
    while width < low and relative + width < p.size:
        children.append(width)
        width *= 2
    return relative, low if relative else 0, children


def broadcast(p: Problem) -> Schedule:
    """Down the tree, the largest subtree first."""
    whole = Span(OUT, 0, p.receives[0])
    if not whole.nbytes:
        return Schedule(())
    _, up, children = _tree(p)
    steps: list[Step] = [Recv((p.rank - up) % p.size, whole)] if up else []
    steps += [Send((p.rank + width) % p.size, whole) for width in reversed(children)]
    return Schedule(tuple(steps))


def reduce(p: Problem) -> Schedule:
    """Up the tree; each rank reduces its children's partial results, in the order of the relative ranks."""
    nbytes = p.receives[0]
    if not nbytes:
        return Schedule(())
    _, up, children = _tree(p)
    own = Span(p.source, 0, nbytes)
    if not children:
        if up:
            return Schedule((Send((p.rank - up) % p.size, own),))
        return Schedule(() if p.in_place else (Copy(Span(OUT, 0, nbytes), own),))
    total = own
    kept = Span(TMP, 0, nbytes) if up else Span(OUT, 0, nbytes)
    steps: list[Step] = []
    for number, width in enumerate(children):
        came = Span(TMP, (1 + number % 2) * nbytes, (2 + number % 2) * nbytes)
        steps += [Recv((p.rank + width) % p.size, came), Reduce(kept, total, came)]
        total = kept
    if up:
        steps.append(Send((p.rank - up) % p.size, total))
    return Schedule(tuple(steps), 3 * nbytes)


def _relative_blocks(p: Problem, sizes: tuple[int, ...]) -> list[Span]:
    return blocks(TMP, [sizes[(p.root + i) % p.size] for i in range(p.size)])


def gather(p: Problem) -> Schedule:
    """Subtrees collect their blocks, in the order of the relative ranks; every rank knows all sizes."""
    relative, up, children = _tree(p)
    slots = _relative_blocks(p, p.receives)
    own = p.receives[p.rank]
    placed = blocks(OUT, p.receives)[p.root]
    mine = placed if p.in_place and not up else Span(IN, 0, own)
    steps: list[Step] = [Copy(slots[relative], mine)] if own else []
    for width in children:
        subtree = _subtree(slots, relative + width, width)
        if subtree.nbytes:
            steps.append(Recv((p.rank + width) % p.size, subtree))
    if up:
        subtree = _subtree(slots, relative, up)
        if subtree.nbytes:
            steps.append(Send((p.rank - up) % p.size, subtree))
    else:
        out = blocks(OUT, p.receives)
        steps += [
            Copy(out[(p.root + i) % p.size], slot)
            for i, slot in enumerate(slots)
            if slot.nbytes and not (i == 0 and p.in_place)
        ]
    return Schedule(tuple(steps), sum(p.receives))


def scatter(p: Problem) -> Schedule:
    """Each rank passes on the blocks of its subtrees; every rank knows all sizes."""
    relative, up, children = _tree(p)
    slots = _relative_blocks(p, p.sends)
    steps: list[Step] = []
    if up:
        subtree = _subtree(slots, relative, up)
        if subtree.nbytes:
            steps.append(Recv((p.rank - up) % p.size, subtree))
    else:
        give = blocks(IN, p.sends)
        steps += [Copy(slot, give[(p.root + i) % p.size]) for i, slot in enumerate(slots) if slot.nbytes]
    for width in reversed(children):
        subtree = _subtree(slots, relative + width, width)
        if subtree.nbytes:
            steps.append(Send((p.rank + width) % p.size, subtree))
    if slots[relative].nbytes:
        steps.append(Copy(Span(OUT, 0, slots[relative].nbytes), slots[relative]))
    return Schedule(tuple(steps), sum(p.sends))


def _subtree(slots: list[Span], first: int, width: int) -> Span:
    return Span(TMP, slots[first].start, slots[min(first + width, len(slots)) - 1].stop)
