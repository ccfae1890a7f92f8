// What the kernels of aiocomm/moe/sources.py read beside rows: tables, written straight into memory that is pinned for
// them. Pure: arrays in, arrays out, in linear time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace aiocomm {

// As `Entry` there: a row that is brought to a place.
struct MoveEntry {
  uint32_t source, index, place, unused;
};

// Writes entries for these rows of a rank, whose places follow each other; returns the greatest index + 1.
template <class Index>
uint64_t list_moves(uint32_t source, std::span<const Index> indices, uint32_t place, MoveEntry* into) {
  uint64_t extent = 0;
  for (const Index index : indices) {
    const auto at = static_cast<uint64_t>(index);
    if (at >= extent) extent = at + 1;
    *into++ = {source, static_cast<uint32_t>(at), place++, 0};
  }
  return extent;
}

// What sums read, each part from a multiple of 16 bytes on.
struct SumTables {
  SumTables(size_t assignments, size_t rows, size_t tokens, size_t ranks);
  // Of `order`, `first` and `weights` (all as in `Arrangement`, but by assignment), of each token's rows, and of all.
  size_t order = 0, first = 0, weights = 0, rows_of = 0, nbytes = 0;
};

// `sent` are the tokens that went to each rank; `into` has `nbytes`. False: a token or an assignment is not there.
bool write_sum_tables(const SumTables& at, std::span<const int64_t> order, std::span<const int64_t> first,
                      std::span<const float> weights, std::span<const std::span<const int64_t>> sent,
                      size_t tokens, std::byte* into);

}  // namespace aiocomm
