"""The tensors that vLLM registers, whatever their order in memory: pages and heads are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import aiocomm

torch = pytest.importorskip("torch", reason="no torch here: pip install torch")
caches_of = pytest.importorskip("aiocomm.vllm.tensors").caches_of

LAYERS, PAGES, HEADS, TOKENS, CONTENT = 3, 5, 2, 4, 6


def numbered(*shape: int, dtype: Any = None) -> Any:
    return torch.arange(int(np.prod(shape)), dtype=torch.int16).view(dtype or torch.bfloat16).reshape(shape)


def heads_first() -> list[Any]:
    return list(numbered(LAYERS, PAGES, HEADS, TOKENS, CONTENT))


def tokens_first() -> list[Any]:
    return list(numbered(LAYERS, PAGES, TOKENS, HEADS, CONTENT).permute(0, 1, 3, 2, 4))


def layers_within_pages() -> list[Any]:
    return list(numbered(PAGES, LAYERS, HEADS, TOKENS, CONTENT).permute(1, 0, 2, 3, 4))


def each_by_itself() -> list[Any]:
    return [layer.clone() for layer in heads_first()]


def of_one_head() -> list[Any]:
    return [layer[:, :1].clone() for layer in heads_first()]


def one_shared_by_two_layers() -> list[Any]:
    first, second, third = heads_first()
    return [first, second, third, second]


FORMS = [
    heads_first,
    tokens_first,
    layers_within_pages,
    each_by_itself,
    of_one_head,
    one_shared_by_two_layers,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 2])
def test_pages_and_heads_are_found(form: Any, block: int) -> None:
    tensors = form()
    caches, layers, content = caches_of(tensors, block * TOKENS)
    assert (layers, content) == (LAYERS, CONTENT)
    pages = caches.pages()
    heads = tensors[0].shape[1]
    assert pages.count == PAGES
    assert pages.nbytes == LAYERS * heads * TOKENS * CONTENT * 2
    np.testing.assert_array_equal(
        caches.of_blocks([1, 0]), [block + n for n in range(block)] + list(range(block))
    )
    cut = pages.slice(caches.head_axis, heads - 1, heads)
    assert cut.nbytes == pages.nbytes // heads


@pytest.mark.parametrize("form", FORMS)
def test_the_arrays_are_the_tensors_memory(form: Any) -> None:
    tensors = form()
    arrays = caches_of(tensors, TOKENS)[0].pages().arrays
    for array in arrays:
        array[...] = 7
    assert all((tensor.view(torch.int16) == 7).all() for tensor in tensors)


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        (heads_first, "LBHNC"),
        (tokens_first, "LBNHC"),
        (layers_within_pages, "BLHNC"),
        (each_by_itself, "LBHNC"),
        (one_shared_by_two_layers, "LBHNC"),
    ],
)
def test_the_order_of_axes_has_vllms_name(form: Any, layout: str) -> None:
    assert caches_of(form(), TOKENS)[0].layout == layout


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float32])
def test_every_dtype_moves_as_bytes(dtype: Any) -> None:
    (array,) = caches_of([torch.zeros(PAGES, HEADS, TOKENS, CONTENT, dtype=dtype)], TOKENS)[0].pages().arrays
    assert array.dtype.itemsize == dtype.itemsize


def test_what_cannot_be_handed_over_is_named() -> None:
    with pytest.raises(aiocomm.UsageError, match=r"shapes \[\(5, 2, 4\)\]"):
        caches_of([torch.zeros(PAGES, HEADS, TOKENS)], TOKENS)
    with pytest.raises(aiocomm.UsageError, match="of one"):
        caches_of([*heads_first(), torch.zeros(PAGES, 1, TOKENS, CONTENT)], TOKENS)
    with pytest.raises(aiocomm.UsageError, match="gaps"):
        caches_of([layer[:, :, :, :4] for layer in heads_first()], TOKENS)
    with pytest.raises(aiocomm.UsageError, match="no whole pages"):
        caches_of(heads_first(), TOKENS + 1)
