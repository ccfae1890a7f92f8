"""Schedules as what each rank writes into others' memory: the same bytes, in any order that is allowed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.test_schedules import PAIRS, _sizes, problems, wanted

from aiocomm.collectives.algorithms import applicable, build
from aiocomm.collectives.pushes import pushes
from aiocomm.collectives.steps import IN, OUT, Copy, Problem, Recv, Send, Span

if TYPE_CHECKING:
    import numpy.typing as npt

    from aiocomm.collectives.pushes import Part

    Bytes = npt.NDArray[np.uint8]

MOVING = ("broadcast", "scatter", "gather", "all_gather", "all_to_all")
# Those that need neither scratch memory nor to know when memory may be written again.
WITHOUT_MESSAGES = {
    *((operation, "direct") for operation in MOVING),
    ("broadcast", "binomial"),
    ("broadcast", "pipelined"),
    ("broadcast", "chain"),
}


def perform(parts: tuple[tuple[Part, ...], ...], given: list[Bytes], out: list[Bytes], seed: int) -> int:
    """Let ranks do their parts, in any order; returns the bytes that went to others."""
    choose = random.Random(seed)
    begun, in_place = [0] * len(parts), [0] * len(parts)
    away = 0
    while any(count < len(own) for count, own in zip(in_place, parts, strict=True)):
        able = [
            rank
            for rank, own in enumerate(parts)
            if begun[rank] < len(own) and all(in_place[r] >= n for r, n in own[begun[rank]].after)
        ]
        assert able, "they wait for each other"
        rank = choose.choice(able)
        for move in parts[rank][begun[rank]].moves:
            source = {IN: given, OUT: out}[move.source.buffer][rank][move.source.start : move.source.stop]
            target = {IN: given, OUT: out}[move.target.buffer][move.rank]
            target[move.target.start : move.target.stop] = source
            away += move.source.nbytes if move.rank != rank else 0
        begun[rank] += 1
        in_place[rank] = begun[rank]
    return away


def contents(operation: str, cases: list[Problem], seed: int) -> tuple[list[Bytes], list[Bytes], list[Bytes]]:
    rng = np.random.default_rng(seed)
    given, out = [], []
    for p in cases:
        n_in, n_out = _sizes(operation, p)
        given.append(rng.integers(0, 256, n_in, np.uint8))
        out.append(rng.integers(0, 256, n_out, np.uint8))
    before = [o.copy() if p.in_place else g for p, g, o in zip(cases, given, out, strict=True)]
    return given, out, [o.copy() for o in out] if operation == "broadcast" else before


@pytest.mark.parametrize(("operation", "algorithm"), [pair for pair in PAIRS if pair[0] in MOVING])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_same_bytes_in_any_order(operation: str, algorithm: str, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2, 3, 4, 5, 8, 16]))
    if algorithm not in applicable(operation, size):
        size = 8
    root = data.draw(st.integers(0, size - 1)) if operation in ("broadcast", "scatter", "gather") else 0
    nbytes = data.draw(st.integers(0, 24))
    in_place = operation == "all_gather" and data.draw(st.booleans())
    cases = problems(operation, size, root, [nbytes] * size, data.draw(st.integers(1, 9)), 1, in_place)
    schedules = [build(operation, algorithm, p).steps for p in cases]
    parts = pushes(schedules)
    if parts is None:
        assert (operation, algorithm) not in WITHOUT_MESSAGES
        return
    given, out, before = contents(operation, cases, data.draw(st.integers(0, 1 << 20)))
    away = perform(parts, given, out, data.draw(st.integers(0, 1 << 20)))
    for p in cases:
        right = wanted(operation, p, before, cases)
        if right is not None:
            assert np.array_equal(out[p.rank][: len(right)], right)
    sent = (step.source.nbytes for steps in schedules for step in steps if isinstance(step, Send))
    assert away == sum(sent)


def test_what_goes_on_through_others_is_told_chunk_by_chunk() -> None:
    """Else nobody would pass on anything before the root is through."""
    cases = problems("broadcast", 3, 0, [12] * 3, 4, 1, False)
    root, middle, last = pushes([build("broadcast", "chain", p).steps for p in cases]) or ((), (), ())
    assert [part.after for part in root] == [(), (), ()]
    assert [part.after for part in middle] == [((0, 1),), ((0, 2),), ((0, 3),)]
    assert [part.moves for part in last] == [()]


def test_what_begins_at_once_is_one_part() -> None:
    cases = problems("all_gather", 4, 0, [5] * 4, 100, 1, False)
    parts = pushes([build("all_gather", "direct", p).steps for p in cases])
    assert parts is not None
    for rank, own in enumerate(parts):
        assert len(own) == 1
        assert sorted(move.rank for move in own[0].moves) == [0, 1, 2, 3]
        assert own[0].moves[-1].rank == rank  # what stays does not hold up what others wait for


IN3, OUT3, TMP3 = (Span(buffer, 0, 3) for buffer in (IN, OUT, "tmp"))


@pytest.mark.parametrize(
    "schedules",
    [
        [[Send(1, TMP3)], [Recv(0, OUT3)]],
        [[Send(1, IN3)], [Recv(0, TMP3)]],
        [[Send(1, IN3)], [Copy(IN3, OUT3), Recv(0, OUT3)]],  # written while it may still be read
        [[Send(1, IN3)], [Recv(0, OUT3), Copy(IN3, OUT3)]],
        [[Send(1, IN3), Send(1, IN3)], [Recv(0, OUT3)]],
    ],
    ids=["from scratch", "to scratch", "over what is read", "copied on", "unmatched"],
)
def test_what_takes_messages(schedules: list[list[Send | Recv | Copy]]) -> None:
    assert pushes(schedules) is None
