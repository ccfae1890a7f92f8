"""Bruck: ⌈log2 size⌉ rounds for any size, by rotating the blocks.

See Bruck and others, "Efficient algorithms for all-to-all communications in multiport message-passing
systems" (1997). All-gather moves the fewest bytes; all-to-all moves each block up to log2 size times, to save
messages.
"""

from __future__ import annotations

from aiocomm.collectives.steps import (
    IN,
    OUT,
    TMP,
    Copy,
    Problem,
    Recv,
    Schedule,
    Send,
    Span,
    Step,
    blocks,
)

__all__ = ["all_gather", "all_to_all"]


def all_gather(p: Problem) -> Schedule:
    """Slot k of the scratch memory is the block of the rank k places on; the slots double every round."""
    slots = blocks(TMP, [p.receives[(p.rank + k) % p.size] for k in range(p.size)])
    out = blocks(OUT, p.receives)
    own = out[p.rank] if p.in_place else Span(IN, 0, p.receives[p.rank])
    steps: list[Step] = [Copy(slots[0], own)] if own.nbytes else []
    have = 1
    while have < p.size:
        count = min(have, p.size - have)
        give = Span(TMP, slots[0].start, slots[count - 1].stop)
        take = Span(TMP, slots[have].start, slots[have + count - 1].stop)
        if give.nbytes:
            steps.append(Send((p.rank - have) % p.size, give))
        if take.nbytes:
            steps.append(Recv((p.rank + have) % p.size, take))
        have += count
    steps += [
        Copy(out[(p.rank + k) % p.size], slot)
        for k, slot in enumerate(slots)
        if slot.nbytes and not (k == 0 and p.in_place)
    ]
    return Schedule(tuple(steps), sum(p.receives))


def all_to_all(p: Problem) -> Schedule:
    """Block for the rank k places on travels in the rounds of the bits of k; all blocks have one size."""
    size, block = p.size, p.sends[0]
    if not block:
        return Schedule(())
    give, take = blocks(IN, p.sends), blocks(OUT, p.receives)
    slots = blocks(TMP, [block] * size)
    steps: list[Step] = [Copy(slots[k], give[(p.rank + k) % size]) for k in range(size)]
    packed = size * block
    width = 1
    while width < size:
        moving = [k for k in range(size) if k & width]
        out = Span(TMP, packed, packed + len(moving) * block)
        came = Span(TMP, out.stop, out.stop + len(moving) * block)
        steps += [Copy(out.part(i * block, (i + 1) * block), slots[k]) for i, k in enumerate(moving)]
        steps += [Send((p.rank + width) % size, out), Recv((p.rank - width) % size, came)]
        steps += [Copy(slots[k], came.part(i * block, (i + 1) * block)) for i, k in enumerate(moving)]
        width *= 2
    steps += [Copy(take[(p.rank - k) % size], slots[k]) for k in range(size)]
    return Schedule(tuple(steps), 3 * size * block)
