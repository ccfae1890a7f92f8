"""Plans of paged copies against a NumPy model, bytewise; how few copies they are; what is refused."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiocomm.errors import UsageError
from aiocomm.pages import Pages
from aiocomm.pages.planner import Copies, plan


def carry_out(copies: Copies, source: Pages, target: Pages) -> None:
    """Do what a plan says, row by row."""
    give = [array.reshape(-1).view(np.uint8) for array in source.arrays]
    take = [array.reshape(-1).view(np.uint8) for array in target.arrays]
    for a, at, b, to, n in zip(*(column.tolist() for column in copies.flat()), strict=True):
        take[b][to : to + n] = give[a][at : at + n]


def tokens_of(array: Any, page_axis: int, token_axis: int, pages: list[int]) -> Any:
    """The model: the pages' tokens, one after the other, as an array with the token axis first."""
    moved = np.moveaxis(array, (page_axis, token_axis), (0, 1))[pages]
    return moved.reshape(-1, *moved.shape[2:])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_plans_do_what_the_model_does(data: st.DataObject) -> None:
    draw = data.draw
    page_axis = draw(st.integers(0, 2))
    heads, dim, planes = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from([1, 2, 4, 6])) for _ in range(2)]
    total = int(np.lcm(*sizes)) * draw(st.integers(1, 4))
    lists, sides = [], []
    low = draw(st.integers(0, heads - 1))
    high = draw(st.integers(low + 1, heads))
    for side, size in enumerate(sizes):
        count = total // size + draw(st.integers(0, 3))
        # axes: [layers, pages, tokens, heads, dim] with the page axis in one of three places
        own_heads = heads if side == 0 else high - low
        shape = [layers, size, own_heads, dim]
        shape.insert(page_axis, count)
        filled = [np.random.default_rng(p).integers(0, 1 << 16, shape, np.uint16) for p in range(planes)]
        if side:
            filled = [np.zeros(shape, np.uint16) for _ in range(planes)]
        token_axis = 1 + (page_axis <= 1)
        pages = Pages(filled, page_axis, token_axis)
        sides.append(pages if side else pages.slice(2 + (page_axis <= 2), low, high))
        lists.append(draw(st.permutations(range(count)))[: total // size])
    source, target = sides
    carry_out(plan(source.layout, lists[0], target.layout, lists[1]), source, target)
    token_axis = 1 + (page_axis <= 1)
    for there, here in zip(source.arrays, target.arrays, strict=True):
        wanted = tokens_of(there, page_axis, token_axis, list(lists[0]))
        head_axis = wanted.ndim - 2
        wanted = np.take(wanted, range(low, high), head_axis)
        assert np.array_equal(tokens_of(here, page_axis, token_axis, list(lists[1])), wanted)
        untouched = np.ones(here.shape[page_axis], bool)
        untouched[list(lists[1])] = False
        assert not np.compress(untouched, here, page_axis).any()


def pages(*shape: int, axis: int = 0, arrays: int = 1, **more: Any) -> Pages:
    return Pages([np.zeros(shape, np.uint8) for _ in range(arrays)], axis, **more)


def test_neighbours_merge_whatever_their_order() -> None:
    kv = pages(100, 4096)
    found = plan(kv.layout, [7, 5, 6, 40], kv.layout, [22, 20, 21, 3])
    assert sorted(zip(found.source.tolist(), found.target.tolist(), strict=True)) == [
        (5 * 4096, 20 * 4096),
        (40 * 4096, 3 * 4096),
    ]
    assert sorted((found.nbytes * found.rows).tolist()) == [4096, 3 * 4096]


def test_one_strided_copy_per_page_across_layers() -> None:
    kv = pages(64, 2, 500, 1024, axis=2)  # layers, K and V, pages
    rng = np.random.default_rng(0)
    apart = rng.permutation(250)[:200] * 2  # no neighbours, which would merge
    found = plan(kv.layout, apart, kv.layout, rng.permutation(500)[:200])
    assert len(found) == 200
    assert set(found.rows.tolist()) == {128}
    assert set(found.nbytes.tolist()) == {1024}


def test_equally_spaced_pages_become_one_copy() -> None:
    kv = pages(100, 16, arrays=3)
    found = plan(kv.layout, range(0, 100, 4), kv.layout, range(0, 75, 3))
    assert len(found) == 3
    assert found.rows.tolist() == [25] * 3


def test_whole_caches_are_one_copy_per_array() -> None:
    kv = pages(64, 4, 8, arrays=2)
    assert plan(kv.layout, range(64), kv.layout, range(64)).nbytes.tolist() == [2048, 2048]


def test_planes_choose_arrays() -> None:
    kv = pages(4, 8, arrays=4)
    found = plan(kv.planes([1]).layout, [0], kv.planes([3]).layout, [2])
    assert (found.source_array.tolist(), found.target_array.tolist()) == ([1], [3])


def test_nothing_is_nothing() -> None:
    assert len(plan(pages(4, 8).layout, [], pages(4, 8).layout, [])) == 0


@pytest.mark.parametrize(
    ("source", "give", "target", "take", "message"),
    [
        (pages(4, 8), [4], pages(4, 8), [0], "source page 4 is outside 0 to 3"),
        (pages(4, 8), [0], pages(4, 8), [-1], "target page -1"),
        (pages(4, 8), [0, 1], pages(4, 8), [2, 2], "target page 2 comes twice"),
        (pages(4, 8), [0, 1], pages(4, 8), [2], "2 source pages of 1 tokens"),
        (pages(4, 8), [0], pages(4, 6), [0], "do not fit"),
        (pages(4, 8), [0], pages(4, 8, arrays=2), [0], "do not fit"),
        (pages(4, 8, token_axis=1), [0], pages(4, 8), [0], "do not fit"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    source: Pages, give: list[int], target: Pages, take: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(source.layout, give, target.layout, take)


def test_arrays_that_are_no_pages_are_refused() -> None:
    for arrays, message in (
        ([], "at least one"),
        (np.zeros(3), "page axis"),
        (np.zeros((4, 4)).T, "contiguous"),
    ):
        with pytest.raises(UsageError, match=message):
            Pages(arrays)
    with pytest.raises(UsageError, match="arrays differ"):
        Pages([np.zeros((2, 2)), np.zeros((2, 3))])
    with pytest.raises(UsageError, match="page axis, or none"):
        pages(4, 8).slice(0, 0, 1)


def test_planning_does_not_grow_with_the_copies() -> None:
    """100,000 scattered pages take milliseconds; the bound is loose, for machines that do other things."""
    layout = Pages(np.broadcast_to(np.uint8(0), (1,)).repeat(200_000).reshape(200_000, 1)).layout
    rng = np.random.default_rng(1)
    give, take = rng.permutation(200_000)[:100_000], rng.permutation(200_000)[:100_000]
    best = min(_seconds(lambda: plan(layout, give, layout, take)) for _ in range(5))
    assert best < 0.1


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
