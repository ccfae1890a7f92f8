// What aiocomm's kernels for experts do, by the host: rows moved, outputs weighed, partial sums added.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sim.hpp"

namespace fake {

inline const std::string kExperts = "experts";  // stands for the dtype of such a kernel

// Words of eight bytes of a kernel's argument; 0: there is no such kernel.
size_t expert_argument_words(const std::string& name);

struct DeviceMemory {
  std::function<CUresult(uint64_t, size_t, std::vector<Piece>&)> pieces;
  std::function<bool()> stale;  // what was asked for last, or before, is no longer its owner's
};

CUresult run_experts(const Kernel& kernel, const DeviceMemory& memory);

}  // namespace fake
