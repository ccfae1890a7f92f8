"""One rank's KV cache as paged memory, and what two engines must have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aiocomm.errors import UsageError
from aiocomm.pages import Pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Axes", "Caches", "Geometry", "differing"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What two engines must have in common, whatever their tensor parallelism."""

    model: str
    dtype: str
    layers: int
    block_size: int
    heads: int
    content: int  # elements of a token and head: keys and values
    stages: int
    layout: str = "LBHNC"  # `Caches.layout`
    backend: str = ""  # of attention: how it lays the content out
    vllm: str = ""  # its version
    protocol: int = 1


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Which part of their `Geometry` keeps blocks of one engine from being the other's; None: nothing."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            return f"{name} is {theirs.get(name)!r} there and {value!r} here"
    return None


@dataclass(frozen=True, slots=True)
class Axes:
    """Of the arrays, which axis counts what."""

    page: int
    head: int
    token: int


class Caches:
    """Arrays, and how the engine's block ids name their pages.

    Args:
        arrays: contiguous, of one shape: one for all layers, or one for each.
        block_size: tokens of one of the engine's blocks, which may be several pages.

    Raises:
        UsageError: blocks are no whole pages.
    """

    def __init__(self, arrays: list[Any], axes: Axes, block_size: int) -> None:
        self._arrays = arrays
        self._axes = axes
        tokens = arrays[0].shape[axes.token]
        if block_size % tokens:
            raise UsageError(f"blocks of {block_size} tokens are no whole pages of {tokens}")
        self._pages_per_block = block_size // tokens

    @property
    def head_axis(self) -> int:
        """Of `pages()`, the axis along which heads lie."""
        return self._axes.head

    @property
    def layout(self) -> str:
        """The order of axes in memory, as vLLM has it: layers, blocks, heads, tokens (N), content."""
        axes = {self._axes.page: "B", self._axes.head: "H", self._axes.token: "N"}
        count = len(self._arrays[0].shape)
        order = "".join(axes.get(axis, "L") for axis in range(count - 1)) + "C"
        return order if "L" in order else f"L{order}"

    @property
    def block_bytes(self) -> int:
        """Of a block in all layers."""
        layout = self.pages().layout
        nbytes: int = layout.nbytes * len(layout.planes) * self._pages_per_block
        return nbytes

    def pages(self) -> Pages:
        """The whole cache, with leases of its own: blocks that two requests share are leased to both."""
        return Pages(self._arrays, self._axes.page, self._axes.token)

    def of_blocks(self, blocks: Sequence[int]) -> NDArray[np.int64]:
        """Pages of the engine's blocks, in their order."""
        pages = np.arange(self._pages_per_block)
        found: NDArray[np.int64] = np.asarray(blocks, np.int64)[:, None] * self._pages_per_block + pages
        return found.ravel()
