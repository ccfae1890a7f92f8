"""Who gets which rows. Pure: expert numbers in, lists of rows out.

A sender's part for a rank lists the tokens that have an expert there, each once, in ascending order, and for
each its experts there. A receiver puts the parts of all ranks one after the other, in the order of the ranks:
its rows. An assignment is a row and one of its experts; assignments are kept by expert, then by row, so that
an expert's input is one run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aiocomm.collectives.arrays import array_of
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aiocomm.moe.placement import Placement

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float32]

__all__ = ["Arrangement", "Part", "Routed", "arrange", "checked", "route", "routed"]

MOST_CHOICES = 0xFFFF  # experts of one token on one rank


class Part(NamedTuple):
    """What one rank sends another.

    Args:
        tokens: the sender's tokens that have an expert there, ascending; empty where they are not known.
        counts: experts of each of them there; uint16.
        experts: these experts, by token and then in the order of the token's list; int32.
        weights: of these experts; float32.
    """

    tokens: Integers
    counts: NDArray[np.uint16]
    experts: NDArray[np.int32]
    weights: Floats

    @property
    def rows(self) -> int:
        """Tokens that travel."""
        return len(self.counts)


class Routed(Sequence[Part]):
    """The parts for all ranks, which are made once they are asked for.

    Args:
        whole: of all of them, one after the other, by rank.
        rows: where each rank's rows begin, and where they end.
        assignments: the same of its assignments.
    """

    __slots__ = ("_made", "assignments", "rows", "whole")

    def __init__(self, whole: Part, rows: list[int], assignments: list[int]) -> None:
        self.whole = whole
        self.rows = rows
        self.assignments = assignments
        self._made: dict[int, Part] = {}

    def __len__(self) -> int:
        return len(self.rows) - 1

    def rows_for(self, rank: int) -> int:
        """Tokens that travel there."""
        return self.rows[rank + 1] - self.rows[rank]

    def __getitem__(self, rank: Any) -> Any:
        if isinstance(rank, slice):
            return [self[one] for one in range(*rank.indices(len(self)))]
        part = self._made.get(rank)
        if part is None:
            if not 0 <= rank < len(self):
                raise IndexError(rank)
            here = slice(self.rows[rank], self.rows[rank + 1])
            there = slice(self.assignments[rank], self.assignments[rank + 1])
            whole = self.whole
            part = Part(whole.tokens[here], whole.counts[here], whole.experts[there], whole.weights[there])
            self._made[rank] = part
        return part


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a rank has received.

    Args:
        starts: first row of each rank's part, and the number of all rows; length `size + 1`.
        rows: the row of each assignment.
        offsets: first assignment of each local expert, and the number of all; length `local experts + 1`.
        weights: of each assignment.
        order: the assignments by row, and there by ascending expert.
        first: where each row begins in `order`, and the number of all; length `rows + 1`.
    """

    starts: Integers
    rows: Integers
    offsets: Integers
    weights: Floats
    order: Integers
    first: Integers

    @property
    def count(self) -> int:
        """Assignments."""
        return len(self.rows)

    def begins(self) -> list[int]:
        """`starts` as numbers."""
        return self.starts.tolist()  # type: ignore[no-any-return]


def checked(
    count: int, expert_ids: Any, weights: Any, experts: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The arguments of a dispatch as two-dimensional arrays.

    Raises:
        UsageError: they are no arrays, shapes do not fit, or an expert is out of range.
    """
    ids = array_of(expert_ids, "expert_ids")
    if ids.dtype.kind not in "iu":
        raise UsageTypeError(f"expert_ids holds {ids.dtype}, not integers")
    if ids.ndim == 1:
        ids = ids[:, None]
    if ids.ndim != 2 or len(ids) != count:
        raise UsageError(f"expert_ids has shape {ids.shape} for {count} tokens: one row of experts per token")
    if ids.shape[1] > MOST_CHOICES:
        raise UsageError(f"expert_ids names {ids.shape[1]} experts per token: at most {MOST_CHOICES}")
    if ids.size and (ids.max() >= experts or ids.min() < -1):
        token, choice = np.argwhere((ids >= experts) | (ids < -1))[0]
        raise UsageError(
            f"token {token} names expert {ids[token, choice]}: experts are 0 to {experts - 1}, or -1 for none"
        )
    if weights is None:
        return ids, np.ones(ids.shape, np.float32)
    found = array_of(weights, "weights")
    if found.dtype.kind not in "fiuV" or found.dtype.names is not None:
        raise UsageTypeError(f"weights holds {found.dtype}, not numbers")
    if found.ndim == 1:
        found = found[:, None]
    if found.shape != ids.shape:
        raise UsageError(f"weights has shape {found.shape}, expert_ids {ids.shape}")
    try:
        return ids, found.astype(np.float32)
    except (TypeError, ValueError):  # bytes of a dtype that NumPy does not know
        raise UsageTypeError(f"weights holds {found.dtype}, not numbers") from None


def routed(count: int, expert_ids: Any, weights: Any, placement: Placement) -> list[Part]:
    """The part for each rank, of arguments that are checked on the way.

    Raises:
        UsageError: as `checked`, which is asked only where something is unusual.
    """
    ids = array_of(expert_ids, "expert_ids")
    plain = ids.ndim == 2 and len(ids) == count and ids.dtype.kind == "i" and ids.shape[1] <= MOST_CHOICES
    if plain and weights is not None:
        weights = array_of(weights, "weights")
        plain = weights.shape == ids.shape and weights.dtype.kind in "fiu"
    if plain:
        with contextlib.suppress(ValueError):  # an expert that is not there: `checked` says which
            given = np.ones(ids.shape, np.float32) if weights is None else weights
            return route(ids, given, placement)
    return route(*checked(count, ids, weights, placement.experts), placement)


def route(ids: NDArray[Any], weights: NDArray[Any], placement: Placement) -> list[Part]:
    """The part for each rank.

    Args:
        ids: expert of each choice of each token, or -1; shape (tokens, choices).
        weights: of the same shape.

    Raises:
        ValueError: an expert is out of range.
    """
    most = ids.size
    tokens, counts = np.empty(most, np.int64), np.empty(most, np.uint16)
    experts, routed = np.empty(most, np.int32), np.empty(most, np.float32)
    rows, assignments = _core.route_tokens(
        np.ascontiguousarray(ids, np.int64),
        np.ascontiguousarray(weights, np.float32),
        placement.owner,
        placement.size,
        tokens,
        counts,
        experts,
        routed,
    )
    return list(Routed(Part(tokens, counts, experts, routed), rows, assignments))


def arrange(parts: Sequence[Part], placement: Placement, rank: int) -> Arrangement:
    """Order what came to a rank, by the rank that it came from, into runs by expert.

    Raises:
        ValueError: a part contradicts itself, or is for experts of another rank.
    """
    held = len(placement.held[rank])
    count, total = sum(len(part.counts) for part in parts), sum(len(part.experts) for part in parts)
    starts, offsets = np.empty(len(parts) + 1, np.int64), np.empty(held + 1, np.int64)
    rows, order, first = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(count + 1, np.int64)
    weights = np.empty(total, np.float32)
    came = [(part.counts, part.experts, part.weights) for part in parts]
    _core.arrange_parts(came, placement.here(rank), held, starts, rows, offsets, weights, order, first)
    return Arrangement(starts, rows, offsets, weights, order, first)
