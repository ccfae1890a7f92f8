"""The connector's scheduler side: what it has its workers do, for each way that a request can go."""

from __future__ import annotations

from typing import Any

import pytest

import aiocomm
from aiocomm.vllm.scheduler import Scheduler
from aiocomm.vllm.steps import Fetch, Origin, Step, lent_name, request_of
from aiocomm.vllm.worker import Options

BLOCK = 16
ORIGIN = Origin("prefill", 2, "p-1/0")


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """That can be told beforehand."""
    monkeypatch.setattr("aiocomm.vllm.scheduler.lent_name", "{}/0".format)


def came(blocks: list[int], tokens: int) -> dict[str, Any]:
    """What a prefill engine of two ranks answers."""
    engine = Scheduler("prefill", 2, BLOCK)
    params = engine.finished("p-1", {"do_remote_decode": True}, tokens, blocks, complete=True)
    assert params is not None
    assert engine.step() == Step(keep={"p-1/0": tuple(blocks)})
    return params


@pytest.fixture
def decode() -> Scheduler:
    return Scheduler("decode", 4, BLOCK)


def test_a_prompt_goes_over(decode: Scheduler) -> None:
    decode.added("d-1", came([7, 3, 9], 40))
    assert decode.step() == Step(claim=[ORIGIN])
    assert decode.matched("d-1", 40, 0) == 40
    assert decode.matched("d-1", 40, 0) == 40, "asked again, it says the same"
    decode.allocated("d-1", 40, [1, 2, 4], 40)
    assert decode.step() == Step(fetch=[Fetch("d-1", ORIGIN, (7, 3, 9), (1, 2, 4))])
    assert decode.matched("d-1", 40, 0) == 0, "it comes once"
    decode.allocated("d-1", 40, [1, 2, 4], 0)
    assert not decode.step()


def test_a_request_is_lent_by_another_name_than_an_older_one_of_its_name() -> None:
    """Of which somebody may come late: the blocks hold something else by now."""
    first, second = lent_name("a/b"), lent_name("a/b")
    assert first != second
    assert request_of(first) == request_of(second) == "a/b"


def test_what_is_here_already_does_not_come(decode: Scheduler) -> None:
    decode.added("d-1", came([7, 3, 9], 40))
    assert decode.matched("d-1", 40, 16) == 24
    decode.allocated("d-1", 40, [5, 2, 4], 24)
    assert decode.step().fetch == [Fetch("d-1", ORIGIN, (3, 9), (2, 4))]


def test_blocks_beyond_the_prompt_do_not_come(decode: Scheduler) -> None:
    """A prefill engine that has gone on for some tokens, and a decode engine that has room for more."""
    decode.added("d-1", came([7, 3, 9, 8], 50))
    assert decode.matched("d-1", 40, 0) == 40
    decode.allocated("d-1", 40, [1, 2, 4, 6], 40)
    assert decode.step().fetch == [Fetch("d-1", ORIGIN, (7, 3, 9), (1, 2, 4))]


def test_a_prompt_that_was_computed_in_part(decode: Scheduler) -> None:
    decode.added("d-1", came([7, 3], 32))
    assert decode.matched("d-1", 40, 0) == 32
    decode.allocated("d-1", 40, [1, 2, 4], 32)
    assert decode.step().fetch == [Fetch("d-1", ORIGIN, (7, 3), (1, 2))]


def test_all_of_it_is_here(decode: Scheduler) -> None:
    decode.added("d-1", came([7, 3], 32))
    decode.step()
    assert decode.matched("d-1", 32, 32) == 0
    decode.allocated("d-1", 32, [1, 2], 0)
    assert decode.step() == Step(release=[ORIGIN])


def test_a_request_that_is_aborted_in_the_queue_releases_its_blocks(decode: Scheduler) -> None:
    params = came([7, 3], 32)
    decode.added("d-1", params)
    decode.step()
    assert decode.finished("d-1", params, 0, [], complete=False) is None
    assert decode.step() == Step(release=[ORIGIN])


def test_a_request_that_is_aborted_while_it_comes_is_broken_off(decode: Scheduler) -> None:
    params = came([7, 3], 32)
    decode.added("d-1", params)
    decode.allocated("d-1", 32, [1, 2], 32)
    decode.step()
    assert decode.finished("d-1", params, 0, [1, 2], complete=False) is None
    assert decode.step() == Step(cancel=["d-1"])


def test_a_request_that_ends_after_it_came_breaks_nothing_off(decode: Scheduler) -> None:
    params = came([7, 3], 32)
    decode.added("d-1", params)
    decode.allocated("d-1", 32, [1, 2], 32)
    decode.step()
    decode.received({"d-1"})
    assert decode.finished("d-1", params, 40, [1, 2, 3], complete=True) is None
    assert not decode.step()


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_engine_id": None},
        {"remote_request_id": 7},
        {"remote_block_ids": None},
        {"remote_block_ids": [[1, 2]]},
        {"remote_block_ids": [-1]},
        {"remote_num_tokens": None},
        {"tp_size": 0},
    ],
)
def test_a_request_that_says_not_whence_it_comes_is_computed_here(
    decode: Scheduler, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    decode.added("d-1", came([7, 3], 32) | wrong)
    assert decode.matched("d-1", 32, 0) == 0
    assert not decode.step()
    assert "d-1" in caplog.text


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}])
def test_requests_of_this_engine_alone(decode: Scheduler, params: dict[str, Any] | None) -> None:
    decode.added("d-1", params)
    assert decode.matched("d-1", 32, 0) == 0
    decode.allocated("d-1", 32, [1, 2], 0)
    assert decode.finished("d-1", params, 40, [1, 2, 3], complete=True) is None
    assert not decode.step()


def test_an_engine_that_only_prefills_fetches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = Scheduler("prefill", 1, BLOCK, fetches=False)
    engine.added("d-1", came([7, 3], 32))
    assert engine.matched("d-1", 32, 0) == 0
    assert not engine.step()
    assert "d-1 is computed here" in caplog.text


def test_an_engine_that_only_decodes_hands_nothing_over(caplog: pytest.LogCaptureFixture) -> None:
    engine = Scheduler("decode", 1, BLOCK, lends=False)
    assert engine.finished("p-1", {"do_remote_decode": True}, 20, [1, 2], complete=True) is None
    assert not engine.step()
    assert "p-1 is not handed over" in caplog.text


def test_a_prefill_that_was_aborted_keeps_nothing() -> None:
    engine = Scheduler("prefill", 1, BLOCK)
    assert engine.finished("p-1", {"do_remote_decode": True}, 20, [1, 2], complete=False) is None
    assert not engine.step()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, "address"),
        ({"address": 7000}, "address"),
        ({"address": "tcp://a:1", "lease": 3}, r"'lease'.*lease_s"),
        ({"address": "tcp://a:1", "lease_s": 0}, "lease_s=0"),
        ({"address": "tcp://a:1", "fetch_s": "3"}, "fetch_s='3'"),
    ],
)
def test_options_that_make_no_sense_are_named(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(aiocomm.UsageError, match=said):
        Options.of(extra)
