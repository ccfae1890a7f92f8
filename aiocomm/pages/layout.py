"""Where the bytes of a page lie, derived from arrays and strides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm._numbers import number
from aiocomm.errors import UsageError, UsageTypeError
from aiocomm.pages.memory import form_of, is_writable, overlap, span_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiocomm.pages.lease import PageLease
    from aiocomm.pages.memory import Form

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
        page_axis: of the arrays; the other axes are those of `shape`.
    """

    planes: tuple[int, ...]
    count: int
    page_stride: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    item: int
    token_axis: int | None = None
    page_axis: int = 0

    def chosen(self, planes: Sequence[int]) -> Layout:
        """Some of the planes, by their place among those there are.

        Raises:
            UsageError: there is no such plane.
        """
        if not isinstance(planes, Iterable):
            raise UsageTypeError(f"planes={planes!r}: a list of numbers of arrays")
        places = tuple(number("plane", plane) for plane in planes)
        if not places or any(not 0 <= p < len(self.planes) for p in places):
            raise UsageError(f"planes {list(places)} are not among the {len(self.planes)} there are")
        return replace(self, planes=tuple(self.planes[p] for p in places))

    def sliced(self, axis: int, start: int, stop: int) -> Layout:
        """A range along an axis of the arrays.

        Raises:
            UsageError: it is the page axis, the token axis or none, or the range is outside.
        """
        at, start, stop = self._place(axis), number("start", start), number("stop", stop)
        if at == self.token_axis:
            raise UsageError("pages are not cut along the token axis")
        if not 0 <= start < stop <= self.shape[at]:
            raise UsageError(f"{start}:{stop} is outside axis {axis} of length {self.shape[at]}")
        shape = (*self.shape[:at], stop - start, *self.shape[at + 1 :])
        return replace(self, shape=shape, start=self.start + start * self.strides[at])

    def layers(self, axis: int | None, arrays: int) -> list[Layout]:
        """One layout per layer: each `arrays` planes, or each index of an axis.

        Raises:
            UsageError: planes are left over, or the axis cannot be cut.
        """
        if axis is not None:
            count = self.shape[self._place(axis)]
            return [self.sliced(axis, layer, layer + 1) for layer in range(count)]
        arrays = number("arrays", arrays)
        if arrays < 1 or len(self.planes) % arrays:
            raise UsageError(f"{len(self.planes)} arrays do not divide into layers of {arrays}")
        return [self.chosen(range(n, n + arrays)) for n in range(0, len(self.planes), arrays)]

    def _place(self, axis: int) -> int:
        """Of an axis of the arrays, in `shape`."""
        found, there_are = number("axis", axis), len(self.shape) + 1
        if not -there_are <= found < there_are or found % there_are == self.page_axis:
            raise UsageError(f"axis {found} is the page axis, or none of {there_are} axes")
        found %= there_are
        return found - (found > self.page_axis)

    def check_target(self) -> None:
        """Refuse to have pages written into, where one would overwrite another.

        Raises:
            UsageError: a plane comes twice.
        """
        if len(set(self.planes)) != len(self.planes):
            raise UsageError(f"planes {list(self.planes)} of the target: one comes twice")

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
    Leases belong to a `Pages` and all its views, and end each other. Other `Pages` of the same arrays have
    leases of their own: so pages can be leased to several holders, who end by themselves.
    Pages are matched axis by axis: two layouts fit if their axes other than the page axis have one order and
    shape. Where `token_axis` is given on both sides, it may lie at different places (tokens before heads, or
    after them), and pages may hold different numbers of tokens.

    Args:
        arrays: an array, or several of one shape and dtype, contiguous in C order: all NumPy's, or all GPU
            arrays of any library. Read-only ones, and those that overlap each other, can be sources only.
        page_axis: the axis that counts pages.
        token_axis: the axis that counts tokens in a page, if such pages are to be matched.
    """

    def __init__(self, arrays: Any, page_axis: int = 0, token_axis: int | None = None) -> None:
        self.arrays: list[Any] = list(arrays) if isinstance(arrays, list | tuple) else [arrays]
        first = _common_form(self.arrays)
        self.on_gpu = first.on_gpu
        axes_there_are = len(first.shape)
        page = _axis("page_axis", page_axis, axes_there_are)
        token = None if token_axis is None else _axis("token_axis", token_axis, axes_there_are)
        if token == page:
            raise UsageError("page_axis and token_axis are the same axis")
        if token is not None and not first.shape[token]:
            raise UsageError(
                f"token_axis={token_axis} has length 0: a page that is matched holds a token or more"
            )
        if token is not None and token > page:
            token -= 1
        axes = [axis for axis in range(axes_there_are) if axis != page]
        self.layout = Layout(
            tuple(range(len(self.arrays))),
            first.shape[page],
            first.strides[page],
            tuple(first.shape[axis] for axis in axes),
            tuple(first.strides[axis] for axis in axes),
            0,
            first.item,
            token,
            page,
        )
        self._leases: list[PageLease] = []  # shared with all views
        self._spans = [span_of(array) for array in self.arrays]
        self._apart = not overlap(self._spans)

    def planes(self, planes: Sequence[int]) -> Pages:
        """A view of some of the arrays, e.g. of one layer."""
        return self._view(self.layout.chosen(planes))

    def slice(self, axis: int, start: int, stop: int) -> Pages:
        """A view of a range along an axis of the arrays, e.g. of some heads. Not along the page axis.

        Args:
            axis: negative ones count from the last, as everywhere.
            start: the first index.
            stop: the index behind the last.
        """
        return self._view(self.layout.sliced(axis, start, stop))

    def layers(self, axis: int | None = None, *, arrays: int = 1) -> list[Pages]:
        """Views of the layers, in their order, for `put_layers`.

        Args:
            axis: of the arrays, along which layers lie; without one, layers are `arrays` arrays each.
            arrays: arrays of a layer: 2 where K and V have one each.
        """
        return [self._view(layout) for layout in self.layout.layers(axis, arrays)]

    def _view(self, layout: Layout) -> Pages:
        view = object.__new__(Pages)
        view.__dict__.update(self.__dict__)
        view.layout = layout
        return view

    @property
    def _writable(self) -> list[int]:
        """The planes into which pages may be got."""
        return [plane for plane in self.layout.planes if is_writable(self.arrays[plane])]

    def _check_target(self) -> None:
        """Refuse to have pages written into, where one would overwrite another."""
        planes = self._writable
        apart = self._apart and len(set(planes)) == len(planes)
        if not apart and overlap([self._spans[plane] for plane in planes]):
            raise UsageError("arrays of the target pages overlap: name memory that is written only once")

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


def _common_form(arrays: Sequence[Any]) -> Form:
    if not arrays:
        raise UsageError("Pages needs at least one array")
    forms = [form_of(array) for array in arrays]
    first = forms[0]
    for form in forms:
        if form.on_gpu != first.on_gpu:
            raise UsageError("some arrays are in host memory, and some on a GPU: make Pages of each kind")
        if form != first:
            raise UsageError(f"arrays differ: {form.shape} {form.dtype} and {first.shape}")
    if len(first.shape) < 2:
        raise UsageError("an array of pages has a page axis and at least one other")
    return first


def _axis(name: str, axis: int, ndim: int) -> int:
    axis = number(name, axis)
    if not -ndim <= axis < ndim:
        raise UsageError(f"{name}={axis} for arrays of {ndim} axes")
    return axis % ndim
