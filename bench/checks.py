"""Compares samples with the rules of their suites. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .model import Better, Rule, Sample, Suite


@dataclass(frozen=True)
class Verdict:
    """What came of one rule; `passed` is None where nothing was measured that it could be judged by.

    Args:
        rounds: In how many its subject was measured.
        without: Peers of the rule that were missing or failed, and in how many of those rounds. One of them
            may be the best: what passed, passed against the others alone.
    """

    rule: Rule
    figure: figures.Figure | None
    passed: bool | None
    rounds: int = 0
    without: Mapping[str, int] = field(default_factory=dict)

    @property
    def word(self) -> str:
        if self.passed is None:
            return "not judged" if self.rounds else "not measured"
        return "pass" if self.passed else "FAIL"

    def absent(self) -> str:
        """Return whom it was judged without, for people; empty where nobody is missing."""
        names = [
            name if count == self.rounds else f"{name} in {count} of {self.rounds} rounds"
            for name, count in self.without.items()
        ]
        return f"without {', '.join(names)}" if names else ""


def judge(rule: Rule, samples: Sequence[Sample]) -> Verdict:
    """Return whether the median over rounds keeps the rule."""
    if rule.against:
        better: Better = "lower" if rule.relation == "<=" else "higher"
        figure = figures.ratio(samples, rule.subject, rule.against, rule.metric, better)
    else:
        figure = figures.of(samples, rule.subject, rule.metric)
    passed = figures.holds(figure.median, rule.relation, rule.bound) if figure else None
    rounds = len(figures.by_round(samples, rule.subject, rule.metric))
    without = figures.lacking(samples, rule.subject, rule.against, rule.metric)
    return Verdict(rule, figure, passed, rounds, without)


def judge_all(suite: Suite, samples: Sequence[Sample]) -> list[Verdict]:
    """Return a verdict for each rule of a suite. Samples of others, which are named alike, do not count."""
    own = [sample for sample in samples if sample.suite == suite.name]
    return [judge(rule, own) for rule in suite.rules]
