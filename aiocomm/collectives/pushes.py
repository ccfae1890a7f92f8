"""A schedule as what each rank writes into the others' memory.

Where every rank reaches the arrays of all others, nobody needs to ask for a message or to wait for one: who
has the bytes writes them to where the schedule's `Recv` would have put them. What a rank writes is cut into
parts, in their order; a part may need parts of others to be in place, where the schedule passes on what has
come. Pure, as the schedules are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiocomm.collectives.steps import TMP, Copy, Recv, Send, Span, dependencies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.collectives.steps import Step

__all__ = ["Move", "Part", "pushes"]


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of this rank to `target` at a rank of the group, which may be itself."""

    rank: int
    source: Span
    target: Span


@dataclass(frozen=True, slots=True)
class Part:
    """Moves that begin together.

    Args:
        after: ranks, and how many of their parts have to be in place before.
    """

    moves: tuple[Move, ...]
    after: tuple[tuple[int, int], ...] = ()


def pushes(schedules: Sequence[Sequence[Step]]) -> tuple[tuple[Part, ...], ...] | None:
    """The parts of every rank, whose schedules are given in the order of the ranks.

    None: these schedules reduce, need scratch memory, or have to know when memory may be written again.
    """
    receives: dict[tuple[int, int], list[tuple[int, Span]]] = defaultdict(list)  # by sender and receiver
    needed = [dependencies(steps) for steps in schedules]
    passed_on = {(rank, step) for rank, some in enumerate(needed) for earlier in some for step in earlier}
    for rank, steps in enumerate(schedules):
        for index, step in enumerate(steps):
            if isinstance(step, Recv):
                if step.target.buffer == TMP or needed[rank][index]:
                    return None
                receives[step.peer, rank].append((index, step.target))
    sent: dict[tuple[int, int], int] = {}  # the part that fills a receive, by rank and step
    waiting: list[list[tuple[list[Move], tuple[int, ...]]]] = []  # by rank: moves, and what they wait for
    for rank, steps in enumerate(schedules):
        parts: list[tuple[list[Move], tuple[int, ...]]] = []
        counts: dict[int, int] = defaultdict(int)
        alone = True  # the last part stays as it is
        for index, step in enumerate(steps):
            before = needed[rank][index]
            match step:
                case Recv():
                    continue
                case Send(peer, source):
                    came = receives[rank, peer]
                    if counts[peer] == len(came) or source.buffer == TMP:
                        return None
                    into, target = came[counts[peer]]
                    counts[peer] += 1
                    move = Move(peer, source, target)
                case Copy(target, source) if TMP not in (target.buffer, source.buffer) and not before:
                    into, move = -1, Move(rank, source, target)
                case _:
                    return None
            if not all(isinstance(steps[earlier], Recv) for earlier in before):
                return None
            awaited = (move.rank, into) in passed_on
            if awaited or alone or before != parts[-1][1]:
                parts.append(([], before))
            alone = awaited
            parts[-1][0].append(move)
            if into >= 0:
                sent[move.rank, into] = len(parts)
        waiting.append(parts or [([], ())])
    found = []
    for rank, parts in enumerate(waiting):
        own = []
        for moves, before in parts:
            after: dict[int, int] = {}
            for step_index in before:
                step = schedules[rank][step_index]
                assert isinstance(step, Recv)
                after[step.peer] = max(after.get(step.peer, 0), sent[rank, step_index])
            own.append(Part(tuple(moves), tuple(sorted(after.items()))))
        found.append(tuple(own))
    return tuple(found)
