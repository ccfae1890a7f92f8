"""Weighted sums of experts' outputs, in two steps: at the rank that holds the experts, and at the token's.

Sums are in float32 (float64 for float64 outputs) and their order is fixed by routing and placement: on a rank
by ascending expert, then over the ranks in their order. Each step is vectorised over blocks of rows that stay
in cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.moe.routing import Arrangement

    Integers = NDArray[np.int64]

__all__ = ["accumulator", "add_up", "weigh"]

_BLOCK_BYTES: Final = 512 << 10


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of sums of outputs of a dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _block(row_bytes: int) -> int:
    return max(1, _BLOCK_BYTES // max(1, row_bytes))


def weigh(outputs: NDArray[Any], found: Arrangement, start: int, stop: int, sums: NDArray[Any]) -> None:
    """Sum the weighted outputs of each of the rows `start` to `stop`.

    Args:
        outputs: one row per assignment; shape (assignments, hidden).
        sums: receives them; shape (stop - start, hidden), of an accumulator's dtype.
    """
    step = _block(sums.shape[1] * sums.itemsize)
    weights = found.weights[:, None].astype(sums.dtype, copy=False)
    for a in range(start, stop, step):
        b = min(a + step, stop)
        for k, (at, rows) in enumerate(found.terms):
            low, high = (a, b) if k == 0 else np.searchsorted(rows, (a, b)).tolist()
            if low == high:
                continue
            chosen = at[low:high]
            term = outputs[chosen].astype(sums.dtype, copy=False)
            term *= weights[chosen]
            if k == 0:  # every row has a first
                sums[a - start : b - start] = term
            else:
                sums[rows[low:high] - start] += term


def add_up(parts: Sequence[tuple[Integers, NDArray[Any]]], sums: NDArray[Any]) -> None:
    """Add the ranks' partial sums, in the order of the ranks.

    Args:
        parts: of each rank the tokens, ascending, and one row for each of them.
        sums: receives the result; shape (tokens, hidden), of an accumulator's dtype.
    """
    step = _block(sums.shape[1] * sums.itemsize)
    for a in range(0, len(sums), step):
        b = min(a + step, len(sums))
        sums[a:b] = 0
        for tokens, rows in parts:
            low, high = np.searchsorted(tokens, (a, b)).tolist()
            if high - low == b - a:
                sums[a:b] += rows[low:high]
            elif high > low:
                sums[tokens[low:high]] += rows[low:high]
