"""Tables of samples for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from . import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .checks import Verdict
    from .model import Column, Options, Sample, Subject, Suite

_STYLES = {"ours": "bold", "peer": "", "handmade": "", "raw": "dim"}
_ABSENT = "[yellow]absent[/yellow]"
_WIDE = 12  # columns beyond which they are rows


def show(figure: figures.Figure | None, digits: int, scale: float = 1.0) -> str:
    """Return a median, and beneath it the range over rounds."""
    if figure is None:
        return "-"
    median, low, high = (f"{value * scale:.{digits}f}" for value in (figure.median, figure.low, figure.high))
    return median if figure.rounds == 1 else f"{median}\n[dim]{low}..{high}[/dim]"


def of_suite(suite: Suite, options: Options, samples: Sequence[Sample]) -> Table:
    """Return a suite's figures: a row per subject, with what is missing or failed said in its place."""
    columns = suite.columns(options)
    rounds = max((s.round for s in samples), default=-1) + 1
    table = Table(title=f"{suite.name}: {suite.title}", title_justify="left", caption_justify="left")
    if rounds > 1:
        table.caption = f"median of {rounds} rounds, lowest..highest"
    rows: list[tuple[str, str, list[str]]] = []
    for subject in suite.subjects(options):
        taken = [s for s in samples if s.subject == subject.name]
        failed = [s for s in taken if s.error]
        name = subject.name + (f"\n[red]failed {len(failed)} of {len(taken)}[/red]" if failed else "")
        if taken:
            cells = [show(figures.of(taken, subject.name, c.metric), c.digits, c.scale) for c in columns]
            rows.append((name, _STYLES[subject.kind], cells))
        elif subject.missing:
            rows.append((subject.name, "", [_ABSENT, *["-"] * (len(columns) - 1)]))
    _lay_out(table, columns, rows)
    return table


def _lay_out(table: Table, columns: Sequence[Column], rows: Sequence[tuple[str, str, list[str]]]) -> None:
    """A row per subject; or where those would be too wide, a row per figure."""
    table.add_column("", no_wrap=True)
    if len(columns) <= _WIDE:
        for column in columns:
            table.add_column(column.title, justify="right")
        for name, style, cells in rows:
            table.add_row(name, *cells, style=style)
        return
    shown = [row for row in rows if any(cell not in ("-", _ABSENT) for cell in row[2])]
    for name, style, _ in shown:
        table.add_column(name, justify="right", style=style)
    for index, column in enumerate(columns):
        table.add_row(column.title.replace("\n", " "), *(cells[index] for _, _, cells in shown))


def footnotes(suite: Suite, options: Options, samples: Sequence[Sample]) -> list[str]:
    """Return what a row cannot hold: notes on subjects and the reasons of failures."""
    lines = [f"{s.name}: {s.note}" for s in suite.subjects(options) if s.note and not s.missing]
    taken = {s.subject for s in samples}  # elsewhere, perhaps, and only shown here
    lines += [f"{s.name}: {s.missing}" for s in suite.subjects(options) if s.missing and s.name not in taken]
    lines += [f"{s.subject}, round {s.round}, failed: {s.error}" for s in samples if s.error]
    return lines


def of_ratios(suite: Suite, options: Options, samples: Sequence[Sample]) -> Table | None:
    """Return ours divided by the best peer, taken within each round; tcp is compared with tcp alone."""
    subjects = suite.subjects(options)
    ours = [
        s for s in subjects if s.kind == "ours" and any(x.subject == s.name and x.metrics for x in samples)
    ]
    columns = [c for c in suite.columns(options) if c.better != "neither"]
    rivals = [s for s in subjects if s.kind == "peer"]
    if not ours or not rivals:
        return None
    table = Table(
        title="ours ÷ the best peer of the same round", title_justify="left", caption_justify="left",
        caption="median of the rounds, lowest..highest, who was best; times: below 1 is better, rates: above",
    )  # fmt: skip
    rows = [
        (subject.name, "", [_ratio_cell(subject, rivals, column, samples) for column in columns])
        for subject in ours
    ]
    _lay_out(table, columns, rows)
    return table


def _ratio_cell(
    subject: Subject, rivals: Sequence[Subject], column: Column, samples: Sequence[Sample]
) -> str:
    against = [r.name for r in rivals if subject.wire != "tcp" or r.wire == "tcp"]
    figure = figures.ratio(samples, subject.name, against, column.metric, column.better)
    if figure is None:
        return "-"
    ahead = figure.median >= 1 if column.better == "higher" else figure.median <= 1
    colour = "green" if ahead else "red"
    spread = f"\n[dim]{figure.low:.2f}..{figure.high:.2f}[/dim]" if figure.rounds > 1 else ""
    return f"[{colour}]{figure.median:.2f}[/{colour}]{spread}\n[dim]{figure.against}[/dim]"


def of_verdicts(verdicts: Sequence[Verdict]) -> Table:
    """Return what must hold, and whether it does."""
    table = Table(title="what must hold", title_justify="left", caption_justify="left")
    if any(verdict.without for verdict in verdicts):
        table.caption = "without: has no figure here, and may be the best of those that the rule names"
    for title in ("what", "of", "figure", "must", "against", ""):
        table.add_column(title, justify="right" if title == "figure" else "left")
    colours = {"pass": "green", "not measured": "yellow", "not judged": "yellow"}
    for verdict in verdicts:
        rule, figure = verdict.rule, verdict.figure
        times = "x " if rule.against else ""
        sign = "≤" if rule.relation == "<=" else "≥"
        value = f"{figure.median:.3g}" if figure else "-"
        if figure and figure.rounds > 1:
            value += f" [dim]{figure.low:.3g}..{figure.high:.3g}[/dim]"
        rival = figure.against if figure and figure.against else ", ".join(rule.against)
        if verdict.without:
            rival = (f"{rival}\n" if figure else "") + f"[yellow]{verdict.absent()}[/]"
        colour = "red" if verdict.passed is False else "yellow" if verdict.without else colours[verdict.word]
        word = f"[{colour}]{verdict.word}[/]"
        table.add_row(rule.what, rule.subject, value, f"{sign} {times}{rule.bound:g}", rival, word)
    return table
