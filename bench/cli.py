"""``aiocomm bench``: measures our links beside their peers on this machine."""

from __future__ import annotations

import datetime
import itertools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import checks, gpu, machine, peers, record, rounds, sizes, table
from .model import Options, Sample, Subject, Suite
from .suites import SUITES

if TYPE_CHECKING:
    import argparse

_NARROWEST = 170  # columns; a table folded to 80 cannot be read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Measure our links beside their peers on this machine: tables, a result file, and what must hold."""
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; else all")
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer messages, no 1 GiB")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is measured (default: 5)")
    parser.add_argument("--peers", default="", metavar="A,B", help="only these (see --list)")
    parser.add_argument("--sizes", default="", metavar="8,64KiB", help="only these message sizes, in `pairs`")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="result file (a new results/MACHINE-DATE.json)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all that must hold does")
    parser.add_argument("--show", type=Path, metavar="FILE", help="show an earlier result, measure nothing")
    parser.add_argument("--list", action="store_true", help="list suites, peers, and what to install")
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="per peer and round (180)")


def main(args: argparse.Namespace) -> int:
    """Run what `add_arguments` understood; return the exit status."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NARROWEST)
    if args.list:
        _list(console)
        return 0
    here, today = machine.describe(), datetime.date.today().isoformat()
    try:
        options, suites = _understand(args)
        out = args.out or _unused(_results_folder(), here.kind, today)
        earlier = record.load(args.show) if args.show else None
        if earlier is None:
            _try_out(out)
    except (ValueError, KeyError, OSError) as error:
        print(f"aiocomm bench: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    if earlier is not None:
        measured = {sample.suite for sample in earlier.samples}
        shown = suites if args.suites else [suite for suite in suites if suite.name in measured]
        return _report(console, earlier, shown, args.check)
    console.print(here.line())
    samples, missing, interrupted = _measure(suites, options)
    result = record.Record(here.to_json(), today, options, tuple(samples), missing)
    status = _report(console, result, suites, args.check)
    if not any(sample.metrics for sample in samples):
        print(f"aiocomm bench: {_why_nothing(samples, missing)}; no file is written", file=sys.stderr)
        return 130 if interrupted else 1
    verdicts = [v for suite in suites for v in checks.judge_all(suite, samples)]
    try:
        record.save(out, result, verdicts)
    except OSError as error:
        print(f"aiocomm bench: the results cannot be written: {error}", file=sys.stderr)
        return 1
    console.print(f"written to {out}")
    return 130 if interrupted else status


def _understand(args: argparse.Namespace) -> tuple[Options, list[Suite]]:
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"no suite {unknown[0]!r}; there are: {', '.join(SUITES)}")
    names = tuple(name for name in args.peers.split(",") if name)
    for name in names:
        if name not in gpu.NAMES:
            peers.find(name)
    rounds_wanted = args.rounds if args.rounds is not None else 2 if args.quick else 5
    if rounds_wanted < 1:
        raise ValueError("--rounds must be at least 1")
    if not args.timeout > 0:
        raise ValueError(f"--timeout must be more than 0 seconds, not {args.timeout:g}")
    options = Options(
        rounds=rounds_wanted,
        quick=args.quick,
        peers=names,
        sizes=tuple(sizes.parse(text) for text in args.sizes.split(",") if text),
        timeout_s=args.timeout,
    )
    return options, [SUITES[name] for name in dict.fromkeys(args.suites or SUITES)]


def _measure(suites: list[Suite], options: Options) -> tuple[list[Sample], dict[str, str], bool]:
    """Take all samples; what was taken before Ctrl-C is kept."""
    samples: list[Sample] = []
    missing: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for suite in suites:
            subjects = suite.subjects(options)
            missing.update({s.name: s.missing for s in subjects if s.missing})
            total = sum(not s.missing for s in subjects) * options.rounds
            task = progress.add_task(suite.name, total=total)

            def started(number: int, subject: Subject, suite: Suite = suite, task: object = task) -> None:
                text = f"{suite.name}: round {number + 1}, {subject.name}"
                progress.update(task, description=text)  # type: ignore[arg-type]

            try:
                for sample in rounds.run(suite, options, started):
                    samples.append(sample)
                    progress.advance(task)
            except KeyboardInterrupt:
                return samples, missing, True
    return samples, missing, False


def _report(console: Console, result: record.Record, suites: list[Suite], check: bool) -> int:
    """Print tables; return 1 if `check` and something that must hold does not, or was not measured."""
    verdicts = []
    for suite in suites:
        samples = [s for s in result.samples if s.suite == suite.name]
        console.print(table.of_suite(suite, result.options, samples))
        ratios = table.of_ratios(suite, result.options, samples)
        if ratios is not None:
            console.print(ratios)
        for line in table.footnotes(suite, result.options, samples):
            console.print(line, style="dim", markup=False, highlight=False)
        verdicts += checks.judge_all(suite, samples)
    if check or any(v.figure for v in verdicts):
        console.print(table.of_verdicts(verdicts))
    return int(check and any(v.passed is not True for v in verdicts))


def _list(console: Console) -> None:
    for suite in SUITES.values():
        console.print(f"[bold]{suite.name}[/bold]: {suite.title}")
    console.print()
    for peer in peers.registry().values():
        state = peer.missing() or peer.note
        console.print(f"{peer.name:30} {peer.kind:9} {peer.wire:7} {peer.loop:9} {state}", highlight=False)


def _results_folder() -> Path:
    """Results are kept in the repository when run from it."""
    return Path("bench/results") if Path("bench/cli.py").exists() else Path("results")


def _try_out(path: Path) -> None:
    """Raise ValueError where no result file can be written, which is better told before measuring."""
    try:
        if path.exists():
            path.open("ab").close()
        else:
            there = next(folder for folder in path.absolute().parents if folder.exists())
            tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; see --out") from error


def _unused(folder: Path, machine: str, date: str) -> Path:
    """The name of a file that is not there yet: what was measured earlier in the day is kept."""
    names = (f"{machine}{f'-{number}' if number > 1 else ''}-{date}.json" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _why_nothing(samples: list[Sample], missing: dict[str, str]) -> str:
    """Why a run has no figures, for people."""
    if samples:
        return (
            f"nothing was measured: each of the {len(samples)} tries failed, the last by: {samples[-1].error}"
        )
    if missing:
        name, reason = next(iter(missing.items()))
        return f"nothing that was asked for can be measured here ({name}: {reason})"
    return "nothing was measured"
