"""Lists of pages as the planner takes them: integers of 64 bits, and nothing else taken for such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from aiocomm.errors import UsageError, UsageTypeError
from aiocomm_native import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]
    Indices = Sequence[int] | NDArray[np.integer[Any]]

__all__ = ["own_list", "page_list"]


def page_list(pages: Indices) -> Integers:
    """A list of pages as an array; the caller's own one where it can be used as it is.

    Raises:
        UsageError: it holds something else than integers of 64 bits.
    """
    if isinstance(pages, bytes | bytearray):
        _refuse(type(pages).__name__)
    if isinstance(pages, tuple | range):
        pages = list(pages)
    if type(pages) is list and (found := _core.integers(pages)) is not None:
        return found  # in a fraction of the time of NumPy
    array = pages if isinstance(pages, np.ndarray) else _array(pages)
    if array.dtype.kind == "O" and array.ndim:
        array = _array(array.reshape(-1).tolist())
    if array.dtype.kind not in "iu":
        if array.size:
            _refuse(array.dtype.name if array.ndim else type(pages).__name__)
        return np.empty(0, np.int64)  # of an empty list NumPy makes floats
    if array.dtype.kind == "u" and array.itemsize == 8 and array.size and array.max() >= 1 << 63:
        _too_large()
    return np.ascontiguousarray(array, np.int64).reshape(-1)


def own_list(pages: Indices) -> Integers:
    """The same as an array that nobody else changes, while it is planned for on another thread."""
    found = page_list(pages)
    if type(pages) is list or (isinstance(pages, np.ndarray) and not np.may_share_memory(found, pages)):
        return found
    return found.copy()


def _array(pages: Any) -> Any:
    try:
        if not isinstance(pages, Sequence) or isinstance(pages, str | bytes) or hasattr(pages, "__array__"):
            return np.asarray(pages)
        for kind in set(map(type, pages)):  # NumPy makes numbers of True and of "1"
            if not issubclass(kind, int | np.integer) or kind is bool:
                _refuse(kind.__name__)
        return np.asarray(pages, np.int64)
    except OverflowError:
        _too_large()
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageTypeError(f"page indices are integers in host memory: {error}") from error


def _refuse(kind: str) -> NoReturn:
    hint = ": numpy.flatnonzero(mask)" if kind.startswith("bool") else ""
    raise UsageTypeError(f"page indices are integers, not {kind}{hint}")


def _too_large() -> NoReturn:
    raise UsageError("page indices are integers of 64 bits, and one is larger")
