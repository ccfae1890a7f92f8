// Weighted sums of rows, for the combine of a mixture of experts. Pure: memory in, memory out.
//
// The order of every sum is given by the arguments, and no multiplication is fused with an addition, so results
// are those of the plain loop, bit by bit, on every machine. Sums are in float, or in double where the rows are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace aiocomm {

enum class FloatKind : uint8_t { f16, bf16, f32, f64 };

size_t float_bytes(FloatKind kind);

// A matrix of `hidden` columns, rows close together.
struct ConstRows {
  const std::byte* data;
  FloatKind kind;
};
struct SumRows {
  std::byte* data;
  FloatKind kind;
};

// sums[r - begin] = weights[a0] * terms[a0] + weights[a1] * terms[a1] + ..., for the rows r from `begin` to `end`,
// where a0, a1, ... are order[first[r]] to order[first[r + 1] - 1].
void weigh_rows(ConstRows terms, size_t hidden, const int64_t* order, const int64_t* first,
                const float* weights, int64_t begin, int64_t end, SumRows sums);

struct PartialSums {
  std::span<const int64_t> tokens;  // ascending
  ConstRows rows;                   // one for each of them
};

// out[t] = the sum of the rows of `parts` for token t, in the order of the parts; zeros where there is none.
void add_rows(std::span<const PartialSums> parts, int64_t tokens, size_t hidden, bool wide, SumRows out);

}  // namespace aiocomm
