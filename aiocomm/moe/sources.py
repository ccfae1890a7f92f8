"""CUDA C++ of what experts' ranks compute on GPUs: rows moved, outputs weighed, partial sums added.

Rules:
- Sums are those of `core/weighting.cpp`, bit by bit: in the same order, no multiplication fused with an
  addition, and conversions by the same steps.
- A kernel takes one argument, a structure; `struct` formats of it are beside the sources. Tables of indices
  lie in memory of its own GPU, or in pinned memory of the host.
- A warp has one piece of work at a time. No thread waits for another.
"""

from __future__ import annotations

import functools
from typing import Final

from aiocomm.collectives.kernels import THREADS
from aiocomm.pages.gather import ROW_COPY

__all__ = ["ADD", "KINDS", "MOST_RANKS", "MOVE", "MOVE_SOURCE", "PLAIN", "WEIGH", "sums_source"]

MOST_RANKS: Final = 64  # of a group, whose addresses an argument holds
PLAIN: Final = 4  # runs of bytes that a launch copies beside rows
_PIECE: Final = 4096  # bytes that a warp copies at once
_AT_ONCE: Final = 2  # groups of eight elements that a thread has under way, and as many that are on their way

MOVE: Final = f"<{MOST_RANKS}Q4Q{3 * PLAIN}Q"  # base, to, table, count, width; to, from, nbytes of each run
MOVE_SOURCE: Final = f"""// aiocomm experts: move
{ROW_COPY}
struct Entry {{ unsigned source, index, place, unused; }};
struct Move {{
  size_type base[{MOST_RANKS}], to, table, count, width;
  Row plain[{PLAIN}];
}};

__device__ void copy_piece(size_type to, size_type from, size_type nbytes, unsigned lane) {{
  const Row piece = {{to, from, nbytes}};
  size_type done = 0;
  if (((to | from) & 15) == 0) done = copied<uint4>(piece, done, lane);
  if (((to | from) & 3) == 0) done = copied<unsigned>(piece, done, lane);
  copied<unsigned char>(piece, done, lane);
}}

extern "C" __global__ void __launch_bounds__({THREADS}) move_rows(const Move all) {{
  const unsigned lane = threadIdx.x % 32;
  const size_type stride = (size_type)gridDim.x * (blockDim.x / 32);
  const size_type first = (size_type)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  for (unsigned run = 0; run < {PLAIN}; ++run)
    for (size_type at = first * {_PIECE}; at < all.plain[run].nbytes; at += stride * {_PIECE}) {{
      const size_type left = all.plain[run].nbytes - at;
      copy_piece(all.plain[run].to + at, all.plain[run].from + at, left < {_PIECE} ? left : {_PIECE}, lane);
    }}
  const size_type per = (all.width + {_PIECE - 1}) / {_PIECE}, pieces = all.count * per;
  if (first >= pieces) return;
  const Entry* table = (const Entry*)all.table;
  Entry entry = table[first / per];
  for (size_type piece = first; piece < pieces; piece += stride) {{
    Entry after = entry;
    if (piece + stride < pieces) after = table[(piece + stride) / per];  // is on its way meanwhile
    const size_type at = piece % per * {_PIECE}, left = all.width - at;
    copy_piece(all.to + entry.place * all.width + at, all.base[entry.source] + entry.index * all.width + at,
               left < {_PIECE} ? left : {_PIECE}, lane);
    entry = after;
  }}
}}
"""

