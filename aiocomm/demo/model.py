"""A decoder-only transformer in NumPy: what the demo prefills in one process and decodes in another.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, one token per byte, embedding tied to the output.
The weights are seeded noise, so the text it writes has no meaning; arithmetic, cache and traffic are real.

Theory of operation
-------------------
`Transformer.forward` is a generator. For each layer it projects the new tokens, writes their keys and values
into the cache, and *yields before that layer's attention reads it*. One pause serves both ends of a split:

- the prefill side sends what was yielded while it goes on with the attention of that layer;
- the decode side waits, at the same place, until the keys and values of the earlier tokens have come.

Invariants: the cache holds rotated keys; positions [0, cache.length) are valid in every layer; a forward pass
writes only positions [cache.length, cache.length + n), so that earlier ones may still be arriving meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = ["Floats", "KVCache", "LayerKV", "ModelConfig", "Transformer", "attention", "finish", "rotate"]

Floats: TypeAlias = NDArray[np.float32]

VOCABULARY = 256
_QUERY_BLOCK = 64
"""Query rows per block of attention, few enough for a block's scores to stay in a core's cache."""


# Seeded noise needs three scales to behave like a language model rather than a constant:
_QUERY_GAIN = 4.0
"""Sharper attention: noise attends to everything alike, and no wrong key or value would show in the text."""
_EMBEDDING_SCALE = 0.1
"""A residual stream that is mostly embedding would, through the tied output, repeat its own token."""
_LOGIT_GAIN = 2.5
"""Standard deviation of the logits: neither uniform nor one certain byte."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of the model. `dim` is split over `heads`; `kv_heads` must divide `heads`."""

    layers: int = 8
    dim: int = 256
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 704
    seed: int = 0
    rope_base: float = 10_000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, not {self.layers}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of {2 * self.heads} (heads of an even size)")

    @classmethod
    def sized(cls, layers: int, dim: int, seed: int = 0) -> ModelConfig:
        """The usual proportions: heads of 64, two query heads per key head, a hidden layer of 8/3 `dim`."""
        if dim < 128 or dim % 128:
            raise ValueError(f"dim must be a multiple of 128, not {dim}")
        heads = dim // 64
        return cls(layers, dim, heads, heads // 2, 64 * round(dim / 24), seed)

    @property
    def head_dim(self) -> int:
        """Elements per head."""
        return self.dim // self.heads

    @property
    def kv_nbytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all weights."""
        projections = (self.heads + 2 * self.kv_heads) * self.head_dim + self.dim
        layer = self.dim * (projections + 3 * self.ffn + 2)
        return 4 * (self.layers * layer + (VOCABULARY + 1) * self.dim)


class LayerKV(NamedTuple):
    """The new tokens' keys and values of one layer: contiguous views, [tokens, kv_heads, head_dim] each."""

    layer: int
    keys: Floats
    values: Floats


class KVCache:
    """Keys and values of one sequence, [layers, capacity, kv_heads, head_dim] each.

    `empty(shape, dtype)` allocates; pass `aiocomm.empty` for memory that peers on this host write into.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, empty: Callable[..., NDArray[np.float32]] = np.empty
    ) -> None:
        shape = (config.layers, capacity, config.kv_heads, config.head_dim)
        self.keys = empty(shape, np.float32)
        self.values = empty(shape, np.float32)
        self.keys.fill(0.0)  # touch every page now: first touch would be counted as time to first token
        self.values.fill(0.0)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return int(self.keys.shape[1])

    def layer(self, index: int, start: int, stop: int) -> LayerKV:
        """Views of the tokens [start, stop) of one layer."""
        return LayerKV(index, self.keys[index, start:stop], self.values[index, start:stop])


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Floats
    qkv: Floats  # [dim, (heads + 2 kv_heads) head_dim]
    output: Floats  # [dim, dim]
    ffn_norm: Floats
    gate_up: Floats  # [dim, 2 ffn]
    down: Floats  # [ffn, dim]


def rms_norm(x: Floats, gain: Floats, epsilon: float) -> Floats:
    """Scale each row of `x` to root mean square 1, then by `gain`."""
    scale = np.sqrt(np.einsum("nd,nd->n", x, x) / np.float32(x.shape[-1]) + np.float32(epsilon))
    return np.asarray(x * (gain / scale[:, None]), dtype=np.float32)


def rotate(x: Floats, start: int, base: float) -> Floats:
    """Rotary positions (Su et al., 2021, halves paired as in GPT-NeoX) for `x` [tokens, heads, head_dim].

    Row i has position `start + i`. The dot product of two rotated vectors depends on their distance alone.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    angle = np.arange(start, start + x.shape[0])[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float32)[:, None], np.sin(angle).astype(np.float32)[:, None]
    low, high = x[..., :half], x[..., half:]
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def attention(q: Floats, keys: Floats, values: Floats) -> Floats:
    """Causal grouped-query attention of the last `n` positions.

    Args:
        q: queries [n, heads, head_dim], already scaled; row i sees keys [0, length - n + i].
        keys: [length, kv_heads, head_dim].
        values: [length, kv_heads, head_dim].

    Returns:
        [n, heads * head_dim].
    """
    n, heads, size = q.shape
    length, kv_heads, _ = keys.shape
    group = heads // kv_heads  # query heads that share one key head: they make one matrix product
    grouped = np.ascontiguousarray(q.reshape(n, kv_heads, group, size).transpose(1, 2, 0, 3))
    out = np.empty((n, kv_heads, group, size), np.float32)
    block = min(n, _QUERY_BLOCK)
    scratch = np.empty(group * block * length, np.float32)
    hidden = np.triu(np.full((block, block), -np.inf, np.float32), 1)
    for start in range(0, n, block):
        stop = min(start + block, n)
        rows, seen = stop - start, length - n + stop
        for head in range(kv_heads):
            scores = scratch[: group * rows * seen].reshape(group * rows, seen)
            queries = grouped[head, :, start:stop].reshape(group * rows, size)
            np.matmul(queries, keys[:seen, head].T, out=scores)
            scores.reshape(group, rows, seen)[:, :, seen - rows :] += hidden[:rows, :rows]
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            mixed = scores @ values[:seen, head]
            mixed /= scores.sum(axis=1, keepdims=True)
            out[start:stop, head] = mixed.reshape(group, rows, size).transpose(1, 0, 2)
    return out.reshape(n, heads * size)


class Transformer:
    """The model of one process. Two of the same `ModelConfig` have the same weights."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        rng = np.random.default_rng(config.seed)

        def matrix(rows: int, columns: int) -> Floats:
            return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(rows**-0.5)

        c = config
        width = c.heads * c.head_dim, 2 * c.kv_heads * c.head_dim
        self.embedding = rng.standard_normal((VOCABULARY, c.dim), dtype=np.float32)
        self.norm = np.ones(c.dim, np.float32)
        self.layers: list[_Layer] = []
        for _ in range(c.layers):
            qkv = matrix(c.dim, sum(width))
            qkv[:, : width[0]] *= np.float32(_QUERY_GAIN)
            self.layers.append(
                _Layer(
                    attention_norm=np.ones(c.dim, np.float32),
                    qkv=qkv,
                    output=matrix(c.dim, c.dim),
                    ffn_norm=np.ones(c.dim, np.float32),
                    gate_up=matrix(c.dim, 2 * c.ffn),
                    down=matrix(c.ffn, c.dim),
                )
            )

    def forward(self, tokens: NDArray[np.uint8], cache: KVCache) -> Generator[LayerKV, None, Floats]:
        """Run `tokens` after what `cache` holds; yield each layer's keys and values before its attention.

        The generator's value is the last layer's output [tokens, dim]. Whoever drives it to the end adds
        `len(tokens)` to `cache.length`.
        """
        c = self.config
        start, stop = cache.length, cache.length + len(tokens)
        if stop > cache.capacity:
            raise ValueError(f"{stop} tokens do not fit into a cache of {cache.capacity}")
        query_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
        x = self.embedding[tokens] * np.float32(_EMBEDDING_SCALE)
        for index, layer in enumerate(self.layers):
            qkv = rms_norm(x, layer.attention_norm, c.epsilon) @ layer.qkv
            new = cache.layer(index, start, stop)
            k, v = qkv[:, query_size : query_size + kv_size], qkv[:, query_size + kv_size :]
            new.keys[:] = rotate(k.reshape(-1, c.kv_heads, c.head_dim), start, c.rope_base)
            new.values[:] = v.reshape(-1, c.kv_heads, c.head_dim)
            yield new
            q = rotate(qkv[:, :query_size].reshape(-1, c.heads, c.head_dim), start, c.rope_base)
            q *= np.float32(c.head_dim**-0.5)
            x += attention(q, cache.keys[index, :stop], cache.values[index, :stop]) @ layer.output
            gate_up = rms_norm(x, layer.ffn_norm, c.epsilon) @ layer.gate_up
            gate, up = gate_up[:, : c.ffn], gate_up[:, c.ffn :]
            up *= gate / (1.0 + np.exp(-gate))
            x += up @ layer.down
            del (
                gate_up,
                gate,
                up,
                q,
            )  # tens of MB: freed within the layer, not between prefill and first token
        return x

    def prefill(self, tokens: NDArray[np.uint8], cache: KVCache) -> Iterator[LayerKV]:
        """Fill `cache` with `tokens`; yield each layer's keys and values as soon as they are there.

        Ends with the last layer's keys and values: nothing after them is needed to decode.
        """
        yield from islice(self.forward(tokens, cache), self.config.layers)
        cache.length += len(tokens)

    def decode(self, token: int, cache: KVCache) -> Generator[LayerKV, None, int]:
        """Run one token and return the next, sampled. Pauses where `forward` does."""
        hidden = yield from self.forward(np.array([token], np.uint8), cache)
        cache.length += 1
        return self.sample(self.logits(hidden)[-1], cache.length)

    def logits(self, hidden: Floats) -> Floats:
        """Scores of the next byte, [tokens, 256], from the last layer's output [tokens, dim]."""
        x = rms_norm(hidden, self.norm, self.config.epsilon)
        x *= np.float32(_LOGIT_GAIN * self.config.dim**-0.5)
        return np.asarray(x @ self.embedding.T, dtype=np.float32)

    def sample(self, logits: Floats, position: int) -> int:
        """Draw the byte for `position`. The noise is seeded by the position: two processes draw the same."""
        noise = np.random.default_rng((self.config.seed, position)).gumbel(size=VOCABULARY)
        return int((logits + noise).argmax())

    def generate(self, prompt: NDArray[np.uint8], count: int, cache: KVCache) -> Iterator[int]:
        """Prefill all but the last byte of `prompt`, then decode `count` tokens; yield each when known."""
        for _ in self.prefill(prompt[:-1], cache):
            pass
        token = int(prompt[-1])
        for _ in range(count):
            token = finish(self.decode(token, cache))
            yield token


def finish(step: Generator[LayerKV, None, int]) -> int:
    """Drive a `decode` to its end without waiting at its pauses."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            return int(end.value)
