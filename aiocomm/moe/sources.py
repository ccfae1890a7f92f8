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
__device__ float narrowed(float value) { return value; }
__device__ float narrowed(double value) {
  const float nearest = (float)value;
  const double back = (double)nearest;
  const int away = value > 0 ? back > value : back < value;
  return __uint_as_float((__float_as_uint(nearest) - away) | (back != value));
}
__device__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ double plus(double a, double b) { return __dadd_rn(a, b); }
"""
_STORED: Final = {  # how a dtype is stored, read and written
    "float16": ("unsigned short", "from_half(x)", "to_half(narrowed(x))"),
    "bfloat16": ("unsigned short", "from_bfloat(x)", "to_bfloat(narrowed(x))"),
    "float32": ("float", "x", "(float)x"),
    "float64": ("double", "x", "x"),
}
KINDS: Final = tuple(_STORED)

WEIGH: Final = "<5Q6I"  # see Weigh
ADD: Final = f"<{MOST_RANKS}Q6Q6I"  # see Add
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
typedef Terms::stored_t term_t;
constexpr unsigned kPer = 8;
template <typename T> struct alignas(16) Group {{ T at[kPer]; }};
// Terms, or ranks' parts, that a thread has under way at once, and groups of each: as many as registers hold.
constexpr unsigned kTerms = sizeof(sum_t) == 8 ? 1 : 2, kParts = 8 / sizeof(Wire::stored_t);
constexpr unsigned kWeighed = 8 / sizeof(term_t), kAdded = sizeof(sum_t) == 8 ? 1 : 2;

// Elements of a row from `column` on, as many as there are; `kWhole`: groups lie at multiples of 16 bytes.
template <typename Kind, bool kWhole>
__device__ void load_group(Group<typename Kind::stored_t>& into, const typename Kind::stored_t* row,
                           unsigned column, unsigned hidden) {{
  if (column >= hidden) return;
  if (kWhole) {{
    into = *(const Group<typename Kind::stored_t>*)(row + column);
    return;
  }}
  for (unsigned i = 0; i < kPer && column + i < hidden; ++i) into.at[i] = row[column + i];
}}
template <typename Kind, bool kWhole>
__device__ void save_group(const sum_t* sums, typename Kind::stored_t* row, unsigned column,
                           unsigned hidden) {{
  if (column >= hidden) return;
  Group<typename Kind::stored_t> made;
#pragma unroll
  for (unsigned i = 0; i < kPer; ++i) made.at[i] = Kind::save(sums[i]);
  if (kWhole) {{
    *(Group<typename Kind::stored_t>*)(row + column) = made;
    return;
  }}
  for (unsigned i = 0; i < kPer && column + i < hidden; ++i) row[column + i] = made.at[i];
}}

// The terms of each row: those of `order` from `first` of it on.
struct Assigned {{
  size_type terms, order, first, weights;
}};

// Sums of a row's weighted terms. Loads go out before any of them is used.
template <unsigned kTerms, unsigned kGroups, bool kWhole>
__device__ void weigh(sum_t* sums, const Assigned& all, unsigned begin, unsigned end, unsigned column,
                      unsigned hidden) {{
  const unsigned* order = (const unsigned*)all.order;
  const float* weights = (const float*)all.weights;
  for (unsigned k = begin; k < end; k += kTerms) {{
    Group<term_t> part[kTerms][kGroups] = {{}};
    sum_t weight[kTerms] = {{}};
#pragma unroll
    for (unsigned t = 0; t < kTerms; ++t)
      if (k + t < end) {{
        const term_t* row = (const term_t*)all.terms + (size_type)order[k + t] * hidden;
        weight[t] = (sum_t)weights[k + t];
#pragma unroll
        for (unsigned g = 0; g < kGroups; ++g)
          load_group<Terms, kWhole>(part[t][g], row, column + g * 32 * kPer, hidden);
      }}
#pragma unroll
    for (unsigned t = 0; t < kTerms; ++t)
      if (k + t < end) {{
#pragma unroll
        for (unsigned g = 0; g < kGroups; ++g)
#pragma unroll
          for (unsigned i = 0; i < kPer; ++i) {{
            const sum_t term = times(Terms::load(part[t][g].at[i]), weight[t]);
            sum_t& sum = sums[g * kPer + i];
            sum = k + t == begin ? term : plus(sum, term);
          }}
      }}
  }}
}}

// Rows from `own_first` on, `own` of them, are left out: whoever adds up weighs them then.
struct Weigh {{
  Assigned from;
  size_type wire;
  unsigned own_first, own, count, hidden, whole, unused;
}};

template <bool kWhole>
__device__ void weigh_all(const Weigh& all) {{
  constexpr unsigned kGroups = kWhole ? kWeighed : 1, kStep = 32 * kPer * kGroups;
  const unsigned lane = threadIdx.x % 32;
  const unsigned stride = gridDim.x * (blockDim.x / 32), hidden = all.hidden;
  const unsigned per = (hidden + kStep - 1) / kStep, pieces = (all.count - all.own) * per;
  const unsigned begins = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (begins >= pieces) return;
  const unsigned* first = (const unsigned*)all.from.first;
  unsigned row = begins / per;
  if (row >= all.own_first) row += all.own;
  unsigned begin = first[row], end = first[row + 1];
  for (unsigned piece = begins; piece < pieces; piece += stride) {{
    unsigned after = row, next_begin = begin, next_end = end;
    if (piece + stride < pieces) {{  // is on its way meanwhile
      after = (piece + stride) / per;
      if (after >= all.own_first) after += all.own;
      next_begin = first[after], next_end = first[after + 1];
    }}
    const unsigned column = piece % per * kStep + lane * kPer;
    sum_t sums[kGroups * kPer] = {{}};
    weigh<kTerms, kGroups, kWhole>(sums, all.from, begin, end, column, hidden);
    for (unsigned g = 0; g < kGroups; ++g)
      save_group<Wire, kWhole>(sums + g * kPer, (Wire::stored_t*)all.wire + (size_type)row * hidden,
                               column + g * 32 * kPer, hidden);
    row = after, begin = next_begin, end = next_end;
  }}
}}

extern "C" __global__ void __launch_bounds__({threads}) weigh_rows(const Weigh all) {{
  if (all.whole)
    weigh_all<true>(all);
  else
    weigh_all<false>(all);
}}

// By rank where its rows begin, of which `table` has one or none (-1) for each token. Those of rank `own` are
// weighed here: they are the rows of `from` from `own_first` on.
struct Add {{
  size_type base[{ranks}], out, table;
  Assigned from;
  unsigned own_first, size, own, count, hidden, whole;
}};

template <bool kWhole>
__device__ void add_all(const Add& all) {{
  typedef Wire::stored_t wire_t;
  constexpr unsigned kAtOnce = kWhole ? kParts : 1, kGroups = kWhole ? kAdded : 1;
  constexpr unsigned kStep = 32 * kPer * kGroups;
  const unsigned lane = threadIdx.x % 32;
  const unsigned stride = gridDim.x * (blockDim.x / 32), hidden = all.hidden;
  const unsigned per = (hidden + kStep - 1) / kStep, pieces = all.count * per;
  const unsigned* first = (const unsigned*)all.from.first + all.own_first;
  for (unsigned piece = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; piece < pieces; piece += stride) {{
    const unsigned token = piece / per, column = piece % per * kStep + lane * kPer;
    const int* rows = (const int*)all.table + (size_type)token * all.size;
    const int mine = rows[all.own];
    sum_t sums[kGroups * kPer] = {{}}, own[kGroups * kPer] = {{}};
    for (unsigned start = 0; start < all.size; start += kAtOnce) {{
      int row[kAtOnce];
#pragma unroll
      for (unsigned p = 0; p < kAtOnce; ++p) row[p] = start + p < all.size ? rows[start + p] : -1;
      Group<wire_t> part[kAtOnce][kGroups] = {{}};
#pragma unroll
      for (unsigned p = 0; p < kAtOnce; ++p)
        if (row[p] >= 0 && start + p != all.own) {{
          const wire_t* from = (const wire_t*)all.base[start + p] + (size_type)row[p] * hidden;
#pragma unroll
          for (unsigned g = 0; g < kGroups; ++g)
            load_group<Wire, kWhole>(part[p][g], from, column + g * 32 * kPer, hidden);
        }}
      if (!start && mine >= 0)  // while they are on their way
        weigh<1, kGroups, kWhole>(own, all.from, first[mine], first[mine + 1], column, hidden);
#pragma unroll
      for (unsigned p = 0; p < kAtOnce; ++p)
        if (row[p] >= 0) {{
          const bool here = start + p == all.own;
#pragma unroll
          for (unsigned g = 0; g < kGroups; ++g)
#pragma unroll
            for (unsigned i = 0; i < kPer; ++i) {{
              sum_t& sum = sums[g * kPer + i];
              sum = plus(sum, here ? own[g * kPer + i] : Wire::load(part[p][g].at[i]));
            }}
        }}
    }}
    for (unsigned g = 0; g < kGroups; ++g)
      save_group<Out, kWhole>(sums + g * kPer, (Out::stored_t*)all.out + (size_type)token * hidden,
                              column + g * 32 * kPer, hidden);
  }}
}}

extern "C" __global__ void __launch_bounds__({threads}) add_rows(const Add all) {{
  if (all.whole)
    add_all<true>(all);
  else
    add_all<false>(all);
}}
"""


@functools.cache
def sums_source(terms: str, wire: str, out: str) -> str:
    """CUDA C++ of the sums of outputs of a dtype, whose partial sums travel in another; see `KINDS`."""
    total = "float64" if terms == "float64" else "float32"
    kinds = ""
    for name, dtype in (("Terms", terms), ("Wire", wire), ("Out", out)):
        stored, load, save = _STORED[dtype]
        kinds += _KIND.format(name=name, stored=stored, load=load, save=save)
    return _SUMS.format(
        terms=terms,
        wire=wire,
        out=out,
        sum=_STORED[total][0],
        bits=_BITS,
        kinds=kinds,
        threads=THREADS,
        ranks=MOST_RANKS,
    )
