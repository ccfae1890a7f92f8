"""Medians, spreads and ratios over rounds. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .model import Better, Sample


@dataclass(frozen=True)
class Figure:
    """One number over rounds."""

    median: float
    low: float
    high: float
    rounds: int
    against: str = ""  # of a ratio: the subject that was the best in most rounds


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` (0 to 1) of `values` do not exceed."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def figure(values: Sequence[float], against: str = "") -> Figure | None:
    """Return the median and the range of `values`, or None of none."""
    if not values:
        return None
    return Figure(statistics.median(values), min(values), max(values), len(values), against)


def by_round(samples: Iterable[Sample], subject: str, metric: str) -> dict[int, float]:
    """Return one metric of one subject, keyed by the round it was measured in."""
    return {s.round: s.metrics[metric] for s in samples if s.subject == subject and metric in s.metrics}


def of(samples: Iterable[Sample], subject: str, metric: str) -> Figure | None:
    """Return the figure of one metric of one subject."""
    return figure(list(by_round(samples, subject, metric).values()))


def ratio(
    samples: Sequence[Sample], subject: str, against: Sequence[str], metric: str, better: Better
) -> Figure | None:
    """Return `subject` divided by the best of `against`, within each round, then the median over rounds.

    A shared machine drifts between rounds by more than a few per cent, within one by much less: so medians
    of ratios, not ratios of medians. Rounds in which the subject or all of `against` failed do not count.
    """
    best = max if better == "higher" else min
    others = {name: by_round(samples, name, metric) for name in against if name != subject}
    values: list[float] = []
    winners: Counter[str] = Counter()
    for number, value in by_round(samples, subject, metric).items():
        rivals = [(series[number], name) for name, series in others.items() if number in series]
        if not rivals:
            continue
        rival, name = best(rivals)
        if rival == 0:
            continue
        values.append(value / rival)
        winners[name] += 1
    return figure(values, winners.most_common(1)[0][0] if winners else "")


def lacking(samples: Sequence[Sample], subject: str, against: Sequence[str], metric: str) -> dict[str, int]:
    """Return who of `against` has no figure in how many of the rounds in which `subject` has one."""
    rounds = by_round(samples, subject, metric).keys()
    counts = {name: len(rounds - by_round(samples, name, metric).keys()) for name in against}
    return {name: count for name, count in counts.items() if count}


def holds(value: float, relation: Literal["<=", ">="], bound: float) -> bool:
    """Return whether `value` keeps `bound`."""
    return value <= bound if relation == "<=" else value >= bound
