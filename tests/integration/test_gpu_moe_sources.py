"""The kernels of dispatch and combine, run as C++ on the host, beside what the host itself computes."""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from gpu_experts import EXPERTS
from integration.test_gpu_gather import EVERY, as_library, assert_aligned
from integration.test_gpu_reductions import assert_it_compiles

from aiocomm.moe import sources
from aiocomm.moe.placement import place
from aiocomm.moe.routing import arrange, route
from aiocomm.moe.weighting import add_up, weigh

if TYPE_CHECKING:
    from pathlib import Path

# ------------------------------------------------------------ the sources, as C++


def test_the_source_that_moves_rows(tmp_path: Path) -> None:
    run = (
        'extern "C" void run(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "move_rows(*(const Move*)all); }"
    )
    library = as_library(sources.MOVE_SOURCE, run, tmp_path)
    rng = np.random.default_rng(0)
    for width, blocks, threads, off in (
        (16, 1, 32, 0),
        (10_000, 3, 64, 0),
        (7, 2, 512, 0),
        (4096, 2, 64, 0),
        (5008, 2, 64, 4),
        (5008, 2, 64, 1),
    ):
        given = [shifted(rng.integers(0, 255, (20, width), np.uint8), off) for _ in range(3)]
        count = 50
        table = np.zeros((count, 4), np.uint32)
        table[:, 0], table[:, 1] = rng.integers(0, 3, count), rng.integers(0, 20, count)
        table[:, 2] = rng.permutation(count)
        target, plain = np.zeros((count, width), np.uint8), [np.zeros(5001, np.uint8) for _ in range(2)]
        base = [one.ctypes.data for one in given] + [0] * (sources.MOST_RANKS - 3)
        more = rng.integers(0, 255, 5001, np.uint8)
        runs = [plain[0].ctypes.data, more.ctypes.data, 5001, plain[1].ctypes.data, more.ctypes.data, 16]
        rest = [target.ctypes.data, table.ctypes.data, count, width, *runs, *([0] * 6)]
        argument = np.array([*base, *rest], np.uint64).tobytes()
        library.run(ctypes.c_char_p(argument), blocks, threads)
        expected = np.zeros_like(target)
        for source, index, where, _ in table.tolist():
            expected[where] = given[source][index]
        assert np.array_equal(target, expected)
        assert np.array_equal(plain[0], more)
        assert np.array_equal(plain[1][:16], more[:16])
        assert not plain[1][16:].any()
    assert_aligned(library)


ROUNDED = """
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
"""


@pytest.mark.parametrize("hidden", [8, 21, 1500, 1504])
@pytest.mark.parametrize(
    "names", ["f2 f4 f2", "f2 f2 f4", "bf bf bf", "f4 bf f4", "f4 f4 f2", "f8 f8 f8", "f8 f4 f8"]
)
def test_the_sources_of_sums_are_those_of_the_host(tmp_path: Path, names: str, hidden: int) -> None:
    dtypes = [np.dtype(ml_dtypes.bfloat16 if name == "bf" else name) for name in names.split()]
    run = (
        'extern "C" void weigh(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "weigh_rows(*(const Weigh*)all); }\n"
        + 'extern "C" void add(const void* all, unsigned blocks, unsigned threads) {'
        + EVERY
        + "add_rows(*(const Add*)all); }"
    )
    source = ROUNDED + sources.sums_source(*(dtype.name for dtype in dtypes)).replace(
        "__device__ static", "static"
    )
    library = as_library(source, run, tmp_path)
    for size, me in ((3, 1), (6, 5)):  # fewer ranks than are taken at once, and more
        assert_sums_are_those_of_the_host(library, dtypes, hidden, size, me)
    if hidden == 8:  # rows that begin between groups
        assert_sums_are_those_of_the_host(library, dtypes, hidden, 3, 1, 1)
    assert_aligned(library)


