#include "core/expert_tables.hpp"

#include <algorithm>

namespace aiocomm {

namespace {
size_t aligned(size_t nbytes) { return (nbytes + 15) & ~size_t{15}; }
}  // namespace

SumTables::SumTables(size_t assignments, size_t rows, size_t tokens, size_t ranks) {
  first = aligned(assignments * sizeof(uint32_t));
  weights = first + aligned((rows + 1) * sizeof(uint32_t));
  rows_of = weights + aligned(assignments * sizeof(float));
  nbytes = rows_of + aligned(tokens * ranks * sizeof(int32_t));
}

bool write_sum_tables(const SumTables& at, std::span<const int64_t> order, std::span<const int64_t> first,
                      std::span<const float> weights, std::span<const std::span<const int64_t>> sent,
                      size_t tokens, std::byte* into) {
  auto* places = reinterpret_cast<uint32_t*>(into + at.order);
  auto* weight = reinterpret_cast<float*>(into + at.weights);
  for (size_t k = 0; k < order.size(); ++k) {
    if (static_cast<uint64_t>(order[k]) >= weights.size()) return false;
    places[k] = static_cast<uint32_t>(order[k]);
    weight[k] = weights[static_cast<size_t>(order[k])];
  }
  auto* begins = reinterpret_cast<uint32_t*>(into + at.first);
  for (size_t row = 0; row < first.size(); ++row) begins[row] = static_cast<uint32_t>(first[row]);
  auto* rows = reinterpret_cast<int32_t*>(into + at.rows_of);
  std::fill_n(rows, tokens * sent.size(), -1);
  for (size_t rank = 0; rank < sent.size(); ++rank)
    for (size_t row = 0; row < sent[rank].size(); ++row) {
      const auto token = static_cast<uint64_t>(sent[rank][row]);
      if (token >= tokens) return false;
      rows[token * sent.size() + rank] = static_cast<int32_t>(row);
    }
  return true;
}

}  // namespace aiocomm
