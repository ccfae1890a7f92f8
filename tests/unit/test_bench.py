"""The benchmark's arithmetic, its registry, and one cheap peer end to end."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import io
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiocomm_bench import (
    checks,
    cli,
    figures,
    machine,
    markdown,
    pair,
    peers,
    perftest,
    plan,
    rdma,
    record,
    rounds,
    sizes,
    suites,
    table,
    work,
)
from aiocomm_bench.model import Column, Options, Rule, Sample, Subject, Suite
from aiocomm_bench.peers import ours
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

SUBJECTS = (
    Subject("ours", "ours"),
    Subject("ours-tcp", "ours", "tcp"),
    Subject("fast", "peer"),
    Subject("slow", "peer", "tcp"),
    Subject("absent", "peer", "", "not installed: pip install absent"),
)


def suite(measure: Any = None) -> Suite:
    return Suite(
        "canned",
        "canned data",
        lambda options: SUBJECTS,
        measure or (lambda name, options: {"us": float(len(name))}),
        lambda options: (Column("us", "time", 1), Column("rate", "rate", 1, "higher")),
        (Rule("time", "ours", "us", "<=", 1.1, ("fast", "slow")), Rule("idle", "ours", "idle", "<=", 0.0)),
    )


def samples(**series: list[float]) -> list[Sample]:
    """Samples of one metric, `us`, by subject and round."""
    return [
        Sample("canned", name.replace("_", "-"), number, {"us": value})
        for name, values in series.items()
        for number, value in enumerate(values)
    ]


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figure_is_the_median_and_the_range() -> None:
    assert figures.figure([3.0, 1.0, 2.0]) == figures.Figure(2.0, 1.0, 3.0, 3)
    assert figures.figure([]) is None


@pytest.mark.parametrize(("share", "value"), [(0.0, 0.0), (0.5, 50.0), (0.99, 99.0), (1.0, 99.0)])
def test_percentile(share: float, value: float) -> None:
    assert figures.percentile([float(x) for x in reversed(range(100))], share) == value


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        figures.percentile([], 0.5)


def test_ratio_is_taken_within_each_round_against_the_best_of_that_round() -> None:
    taken = samples(ours=[10.0, 40.0, 10.0], fast=[10.0, 40.0, 20.0], slow=[20.0, 20.0, 30.0])
    ratio = figures.ratio(taken, "ours", ["fast", "slow"], "us", "lower")
    assert ratio == figures.Figure(1.0, 0.5, 2.0, 3, "fast")
    higher = figures.ratio(taken, "ours", ["fast", "slow"], "us", "higher")
    assert higher is not None
    assert higher.median == 0.5


def test_ratio_skips_rounds_in_which_either_side_failed() -> None:
    taken = [*samples(ours=[1.0, 2.0], fast=[2.0]), Sample("canned", "fast", 1, {}, "died")]
    assert figures.ratio(taken, "ours", ["fast"], "us", "lower") == figures.Figure(0.5, 0.5, 0.5, 1, "fast")
    assert figures.ratio(taken, "ours", ["absent"], "us", "lower") is None


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        (Rule("x", "ours", "us", "<=", 1.1, ("fast",)), True),
        (Rule("x", "ours", "us", "<=", 0.9, ("fast",)), False),
        (Rule("x", "ours", "us", ">=", 1.0, ("fast",)), True),
        (Rule("x", "ours", "us", "<=", 10.0), True),
        (Rule("x", "ours", "us", "<=", 9.0), False),
        (Rule("x", "ours", "other", "<=", 9.0), None),
        (Rule("x", "ours", "us", "<=", 9.0, ("absent",)), None),
    ],
)
def test_verdicts(rule: Rule, passed: bool | None) -> None:
    verdict = checks.judge(rule, samples(ours=[10.0], fast=[10.0]))
    assert verdict.passed is passed
    word = {True: "pass", False: "FAIL", None: "not judged" if rule.against else "not measured"}[passed]
    assert verdict.word == word


@pytest.mark.parametrize(
    ("relation", "bound", "passed"),
    [("<=", 1.0, False), ("<=", 2.0, True), (">=", 1.0, False), (">=", 0.5, True)],
)
def test_a_rule_is_against_the_best_rival_by_its_own_measure(
    relation: Any, bound: float, passed: bool
) -> None:
    """Of what is to be small that is the smallest, of what is to be large the largest."""
    taken = samples(ours=[10.0], one=[5.0], other=[20.0])
    rule = Rule("x", "ours", "us", relation, bound, ("one", "other"))
    assert checks.judge(rule, taken).passed is passed


def test_odd_rounds_go_backwards_and_leave_out_what_is_missing() -> None:
    seen: list[tuple[int, str]] = []
    taken = list(rounds.run(suite(), Options(rounds=2), lambda n, s: seen.append((n, s.name))))
    names = ["ours", "ours-tcp", "fast", "slow"]
    assert seen == [(0, n) for n in names] + [(1, n) for n in reversed(names)]
    assert [(s.round, s.subject) for s in taken] == seen


def test_a_subject_that_fails_does_not_end_the_others() -> None:
    def measure(name: str, options: Options) -> dict[str, float]:
        if name == "fast":
            raise pair.PairError("last words")
        return {"us": 1.0}

    taken = list(rounds.run(suite(measure), Options(rounds=1), lambda n, s: None))
    assert [(s.subject, s.error) for s in taken] == [
        ("ours", ""), ("ours-tcp", ""), ("fast", "last words"), ("slow", ""),
    ]  # fmt: skip


def test_table_shows_spread_failures_and_what_to_install() -> None:
    taken = [*samples(ours=[1.0, 3.0], fast=[2.0, 2.0]), Sample("canned", "slow", 0, {}, "died of it")]
    text = shown(table.of_suite(suite(), Options(), taken))
    assert "2.0" in text
    assert "1.0..3.0" in text
    assert "failed 1 of 1" in text
    assert "absent" in text
    notes = table.footnotes(suite(), Options(), taken)
    assert "absent: not installed: pip install absent" in notes
    assert "slow, round 0, failed: died of it" in notes


def test_what_was_measured_elsewhere_is_shown_here_where_it_is_absent() -> None:
    taken = samples(absent=[7.0])
    assert "7.0" in shown(table.of_suite(suite(), Options(), taken))
    assert not [note for note in table.footnotes(suite(), Options(), taken) if "absent" in note]


def test_many_figures_are_rows() -> None:
    many = tuple(Column("us", f"time\nof {number}", 1) for number in range(20))
    wide = replace(suite(), columns=lambda options: many)
    lines = shown(table.of_suite(wide, Options(), samples(ours=[1.0], fast=[2.0]))).splitlines()
    assert "ours" in lines[2]
    assert "fast" in lines[2]
    assert "absent" not in lines[2]
    row = next(line for line in lines if "time of 17" in line)
    assert "1.0" in row
    assert "2.0" in row
    ratios = table.of_ratios(wide, Options(), samples(ours=[1.0], fast=[2.0]))
    assert any("time of 17" in line and "0.50" in line for line in shown(ratios).splitlines())


def test_ratio_table_compares_tcp_with_tcp_alone() -> None:
    taken = samples(ours=[4.0], ours_tcp=[4.0], fast=[8.0], slow=[16.0])
    compared = table.of_ratios(suite(), Options(), taken)
    text = shown(compared)
    assert "0.50" in text
    assert "0.25" in text
    assert table.of_ratios(suite(), Options(), samples(fast=[1.0])) is None


def test_verdict_table_names_each_rule() -> None:
    text = shown(table.of_verdicts(checks.judge_all(suite(), samples(ours=[2.0], fast=[1.0]))))
    assert "FAIL" in text
    assert "not measured" in text


def test_a_verdict_says_whom_it_was_judged_without(tmp_path: Path) -> None:
    taken = [*samples(ours=[1.0, 1.0], fast=[2.0]), Sample("canned", "fast", 1, {}, "died")]
    rule = Rule("time", "ours", "us", "<=", 1.0, ("fast", "slow"))
    verdict = checks.judge(rule, taken)
    assert (verdict.word, verdict.without) == ("pass", {"fast": 1, "slow": 2})
    assert "without fast in 1 of 2 rounds, slow" in shown(table.of_verdicts([verdict]))
    whole = checks.judge(rule, samples(ours=[1.0], fast=[2.0], slow=[3.0]))
    assert (whole.word, whole.without) == ("pass", {})
    assert "without" not in shown(table.of_verdicts([whole]))
    path = tmp_path / "x.json"
    record.save(path, record.Record({}, "today", Options(), tuple(taken), {}), [verdict])
    assert json.loads(path.read_text())["checks"][0]["without"] == {"fast": 1, "slow": 2}
    assert "of fast, without fast, slow" in markdown.checks(json.loads(path.read_text()))[-1]


def test_a_rule_none_of_whose_peers_was_measured_is_not_judged(tmp_path: Path) -> None:
    failed = Sample("canned", "fast", 0, {}, "died")
    verdict = checks.judge(suite().rules[0], [*samples(ours=[0.1]), failed])
    assert (verdict.word, verdict.passed, verdict.without) == ("not judged", None, {"fast": 1, "slow": 1})
    text = shown(table.of_verdicts([verdict]))
    assert "not judged" in text
    assert "without fast, slow" in text
    assert checks.judge(suite().rules[0], [failed]).word == "not measured"
    path = tmp_path / "x.json"
    record.save(path, record.Record({}, "today", Options(), (), {}), [verdict])
    assert json.loads(path.read_text())["checks"][0]["verdict"] == "not judged"
    assert len(markdown.checks(json.loads(path.read_text()))) == 2, "nothing beneath the head"


def test_a_suite_is_judged_by_its_own_samples() -> None:
    others = [replace(sample, suite="canned-3") for sample in samples(ours=[9.0], fast=[1.0])]
    verdict = checks.judge_all(suite(), [*samples(ours=[1.0], fast=[1.0]), *others])[0]
    assert verdict.figure is not None
    assert (verdict.figure.median, verdict.passed) == (1.0, True)


def test_records_keep_six_digits(tmp_path: Path) -> None:
    taken = (Sample("canned", "ours", 0, {"us": 1234567.891, "n": 12345678}),)
    record.save(tmp_path / "x.json", record.Record({}, "today", Options(), taken, {}), ())
    assert dict(record.load(tmp_path / "x.json").samples[0].metrics) == {"us": 1234570.0, "n": 12345678}


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    options = Options(rounds=2, peers=("a",), sizes=(8,))
    taken = record.Record({"cores": 2}, "2026-01-01", options, tuple(samples(ours=[1.5, 2.5])), {"x": "pip"})
    path = tmp_path / "new" / "result.json"
    record.save(path, taken, checks.judge_all(suite(), taken.samples))
    assert record.load(path) == taken
    assert json.loads(path.read_text())["checks"][1]["verdict"] == "not measured"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="not a result file"):
        record.load(path)


@pytest.mark.parametrize(("text", "nbytes"), [("8", 8), ("64KiB", 65536), ("1m", 1 << 20), ("1GiB", 1 << 30)])
def test_sizes(text: str, nbytes: int) -> None:
    assert sizes.parse(text) == nbytes
    assert sizes.parse(sizes.show(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-8", "KiB", "8 parsecs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        sizes.parse(text)


def test_chosen_sizes_make_the_plan() -> None:
    made = plan.plan_for(Options(sizes=(1 << 20, 8)))
    assert [n for n, _ in made.pingpong] == [8]
    assert [n for n, _ in made.bulk] == [1 << 20]
    assert plan.Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_registry_finds_every_peer_and_says_what_is_missing() -> None:
    found = peers.registry()
    assert {
        "blocking-unix",
        "ucxx-best",
        "mpi4py",
        "memcpy-one-thread",
        "handmade-ring",
        "aiocomm-shm",
    } <= set(found)
    assert [p.kind for p in found.values()] == sorted(
        (p.kind for p in found.values()), key=("raw", "handmade", "peer", "ours").index
    )
    with pytest.raises(KeyError, match="no peer 'nobody'"):
        peers.find("nobody")
    nowhere = peers.Peer(
        "x", found["gloo"].open, "peer", "tcp", modules=("no_such_module",), install="pip install x"
    )
    assert nowhere.missing() == "not installed: pip install x"


def test_a_new_link_is_a_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ours._new_links() == []
    (tmp_path / "links").mkdir()
    for name in ("shm", "uds", "_report"):
        (tmp_path / "links" / f"{name}.py").touch()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"aiocomm": package}.get)
    assert ours._new_links() == ["uds"]


def test_rules_speak_of_peers_and_metrics_that_exist() -> None:
    for each in suites.SUITES.values():
        names = {s.name for s in each.subjects(Options())}
        for rule in each.rules:
            assert {rule.subject, *rule.against} <= names
    columns = {c.metric for c in suites.SUITES["pairs"].columns(Options())}
    assert {r.metric for r in suites.SUITES["pairs"].rules} <= columns


def test_a_cheap_peer_end_to_end() -> None:
    tiny = plan.Plan(pingpong=((8, 5),), bulk=((1 << 20, 2),), windows=2, idle_s=0.01)
    arguments = {"peer": "blocking-unix", "plan": tiny.to_json()}
    sender, receiver = pair.run("aiocomm_bench.work:child", arguments, timeout_s=60)
    merged = work.merge(sender, receiver)
    assert merged["cpu_s_per_gb/1MiB"] == sender["cpu_s_per_gb/1MiB"] + receiver["cpu_s_per_gb/1MiB"]
    assert merged["idle_cores"] == receiver["idle_cores"]
    assert {"half_us/8B", "p99_us/8B", "gbytes_s/1MiB", "messages_s"} <= set(merged)


def test_collectives_of_three_processes_end_to_end() -> None:
    arguments = {"peer": "aiocomm-shm", "ranks": 3, "cases": [[1024, 2], [65536, 2]]}
    found = pair.run("aiocomm_bench.collectives:child", arguments, timeout_s=60, size=3)
    columns = {c.metric for c in suites.SUITES["collectives-3"].columns(Options())}
    assert len(found) == 3
    for one in found:
        assert len(one) == 8
        assert set(one) & columns == {metric for metric in columns if metric.endswith("/1KiB")}
        assert all(us > 0 for us in one.values())


def test_a_pair_that_fails_says_why_and_one_that_hangs_is_ended() -> None:
    arguments = {"peer": "nobody", "plan": plan.QUICK.to_json()}
    with pytest.raises(pair.PairError, match="no peer 'nobody'"):
        pair.run("aiocomm_bench.work:child", arguments, timeout_s=60)
    endless = plan.Plan(pingpong=((8, 10**9),), bulk=(), windows=0, idle_s=0)
    hanging = {"peer": "blocking-unix", "plan": endless.to_json()}
    with pytest.raises(pair.PairError, match="not done after"):
        pair.run("aiocomm_bench.work:child", hanging, timeout_s=0.5)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.main(parser.parse_args(["--list"])) == 0
    assert "blocking-unix" in capsys.readouterr().out
    zero, nan = ["--timeout", "0"], ["--timeout", "nan"]
    for wrong in (["nosuite"], ["--peers", "nobody"], ["--sizes", "x"], ["--rounds", "0"], zero, nan):
        assert cli.main(parser.parse_args(wrong)) == 2
    out = tmp_path / "result.json"
    line = [
        "pairs",
        "--quick",
        "--rounds",
        "1",
        "--peers",
        "blocking-unix",
        "--sizes",
        "8",
        "--out",
        str(out),
    ]
    assert cli.main(parser.parse_args(line)) == 0
    assert cli.main(parser.parse_args(["pairs", "--show", str(out)])) == 0
    assert cli.main(parser.parse_args(["pairs", "--show", str(out), "--check"])) == 1, "ours was not measured"
    assert "blocking-unix" in capsys.readouterr().out


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, what: Suite) -> int:
    """The exit status of `aiocomm bench` in an empty folder, for one suite."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "SUITES", {what.name: what})
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.main(parser.parse_args(["--rounds", "1"]))


