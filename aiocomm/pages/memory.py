"""The arrays that pages lie in: NumPy's in host memory, those of any library on a GPU."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from aiocomm._device import describe, is_read_only, itemsize_of, part_of
from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm._device import Description

__all__ = ["Bytes", "Form", "bytes_of", "form_of", "is_writable", "overlap", "span_of"]

Bytes: TypeAlias = "NDArray[np.uint8] | Description"
"""All bytes of an array: flat host memory, or a description of GPU memory."""


class Form(NamedTuple):
    """What all arrays of pages have in common."""

    on_gpu: bool
    shape: tuple[int, ...]
    item: int  # bytes of an element
    dtype: str

    @property
    def strides(self) -> tuple[int, ...]:
        """In bytes, in C order."""
        return tuple(math.prod(self.shape[axis + 1 :]) * self.item for axis in range(len(self.shape)))


def form_of(array: Any) -> Form:
    """Look at an array.

    Raises:
        UsageError: it is not contiguous.
        UsageTypeError: it holds Python objects, or is no array that can be used.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise UsageTypeError("the array is masked, and masks do not travel: pass x.filled()")
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject:
            raise UsageTypeError("the array holds Python objects, which are addresses in this process")
        if not array.flags.c_contiguous:
            raise UsageError("the arrays must be contiguous in C order: use planes() and slice() for views")
        return Form(False, array.shape, array.itemsize, str(array.dtype))
    described = describe(array, False)
    if described is None:
        raise UsageTypeError(
            f"Pages takes NumPy arrays and GPU arrays, not {type(array).__name__}: numpy.from_dlpack(x)"
        )
    _, _, _, _, _, form, shape = described
    return Form(True, shape, itemsize_of(described), form)


def is_writable(array: Any) -> bool:
    """Whether pages may be got into it."""
    return bool(array.flags.writeable) if isinstance(array, np.ndarray) else not is_read_only(array)


def span_of(array: Any) -> tuple[int, int]:
    """Where its memory begins and ends."""
    if isinstance(array, np.ndarray):
        begin, nbytes = array.__array_interface__["data"][0], array.nbytes
    else:
        described = describe(array, False)
        assert described is not None  # as when its form was looked at
        begin, nbytes = described[1], described[2]
    return begin, begin + nbytes


def overlap(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether two have bytes in common."""
    filled = sorted(span for span in spans if span[0] < span[1])
    return any(begin < end for (_, end), (begin, _) in itertools.pairwise(filled))


def bytes_of(array: Any, start: int, writable: bool, stream: Any) -> Bytes:
    """Its bytes as they are to be moved, from one on.

    Args:
        stream: of a GPU array, whose work is waited for; None: its library's current one.

    Raises:
        UsageError: `stream` is given for a host array.
    """
    if isinstance(array, np.ndarray):
        if stream is not None:
            raise UsageError(
                "stream= belongs to GPU arrays, and these pages are in host memory: leave it out"
            )
        return array.reshape(-1).view(np.uint8)[start:]
    described = describe(array, writable, stream)
    assert described is not None  # as when the pages were made
    return part_of(described, start, max(0, described[2] - start)) if start else described
