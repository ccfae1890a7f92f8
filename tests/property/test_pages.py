"""Plans of paged copies against a NumPy model, bytewise; how few copies they are; what is refused."""

from __future__ import annotations

import itertools
import math
import threading
import time
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio.to_thread
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiocomm.errors import UsageError
from aiocomm.pages import Pages, plan_cache, ranges
from aiocomm.pages.indices import own_list, page_list
from aiocomm.pages.planner import Copies, alike, one_pair, plan
from aiocomm.pages.ranges import Plan, plan_pages
from aiocomm_native import _core


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
    lists, sides, orders = [], [], []
    low = draw(st.integers(0, heads - 1))
    high = draw(st.integers(low + 1, heads))
    for side, size in enumerate(sizes):
        count = total // size + draw(st.integers(0, 3))
        # axes: [layers, tokens, heads, dim] or [layers, heads, tokens, dim], the page axis among them
        own_heads = heads if side == 0 else high - low
        heads_first = draw(st.booleans())
        shape = [layers, own_heads, size, dim] if heads_first else [layers, size, own_heads, dim]
        shape.insert(page_axis, count)
        filled = [np.random.default_rng(p).integers(0, 1 << 16, shape, np.uint16) for p in range(planes)]
        if side:
            filled = [np.zeros(shape, np.uint16) for _ in range(planes)]
        one, other = (axis + (page_axis <= axis) for axis in (1, 2))
        token_axis, head_axis = (other, one) if heads_first else (one, other)
        pages = Pages(filled, page_axis, token_axis)
        sides.append(pages if side else pages.slice(head_axis, low, high))
        lists.append(draw(st.permutations(range(count)))[: total // size])
        orders.append((token_axis, head_axis))
    source, target = sides
    carry_out(plan(source.layout, lists[0], target.layout, lists[1]), source, target)
    for there, here in zip(source.arrays, target.arrays, strict=True):
        wanted = np.take(there, range(low, high), orders[0][1])
        given_, got = (
            tokens_of(
                np.moveaxis(array, head, -2), page_axis - (head < page_axis), token - (head < token), pages_
            )
            for array, (token, head), pages_ in zip((wanted, here), orders, lists, strict=True)
        )
        assert np.array_equal(got, given_)
        untouched = np.ones(here.shape[page_axis], bool)
        untouched[list(lists[1])] = False
        assert not np.compress(untouched, here, page_axis).any()


@settings(max_examples=60, deadline=None)
@given(
    source_heads=st.sampled_from([4, 8, 16]),
    target_heads=st.sampled_from([4, 8, 16]),
    data=st.data(),
)
def test_heads_go_from_any_degree_of_tensor_parallelism_to_any_other(
    source_heads: int, target_heads: int, data: st.DataObject
) -> None:
    """16 heads over 16 / n ranks on either side: each pair of ranks moves the heads that both have."""
    sizes = [data.draw(st.sampled_from([1, 2, 4])) for _ in range(2)]
    together = [data.draw(st.booleans()) for _ in range(2)]  # K and V in one array, or in one each
    tokens, dim = 8, 2
    whole = np.random.default_rng(0).integers(1, 1 << 16, (2, tokens, 16, dim), np.uint16)
    lists = [data.draw(st.permutations(range(tokens // size + 2)))[: tokens // size] for size in sizes]

    def caches(heads: int, size: int, filled: bool, joint: bool, places: list[int]) -> list[Pages]:
        ranks = []
        for first in range(0, 16, heads):
            kv = np.zeros((tokens // size + 2, 2, size, heads, dim), np.uint16)
            if filled:
                mine = whole[:, :, first : first + heads].reshape(2, tokens // size, size, heads, dim)
                kv[places] = mine.swapaxes(0, 1)
            if joint:
                ranks.append(Pages(kv, token_axis=2))
            else:
                ranks.append(Pages([np.ascontiguousarray(kv[:, n]) for n in (0, 1)], token_axis=1))
        return ranks

    def part(cache: Pages, n: int, joint: bool, heads: slice) -> Pages:
        """K or V, and a range of heads."""
        view = cache.slice(1, n, n + 1) if joint else cache.planes([n])
        return view.slice(3 if joint else 2, heads.start, heads.stop)

    sources = caches(source_heads, sizes[0], True, together[0], lists[0])
    targets = caches(target_heads, sizes[1], False, together[1], lists[1])
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            first = max(i * source_heads, j * target_heads)
            last = min((i + 1) * source_heads, (j + 1) * target_heads)
            for n in (0, 1) if first < last else ():
                give = part(source, n, together[0], slice(first - i * source_heads, last - i * source_heads))
                take = part(target, n, together[1], slice(first - j * target_heads, last - j * target_heads))
                carry_out(plan(give.layout, lists[0], take.layout, lists[1]), give, take)
    expected = caches(target_heads, sizes[1], True, together[1], lists[1])
    for target, wanted in zip(targets, expected, strict=True):
        assert all(map(np.array_equal, target.arrays, wanted.arrays))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.tuples(*[st.sampled_from([1, 16, 64, 256])] * 2), page_first=st.booleans())
def test_latents_go_between_layouts(data: st.DataObject, sizes: tuple[int, int], page_first: bool) -> None:
    """MLA: one latent per token, no heads; layers before or after pages in one array, or an array each."""
    layers, dim, total = 3, 5, 256 * data.draw(st.integers(1, 2))
    counts = [total // size + 1 for size in sizes]
    give, take = (data.draw(st.permutations(range(count)))[:-1] for count in counts)
    shape = (counts[0], layers, sizes[0], dim) if page_first else (layers, counts[0], sizes[0], dim)
    array = np.random.default_rng(1).integers(0, 1 << 16, shape, np.uint16)
    source = Pages(array, 0 if page_first else 1, token_axis=2)
    target = Pages([np.zeros((counts[1], sizes[1], dim), np.uint16) for _ in range(layers)], token_axis=1)
    axis = 1 if page_first else 0
    for from_, to in zip(source.layers(axis), target.layers(), strict=True):
        carry_out(plan(from_.layout, give, to.layout, take), from_, to)
    for layer in range(layers):
        given_ = np.take(array, layer, axis)[list(give)].reshape(-1, dim)
        assert np.array_equal(target.arrays[layer][list(take)].reshape(-1, dim), given_)


@pytest.mark.anyio
async def test_plans_are_kept_for_the_next_layer_and_found_by_all_of_their_lists() -> None:
    kv = pages(4000, 16, arrays=4)
    rng = np.random.default_rng(5)
    give, take = rng.permutation(4000), rng.permutation(4000)
    layers = [kv.planes([layer]).layout for layer in range(4)]
    first = await plan_pages(layers[0], give, layers[1], take, lambda plan: "rows")
    assert await plan_pages(layers[2], give, layers[3], take, lambda plan: "at_target") is first
    other = take.copy()
    other[[1, 2]] = other[[2, 1]]  # differs where no key looks
    third = await plan_pages(layers[0], give, layers[0], other, lambda plan: "at_target")
    assert third is not first
    assert not np.array_equal(third.at_target.near, first.at_target.near)


@pytest.mark.anyio
async def test_layers_of_one_array_have_one_plan() -> None:
    """Views that differ only in where they begin: they are planned as many times as there are lists."""
    ranges._kept.clear()
    source, target = pages(3, 2, 200, 4, 16, axis=2), pages(200, 6, 4, 16)
    rng = np.random.default_rng(6)
    give, take = (rng.permutation(200)[:50] for _ in range(2))
    ways = [view.slice(3, 1, 2) for layer in source.layers(0) for view in layer.layers(1)]
    found = [
        await plan_pages(one.layout, give, other.slice(2, 2, 3).layout, take, lambda plan: "rows")
        for one, other in zip(ways, target.layers(1), strict=True)
    ]
    assert len(found) == 6
    assert all(plan is found[0] for plan in found)
    assert found[0].at_target.near.min() == give.min() * 64
    assert found[0].at_target.far.min() == take.min() * 384


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
async def test_plans_of_short_lists_are_told_apart(count: int) -> None:
    layout, first = pages(100, 16).layout, list(range(0, 2 * count, 2))

    def rows(plan: Plan) -> str:
        return "rows"

    kept = await plan_pages(layout, first, layout, first, rows)
    assert await plan_pages(layout, first, layout, first, rows) is kept
    for place in range(count):
        other = [*first[:place], 2 * count + 1, *first[place + 1 :]]
        assert await plan_pages(layout, other, layout, first, rows) is not kept
        assert await plan_pages(layout, first, layout, other, rows) is not kept


def test_plans_are_kept_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For so many plans, and for so many bytes in all of them: a larger plan takes the room of several."""
    monkeypatch.setattr(plan_cache, "_MOST_BYTES", 20_000)
    layout, kept = pages(5000, 16).layout, plan_cache.PlanCache[int](5)

    def keep(n: int, nbytes: int = 0) -> None:
        kept.keep(layout, np.arange(n), layout, np.arange(n), n, nbytes)

    def found() -> list[int | None]:
        return [kept.find(layout, np.arange(n), layout, np.arange(n)) for n in sizes]

    sizes = [10, 20, 30, 40, 50, 60]
    for n in sizes:
        keep(n)
        keep(n)  # once more takes no more room
    assert found() == [None, 20, 30, 40, 50, 60]
    keep(20, 17_500)
    assert found() == [None, 20, None, None, 50, 60]
    keep(20, 1000)  # less than before
    keep(30)
    assert found() == [None, 20, 30, None, 50, 60]
    keep(900, 10_000)
    assert found() == [None] * 6
    assert kept.find(layout, np.arange(900), layout, np.arange(900)) == 900
    kept.clear()
    keep(400)
    keep(50)
    assert kept.find(layout, np.arange(400), layout, np.arange(400)) == 400


def test_what_a_plan_takes_grows_with_its_rows_and_forms() -> None:
    kv = pages(500, 64, 4, 8).slice(2, 0, 2)  # 64 rows of each page
    from_, to = alike(kv.layout, kv.layout)
    made = Plan(one_pair(from_, np.arange(300), to, np.arange(300)[::-1].copy()))
    before = made.nbytes
    arrays = made.at_target.far, made.at_target.nbytes, made.at_target.near, made.at_target.rows
    assert made.nbytes - before >= sum(one.nbytes for one in arrays) >= 300 * 64 * 32
    before = made.nbytes
    assert len(made.rows_at_target) == 300 * 64
    assert made.nbytes - before >= 300 * 64 * 48


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("shape", "heads", "form", "aside"),
    [
        ((1, 64, 256, 4, 8), 2, "at_target", True),  # 256 rows of each page
        ((1, 64, 256, 4, 8), 2, "rows", False),  # which are one copy
        ((1, 64, 256, 4, 8), 4, "at_target", False),  # a page is one row
        ((64, 64, 4, 4, 8), 2, "rows", True),  # rows of a layer are one copy
    ],
)
async def test_rows_of_few_pages_may_be_many(
    shape: tuple[int, ...], heads: int, form: str, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes long is planned on another thread, however few pages there are."""
    threads, here = [], anyio.to_thread.run_sync

    async def run_sync(call: Any, *arguments: Any) -> Any:
        threads.append(call)
        return await here(call, *arguments)

    monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
    ranges._kept.clear()
    source, target = (pages(*shape, axis=1).slice(3, 0, heads).layout for _ in range(2))
    lists = [np.random.default_rng(seed).permutation(64)[:40] for seed in (21, 22)]
    for _ in range(2):
        found = await plan_pages(source, lists[0], target, lists[1], lambda plan: form)
        assert form in found.__dict__
        assert len(threads) == aside, "once: it is kept"


def test_plans_that_are_made_at_one_time_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, _ = alike(pages(64, 8).layout, pages(64, 8).layout)
    first, second = (Plan(one_pair(layout, np.arange(8), layout, np.arange(8))) for _ in range(2))
    far_ranges, begun, end = _core.far_ranges, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert end.wait(60)
        return far_ranges(*arguments)

    def other() -> None:
        assert second.at_target.nbytes.tolist() == [64]
        end.set()

    monkeypatch.setattr(_core, "far_ranges", slow)
    with ThreadPoolExecutor(2) as threads:
        made = threads.submit(lambda: first.at_target)
        assert begun.wait(60)
        monkeypatch.setattr(_core, "far_ranges", far_ranges)
        threads.submit(other)
        assert made.result(60).nbytes.tolist() == [64]


@pytest.mark.anyio
async def test_plans_that_are_kept_are_found_on_the_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = pages(5000, 16, arrays=2)
    rng = np.random.default_rng(11)
    lists = rng.permutation(5000).tolist(), rng.permutation(5000).tolist()
    source, target = kv.planes([0]).layout, kv.planes([1]).layout
    sides = source, lists[0], target, lists[1]
    forms = "rows", "at_source", "at_target", "rows_at_source", "rows_at_target"
    made = {form: getattr(await plan_pages(*sides, lambda _, form=form: form), form) for form in forms}

    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing has to be planned")

    monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
    other = target, lists[0], source, lists[1]  # planned for one pair of arrays, and so for all
    for form in forms:
        for lists_ in (sides, other):
            found = await plan_pages(*lists_, lambda _, form=form: form)
            assert getattr(found, form) is made[form]
    with pytest.raises(UsageError, match="do not fit"):
        await plan_pages(source, [1], kv.layout, [1], lambda plan: "rows")


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_a_list_of_pages_is_an_array(values: list[int]) -> None:
    found = page_list(values)
    assert found.dtype == np.int64
    assert found.tolist() == values


def test_all_that_holds_integers_is_a_list_of_pages() -> None:
    for fine in (
        (1, 2),
        range(3),
        [np.int64(5), 6],
        [np.uint64(5), np.int8(-1)],
        deque([1, 2]),
        array("i", [4]),
        np.array([3, 4], object),
        *(np.arange(4).astype(kind) for kind in ("i1", "u2", "i4", ">i8", "u8")),
        np.arange(8)[::-2],
    ):
        assert page_list(fine).tolist() == list(fine)  # type: ignore[arg-type]
        assert page_list(fine).dtype == np.int64  # type: ignore[arg-type]
    assert page_list(np.arange(4).reshape(2, 2)).tolist() == [0, 1, 2, 3]
    for empty in ([], (), np.array([]), np.zeros(0, bool), range(0)):
        assert page_list(empty).dtype == np.int64  # type: ignore[arg-type]
        assert page_list(empty).shape == (0,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            [True, False],
            [1, True],
            (1, np.True_),
            np.array([True, False]),
            np.array([1, True], object),
            True,
        ),
        *([1.9], [1, 1.0], np.array([1.9]), [math.nan], np.array([1.0]), 1.0, [1j]),
        *(["1"], "1", b"1", np.array(["1"]), [None], None, [[0, 1]], {1}, slice(0, 1), iter([0])),
        *([2**63], [2**70], [-(2**63) - 1], np.array([2**63], np.uint64), [np.uint64(2**63), 1]),
        *(range(2**70, 2**70 + 2), np.array([2**70], object), np.array([1], "m8[s]")),
    ],
    ids=lambda wrong: repr(wrong).partition(" at 0x")[0],  # the same in every process
)
def test_what_are_no_integers_is_refused(wrong: Any) -> None:
    """NumPy makes integers of floats, strings and masks."""
    with pytest.raises(UsageError, match="page indices are integers"):
        page_list(wrong)


def test_an_own_list_shares_nothing_with_the_callers() -> None:
    for ours in (np.arange(4), np.arange(4, dtype=np.int32), array("q", range(4)), [0, 1, 2, 3]):
        own = own_list(ours)  # type: ignore[arg-type]
        ours[0] = 9
        assert own.tolist() == [0, 1, 2, 3]


def test_ranges_hold_every_row_once() -> None:
    source, target = pages(50, 3, 4), pages(50, 3, 4)
    rng = np.random.default_rng(7)
    give, take = rng.permutation(50)[:30].tolist(), rng.permutation(50)[:30].tolist()
    source.arrays[0][:] = rng.integers(0, 256, source.arrays[0].shape)
    for at_target in (True, False):
        near, far = (source, target) if at_target else (target, source)
        source_, target_ = alike(source.layout, target.layout)
        made = Plan(one_pair(source_, page_list(give), target_, page_list(take)))
        found = made.at_target if at_target else made.at_source
        assert sum(found.nbytes) == int(found.rows.sum()) == 30 * 12
        moved = np.zeros_like(target.arrays[0]).reshape(-1)
        for start, nbytes, first, last in zip(
            found.far, found.nbytes, found.first, found.first[1:], strict=False
        ):
            packed = np.empty(nbytes, np.uint8)
            rows = found.near[first:last], found.rows[first:last]
            if at_target:
                _core.pack_rows(*rows, near.arrays[0].reshape(-1), packed)
                moved[start : start + nbytes] = packed
            else:
                packed[:] = far.arrays[0].reshape(-1)[start : start + nbytes]
                _core.unpack_rows(*rows, moved, packed)
        assert np.array_equal(moved.reshape(50, 3, 4)[take], source.arrays[0][give])
    with pytest.raises(ValueError, match="outside"):
        _core.pack_rows(page_list([700]), page_list([1]), source.arrays[0].reshape(-1), np.empty(1, np.uint8))
    with pytest.raises(ValueError, match="another size"):
        _core.pack_rows(page_list([0]), page_list([1]), source.arrays[0].reshape(-1), np.empty(2, np.uint8))


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


@pytest.mark.parametrize(("tokens", "heads"), [(16, 4), (4, 16)])
def test_tokens_and_heads_swap_in_as_few_strided_copies_as_the_shorter_axis_has(
    tokens: int, heads: int
) -> None:
    nhd = Pages(np.arange(8 * tokens * heads * 2, dtype=np.uint32).reshape(8, tokens, heads, 2), token_axis=1)
    hnd = Pages(np.zeros((8, heads, tokens, 2), np.uint32), token_axis=2)
    found = plan(nhd.layout, [1, 6, 3], hnd.layout, [0, 5, 2])
    assert len(found) == 3 * min(tokens, heads)
    assert set(found.rows.tolist()) == {max(tokens, heads)}
    carry_out(found, nhd, hnd)
    assert np.array_equal(hnd.arrays[0][[0, 5, 2]], nhd.arrays[0][[1, 6, 3]].swapaxes(1, 2))
    back = Pages(np.zeros_like(nhd.arrays[0]), token_axis=1)
    carry_out(plan(hnd.layout, [0, 5, 2], back.layout, [1, 6, 3]), hnd, back)
    assert np.array_equal(back.arrays[0][[1, 6, 3]], nhd.arrays[0][[1, 6, 3]])


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
    for axis in (0, -2, 2, -3):
        with pytest.raises(UsageError, match="page axis, or none"):
            pages(4, 8).slice(axis, 0, 1)
        with pytest.raises(UsageError, match="page axis, or none"):
            pages(4, 8).layers(axis)


@pytest.mark.parametrize("page_axis", [0, 1, 2, 3, -1, -2])
def test_negative_axes_count_from_the_last(page_axis: int) -> None:
    kv = pages(3, 4, 5, 6, axis=page_axis)
    for axis in {0, 1, 2, 3} - {page_axis % 4}:
        assert kv.slice(axis - 4, 1, 2).layout == kv.slice(axis, 1, 2).layout
        assert [one.layout for one in kv.layers(axis - 4)] == [one.layout for one in kv.layers(axis)]
        assert len(kv.layers(axis - 4)) == (3, 4, 5, 6)[axis]


def test_planning_does_not_grow_with_the_copies() -> None:
    """100,000 scattered pages take milliseconds of this thread, whatever else the machine does."""
    layout = Pages(np.broadcast_to(np.uint8(0), (1,)).repeat(200_000).reshape(200_000, 1)).layout
    rng = np.random.default_rng(1)
    lists = [rng.permutation(200_000)[:100_000] for _ in range(6)]  # each pair is new: plans are kept
    best = min(
        _seconds(lambda give=give, take=take: plan(layout, give, layout, take))  # type: ignore[misc]
        for give, take in itertools.pairwise(lists)
    )
    assert best < 0.1


def _seconds(call: Any) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start