def shifted(values: Any, by: int) -> Any:
    """A copy that begins so many elements after a multiple of 16 bytes."""
    room = np.zeros(values.size + by + 16, values.dtype)
    start = -(room.ctypes.data // values.itemsize) % (16 // values.itemsize) + by
    place = room[start : start + values.size].reshape(values.shape)
    place[:] = values
    return place


def assert_sums_are_those_of_the_host(
    library: ctypes.CDLL, dtypes: list[np.dtype[Any]], hidden: int, size: int, me: int, off: int = 0
) -> None:
    terms, wire, result = dtypes
    wide = np.dtype(np.float64 if terms == np.float64 else np.float32)
    rng = np.random.default_rng(hidden)
    tokens = 9
    placement = place(EXPERTS, None, size)
    routed = [
        route(
            rng.integers(-1, EXPERTS, (tokens, 4)), rng.normal(size=(tokens, 4)).astype(np.float32), placement
        )
        for _ in range(size)
    ]
    found = arrange([parts[me] for parts in routed], placement, me)
    outputs = rng.normal(size=(len(found.rows), hidden)) * np.exp2(
        rng.integers(-30, 14, (len(found.rows), 1))
    )
    outputs = shifted(outputs.astype(terms), off)
    starts = found.starts.tolist()
    total, own = starts[-1], slice(starts[me], starts[me + 1])
    sums = shifted(np.zeros((total, hidden), wire), 0)
    order, first = found.order.astype(np.uint32), found.first.astype(np.uint32)
    weights = found.weights[found.order]
    whole = int(hidden % 8 == 0 and not off)
    terms_at = [one.ctypes.data for one in (outputs, order, first, weights)]
    counts = own.start, own.stop - own.start, total, hidden
    argument = struct.pack(sources.WEIGH, *terms_at, sums.ctypes.data, *counts, whole, 0)
    library.weigh(ctypes.c_char_p(argument), 2, 64)
    mine = np.zeros((own.stop - own.start, hidden), wide)
    for peer in range(size):
        part = np.zeros((starts[peer + 1] - starts[peer], hidden), wide if peer == me else wire)
        weigh(outputs, found, starts[peer], starts[peer + 1], part)
        if peer == me:
            mine = part
        else:
            assert part.tobytes() == sums[starts[peer] : starts[peer + 1]].tobytes()
    assert not sums[own].any()  # whoever adds up weighs them
    parts = [
        mine if rank == me else shifted(rng.normal(size=(part.rows, hidden)).astype(wire), 0)
        for rank, part in enumerate(routed[me])
    ]
    table = np.full((tokens, size), -1, np.int32)
    for rank, part in enumerate(routed[me]):
        table[part.tokens, rank] = np.arange(part.rows)
    out, expected = shifted(np.zeros((tokens, hidden), result), off), np.zeros((tokens, hidden), result)
    base = [0 if rank == me else part.ctypes.data for rank, part in enumerate(parts)]
    rest = out.ctypes.data, table.ctypes.data, *terms_at, own.start, size, me, tokens, hidden, whole
    base += [0] * (sources.MOST_RANKS - size)
    library.add(ctypes.c_char_p(struct.pack(sources.ADD, *base, *rest)), 2, 64)
    add_up(
        [(part.tokens, rows) for part, rows in zip(routed[me], parts, strict=True)],
        wide == np.float64,
        expected,
    )
    assert out.tobytes() == expected.tobytes()


# ------------------------------------------------------------ far rows

_NO_RESERVE = 0x4000  # of Linux, to which Python gives no name yet
FAR = """
  gridDim.x = blocks, blockDim.x = 32;
  for (blockIdx.x = first; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x)
"""


def sparse(nbytes: int) -> Any:
    """Zeros, of which only what is touched takes memory."""
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=how), np.uint8)


def test_rows_that_are_moved_from_and_to_far_away(tmp_path: Path) -> None:
    """Where an offset in bytes takes more than 32 bits."""
    run = (
        'extern "C" void run(const void* all, unsigned first, unsigned blocks) {'
        + FAR
        + "move_rows(*(const Move*)all); }"
    )
    library = as_library(sources.MOVE_SOURCE, run, tmp_path)
    width, far = 4096, (1 << 20) + 1
    source, target = sparse((far + 1) * width), sparse((far + 2) * width)
    source[far * width :] = 7
    table = np.array([[0, far, far + 1, 0]], np.uint32)
    base = [source.ctypes.data] + [0] * (sources.MOST_RANKS - 1)
    rest = [target.ctypes.data, table.ctypes.data, 1, width] + [0] * 12
    library.run(ctypes.c_char_p(np.array([*base, *rest], np.uint64).tobytes()), 0, 1)
    assert (target[(far + 1) * width :] == 7).all()
    assert not target[: 2 * width].any()


