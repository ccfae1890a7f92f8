"""Compares samples with the rules of their suites. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .model import Better, Rule, Sample, Suite


@dataclass(frozen=True)
class Verdict:
    """What came of one rule; `passed` is None where nothing was measured that it could be judged by."""

    rule: Rule
    figure: figures.Figure | None
    passed: bool | None

    @property
    def word(self) -> str:
        return {True: "pass", False: "FAIL", None: "not measured"}[self.passed]


def judge(rule: Rule, samples: Sequence[Sample]) -> Verdict:
    """Return whether the median over rounds keeps the rule."""
    if rule.against:
        better: Better = "lower" if rule.relation == "<=" else "higher"
        figure = figures.ratio(samples, rule.subject, rule.against, rule.metric, better)
    else:
        figure = figures.of(samples, rule.subject, rule.metric)
    if figure is None:
        return Verdict(rule, None, None)
    return Verdict(rule, figure, figures.holds(figure.median, rule.relation, rule.bound))


def judge_all(suite: Suite, samples: Sequence[Sample]) -> list[Verdict]:
    """Return a verdict for each rule of a suite. Samples of others, which are named alike, do not count."""
    own = [sample for sample in samples if sample.suite == suite.name]
    return [judge(rule, own) for rule in suite.rules]