_BITS: Final = """
__device__ float from_half(unsigned short half) {
  const int sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  const int special = rest >= 0x0f800000 ? 0x7f800000 : 0;
  const float scaled = __uint_as_float((unsigned)rest) * 5192296858534827628530496329220096.0f;
  return __uint_as_float(__float_as_uint(scaled) | special | sign);
}
__device__ unsigned short to_half(float value) {
  const int bits = (int)__float_as_uint(value), rest = bits & 0x7fffffff;
  const int large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  const int tiny = (int)__float_as_uint(__uint_as_float((unsigned)rest) + 0.5f) - 0x3f000000;
  const int normal = (rest - 0x37fff001 + ((rest >> 13) & 1)) >> 13;
  const int found = rest >= 0x47800000 ? large : rest < 0x38800000 ? tiny : normal;
  return (unsigned short)(found | (bits >> 16 & 0x8000));
}
__device__ float from_bfloat(unsigned short value) { return __uint_as_float((unsigned)value << 16); }
__device__ unsigned short to_bfloat(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const unsigned quiet = (bits >> 16 & 0x8000u) | 0x7fc0u;
  return (unsigned short)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
__device__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ double plus(double a, double b) { return __dadd_rn(a, b); }
"""
_STORED: Final = {  # how a dtype is stored, read and written
    "float16": ("unsigned short", "from_half(x)", "to_half((float)x)"),
    "bfloat16": ("unsigned short", "from_bfloat(x)", "to_bfloat((float)x)"),
    "float32": ("float", "x", "(float)x"),
    "float64": ("double", "x", "x"),
}
KINDS: Final = tuple(_STORED)

