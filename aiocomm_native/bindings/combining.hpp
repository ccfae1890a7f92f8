// All-reduce by one kernel per rank: it reads its block of every rank's array, and writes the result to all of them. A block
// is read and written by the kernel of its own rank alone, so kernels do not wait for each other, and input and output may
// be one array. Who may launch, and when the arrays are one's own again: device_call_py.hpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.hpp"
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

// What is launched here; null: no part of the arrays is this rank's. `in` is an address; `places` are those of all ranks of
// the group, who may have one array for both.
std::unique_ptr<DeviceBuffer> combination(Engine& engine, const Combining& how, const std::vector<int>& ranks,
                                          size_t rank, uint64_t in, const DeviceBuffer& out, uint64_t nbytes,
                                          const std::vector<Arena::Places>& places);

}  // namespace aiocomm::py
