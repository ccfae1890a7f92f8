"""Reductions of float8 arrays in host memory: an element's parts are combined in float32, and rounded once.

The schedules are those of every dtype. Where one reduces the parts of all ranks one after the other, as the
direct ones do, each partial result is kept in float32 beside the bytes that stand for it, until the next step
takes it up. Schedules that send partial results would have to round them on the way, so none is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from aiocomm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from numpy.typing import NDArray

__all__ = ["ONCE", "Partials", "check_algorithm", "is_narrow"]

ONCE: Final = {"reduce": ("direct",), "reduce_scatter": ("direct",), "all_reduce": ("one_shot", "direct")}
"""The algorithms that send no partial results, by operation."""


def is_narrow(dtype: np.dtype[Any]) -> bool:
    """Whether results of this dtype are rounded once, at the end."""
    return dtype.name.startswith("float8")


def check_algorithm(operation: str, algorithm: str | None, dtype: str) -> None:
    """Refuse what would round partial results.

    Raises:
        UsageError: the algorithm does.
    """
    if algorithm is not None and algorithm not in ONCE[operation]:
        raise UsageError(
            f"{operation} of {dtype} by {algorithm!r} would round every partial result: choose from "
            f"{', '.join(ONCE[operation])}, or leave algorithm= out"
        )


class Partials:
    """Partial results of one call.

    Args:
        ufunc: the reduction.
        divide_by: divides results before they are rounded: the number of ranks for a mean, else 1.
    """

    def __init__(self, ufunc: np.ufunc, divide_by: int) -> None:
        self._ufunc = ufunc
        self._divide_by = divide_by
        self._kept: dict[Hashable, NDArray[np.float32]] = {}  # by where the rounded bytes would lie

    def reduce(
        self,
        left: tuple[Hashable, Any],
        right: tuple[Hashable, Any],
        target: tuple[Hashable, Any],
        last: bool,
    ) -> None:
        """Do a step.

        Args:
            left: where it lies, and the array; as `right` and `target`.
            last: the result is complete, and is rounded into `target`.
        """
        a, b = (self._wide(*one) for one in (left, right))
        with np.errstate(all="ignore"):
            total = self._ufunc(a, b)
            if not last:
                self._kept[target[0]] = total
                return
            if self._divide_by > 1:
                total /= np.float32(self._divide_by)
            target[1][:] = total.astype(target[1].dtype)

    def _wide(self, place: Hashable, array: Any) -> NDArray[np.float32]:
        kept = self._kept.pop(place, None)
        return array.astype(np.float32) if kept is None else kept
