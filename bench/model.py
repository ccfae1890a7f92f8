"""What a benchmark is made of.

A *suite* measures *subjects* in rounds. A subject is one thing under one name: a peer, or one mode of ours.
What it gives in one round is a *sample*, a flat mapping of metric name to number. The suite says how to
take one, which metrics a reader wants to see, and which must hold. Rounds, medians, tables, checks and
files are shared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Metrics = dict[str, float]
Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Args:
        rounds: How often each subject is measured.
        quick: Fewer messages and no 1 GiB.
        peers: Names; none means all.
        sizes: Bytes; none means the suite's own.
        timeout_s: For one subject in one round.
    """

    rounds: int = 5
    quick: bool = False
    peers: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    timeout_s: float = 180.0


@dataclass(frozen=True)
class Sample:
    """What one subject gave in one round; `error` says why it gave nothing."""

    suite: str
    subject: str
    round: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    wall_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Sample:
        return Sample(**data)


@dataclass(frozen=True)
class Column:
    """A metric as the table shows it."""

    metric: str
    title: str
    digits: int = 2
    better: Better = "lower"
    scale: float = 1.0


@dataclass(frozen=True)
class Rule:
    """Something that must hold: a metric of `subject`, or its ratio to the best of `against` per round."""

    what: str
    subject: str
    metric: str
    relation: Literal["<=", ">="]
    bound: float
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One thing measured; `missing` says what to install where it can't run."""

    name: str
    kind: Literal["ours", "peer", "handmade", "raw"] = "ours"
    wire: str = ""
    missing: str = ""
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """A benchmark: what to measure, and what to show and demand of it."""

    name: str
    title: str
    subjects: Callable[[Options], Sequence[Subject]]
    measure: Callable[[str, Options], Metrics]
    columns: Callable[[Options], Sequence[Column]]
    rules: tuple[Rule, ...] = ()
