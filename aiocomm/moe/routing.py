"""Who gets which rows. Pure: expert numbers in, lists of rows out.

A sender's part for a rank lists the tokens that have an expert there, each once, in ascending order, and for
each its experts there. A receiver puts the parts of all ranks one after the other, in the order of the ranks:
its rows. An assignment is a row and one of its experts; assignments are kept by expert, then by row, so that
an expert's input is one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.moe.placement import Placement

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float32]

__all__ = ["Arrangement", "Part", "arrange", "checked", "route"]

MOST_CHOICES = 0xFFFF  # experts of one token on one rank


@dataclass(frozen=True, slots=True)
class Part:
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


def checked(
    count: int, expert_ids: Any, weights: Any, experts: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The arguments of a dispatch as two-dimensional arrays.

    Raises:
        UsageError: shapes do not fit, or an expert is out of range.
    """
    ids = np.asarray(expert_ids)
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
    found = np.asarray(weights)
    if found.dtype.kind not in "fiuV":
        raise UsageTypeError(f"weights holds {found.dtype}, not numbers")
    if found.ndim == 1:
        found = found[:, None]
    if found.shape != ids.shape:
        raise UsageError(f"weights has shape {found.shape}, expert_ids {ids.shape}")
    return ids, found.astype(np.float32)


def route(ids: NDArray[Any], weights: Floats, placement: Placement) -> list[Part]:
    """The part for each rank.

    Args:
        ids: expert of each choice of each token, or -1; shape (tokens, choices).
        weights: of the same shape.
    """
    choices = ids.shape[1]
    flat = ids.reshape(-1)
    there = np.flatnonzero(flat >= 0) if flat.size and flat.min() < 0 else np.arange(flat.size)
    experts = flat[there].astype(np.int32)
    owner = placement.owner[experts]
    order = _order(owner, placement.size)
    ends = np.cumsum(np.bincount(owner, minlength=placement.size))
    there, experts = there[order], experts[order]
    token, weight = there // max(1, choices), weights.reshape(-1)[there]
    parts = []
    start = 0
    for end in ends.tolist():
        mine = token[start:end]
        first = np.flatnonzero(np.diff(mine, prepend=-1))
        counts = np.diff(first, append=len(mine)).astype(np.uint16)
        parts.append(Part(mine[first], counts, experts[start:end], weight[start:end]))
        start = end
    return parts


def arrange(parts: Sequence[Part], placement: Placement, rank: int) -> Arrangement:
    """Order what came to a rank, by the rank that it came from, into runs by expert."""
    experts = np.concatenate([part.experts for part in parts])
    counts = np.concatenate([part.counts for part in parts]).astype(np.int64)
    local = placement.local[experts]
    row = np.repeat(np.arange(len(counts)), counts)
    held = len(placement.held[rank])
    order = _order(local, held)
    rows = row[order]
    weights = np.concatenate([part.weights for part in parts])[order]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(local, minlength=held))))
    by_row = np.argsort(rows, kind="stable")
    first = np.concatenate(([0], np.cumsum(counts)))
    starts = np.concatenate(([0], np.cumsum([part.rows for part in parts])))
    return Arrangement(starts, rows, offsets, weights, by_row, first)


def _order(keys: Integers, bound: int) -> Integers:
    """Sort keys below `bound`, stably. 16-bit ones are sorted by radix, in linear time."""
    return np.argsort(keys.astype(np.uint16) if bound <= 1 << 16 else keys, kind="stable")
