"""Takes samples in interleaved rounds, so that a drift of the machine meets all subjects alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .model import Options, Sample, Subject, Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def order(subjects: Sequence[Subject], number: int) -> list[Subject]:
    """Return the order of round `number`: reversed in odd ones, so that none always goes first."""
    return list(subjects) if number % 2 == 0 else list(reversed(subjects))


def run(suite: Suite, options: Options, started: Callable[[int, Subject], None]) -> Iterator[Sample]:
    """Measure every subject once per round; a subject that fails yields a sample that says why."""
    subjects = [s for s in suite.subjects(options) if not s.missing]
    for number in range(options.rounds):
        for subject in order(subjects, number):
            started(number, subject)
            start = time.perf_counter()
            try:
                metrics, error = suite.measure(subject.name, options), ""
            except Exception as failure:  # one subject's failure must not end the others' run
                metrics, error = {}, str(failure) or type(failure).__name__
            yield Sample(suite.name, subject.name, number, metrics, error, time.perf_counter() - start)
