// All-reduce by one kernel per rank: it reads its block of every rank's array, and writes the result to all of them.
//
// Rules
//   - With its header a rank offers its arrays, once the work on their streams is done. Only where all have offered, and
//     have said that they know so and stay, does anyone launch: whoever does not offer has the call made by messages on
//     all ranks.
//   - A block is read and written by the kernel of its own rank alone, so kernels do not wait for each other, and input
//     and output may be one array.
//   - Having said that it stays, a rank does so until all the others have said that their kernels are over, or that they
//     give the call up (aiocomm/collectives/two_shot.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bindings/schedule.hpp"
#include "core/engine.hpp"

namespace aiocomm::py {

// What is launched; no function: nothing.
struct Combining {
  uint64_t function = 0;
  int device = 0;
  uint32_t most_blocks = 1, threads = 1;
  uint32_t item = 1;
  uint32_t divide_by = 0;  // 0: by nothing
  explicit operator bool() const { return function != 0; }
};

constexpr size_t kMostTogether = 16;  // ranks: aiocomm/collectives/headers.py, DIRECT_MEMBERS

// Behind a header.
struct Offer {
  uint64_t mark = 0;
  DevicePlace in, out;
};

// False: the peer cannot reach them. `in` may be `out`.
bool write_offer(Engine& engine, Rank peer, const Lent& in, const Lent& out, std::byte* into);
bool has_offer(const std::byte* from);

// What is launched here; null: no part of the arrays is this rank's. `in` is an address. The
// offer of rank r of the group lies r strides on.
std::unique_ptr<DeviceBuffer> combination(Engine& engine, const Combining& how, const std::vector<int>& ranks,
                                          size_t rank, uint64_t in, const DeviceBuffer& out, uint64_t nbytes,
                                          const std::byte* offers, size_t stride);

}  // namespace aiocomm::py
