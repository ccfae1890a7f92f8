// Who gets which tokens of a mixture of experts, and in what order what came is kept; see aiocomm/moe/routing.py. Pure:
// arrays in, arrays out, in linear time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace aiocomm {

// What is routed, rank by rank; the arrays have room for one entry per choice.
struct Routed {
  int64_t* tokens;   // of each row, ascending for each rank
  uint16_t* counts;  // of each row: its assignments
  int32_t* experts;  // of each assignment, in the order of the token's choices
  float* weights;
};

// Fills `routed`, and `rows` and `assignments`: where each rank's part begins, and how many there are. `owner` is the
// rank of each expert; an id of -1 names none. False: an id or an owner is out of range.
bool route_tokens(const int64_t* ids, const float* weights, size_t tokens, size_t choices,
                  std::span<const int64_t> owner, size_t ranks, const Routed& routed,
                  std::vector<int64_t>& rows, std::vector<int64_t>& assignments);

struct CamePart {
  std::span<const uint16_t> counts;
  std::span<const int32_t> experts;
  const float* weights;
};

// As `Arrangement` in Python: `starts` has one more entry than there are parts, `offsets` than there are experts here,
// `first` than there are rows; the others one per assignment.
struct Arranged {
  int64_t *starts, *rows, *offsets;
  float* weights;
  int64_t *order, *first;
};

// `local` is the number of each expert among the `held` ones that are here; of others it is below 0. False: a part's
// counts do not sum to its assignments, or have a 0, or an expert is not here.
bool arrange_parts(std::span<const CamePart> parts, std::span<const int64_t> local, size_t held,
                   const Arranged& arranged);

}  // namespace aiocomm
