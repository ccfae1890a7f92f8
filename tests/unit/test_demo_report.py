"""The demo's figures: overlap, rate, equality, and what is printed of them."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aiocomm.demo.latency import Latency
from aiocomm.demo.model import ModelConfig
from aiocomm.demo.report import Report, busy, hidden
from aiocomm.demo.split import Run, SplitRun

SINGLE = Run(prefilled_s=1.0, token_s=(1.1, 1.2, 1.3), tokens=(65, 66, 67), checksum=5)
SPLIT = SplitRun(
    prefilled_s=1.0,
    token_s=(1.2, 1.25, 1.3),
    tokens=(65, 66, 67),
    checksum=5,
    submitted_s=(0.25, 1.0),
    arrived_s=(0.5, 1.25),
    nbytes=1_000_000,
)
REPORT = Report(
    model=ModelConfig.sized(2, 128),
    link="shm",
    threads=1,
    prompt_bytes=100,
    single=SINGLE,
    split=SPLIT,
    latencies=(Latency(1024, "idle", (20e-6,), 0.0), Latency(131072, "urgent", (30e-6, 2e-3), 5e9)),
)


def test_busy_counts_overlapping_intervals_once() -> None:
    assert busy([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0
    assert busy([(5.0, 6.0), (0.0, 2.0), (0.5, 1.0)]) == 3.0
    assert busy([(0.0, 2.0), (1.0, 3.0)], until=2.5) == 2.5
    assert busy([(2.0, 3.0)], until=1.0) == 0.0
    assert busy([]) == 0.0


_intervals = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda t: (min(t), max(t))))


@given(intervals=_intervals, until=st.integers(0, 60))
def test_busy_equals_counting(intervals: list[tuple[int, int]], until: int) -> None:
    counted = sum(any(start <= x < stop for start, stop in intervals) for x in range(until))
    assert busy(intervals, until) == counted


def test_hidden_is_the_share_before_prefill_ended() -> None:
    assert hidden([0.25, 1.0], [0.5, 1.25], 1.0) == pytest.approx(0.5)
    assert hidden([0.0], [0.5], 1.0) == 1.0
    assert hidden([1.0], [1.5], 1.0) == 0.0
    assert hidden([], [], 1.0) == 0.0


def test_report_adds_up() -> None:
    found = REPORT.as_json()
    json.dumps(found)
    assert found["tokens_equal"]
    assert found["kv_equal"]
    assert REPORT.equal
    assert found["split"] == {
        "prefill_s": 1.0,
        "time_to_first_token_s": 1.2,
        "per_token_s": pytest.approx(0.05),
    }
    assert found["kv_bytes_per_s"] == pytest.approx(2e6)
    assert found["hidden_share"] == pytest.approx(0.5)


@pytest.mark.parametrize("change", [{"tokens": (65, 66, 68)}, {"checksum": 6}])
def test_any_difference_is_told(change: dict[str, object]) -> None:
    report = dataclasses.replace(REPORT, split=dataclasses.replace(SPLIT, **change))
    assert not report.equal
    assert "equal: no" in show(report)


def test_one_token_has_no_time_per_token() -> None:
    run = dataclasses.replace(SINGLE, token_s=(1.0,), tokens=(65,))
    assert run.per_token_s is None


def test_tables_fit_eighty_columns() -> None:
    text = show(REPORT)
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "1.20 s",
        "200.0 ms",
        "1.0 MB in 4 messages",
        "50% of 500.0 ms",
        "20 µs",
        "5.00 GB/s",
        "b'ABC'",
    ):
        assert expected in text
    assert "tokens equal: yes   keys and values equal: yes" in text


def show(report: Report) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    report.show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
