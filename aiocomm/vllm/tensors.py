"""The tensors that vLLM registers, as arrays whose bytes can be moved."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from aiocomm.errors import UsageError
from aiocomm.vllm.caches import Axes, Caches

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["caches_of"]


def caches_of(tensors: Sequence[Any], block_size: int) -> tuple[Caches, int, int]:
    """The caches, how many layers they have, and how many elements a token and head.

    Args:
        tensors: of each layer `[pages, heads, tokens, content]`, whatever the order of axes in memory. Layers
            may share one.

    Raises:
        UsageError: they are of several shapes, or have gaps, as those of hybrid models do.
    """
    layers = list({tensor.data_ptr(): tensor for tensor in tensors}.values())
    shapes = sorted({tuple(tensor.shape) for tensor in layers})
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise UsageError(
            f"KV caches of shapes {shapes}: only those of one [pages, heads, tokens, content] are handed "
            "over, not those of models whose layers have several"
        )
    # Where one allocation holds all layers a lease is one region, in place of one per layer.
    together = _together(layers)
    laid = _laid([together], 1) if together is not None else None
    arrays, axes = laid or _laid(layers, 0) or (None, None)
    if arrays is None or axes is None:
        raise UsageError(f"KV caches of shape {shapes[0]} and strides {layers[0].stride()} have gaps")
    return Caches(arrays, axes, block_size), len(layers), shapes[0][3]


def _together(layers: list[Any]) -> Any:
    """All layers as one tensor, layers first, if one allocation holds them at equal distances."""
    first, offsets = layers[0], [tensor.storage_offset() for tensor in layers]
    steps = {after - before for before, after in pairwise(offsets)}
    alike = {(tensor.untyped_storage().data_ptr(), tuple(tensor.stride())) for tensor in layers}
    if len(steps) != 1 or min(steps) <= 0 or len(alike) > 1:
        return None
    return first.as_strided((len(layers), *first.shape), (*steps, *first.stride()), offsets[0])


def _laid(tensors: list[Any], before: int) -> tuple[list[Any], Axes] | None:
    """Axes in the order of memory, and where those after the first `before` are; None: there are gaps."""
    shape, strides = tensors[0].shape, tensors[0].stride()
    order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], -shape[axis]))
    laid = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in laid):
        return None
    page, head, token = (order.index(before + axis) for axis in range(3))
    return [_integers(tensor) for tensor in laid], Axes(page, head, token)


def _integers(tensor: Any) -> Any:
    """Only bytes are moved: NumPy knows no bfloat16 or float8, and no library can describe all of them."""
    import torch

    tensor = tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
    return tensor if tensor.is_cuda else tensor.numpy()
