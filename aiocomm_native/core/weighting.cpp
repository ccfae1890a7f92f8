#include "core/weighting.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>
#include <vector>

namespace aiocomm {

namespace {

constexpr size_t kTile = 1024;  // columns whose sums stay in the first-level cache

// The conversions have no branches, so that loops of them become vector instructions on any machine.
float from_half(uint16_t half) {
  const int32_t sign = (half & 0x8000) << 16;
  const int32_t rest = (half & 0x7fff) << 13;
  const int32_t special = rest >= 0x0f800000 ? 0x7f800000 : 0;  // infinite, or not a number
  const float scaled = std::bit_cast<float>(rest) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<int32_t>(scaled) | special | sign);
}

uint16_t to_half(float value) {  // to nearest, ties to even
  const int32_t bits = std::bit_cast<int32_t>(value);
  const int32_t rest = bits & 0x7fffffff;
  const int32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  const int32_t tiny = std::bit_cast<int32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000;
  const int32_t normal = (rest - 0x37fff001 + ((rest >> 13) & 1)) >> 13;
  const int32_t found = rest >= 0x47800000 ? large : rest < 0x38800000 ? tiny : normal;
  return static_cast<uint16_t>(found | (bits >> 16 & 0x8000));
}

float from_bfloat(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

uint16_t to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16 & 0x8000u) | 0x7fc0u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

float narrowed(float value) { return value; }

// The nearest float may be half way between two shorter ones where the value is not: then the second rounding would go
// wrong. So where it is not exact, it is the odd one of the two around the value.
float narrowed(double value) {
  const auto nearest = static_cast<float>(value);
  const auto back = static_cast<double>(nearest);
  const int32_t away = value > 0 ? back > value : back < value;
  return std::bit_cast<float>((std::bit_cast<int32_t>(nearest) - away) | (back != value));
}

template <FloatKind K>
using Stored =
    std::conditional_t<K == FloatKind::f64, double, std::conditional_t<K == FloatKind::f32, float, uint16_t>>;

template <FloatKind K, class Sum>
Sum load(Stored<K> value) {
  if constexpr (K == FloatKind::f16) return static_cast<Sum>(from_half(value));
  if constexpr (K == FloatKind::bf16) return static_cast<Sum>(from_bfloat(value));
  if constexpr (K == FloatKind::f32 || K == FloatKind::f64) return static_cast<Sum>(value);
}

template <FloatKind K, class Sum>
Stored<K> store(Sum value) {
  if constexpr (K == FloatKind::f16) return to_half(narrowed(value));
  if constexpr (K == FloatKind::bf16) return to_bfloat(narrowed(value));
  if constexpr (K == FloatKind::f32 || K == FloatKind::f64) return static_cast<Stored<K>>(value);
}

template <class Function>
void with_kind(FloatKind kind, Function function) {
  switch (kind) {
    case FloatKind::f16:
      return function(std::integral_constant<FloatKind, FloatKind::f16>{});
    case FloatKind::bf16:
      return function(std::integral_constant<FloatKind, FloatKind::bf16>{});
    case FloatKind::f32:
      return function(std::integral_constant<FloatKind, FloatKind::f32>{});
    case FloatKind::f64:
      return function(std::integral_constant<FloatKind, FloatKind::f64>{});
  }
}

template <FloatKind K>
const Stored<K>* row_of(const std::byte* data, int64_t row, size_t hidden, size_t column) {
  return reinterpret_cast<const Stored<K>*>(data) + static_cast<size_t>(row) * hidden + column;
}

template <FloatKind K>
Stored<K>* row_of(std::byte* data, int64_t row, size_t hidden, size_t column) {
  return reinterpret_cast<Stored<K>*>(data) + static_cast<size_t>(row) * hidden + column;
}

template <class Sum>
using Tile = std::array<Sum, kTile>;

template <class Sum>
void put(const Tile<Sum>& tile, size_t width, SumRows out, int64_t row, size_t hidden, size_t column) {
  with_kind(out.kind, [&](auto kind) {
    auto* to = row_of<kind.value>(out.data, row, hidden, column);
    for (size_t i = 0; i < width; ++i) to[i] = store<kind.value, Sum>(tile[i]);
  });
}

template <class Sum>
void weigh(ConstRows terms, size_t hidden, const int64_t* order, const int64_t* first, const float* weights,
           int64_t begin, int64_t end, SumRows sums) {
  Tile<Sum> tile;
  for (int64_t row = begin; row < end; ++row) {
    for (size_t column = 0; column < hidden; column += kTile) {
      const size_t width = std::min(kTile, hidden - column);
      for (int64_t k = first[row]; k < first[row + 1]; ++k) {
        const int64_t at = order[k];
        const Sum weight = weights[at];
        with_kind(terms.kind, [&](auto kind) {
          const auto* from = row_of<kind.value>(terms.data, at, hidden, column);
          if (k == first[row]) {
            for (size_t i = 0; i < width; ++i) tile[i] = load<kind.value, Sum>(from[i]) * weight;
          } else {
            for (size_t i = 0; i < width; ++i) tile[i] += load<kind.value, Sum>(from[i]) * weight;
          }
        });
      }
      put(tile, width, sums, row - begin, hidden, column);
    }
  }
}

template <class Sum>
void add(std::span<const PartialSums> parts, int64_t tokens, size_t hidden, SumRows out) {
  Tile<Sum> tile;
  std::vector<size_t> next(parts.size(), 0);  // of each part, the first row that has not been added
  for (int64_t token = 0; token < tokens; ++token) {
    for (size_t column = 0; column < hidden; column += kTile) {
      const size_t width = std::min(kTile, hidden - column);
      std::fill_n(tile.begin(), width, Sum{0});
      for (size_t p = 0; p < parts.size(); ++p) {
        const PartialSums& part = parts[p];
        if (next[p] == part.tokens.size() || part.tokens[next[p]] != token) continue;
        with_kind(part.rows.kind, [&](auto kind) {
          const auto* from =
              row_of<kind.value>(part.rows.data, static_cast<int64_t>(next[p]), hidden, column);
          for (size_t i = 0; i < width; ++i) tile[i] += load<kind.value, Sum>(from[i]);
        });
      }
      put(tile, width, out, token, hidden, column);
    }
    for (size_t p = 0; p < parts.size(); ++p)
      if (next[p] < parts[p].tokens.size() && parts[p].tokens[next[p]] == token) ++next[p];
  }
}

}  // namespace

size_t float_bytes(FloatKind kind) {
  size_t nbytes = 0;
  with_kind(kind, [&](auto k) { nbytes = sizeof(Stored<k.value>); });
  return nbytes;
}

void weigh_rows(ConstRows terms, size_t hidden, const int64_t* order, const int64_t* first,
                const float* weights, int64_t begin, int64_t end, SumRows sums) {
  if (terms.kind == FloatKind::f64) {
    weigh<double>(terms, hidden, order, first, weights, begin, end, sums);
  } else {
    weigh<float>(terms, hidden, order, first, weights, begin, end, sums);
  }
}

void add_rows(std::span<const PartialSums> parts, int64_t tokens, size_t hidden, bool wide, SumRows out) {
  if (wide) {
    add<double>(parts, tokens, hidden, out);
  } else {
    add<float>(parts, tokens, hidden, out);
  }
}

}  // namespace aiocomm
