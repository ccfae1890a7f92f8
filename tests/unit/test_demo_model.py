"""The demo's model against slow references: attention, rotation, cache, order of the layers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiocomm.demo.model import Floats, KVCache, ModelConfig, Transformer, attention, finish, rotate

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG = ModelConfig(layers=3, dim=64, heads=4, kv_heads=2, ffn=96, seed=7)


def prompt(n: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.uint8)


def forward(model: Transformer, tokens: NDArray[np.uint8], cache: KVCache) -> Floats:
    step = model.forward(tokens, cache)
    while True:
        try:
            next(step)
        except StopIteration as end:
            cache.length += len(tokens)
            hidden: Floats = end.value
            return hidden


def naive_attention(q: Floats, keys: Floats, values: Floats) -> Floats:
    """One query and one head at a time, in double precision."""
    n, heads, size = q.shape
    length, kv_heads, _ = keys.shape
    out = np.zeros((n, heads, size))
    for i in range(n):
        seen = length - n + i + 1
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = keys[:seen, shared].astype(float) @ q[i, head].astype(float)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values[:seen, shared] / weights.sum()
    return out.reshape(n, heads * size).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 150),
    before=st.integers(0, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_attention_equals_naive_reference(n: int, before: int, kv_heads: int, group: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n, kv_heads * group, 8), dtype=np.float32) * 2
    keys, values = rng.standard_normal((2, before + n, kv_heads, 8), dtype=np.float32)
    np.testing.assert_allclose(
        attention(q, keys, values), naive_attention(q, keys, values), rtol=2e-4, atol=2e-5
    )


@settings(deadline=None, max_examples=40)
@given(a=st.integers(0, 3000), b=st.integers(0, 3000), shift=st.integers(0, 2000))
def test_rotated_product_depends_on_distance_alone(a: int, b: int, shift: int) -> None:
    q, k = np.random.default_rng(1).standard_normal((2, 1, 1, 32), dtype=np.float32)
    here = np.sum(rotate(q, a, 1e4) * rotate(k, b, 1e4))
    there = np.sum(rotate(q, a + shift, 1e4) * rotate(k, b + shift, 1e4))
    np.testing.assert_allclose(here, there, atol=2e-4)


def test_rotation_keeps_norms_and_leaves_position_zero() -> None:
    x = np.random.default_rng(2).standard_normal((50, 3, 16), dtype=np.float32)
    rotated = rotate(x, 0, 1e4)
    np.testing.assert_array_equal(rotated[0], x[0])
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotate(x[20:], 20, 1e4), rotated[20:])


def test_incremental_decode_equals_full_recomputation() -> None:
    model, tokens = Transformer(CONFIG), prompt(90)
    whole = KVCache(CONFIG, 100)
    expected = forward(model, tokens, whole)
    cache, rows = KVCache(CONFIG, 100), []
    rows.append(forward(model, tokens[:70], cache))
    rows += [forward(model, tokens[i : i + 1], cache) for i in range(70, 90)]
    np.testing.assert_allclose(np.concatenate(rows), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cache.keys[:, :90], whole.keys[:, :90], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cache.values[:, :90], whole.values[:, :90], rtol=1e-3, atol=1e-4)
    assert cache.length == whole.length == 90


def test_prefill_hands_out_each_layer_once_in_order_before_the_next_begins() -> None:
    model, tokens = Transformer(CONFIG), prompt(20)
    cache = KVCache(CONFIG, 32)
    for expected, part in enumerate(model.prefill(tokens, cache)):
        assert part.layer == expected
        assert part.keys.shape == part.values.shape == (20, CONFIG.kv_heads, CONFIG.head_dim)
        assert part.keys.flags.c_contiguous
        assert part.values.flags.c_contiguous
        assert np.abs(part.keys).min() > 0
        assert not cache.keys[expected + 1 :].any()
        assert cache.length == 0
    assert expected == CONFIG.layers - 1
    assert cache.length == 20


def test_decode_reads_a_layer_of_the_cache_only_after_its_pause() -> None:
    """What the decode worker relies on: keys and values may come as late as the pause of their layer."""
    model, tokens = Transformer(CONFIG), prompt(40)
    source = KVCache(CONFIG, 41)
    for _ in model.prefill(tokens[:-1], source):
        pass
    late = KVCache(CONFIG, 41)
    late.keys[:] = late.values[:] = np.nan
    late.length = 39
    step = model.decode(int(tokens[-1]), late)
    for layer in range(CONFIG.layers):
        assert next(step).layer == layer
        late.keys[layer, :39] = source.keys[layer, :39]
        late.values[layer, :39] = source.values[layer, :39]
    assert finish(step) == finish(model.decode(int(tokens[-1]), source))


def test_same_configuration_same_text_and_not_degenerate() -> None:
    tokens = prompt(200)
    texts = [list(Transformer(CONFIG).generate(tokens, 48, KVCache(CONFIG, 250))) for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 12
    other = Transformer(ModelConfig(layers=3, dim=64, heads=4, kv_heads=2, ffn=96, seed=8))
    assert list(other.generate(tokens, 48, KVCache(CONFIG, 250))) != texts[0]


def test_text_depends_on_the_cache() -> None:
    """Otherwise equal tokens would prove nothing about the transfer."""
    model, tokens = Transformer(CONFIG), prompt(200)

    def text(damage: slice) -> list[int]:
        cache = KVCache(CONFIG, 250)
        for _ in model.prefill(tokens[:-1], cache):
            pass
        cache.values[1, damage] = 0.0
        token, out = int(tokens[-1]), []
        for _ in range(48):
            token = finish(model.decode(token, cache))
            out.append(token)
        return out

    assert text(slice(100, 140)) != text(slice(0, 0))


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_activations_stay_sane(layers: int) -> None:
    model = Transformer(ModelConfig.sized(layers, 128))
    hidden = forward(model, prompt(300), KVCache(model.config, 300))
    assert 0.1 < np.sqrt(np.mean(hidden**2)) < 10
    assert 1.0 < model.logits(hidden).std() < 6.0


def test_cache_refuses_more_than_its_capacity() -> None:
    model, cache = Transformer(CONFIG), KVCache(CONFIG, 8)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        next(model.forward(prompt(9), cache))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"layers": 0}, "layers"), ({"heads": 6, "kv_heads": 4}, "kv_heads"), ({"dim": 100}, "dim")],
)
def test_impossible_shapes_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**kwargs)
    with pytest.raises(ValueError, match="128"):
        ModelConfig.sized(2, 200)


def test_bytes_per_token() -> None:
    cache = KVCache(CONFIG, 10)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * CONFIG.kv_nbytes_per_token


def test_bytes_of_the_weights() -> None:
    config = ModelConfig.sized(3, 256)
    model = Transformer(config)
    layers = [weights for layer in model.layers for weights in dataclasses.astuple(layer)]
    assert config.weights_nbytes == sum(w.nbytes for w in (model.embedding, model.norm, *layers))