WEIGH: Final = "<5Q4Q4Q"  # see Weigh
ADD: Final = f"<{MOST_RANKS}Q6Q"  # see Add
_KIND: Final = """
struct {name} {{
  typedef {stored} stored_t;
  __device__ static sum_t load(stored_t x) {{ return (sum_t)({load}); }}
  __device__ static stored_t save(sum_t x) {{ return {save}; }}
}};
"""
_SUMS: Final = """// aiocomm experts: {terms} {wire} {out}
typedef unsigned long long size_type;
typedef {sum} sum_t;
{bits}{kinds}
constexpr unsigned kPer = 8, kGroups = {at_once}, kStep = 32 * kPer * kGroups;
template <typename T> struct alignas(16) Group {{ T at[kPer]; }};

// Elements of a row from `column` on, as many as there are; `whole`: groups lie at multiples of 16 bytes.
template <typename Kind>
__device__ void load_group(Group<typename Kind::stored_t>& into, const typename Kind::stored_t* row,
                           size_type column, size_type hidden, bool whole) {{
  if (column >= hidden) return;
  if (whole) {{
    into = *(const Group<typename Kind::stored_t>*)(row + column);
    return;
  }}
  for (unsigned i = 0; i < kPer && column + i < hidden; ++i) into.at[i] = row[column + i];
}}
template <typename Kind>
__device__ void save_group(const sum_t* sums, typename Kind::stored_t* row, size_type column,
                           size_type hidden, bool whole) {{
  if (column >= hidden) return;
  Group<typename Kind::stored_t> made;
#pragma unroll
  for (unsigned i = 0; i < kPer; ++i) made.at[i] = Kind::save(sums[i]);
  if (whole) {{
    *(Group<typename Kind::stored_t>*)(row + column) = made;
    return;
  }}
  for (unsigned i = 0; i < kPer && column + i < hidden; ++i) row[column + i] = made.at[i];
}}

// Rows `own_first` to `own_last` stay here, in the sums' own type.
struct Weigh {{
  size_type terms, order, first, weights, wire;
  size_type own, own_first, own_last, count;
  size_type hidden, whole, unused[2];
}};

extern "C" __global__ void __launch_bounds__({threads}) weigh_rows(const Weigh all) {{
  typedef Terms::stored_t term_t;
  const unsigned lane = threadIdx.x % 32;
  const size_type stride = (size_type)gridDim.x * (blockDim.x / 32), hidden = all.hidden;
  const size_type per = (hidden + kStep - 1) / kStep, pieces = all.count * per;
  const unsigned* order = (const unsigned*)all.order;
  const unsigned* first = (const unsigned*)all.first;
  const float* weights = (const float*)all.weights;
  for (size_type piece = (size_type)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; piece < pieces;
       piece += stride) {{
    const size_type row = piece / per, column = piece % per * kStep + lane * kPer;
    const unsigned begin = first[row], end = first[row + 1];
    sum_t sums[kGroups][kPer];
    Group<term_t> next[kGroups] = {{}};
    for (unsigned g = 0; g < kGroups; ++g)
      load_group<Terms>(next[g], (const term_t*)all.terms + order[begin] * hidden, column + g * 32 * kPer,
                        hidden, all.whole);
    for (unsigned k = begin; k < end; ++k) {{
      Group<term_t> here[kGroups];
#pragma unroll
      for (unsigned g = 0; g < kGroups; ++g) here[g] = next[g];
      if (k + 1 < end)
#pragma unroll
        for (unsigned g = 0; g < kGroups; ++g)
          load_group<Terms>(next[g], (const term_t*)all.terms + order[k + 1] * hidden, column + g * 32 * kPer,
                            hidden, all.whole);
      const sum_t weight = (sum_t)weights[k];
#pragma unroll
      for (unsigned g = 0; g < kGroups; ++g)
#pragma unroll
        for (unsigned i = 0; i < kPer; ++i) {{
          const sum_t term = times(Terms::load(here[g].at[i]), weight);
          sums[g][i] = k == begin ? term : plus(sums[g][i], term);
        }}
    }}
    const bool own = row >= all.own_first && row < all.own_last;
    for (unsigned g = 0; g < kGroups; ++g) {{
      const size_type at = column + g * 32 * kPer;
      if (own)
        save_group<Sums>(sums[g], (sum_t*)all.own + (row - all.own_first) * hidden, at, hidden, all.whole);
      else
        save_group<Wire>(sums[g], (Wire::stored_t*)all.wire + row * hidden, at, hidden, all.whole);
    }}
  }}
}}

// By rank where its rows begin, of which `table` has one or none (-1) for each token.
struct Add {{
  size_type base[{ranks}], out, table, count, hidden;
  unsigned size, own, whole, unused;
}};

template <typename Kind>
__device__ void add_group(sum_t* sums, const void* base, size_type row, size_type column, size_type hidden,
                          bool whole) {{
  Group<typename Kind::stored_t> part[kGroups] = {{}};
#pragma unroll
  for (unsigned g = 0; g < kGroups; ++g)
    load_group<Kind>(part[g], (const typename Kind::stored_t*)base + row * hidden, column + g * 32 * kPer,
                     hidden, whole);
#pragma unroll
  for (unsigned g = 0; g < kGroups; ++g)
#pragma unroll
    for (unsigned i = 0; i < kPer; ++i)
      sums[g * kPer + i] = plus(sums[g * kPer + i], Kind::load(part[g].at[i]));
}}

extern "C" __global__ void __launch_bounds__({threads}) add_rows(const Add all) {{
  const unsigned lane = threadIdx.x % 32;
  const size_type stride = (size_type)gridDim.x * (blockDim.x / 32), hidden = all.hidden;
  const size_type per = (hidden + kStep - 1) / kStep, pieces = all.count * per;
  for (size_type piece = (size_type)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; piece < pieces;
       piece += stride) {{
    const size_type token = piece / per, column = piece % per * kStep + lane * kPer;
    const int* rows = (const int*)all.table + token * all.size;
    sum_t sums[kGroups * kPer] = {{}};
#pragma unroll 4
    for (unsigned rank = 0; rank < all.size; ++rank) {{
      const int row = rows[rank];
      if (row < 0) continue;
      if (rank == all.own)
        add_group<Sums>(sums, (const void*)all.base[rank], row, column, hidden, all.whole);
      else
        add_group<Wire>(sums, (const void*)all.base[rank], row, column, hidden, all.whole);
    }}
    for (unsigned g = 0; g < kGroups; ++g)
      save_group<Out>(sums + g * kPer, (Out::stored_t*)all.out + token * hidden, column + g * 32 * kPer,
                      hidden, all.whole);
  }}
}}
"""


@functools.cache
def sums_source(terms: str, wire: str, out: str) -> str:
    """CUDA C++ of the sums of outputs of a dtype, whose partial sums travel in another; see `KINDS`."""
    total = "float64" if terms == "float64" else "float32"
    kinds = ""
    for name, dtype in (("Terms", terms), ("Wire", wire), ("Sums", total), ("Out", out)):
        stored, load, save = _STORED[dtype]
        kinds += _KIND.format(name=name, stored=stored, load=load, save=save)
    return _SUMS.format(
        terms=terms,
        wire=wire,
        out=out,
        sum=_STORED[total][0],
        bits=_BITS,
        kinds=kinds,
        at_once=_AT_ONCE,
        threads=THREADS,
        ranks=MOST_RANKS,
    )
