"""Routing and weighted sums of a mixture of experts against models of plain loops, bit by bit."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiocomm.collectives.headers import header
from aiocomm.errors import UsageError
from aiocomm.moe.placement import Placement, place
from aiocomm.moe.routing import Part, arrange, checked, route, routed
from aiocomm.moe.weighting import add_up, weigh
from aiocomm.moe.wire import HEAD_BYTES, Head, lists_bytes, pack_lists, unpack_lists
from aiocomm_native import _core

Array = np.ndarray[Any, Any]
ONE = place(1, None, 1)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Placement, list[tuple[Array, Array]]]:
    """A placement, and for each rank the experts and weights of its tokens."""
    size, experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    given_map = draw(st.none() | st.lists(st.integers(0, size - 1), min_size=experts, max_size=experts))
    seeded = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    ranks = []
    for _ in range(size):
        shape = draw(st.integers(0, 9)), draw(st.integers(1, 4))
        ids = seeded.integers(draw(st.sampled_from([-1, 0])), experts, shape)
        ranks.append((ids, seeded.normal(size=shape).astype(np.float32)))
    return place(experts, given_map, size), ranks


def sent(world: tuple[Placement, list[tuple[Array, Array]]]) -> list[list[Part]]:
    """By sender, its parts by receiver."""
    placement, ranks = world
    return [route(ids, weights, placement) for ids, weights in ranks]


def goes_once(placement: Placement, ids: Array, weights: Array, parts: list[Part]) -> None:
    """Check what one rank sends."""
    for rank, part in enumerate(parts):
        expected = {
            token: [
                (int(e), float(w))
                for e, w in zip(ids[token], weights[token], strict=True)
                if e >= 0 and placement.owner[e] == rank
            ]
            for token in range(len(ids))
        }
        expected = {token: pairs for token, pairs in expected.items() if pairs}
        assert part.tokens.tolist() == sorted(expected)
        ends = np.cumsum(part.counts).tolist()
        found = list(zip(part.experts.tolist(), part.weights.tolist(), strict=True))
        for token, start, end in zip(part.tokens.tolist(), [0, *ends], ends, strict=False):
            assert found[start:end] == expected[token]
        assert (ends[-1] if ends else 0) == len(found)


@settings(max_examples=150, deadline=None)
@given(world=worlds())
def test_each_token_goes_once_to_each_rank_of_its_experts(
    world: tuple[Placement, list[tuple[Array, Array]]],
) -> None:
    placement, ranks = world
    for (ids, weights), parts in zip(ranks, sent(world), strict=True):
        goes_once(placement, ids, weights, parts)


@pytest.mark.parametrize("size", [63, 64, 65, 300])
def test_it_goes_once_to_each_of_many_ranks(size: int) -> None:
    seeded = np.random.default_rng(size)
    ids = seeded.integers(-1, 2 * size, (40, 9))
    ids[7] = ids[7, 0]  # one expert several times
    weights = seeded.normal(size=ids.shape).astype(np.float32)
    placement = place(2 * size, None, size)
    goes_once(placement, ids, weights, route(ids, weights, placement))
    for wrong in (-2, 2 * size):
        ids[39, 8] = wrong
        with pytest.raises(ValueError, match="not there"):
            route(ids, weights, placement)


@settings(max_examples=150, deadline=None)
@given(world=worlds())
def test_what_comes_is_arranged_by_expert_and_then_by_row(
    world: tuple[Placement, list[tuple[Array, Array]]],
) -> None:
    placement, ranks = world
    parts = sent(world)
    for rank in range(placement.size):
        came = [p[rank] for p in parts]
        found = arrange(came, placement, rank)
        triples, row = [], 0
        for (ids, weights), part in zip(ranks, came, strict=True):
            for token in part.tokens.tolist():
                triples += [
                    (int(e), row, float(w))
                    for e, w in zip(ids[token], weights[token], strict=True)
                    if e >= 0 and placement.owner[e] == rank
                ]
                row += 1
        triples.sort(key=lambda triple: triple[:2])
        assert found.rows.tolist() == [r for _, r, _ in triples]
        assert found.weights.tolist() == [w for _, _, w in triples]
        assert found.starts.tolist() == [0, *np.cumsum([p.rows for p in came]).tolist()]
        held = placement.held[rank].tolist()
        assert found.offsets.tolist() == [0, *np.cumsum([[e for e, *_ in triples].count(h) for h in held])]


@pytest.mark.parametrize("choices", [16, 17, 40])
def test_sums_go_by_ascending_expert_however_many_a_row_has(choices: int) -> None:
    seeded = np.random.default_rng(choices)
    placement = place(64, None, 1)
    ids = np.stack([seeded.permutation(64)[:choices] for _ in range(9)])
    found = arrange(route(ids, np.ones(ids.shape, np.float32), placement), placement, 0)
    expert = np.repeat(np.arange(64), np.diff(found.offsets))
    for row, (begin, end) in enumerate(zip(found.first, found.first[1:], strict=False)):
        assert expert[found.order[begin:end]].tolist() == sorted(ids[row])


@settings(max_examples=100, deadline=None)
@given(world=worlds(), hidden=st.integers(1, 5), dtype=st.sampled_from([np.float16, np.float32, np.float64]))
def test_sums_are_those_of_plain_loops_bit_by_bit(
    world: tuple[Placement, list[tuple[Array, Array]]], hidden: int, dtype: Any
) -> None:
    placement, ranks = world
    parts = sent(world)
    wide = np.float64 if dtype is np.float64 else np.float32
    tokens = [
        np.random.default_rng(r).normal(size=(len(ids), hidden)).astype(dtype)
        for r, (ids, _) in enumerate(ranks)
    ]
    back: list[list[tuple[Array, Array]]] = [[] for _ in ranks]
    for rank in range(placement.size):
        found = arrange([p[rank] for p in parts], placement, rank)
        rows = np.concatenate([tokens[s][p[rank].tokens] for s, p in enumerate(parts)])
        expert = np.repeat(placement.held[rank], np.diff(found.offsets))
        outputs = (rows[found.rows] * (expert[:, None] + 1)).astype(dtype)
        for source, (start, stop) in enumerate(zip(found.starts, found.starts[1:], strict=False)):
            sums = np.full((stop - start, hidden), np.nan, wide)
            weigh(outputs, found, start, stop, sums)
            back[source].append((parts[source][rank].tokens, sums))
    for source, (ids, weights) in enumerate(ranks):
        result = np.full((len(ids), hidden), np.nan, wide)
        add_up(back[source], wide is np.float64, result)
        for token in range(len(ids)):
            total = np.zeros(hidden, wide)
            for rank in range(placement.size):
                chosen = sorted(
                    (int(e), k) for k, e in enumerate(ids[token]) if e >= 0 and placement.owner[e] == rank
                )
                some = None
                for e, k in chosen:
                    output = (tokens[source][token] * dtype(e + 1)).astype(dtype)
                    term = output.astype(wide) * weights[token, k].astype(wide)
                    some = term if some is None else some + term
                total = total if some is None else total + some
            assert np.array_equal(result[token], total)


DTYPES = [np.dtype(ml_dtypes.bfloat16), *map(np.dtype, ("f2", "f4", "f8"))]


def nearest(value: float, dtype: np.dtype[Any]) -> Any:
    """The number of a dtype that is next to a double, that with an even mantissa where there are two."""
    if not np.isfinite(value) or dtype == np.float64:
        return np.array(value, dtype)
    info = ml_dtypes.finfo(dtype)
    digits, least = info.nmant + 1, int(info.minexp) - info.nmant
    step = max(math.frexp(value)[1] - digits, least)
    found = round(math.ldexp(value, -step)) * 2.0**step  # Python rounds to even
    return np.array(found if abs(found) <= float(info.max) else math.copysign(math.inf, found), dtype)


def test_a_sum_is_rounded_once() -> None:
    """Also one of doubles, to a dtype shorter than floats, half way between two of it but for one bit."""
    seeded = np.random.default_rng(0)
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, -1e300, 5e-324, -5e-324, 3.4028235677973366e38]
    for exponent in (0, 3, 15, 16, -14, -24, -25, 127, 128, -126, -133, -134, -149, -150):
        for _ in range(40):
            bits = int(seeded.integers(7, 25))  # of which the last is half way, for some dtype
            middle = (1 + int(seeded.integers(1 << bits)) / (1 << bits)) * 2.0**exponent
            for one in (middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf)):
                values += [one, -one]
    terms = np.array(values)[:, None]
    count = len(terms)
    found = arrange(route(np.zeros((count, 1), np.int64), np.ones((count, 1), np.float32), ONE), ONE, 0)
    tokens = np.arange(count)
    for dtype in DTYPES:
        sums, added = np.zeros((count, 1), dtype), np.zeros((count, 1), dtype)
        weigh(terms, found, 0, count, sums)
        add_up([(tokens, terms)], True, added)
        expected = np.stack([nearest(value, dtype) for value in values])[:, None]
        for result in (sums, added):
            assert np.array_equal(result.astype(np.float64), expected.astype(np.float64), equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(world=worlds())
def test_messages_say_what_the_parts_are(world: tuple[Placement, list[tuple[Array, Array]]]) -> None:
    placement, _ = world
    for parts in sent(world):
        for rank, part in enumerate(parts):
            lists = np.zeros(lists_bytes(part.rows, len(part.experts)), np.uint8)
            pack_lists(part, lists)
            packed = Head(header("dispatch"), part.rows, len(part.experts), 3).pack()
            assert len(packed) == HEAD_BYTES
            head = Head.unpack(np.frombuffer(packed, np.uint8))
            assert (head.header, head.flags) == (header("dispatch"), 3)
            found = unpack_lists(head, lists, placement, rank)
            for name in ("counts", "experts", "weights"):
                assert np.array_equal(getattr(found, name), getattr(part, name))
            if part.rows and placement.size > 1:
                with pytest.raises(ValueError, match="has not"):
                    unpack_lists(head, lists, placement, (rank + 1) % placement.size)
                lists[0] += 1
                with pytest.raises(ValueError, match="own counts"):
                    unpack_lists(head, lists, placement, rank)


def test_a_row_without_experts_is_refused() -> None:
    part = Part(np.arange(2), np.array([2, 0], np.uint16), np.zeros(2, np.int32), np.ones(2, np.float32))
    lists = np.zeros(lists_bytes(2, 2), np.uint8)
    pack_lists(part, lists)
    with pytest.raises(ValueError, match="own counts"):
        unpack_lists(Head(header("dispatch"), 2, 2, 3), lists, ONE, 0)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), indices=st.booleans(), lists=st.booleans())
def test_a_message_is_its_head_and_what_rides(
    world: tuple[Placement, list[tuple[Array, Array]]], indices: bool, lists: bool
) -> None:
    for parts in sent(world):
        for part in parts:
            packed = np.zeros(lists_bytes(part.rows, len(part.experts)), np.uint8)
            pack_lists(part, packed)
            expected = part.tokens.astype(np.uint32).tobytes() * indices + packed.tobytes() * lists
            assert _core.pack_message(b"head", *part, indices, lists) == b"head" + expected


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_tables_say_what_kernels_read(world: tuple[Placement, list[tuple[Array, Array]]]) -> None:
    placement, ranks = world
    every, me = sent(world), placement.size - 1
    found, parts, count = arrange([parts[me] for parts in every], placement, me), every[me], len(ranks[me][0])
    order, first, weights, rows_of, nbytes = _core.sum_tables(
        len(found.order), len(found.first) - 1, count, len(parts)
    )
    into = np.full(nbytes + 16, 255, np.uint8)
    into = into[-into.ctypes.data % 16 :][:nbytes]
    lists = found.order, found.first, found.weights
    _core.write_sum_tables(*lists, [part.tokens for part in parts], count, into)
    assert into[order:][: 4 * len(found.order)].view(np.uint32).tolist() == found.order.tolist()
    assert into[first:][: 4 * len(found.first)].view(np.uint32).tolist() == found.first.tolist()
    by_row = found.weights[found.order]
    assert into[weights:][: by_row.nbytes].view(np.float32).tobytes() == by_row.tobytes()
    expected = np.full((count, len(parts)), -1, np.int32)
    for rank, part in enumerate(parts):
        expected[part.tokens, rank] = np.arange(part.rows)
    assert into[rows_of:][: expected.nbytes].tobytes() == expected.tobytes()
    for change in (part.tokens for part in parts if part.rows):
        change[0] = count
        with pytest.raises(ValueError, match="do not fit"):
            _core.write_sum_tables(*lists, [part.tokens for part in parts], count, into)
        break


@settings(max_examples=50, deadline=None)
@given(
    given_rows=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 99), max_size=5)), max_size=4),
)
def test_moves_list_rows_and_say_how_far_they_reach(given_rows: list[tuple[bool, list[int]]]) -> None:
    """Indices are 64 bits wide where they are a rank's own, else 32."""
    expected, extents, parts = [], [], []
    for source, (wide, rows) in enumerate(given_rows):
        place = 10 * source
        parts.append((source, np.array(rows, np.int64 if wide else np.uint32), place))
        expected += [[source, row, place + at, 0] for at, row in enumerate(rows)]
        extents.append(max(rows, default=-1) + 1)
    into = np.zeros((len(expected), 4), np.uint32)
    assert _core.list_moves(into.reshape(-1).view(np.uint8), parts) == extents
    assert into.tolist() == expected
    if expected:
        with pytest.raises(ValueError, match="do not fit"):
            _core.list_moves(into[1:].reshape(-1).view(np.uint8), parts)


