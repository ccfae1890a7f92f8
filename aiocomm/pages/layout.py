"""Where the bytes of a page lie, derived from arrays and strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.errors import UsageError, UsageTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from aiocomm.pages.lease import PageLease

__all__ = ["Layout", "Pages"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The pages of equally shaped arrays, without their memory.

    Args:
        planes: which arrays belong to it, by number.
        count: pages.
        page_stride: bytes from a page to the next, in each array.
        shape: of one page in one array, without the page axis.
        strides: of these axes, in bytes.
        start: offset of the first page's first element in an array, in bytes.
        item: bytes of an element.
        token_axis: of `shape`; along it pages of different size are matched. None: pages are matched whole.
    """

    planes: tuple[int, ...]
    count: int
    page_stride: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    item: int
    token_axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one page over all planes."""
        return len(self.planes) * int(np.prod(self.shape, dtype=np.int64)) * self.item

    @property
    def tokens(self) -> int:
        """Tokens of a page; 1 where no axis counts them."""
        return 1 if self.token_axis is None else self.shape[self.token_axis]


class Pages:
    """Memory in pages, as KV caches are: one array, or one per layer, or one each for keys and values.

    `planes()` and `slice()` give views of the same memory: some of the arrays, or a range of an axis (heads).
    Pages are matched axis by axis: two layouts fit if their axes other than the page axis have one order and
    shape; the tokens per page may differ where `token_axis` is given.

    Args:
        arrays: a host array, or several of one shape and dtype, contiguous in C order. Read-only ones can be
            sources only.
        page_axis: the axis that counts pages.
        token_axis: the axis that counts tokens in a page, if pages of different size are to be matched.
    """

    def __init__(self, arrays: Any, page_axis: int = 0, token_axis: int | None = None) -> None:
        self.arrays: list[NDArray[Any]] = _checked(arrays)
        first = self.arrays[0]
        page = _axis("page_axis", page_axis, first.ndim)
        token = None if token_axis is None else _axis("token_axis", token_axis, first.ndim)
        if token == page:
            raise UsageError("page_axis and token_axis are the same axis")
        if token is not None and token > page:
            token -= 1
        self._axes = [axis for axis in range(first.ndim) if axis != page]
        self.layout = Layout(
            tuple(range(len(self.arrays))),
            first.shape[page],
            first.strides[page],
            tuple(first.shape[axis] for axis in self._axes),
            tuple(first.strides[axis] for axis in self._axes),
            0,
            first.itemsize,
            token,
        )
        self._leases: list[PageLease] = []  # shared with all views

    def planes(self, planes: Sequence[int]) -> Pages:
        """A view of some of the arrays, e.g. of one layer."""
        chosen = tuple(planes)
        if not chosen or any(not 0 <= p < len(self.layout.planes) for p in chosen):
            raise UsageError(f"planes {list(chosen)} are not among the {len(self.layout.planes)} there are")
        return self._view(replace(self.layout, planes=tuple(self.layout.planes[p] for p in chosen)))

    def slice(self, axis: int, start: int, stop: int) -> Pages:
        """A view of a range along an axis of the arrays, e.g. of some heads. Not along the page axis."""
        if axis not in self._axes:
            raise UsageError(f"axis {axis} is the page axis, or none of {self.arrays[0].ndim} axes")
        at, layout = self._axes.index(axis), self.layout
        if at == layout.token_axis:
            raise UsageError("pages are not cut along the token axis")
        if not 0 <= start < stop <= layout.shape[at]:
            raise UsageError(f"{start}:{stop} is outside axis {axis} of length {layout.shape[at]}")
        shape = (*layout.shape[:at], stop - start, *layout.shape[at + 1 :])
        return self._view(replace(layout, shape=shape, start=layout.start + start * layout.strides[at]))

    def _view(self, layout: Layout) -> Pages:
        view = object.__new__(Pages)
        view.__dict__.update(self.__dict__)
        view.layout = layout
        return view

    @property
    def count(self) -> int:
        """Pages."""
        return self.layout.count

    @property
    def nbytes(self) -> int:
        """Bytes of one page, over all planes."""
        return self.layout.nbytes

    def __repr__(self) -> str:
        return (
            f"<aiocomm.Pages {self.count} pages of {self.nbytes} bytes in {len(self.layout.planes)} arrays>"
        )


def _checked(arrays: Any) -> list[NDArray[Any]]:
    several = list(arrays) if isinstance(arrays, list | tuple) else [arrays]
    if not several:
        raise UsageError("Pages needs at least one array")
    for array in several:
        if not isinstance(array, np.ndarray):
            raise UsageTypeError(
                f"Pages takes NumPy arrays, not {type(array).__name__}: numpy.from_dlpack(x)"
            )
        if array.dtype.hasobject:
            raise UsageTypeError("the array holds Python objects, which are addresses in this process")
        if not array.flags.c_contiguous:
            raise UsageError("the arrays must be contiguous in C order: use planes() and slice() for views")
        if (array.shape, array.dtype) != (several[0].shape, several[0].dtype):
            raise UsageError(f"arrays differ: {array.shape} {array.dtype} and {several[0].shape}")
        if array.ndim < 2:
            raise UsageError("an array of pages has a page axis and at least one other")
    return several


def _axis(name: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise UsageError(f"{name}={axis} for arrays of {ndim} axes")
    return axis % ndim