def test_earlier_results_of_the_day_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = datetime.date(2026, 1, 2)  # which does not end meanwhile
    today = SimpleNamespace(today=lambda: day)
    monkeypatch.setattr(cli, "datetime", SimpleNamespace(date=today))
    for count in (1, 2, 3):
        assert command(monkeypatch, tmp_path, suite()) == 0
        assert len(list(tmp_path.glob("results/*.json"))) == count
    assert (tmp_path / "results" / f"{machine.describe().kind}-3-2026-01-02.json").exists()


def test_a_run_that_measured_nothing_fails_and_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, options: Options) -> dict[str, float]:
        raise RuntimeError("no such thing")

    assert command(monkeypatch, tmp_path, suite(fail)) == 1
    assert "nothing was measured: each of the 4 tries failed, the last by: no such" in capsys.readouterr().err
    absent = replace(suite(), subjects=lambda options: SUBJECTS[-1:])
    assert command(monkeypatch, tmp_path, absent) == 1
    assert "nothing that was asked for can be measured here (absent: not inst" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


BANDWIDTH = """\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF\t\tDevice         : rxea0
 local address: LID 0000 QPN 0x0011 PSN 0x9a6c5 RKey 0x000357 VAddr 0x007f4a1a4c0000
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 1048576    200              62.10              61.05  \t\t   0.000061
---------------------------------------------------------------------------------------
"""
LATENCY = """\
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 8       1000          12.87          431.02       14.23     \t       15.06       \t3.44   \t\t21.00   \t\t50.25
"""  # noqa: E501


