"""The algorithms of each operation, by name. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiocomm.collectives import (
    binomial,
    bruck,
    chain,
    direct,
    hierarchical,
    pipelined,
    recursive_doubling,
    ring,
)
from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiocomm.collectives.steps import Problem, Schedule

__all__ = ["ALGORITHMS", "BETWEEN_HOSTS", "applicable", "build"]

ALGORITHMS: Final[dict[str, dict[str, Callable[[Problem], Schedule]]]] = {
    "broadcast": {
        "direct": direct.broadcast,
        "binomial": binomial.broadcast,
        "pipelined": pipelined.broadcast,
        "chain": chain.broadcast,
    },
    "scatter": {"direct": direct.scatter, "binomial": binomial.scatter},
    "gather": {"direct": direct.gather, "binomial": binomial.gather},
    "all_gather": {
        "direct": direct.all_gather,
        "ring": ring.all_gather,
        "recursive_doubling": recursive_doubling.all_gather,
        "bruck": bruck.all_gather,
    },
    "all_to_all": {"direct": direct.all_to_all, "bruck": bruck.all_to_all},
    "all_to_allv": {"direct": direct.all_to_all},
    "scatterv": {"direct": direct.scatter},
    "gatherv": {"direct": direct.gather},
    "reduce": {"direct": direct.reduce, "binomial": binomial.reduce, "pipelined": pipelined.reduce},
    "reduce_scatter": {"direct": direct.reduce_scatter, "ring": ring.reduce_scatter},
    "all_reduce": {
        "one_shot": direct.one_shot,
        "direct": direct.all_reduce,
        "ring": ring.all_reduce,
        "recursive_doubling": recursive_doubling.all_reduce,
    },
}

BETWEEN_HOSTS: Final[dict[str, Callable[[Problem], Schedule]]] = {
    "broadcast": hierarchical.broadcast,
    "all_gather": hierarchical.all_gather,
    "reduce": hierarchical.reduce,
    "reduce_scatter": hierarchical.reduce_scatter,
    "all_reduce": hierarchical.all_reduce,
}


def applicable(operation: str, size: int, hosts: Sequence[int] = ()) -> list[str]:
    """Names of the algorithms that can do an operation in a group of this size, on these hosts."""
    names = list(ALGORITHMS[operation])
    if operation in BETWEEN_HOSTS and hierarchical.useful(hosts):
        names.append("hierarchical")
    if operation == "all_gather" and size & (size - 1):
        names.remove("recursive_doubling")
    return names


def build(operation: str, algorithm: str, problem: Problem) -> Schedule:
    """One rank's schedule.

    Raises:
        UsageError: there is no such algorithm for this operation and size.
    """
    if algorithm not in (names := applicable(operation, problem.size, problem.hosts)):
        raise UsageError(
            f"no algorithm {algorithm!r} for {operation} among {problem.size} ranks: choose from "
            f"{', '.join(names)}"
        )
    if algorithm == "hierarchical":
        return BETWEEN_HOSTS[operation](problem)
    return ALGORITHMS[operation][algorithm](problem)
