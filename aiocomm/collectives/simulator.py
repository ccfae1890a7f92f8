"""Runs the schedules of all ranks in one process, in any order that their dependencies allow.

The harshest rules that a link may have: a send ends only when its receive is posted (no buffering), and its
bytes are read at that moment, whenever it comes. What ends correctly here under every interleaving does so on
any link.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from aiocomm.collectives.steps import IN, OUT, TMP, Copy, Recv, Schedule, Send, Span, dependencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from aiocomm.collectives.steps import Name

    Bytes = npt.NDArray[np.uint8]
    Add = Callable[[Bytes, Bytes], Bytes]

_Key = tuple[int, int, int]  # source, target, number among the messages of this pair

__all__ = ["Deadlock", "Traffic", "simulate"]


class Deadlock(Exception):
    """No rank can go on; the message shows what each waits for."""


@dataclass
class Traffic:
    """What was moved: bytes and messages, by the rank that sent or received them."""

    sent: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    received: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    messages: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))


class _Rank:
    def __init__(self, schedule: Schedule, given: Bytes, out: Bytes) -> None:
        self.steps = schedule.steps
        scratch = np.full(schedule.scratch, 0xEE, np.uint8)
        self.buffers: dict[Name, Bytes] = {IN: given, OUT: out, TMP: scratch}
        needed = dependencies(self.steps)
        self.waits = [len(n) for n in needed]
        self.followers: list[list[int]] = [[] for _ in self.steps]
        for index, earlier in enumerate(needed):
            for e in earlier:
                self.followers[e].append(index)
        self.left = len(self.steps)
        # The k-th send to a peer meets the k-th receive there, in the order of the schedule.
        counts: defaultdict[tuple[str, int], int] = defaultdict(int)
        self.number = []
        for step in self.steps:
            key = (type(step).__name__, step.peer if isinstance(step, Send | Recv) else -1)
            self.number.append(counts[key])
            counts[key] += 1

    def view(self, span: Span) -> Bytes:
        if not 0 <= span.start < span.stop <= len(self.buffers[span.buffer]):
            raise IndexError(f"{span} is outside a buffer of {len(self.buffers[span.buffer])} bytes")
        return self.buffers[span.buffer][span.start : span.stop]

    def end(self, index: int) -> list[int]:
        """Note the end of a step; returns the steps that may begin now."""
        self.left -= 1
        freed = []
        for follower in self.followers[index]:
            self.waits[follower] -= 1
            if not self.waits[follower]:
                freed.append(follower)
        return freed


def simulate(
    schedules: Sequence[Schedule],
    given: Sequence[Bytes],
    out: Sequence[Bytes],
    add: Add,
    choose: Callable[[int], int],
) -> Traffic:
    """Run all ranks to their ends.

    Args:
        schedules: one per rank.
        given: their `IN` buffers.
        out: their `OUT` buffers, changed in place.
        add: the reduction, on bytes.
        choose: picks one of n things that could happen next: 0 to n - 1.

    Raises:
        Deadlock: nothing can happen any more, and not all have ended.
        ValueError: a message and its receive differ in size.
    """
    ranks = [_Rank(s, g, o) for s, g, o in zip(schedules, given, out, strict=True)]
    posted: dict[_Key, tuple[int, Span]] = {}
    offered: dict[_Key, tuple[int, Span]] = {}
    # What may happen next: a step of a rank, or the bytes of a message that both sides have posted.
    possible: list[tuple[int, int] | _Key] = []
    traffic = Traffic()

    def free(rank: int, indices: Iterable[int]) -> None:
        possible.extend((rank, index) for index in indices)

    for r, rank in enumerate(ranks):
        free(r, (i for i, w in enumerate(rank.waits) if not w))
    while possible:
        pick = choose(len(possible))
        possible[pick], possible[-1] = possible[-1], possible[pick]
        event = possible.pop()
        if len(event) == 3:
            send, receive = offered.pop(event), posted.pop(event)
            _move(ranks, event, send[1], receive[1], traffic)
            free(event[0], ranks[event[0]].end(send[0]))
            free(event[1], ranks[event[1]].end(receive[0]))
            continue
        me, index = event
        rank = ranks[me]
        step = rank.steps[index]
        if isinstance(step, Send | Recv):
            pair = (me, step.peer) if isinstance(step, Send) else (step.peer, me)
            key = (*pair, rank.number[index])
            if isinstance(step, Send):
                offered[key] = (index, step.source)
            else:
                posted[key] = (index, step.target)
            if key in posted and key in offered:
                possible.append(key)
            continue
        if isinstance(step, Copy):
            rank.view(step.target)[:] = rank.view(step.source)
        else:
            rank.view(step.target)[:] = add(rank.view(step.left), rank.view(step.right))
        free(me, rank.end(index))
    if stuck := [r for r, rank in enumerate(ranks) if rank.left]:
        raise Deadlock(f"ranks {stuck} wait: sends {sorted(offered)}, receives {sorted(posted)}")
    return traffic


def _move(ranks: list[_Rank], key: _Key, given: Span, wanted: Span, traffic: Traffic) -> None:
    source, target, _ = key
    give, take = ranks[source].view(given), ranks[target].view(wanted)
    if len(give) != len(take):
        raise ValueError(f"{key}: {len(give)} bytes sent, {len(take)} expected")
    take[:] = give
    traffic.sent[source] += len(give)
    traffic.received[target] += len(take)
    traffic.messages[source] += 1
