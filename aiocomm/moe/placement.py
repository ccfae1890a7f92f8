"""Which rank of a group holds which expert."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._numbers import number
from aiocomm.collectives.arrays import array_of
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

__all__ = ["Placement", "place"]


class Placement:
    """Each expert's rank, and its number among the experts of that rank, which are in ascending order.

    Args:
        owner: rank of the group that holds each expert.
        size: ranks of the group.
    """

    def __init__(self, owner: Integers, size: int) -> None:
        self.owner = owner
        self.size = size
        order = np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=size)
        starts = np.cumsum(counts) - counts
        self.held = [order[start : start + n] for start, n in zip(starts, counts, strict=True)]
        self.local = np.empty(len(owner), np.int64)
        self.local[order] = np.arange(len(owner)) - np.repeat(starts, counts)
        self._here: dict[int, Integers] = {}
        self.digest = hashlib.blake2b(owner.tobytes(), digest_size=6).hexdigest()

    def here(self, rank: int) -> Integers:
        """`local` of the experts of a rank, and -1 of all others."""
        found = self._here.get(rank)
        if found is None:
            found = self._here[rank] = np.where(self.owner == rank, self.local, -1)
        return found

    @property
    def experts(self) -> int:
        """Experts of all ranks together."""
        return len(self.owner)


@functools.lru_cache(16)
def _even(experts: int, size: int) -> Placement:
    whole, more = divmod(experts, size)
    counts = [whole + (rank < more) for rank in range(size)]
    return Placement(np.repeat(np.arange(size), counts), size)


@functools.lru_cache(16)
def _given(owner: bytes, size: int) -> Placement:
    return Placement(np.frombuffer(owner, np.int64), size)


def place(experts: Any, placement: Sequence[int] | None, size: int) -> Placement:
    """Contiguous blocks of nearly one size, or as given.

    Args:
        placement: the rank of each expert.

    Raises:
        UsageError: the map has another length, or names a rank that the group has not.
    """
    experts = number("experts", experts)
    if not 1 <= experts <= 1 << 20:
        raise UsageError(f"experts={experts}: 1 to {1 << 20}")
    if placement is None:
        return _even(experts, size)
    owner = array_of(placement, "placement")
    if owner.dtype.kind not in "iu":
        raise UsageTypeError(f"placement holds {owner.dtype}: the rank of each expert is an integer")
    if owner.shape != (experts,):
        raise UsageError(f"placement has shape {owner.shape}, and there are {experts} experts")
    wrong = owner[(owner < 0) | (owner >= size)]
    if wrong.size:
        raise UsageError(f"placement names rank {wrong[0]}: ranks of this group are 0 to {size - 1}")
    return _given(owner.astype(np.int64).tobytes(), size)
