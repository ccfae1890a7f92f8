"""A schedule made ready to run: what waits for what, which message is which, and whether one round is all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from aiocomm.collectives import gpu
from aiocomm.collectives.algorithms import build
from aiocomm.collectives.cost import chunk_bytes
from aiocomm.collectives.steps import Copy, Recv, Reduce, Send, dependencies

if TYPE_CHECKING:
    from aiocomm.collectives.steps import Problem, Span, Step

__all__ = ["EAGER_BYTES", "Eager", "Plan", "make_plan"]

EAGER_BYTES: Final = 16 << 10  # of one message that rides with a header


@dataclass(frozen=True, slots=True)
class Eager:
    """A schedule of one round and small messages, which travel with the call's headers."""

    sends: dict[int, Span]
    receives: dict[int, Span]
    local: tuple[Copy | Reduce, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One rank's part of a collective."""

    operation: str
    algorithm: str
    steps: tuple[Step, ...]
    scratch: int
    waits: tuple[int, ...]  # earlier steps that a step waits for
    followers: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]  # of a message among those of its pair
    first: tuple[int, ...]  # steps that wait for nothing
    reduced: tuple[bool, ...]  # steps that wait for a reduction
    eager: Eager | None


def make_plan(operation: str, algorithm: str, problem: Problem, eager: bool, on_gpu: bool = False) -> Plan:
    """Build the schedule and work out everything that is the same at every call.

    Args:
        eager: small messages may travel with the headers.
        on_gpu: the arrays are.
    """
    largest = max((*problem.receives, *problem.sends, 1))
    item = problem.item
    chunk = (
        gpu.chunk_bytes(operation, largest, item, problem.size)
        if on_gpu
        else chunk_bytes(operation, largest, item)
    )
    problem = replace(problem, chunk=chunk)
    schedule = build(operation, algorithm, problem)
    needed = dependencies(schedule.steps)
    followers: list[list[int]] = [[] for _ in needed]
    for index, earlier in enumerate(needed):
        for e in earlier:
            followers[e].append(index)
    # Decided alike by all ranks: in these every rank sees the sizes of all messages.
    single = algorithm == "one_shot" or (algorithm == "direct" and operation != "all_reduce")
    counts: dict[tuple[bool, int], int] = {}
    numbers = []
    for step in schedule.steps:
        key = (isinstance(step, Send), step.peer) if isinstance(step, Send | Recv) else (False, -1)
        numbers.append(counts.get(key, 0))
        counts[key] = numbers[-1] + 1
    return Plan(
        operation,
        algorithm,
        schedule.steps,
        schedule.scratch,
        tuple(len(n) for n in needed),
        tuple(tuple(f) for f in followers),
        tuple(numbers),
        tuple(i for i, n in enumerate(needed) if not n),
        tuple(any(isinstance(schedule.steps[e], Reduce) for e in n) for n in needed),
        _one_round(schedule.steps, needed) if eager and single else None,
    )


def _one_round(steps: tuple[Step, ...], needed: tuple[tuple[int, ...], ...]) -> Eager | None:
    """All sends, then all receives, then the rest: the same result where no message depends on a step."""
    sends: dict[int, Span] = {}
    receives: dict[int, Span] = {}
    local: list[Copy | Reduce] = []
    for step, earlier in zip(steps, needed, strict=True):
        if isinstance(step, Copy | Reduce):
            local.append(step)
            continue
        into, span = (sends, step.source) if isinstance(step, Send) else (receives, step.target)
        if earlier or step.peer in into or span.nbytes > EAGER_BYTES:
            return None
        into[step.peer] = span
    return Eager(sends, receives, tuple(local))