def test_perftest_is_read() -> None:
    (row,) = perftest.parse(BANDWIDTH)
    assert (row.nbytes, row.iterations) == (1 << 20, 200)
    assert row.values == {
        "BW peak[MiB/sec]": 62.10,  # it says MB and means 2^20
        "BW average[MiB/sec]": 61.05,
        "MsgRate[Mpps]": 0.000061,
    }
    (row,) = perftest.parse(LATENCY)
    assert row.values["t_typical[usec]"] == 14.23
    assert row.values["99.9% percentile[usec]"] == 50.25


@pytest.mark.parametrize(
    "text", ["", "Couldn't connect to 127.0.0.1:18515", BANDWIDTH.replace("0.000061", "")]
)
def test_what_perftest_does_not_say_is_an_error(text: str) -> None:
    with pytest.raises(perftest.PerftestError):
        perftest.parse(text)


def test_rdma_is_compared_with_perftest_by_the_same_names() -> None:
    against = {rule.metric for rule in rdma.SUITE.rules if rule.against == ("perftest",)}
    assert {
        "native_us/8B",
        *(f"mib_s/{kind}/{size}" for kind in ("send", "put", "get") for size in ("1MiB", "16MiB")),
    } == against
    assert against < {column.metric for column in rdma.SUITE.columns(Options())}
