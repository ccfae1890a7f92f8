"""Notes of layers become iterations: one for each call, whatever was stopped, given up, lost or forgotten."""

from __future__ import annotations

import itertools
from contextlib import aclosing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from harness import LIMIT_S

import aiocomm
from aiocomm.pages import streaming
from aiocomm.pages.streaming import LayerNotes

if TYPE_CHECKING:
    from aiocomm.pages.streaming import Layers

pytestmark = pytest.mark.anyio


def bring(notes: LayerNotes, call: int, *layers: int | None, source: int = 0, of: int = 3) -> None:
    for layer in layers:
        notes.put(source, call, layer, of)


async def iterated(notes: LayerNotes, sources: list[int] | None = None) -> list[int]:
    return [layer async for layer in notes.layers(sources, LIMIT_S)]


def nothing_waits(notes: LayerNotes) -> bool:
    return not any(of.waiting or of.taken for of in notes._sources.values())


@pytest.mark.parametrize("end", ["break", "close", "deadline", "cancel"])
async def test_what_comes_of_a_stopped_iteration_is_not_the_next_ones(end: str) -> None:
    notes = LayerNotes()
    bring(notes, 7, 0)
    kept: list[Any] = []
    if end in ("break", "close"):
        async for layer in (layers := notes.layers([0], None)):
            assert layer == 0
            break
        kept.append(layers)  # a break leaves the generator to the collector
        if end == "close":
            await layers.aclose()
    elif end == "deadline":
        layers = notes.layers([0], 0.001)
        assert await anext(layers) == 0
        with pytest.raises(aiocomm.DeadlineExceeded, match="layer 1 of 3 has not come"):
            await anext(layers)
    else:
        with anyio.CancelScope() as scope:
            async for layer in notes.layers([0], None):
                assert layer == 0
                scope.cancel()
    bring(notes, 7, 2, 1)
    with pytest.raises(aiocomm.DeadlineExceeded, match="no layer has come from rank 0"):
        await anext(notes.layers([0], 0.0))
    bring(notes, 8, 0, 2, 1)
    assert await iterated(notes) == [0, 1, 2]
    assert nothing_waits(notes)
    for layers in kept:
        await layers.aclose()


async def test_a_sender_that_gives_up_after_its_last_layer_is_no_news() -> None:
    notes = LayerNotes()
    bring(notes, 7, 0, 1, 2)
    assert await iterated(notes) == [0, 1, 2]
    bring(notes, 7, None)
    bring(notes, 8, 0, 1, 2, None)
    bring(notes, 9, 0, None)
    assert await iterated(notes) == [0, 1, 2]
    with pytest.raises(aiocomm.TransferCancelled, match="gave up before layer 1 of 3"):
        await iterated(notes)
    assert nothing_waits(notes)


async def test_iterations_at_a_time_have_a_call_each() -> None:
    notes = LayerNotes()
    found = []

    async def look() -> None:
        found.append(await iterated(notes, [0]))

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(look)
        await anyio.lowlevel.checkpoint()
        bring(notes, 1, 0)
        bring(notes, 2, 0, 1, of=2)
        await anyio.lowlevel.checkpoint()
        bring(notes, 1, 1, 2)
    assert sorted(found) == [[0, 1], [0, 1, 2]]


async def test_an_iteration_takes_nothing_before_it_has_heard_of_all_its_sources() -> None:
    notes = LayerNotes()
    bring(notes, 5, 0, source=1)
    with pytest.raises(aiocomm.DeadlineExceeded, match="no layer has come from rank 0"):
        await anext(notes.layers([0, 1], 0.0))
    bring(notes, 6, 0, 1, 2, source=0)
    bring(notes, 5, 1, 2, source=1)
    bring(notes, 4, 0, 1, source=0, of=2)
    assert await iterated(notes, [0, 1]) == [0, 1, 2]
    bring(notes, 3, 0, source=1, of=1)
    assert await iterated(notes) == [0, 1], "the rank that was heard of first"
    assert await iterated(notes) == [0]


