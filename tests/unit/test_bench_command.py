"""`aiocomm bench` where it cannot write, or is shown what it has not written; each suite counts once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest
from aiocomm_bench import cli, record
from aiocomm_bench.model import Column, Options, Rule, Subject, Suite

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def broken_off() -> set[str]:
    """The suites in whose middle somebody presses Ctrl-C."""
    return set()


@pytest.fixture
def taken() -> list[Options]:
    """What the suites were told each time."""
    return []


@pytest.fixture
def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken_off: set[str], taken: list[Options]
) -> list[str]:
    """What the suites `one` and `two` have measured so far; results go to an empty folder."""
    calls: list[str] = []

    def suite(name: str) -> Suite:
        def measure(subject: str, options: Options) -> dict[str, float]:
            calls.append(name)
            taken.append(options)
            if name in broken_off:
                raise KeyboardInterrupt
            return {"us": 1.0}

        subjects, columns = (Subject("ours", "ours"),), (Column("us", "time", 1),)
        rules = (Rule("time", "ours", "us", "<=", 2.0),)
        return Suite(name, name, lambda options: subjects, measure, lambda options: columns, rules)

    monkeypatch.setattr(cli, "SUITES", {name: suite(name) for name in ("one", "two")})
    monkeypatch.chdir(tmp_path)
    return calls


def bench(*arguments: str, rounds: tuple[str, ...] = ("--rounds", "1")) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args([*rounds, *arguments]))


@pytest.mark.parametrize("out", [".", "/proc/no/such.json", "file/x.json"])
def test_a_result_that_cannot_be_written_is_told_before_measuring(
    out: str, measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert bench("--out", out) == 2
    assert f"aiocomm bench: {out} cannot be written: " in capsys.readouterr().err
    assert measured == []


def test_trying_leaves_nothing_and_changes_nothing(measured: list[str], tmp_path: Path) -> None:
    (there := tmp_path / "there.json").write_text("before")
    cli._try_out(there)
    cli._try_out(tmp_path / "new" / "folder" / "x.json")
    assert there.read_text() == "before"
    assert list(tmp_path.iterdir()) == [there]


def test_a_result_that_cannot_be_written_in_the_end_is_told_in_a_sentence(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x.json")

    monkeypatch.setattr(record, "save", full)
    assert bench("one") == 1
    told = capsys.readouterr()
    assert "the results cannot be written: [Errno 28] No space left on device: 'x.json'" in told.err
    assert "time" in told.out


def test_a_suite_that_is_named_twice_is_measured_once(measured: list[str]) -> None:
    assert bench("two", "one", "two") == 0
    assert measured == ["two", "one"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "3",
        "{}",
        '{"format": 1}',
        '{"format": 1, "options": 3}',
        '{"format": 1, "options": {"peers": [], "sizes": []}, "samples": [3]}',
    ],
)
def test_what_is_no_result_file_is_named(
    text: str, measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert bench("--show", "x.json") == 2
    assert "aiocomm bench: x.json is not a result file of format 1" in capsys.readouterr().err
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    assert bench("--show", "x.json") == 2
    assert "x.json" in capsys.readouterr().err


def test_a_check_of_a_suite_that_was_not_measured_fails(
    measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("one", "--out", "x.json") == 0
    assert bench("--show", "x.json", "--check") == 0
    assert bench("one", "--show", "x.json", "--check") == 0
    capsys.readouterr()
    assert bench("two", "--show", "x.json", "--check") == 1
    assert "not measured" in capsys.readouterr().out


def test_what_was_measured_before_ctrl_c_is_kept(
    measured: list[str], broken_off: set[str], tmp_path: Path
) -> None:
    broken_off.add("two")
    assert bench("one", "two", "--out", "x.json") == 130
    assert [sample.suite for sample in record.load(tmp_path / "x.json").samples] == ["one"]


def test_ctrl_c_before_anything_was_measured_writes_nothing(
    measured: list[str], broken_off: set[str], tmp_path: Path
) -> None:
    broken_off.add("one")
    assert bench("one", "two", "--out", "x.json") == 130
    assert measured == ["one"]
    assert not list(tmp_path.iterdir())


def test_options_reach_the_suites(measured: list[str], taken: list[Options]) -> None:
    assert bench("one", "--timeout", "7", "--peers", "blocking-unix,gloo", "--sizes", "1KiB,2") == 0
    assert taken == [Options(rounds=1, peers=("blocking-unix", "gloo"), sizes=(1024, 2), timeout_s=7.0)]
    for arguments, rounds in ((["--quick"], 2), ([], 5)):
        measured.clear()
        assert bench("one", *arguments, rounds=()) == 0
        assert len(measured) == rounds