def test_sums_of_rows_that_are_far_away(tmp_path: Path) -> None:
    """Where the number of an element takes more than 32 bits: of outputs, of partial sums, and of results."""
    run = (
        'extern "C" void weigh(const void* all, unsigned first, unsigned blocks) {'
        + FAR
        + "weigh_rows(*(const Weigh*)all); }\n"
        + 'extern "C" void add(const void* all, unsigned first, unsigned blocks) {'
        + FAR
        + "add_rows(*(const Add*)all); }"
    )
    source = ROUNDED + sources.sums_source("float16", "float16", "float16").replace(
        "__device__ static", "static"
    )
    library = as_library(source, run, tmp_path)
    hidden, far = 1 << 16, (1 << 16) + 1
    row = 2 * hidden  # bytes
    pieces = hidden // 1024  # of a row, where each group of eight is whole
    terms, sums, out = (sparse((far + 1) * row) for _ in range(3))
    terms[far * row :].view(np.float16)[:] = 3
    order, weights = np.array([far], np.uint32), np.array([0.5], np.float32)
    first = np.zeros(far + 2, np.uint32)
    first[-1] = 1  # the last row has the only term
    terms_at = [one.ctypes.data for one in (terms, order, first, weights)]
    argument = struct.pack(sources.WEIGH, *terms_at, sums.ctypes.data, 0, 0, far + 1, hidden, 1, 0)
    library.weigh(ctypes.c_char_p(argument), far * pieces, (far + 1) * pieces)
    assert (sums[far * row :].view(np.float16) == 1.5).all()
    assert not sums[: 2 * row].any()
    table = np.full((far + 1, 2), -1, np.int32)
    table[far] = far, 0  # the one row of another rank; and of this, the first from `own_first` on
    base = [sums.ctypes.data] + [0] * (sources.MOST_RANKS - 1)
    rest = out.ctypes.data, table.ctypes.data, *terms_at, far, 2, 1, far + 1, hidden, 1
    pieces = hidden // 512
    argument = struct.pack(sources.ADD, *base, *rest)
    library.add(ctypes.c_char_p(argument), far * pieces, (far + 1) * pieces)
    assert (out[far * row :].view(np.float16) == 3).all()
    assert not out[: 2 * row].any()


@pytest.mark.parametrize("out", ["float16", "bfloat16"])
def test_sums_of_doubles_are_rounded_once(tmp_path: Path, out: str) -> None:
    """As on the host, which the tests of sums hold to plain loops."""
    run = """
extern "C" void round(const double* from, unsigned short* to, unsigned count) {
  for (unsigned i = 0; i < count; ++i) to[i] = Out::save(from[i]);
}"""
    source = ROUNDED + sources.sums_source("float64", "float64", out).replace("__device__ static", "static")
    library = as_library(source, run, tmp_path)
    bits = np.random.default_rng(0).integers(0, 0x7BFF, 3000).astype(np.uint16)
    below, above = (one.view(out).astype(np.float64) for one in (bits, bits + np.uint16(1)))
    middles = (below + above) / 2
    values = np.concatenate([middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)])
    values = np.concatenate([values, -values, [0, np.inf, np.nan, 1e300, 5e-324]])
    found, expected = np.zeros(len(values), np.uint16), np.zeros((len(values), 1), out)
    library.round(*(ctypes.c_void_p(one.ctypes.data) for one in (values, found)), len(values))
    add_up([(np.arange(len(values)), values[:, None])], True, expected)
    assert np.array_equal(found.view(out)[:, None], expected, equal_nan=True)


def test_the_sources_compile() -> None:
    assert_it_compiles(sources.MOVE_SOURCE)
    for terms in sources.KINDS:
        assert_it_compiles(sources.sums_source(terms, "float32", "bfloat16"))