async def test_of_calls_that_nobody_looks_at_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_WAITING", 3)
    monkeypatch.setattr(streaming, "_REMEMBERED", 4)
    notes = LayerNotes()
    bring(notes, 100, 0)  # and is forgotten before it has ended
    for call in range(1, 51):
        bring(notes, call, *range(call), of=call)
    of = notes._sources[0]
    assert len(of.waiting) == 3
    assert len(of.past) <= 4
    assert list(of.taken) == [100]
    bring(notes, 100, 1, 2)
    for call in (48, 49, 50):
        assert await iterated(notes) == list(range(call))
    assert nothing_waits(notes)


async def test_a_lost_source_ends_what_it_had_begun_also_if_it_is_back_at_once() -> None:
    notes = LayerNotes()
    bring(notes, 1, 0, 1, 2)
    bring(notes, 2, 0)
    bring(notes, 3, 0)
    async with aclosing(notes.layers([0], LIMIT_S)) as layers:
        assert await anext(layers) == 0
    notes.lose(0)
    bring(notes, 4, 0, 1, 2)  # of its next incarnation
    for _ in range(2):
        with pytest.raises(aiocomm.PeerLostError, match="rank 0 is gone before layer 1 of 3"):
            await iterated(notes)
    assert await iterated(notes) == [0, 1, 2]
    with pytest.raises(aiocomm.DeadlineExceeded, match="no layer has come from rank 0"):
        await anext(notes.layers([0], 0))  # it is there: its next call may come
    notes.lose(0)
    with pytest.raises(aiocomm.PeerLostError, match="rank 0 is gone before the first layer"):
        await iterated(notes, [0])
    assert nothing_waits(notes)


async def give_up(layers: Layers) -> None:
    """Wait for a layer that has not come, and be cancelled."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(layers.__anext__)
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def test_a_wait_that_was_given_up_is_for_the_same_layer_when_it_is_taken_up() -> None:
    notes = LayerNotes()
    layers, seen = notes.layers([0], None), []
    await give_up(layers)
    for layer in range(3):
        bring(notes, 7, layer)
        seen.append(await anext(layers))
        if layer < 2:
            await give_up(layers)
    assert seen == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(layers)
    bring(notes, 8, 0, 1, 2)
    assert await iterated(notes) == [0, 1, 2], "what was given up has had one call"
    assert nothing_waits(notes)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("why", ["deadline", "gave up", "lost", "closed"])
async def test_what_has_failed_fails_again_and_does_not_end(why: str, after: int) -> None:
    notes = LayerNotes()
    bring(notes, 7, *range(after))
    layers = notes.layers([0], 0.0 if why == "deadline" else None)
    for layer in range(after):
        assert await anext(layers) == layer
    expected: type[aiocomm.AiocommError] = aiocomm.DeadlineExceeded
    if why == "gave up":
        expected = aiocomm.TransferCancelled
        bring(notes, 7, None)
    elif why == "lost":
        expected = aiocomm.PeerLostError
        notes.lose(0)
    elif why == "closed":
        expected = aiocomm.ClosedError
        notes.close("the communicator was closed")
        notes.close()
    errors = []
    for _ in range(3):
        with pytest.raises(expected) as caught:
            await anext(layers)
        errors.append(caught.value)
        bring(notes, 7, *range(3))  # too late
    assert len({str(error) for error in errors}) == 1
    assert f"layer {after} of 3" in str(errors[0]) if after else "layer" in str(errors[0])
    assert why != "closed" or str(errors[0]).startswith("the communicator was closed, and ")
    assert len({getattr(error, "peer", None) for error in errors}) == 1


async def test_a_deadline_counts_from_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, now = LayerNotes(), itertools.count(0.0, 2e6)
    monkeypatch.setattr(streaming, "time", SimpleNamespace(monotonic=lambda: next(now)))
    layers = notes.layers([0], 1e6)  # longer than a test may take
    with pytest.raises(aiocomm.DeadlineExceeded):
        await anext(layers)


async def test_closing_an_iteration_ends_a_wait_of_another_task() -> None:
    notes = LayerNotes()
    layers, ended = notes.layers(None, None), []

    async def look() -> None:
        ended.append([layer async for layer in layers])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        await anyio.lowlevel.checkpoint()
        await layers.aclose()
    assert ended == [[]]
