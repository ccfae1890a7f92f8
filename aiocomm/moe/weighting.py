"""Weighted sums of experts' outputs, in two steps: at the rank that holds the experts, and at the token's.

Sums are in float32 (float64 for float64 outputs) and their order is fixed by routing and placement: on a rank
by ascending expert, then over the ranks in their order. The loops are native, and release the GIL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.errors import UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.moe.routing import Arrangement

    Integers = NDArray[np.int64]

__all__ = ["KINDS", "accumulator", "add_up", "check_kind", "weigh"]

KINDS: Final = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}  # as in core/weighting.hpp


def check_kind(name: str, dtype: str) -> None:
    """Refuse what is not summed.

    Args:
        name: of the argument.
        dtype: its name.

    Raises:
        UsageTypeError: there are no sums of it.
    """
    if dtype not in KINDS:
        raise UsageTypeError(f"{name} is of dtype {dtype}: sums are of {', '.join(KINDS)}")


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of sums of outputs of a dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _raw(array: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
    return array.reshape(-1).view(np.uint8), KINDS[array.dtype.name]


def weigh(outputs: NDArray[Any], found: Arrangement, start: int, stop: int, sums: NDArray[Any]) -> None:
    """Sum the weighted outputs of each of the rows `start` to `stop`.

    Args:
        outputs: one row per assignment; shape (assignments, hidden).
        sums: receives them; shape (stop - start, hidden).
    """
    _core.weigh_rows(
        *_raw(outputs), outputs.shape[1], found.order, found.first, found.weights, start, stop, *_raw(sums)
    )


def add_up(parts: Sequence[tuple[Integers, NDArray[Any]]], wide: bool, out: NDArray[Any]) -> None:
    """Add the ranks' partial sums, in the order of the ranks.

    Args:
        parts: of each rank the tokens, ascending, and one row for each of them.
        wide: add in float64 instead of float32.
        out: receives the result; shape (tokens, hidden).
    """
    raw = [(tokens, *_raw(rows)) for tokens, rows in parts]
    _core.add_rows(raw, len(out), out.shape[1], wide, *_raw(out))