def test_experts_are_placed_in_blocks_of_nearly_one_size() -> None:
    placement = place(10, None, 4)
    assert [held.tolist() for held in placement.held] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert placement.local.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    given_map = place(4, [1, 0, 1, 0], 2)
    assert [held.tolist() for held in given_map.held] == [[1, 3], [0, 2]]
    assert place(2, None, 5).held[4].tolist() == []
    assert given_map.digest != place(4, None, 2).digest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place(0, None, 2), "experts=0"),
        (lambda: place("4", None, 2), "not an integer"),
        (lambda: place(4, [0, 1], 2), "there are 4 experts"),
        (lambda: place(2, [0, 2], 2), "names rank 2"),
        (lambda: place(2, [0.0, 1.0], 2), "integer"),
        (lambda: checked(2, np.zeros((3, 1), int), None, 4), "for 2 tokens"),
        (lambda: checked(1, np.zeros((1, 1)), None, 4), "not integers"),
        (lambda: checked(2, [[0, 1], [0, 4]], None, 4), "token 1 names expert 4: experts are 0 to 3"),
        (lambda: checked(1, [[-2]], None, 4), "token 0 names expert -2"),
        (lambda: checked(1, [[1]], [[1.0, 2.0]], 4), r"weights has shape \(1, 2\)"),
        (lambda: checked(1, [[1]], [["x"]], 4), "not numbers"),
        (lambda: routed(2, np.array([[0, 1], [0, 4]]), None, place(4, None, 2)), "token 1 names expert 4"),
        (lambda: routed(1, np.array([[-2]]), None, place(4, None, 2)), "token 0 names expert -2"),
        (lambda: routed(1, np.array([[1 << 63]], np.uint64), None, place(4, None, 2)), "names expert 9223"),
        (lambda: routed(1, np.array([[1]]), [[1.0, 2.0]], place(4, None, 2)), "weights has shape"),
        (lambda: routed(2, np.array([[1]]), None, place(4, None, 2)), "for 2 tokens"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
