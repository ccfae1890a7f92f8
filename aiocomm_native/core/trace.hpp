// Temporary: time stamps along the way of messages, kept by processes that are told to by AIOCOMM_TRACE.
#pragma once

#include <unistd.h>
#include <x86intrin.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/clock.hpp"

namespace aiocomm::trace {

struct Stamp {
  uint64_t at;
  uint32_t what, more;
};
constexpr uint32_t kStamps = 1u << 17;
inline Stamp stamps[kStamps];
inline std::atomic<uint32_t> next{0};
inline const bool on = std::getenv("AIOCOMM_TRACE") != nullptr;
inline const uint64_t tsc0 = __rdtsc(), ns0 = now_ns();

inline void mark(uint32_t what, uint64_t more = 0) {
  if (!on) return;
  const uint32_t at = next.fetch_add(1, std::memory_order_relaxed);
  stamps[at % kStamps] = {__rdtsc(), what, static_cast<uint32_t>(more)};
}

inline void dump() {
  if (!on) return;
  const uint64_t tsc1 = __rdtsc(), ns1 = now_ns();
  const double per = static_cast<double>(ns1 - ns0) / static_cast<double>(tsc1 - tsc0);
  const std::string path = std::string(std::getenv("AIOCOMM_TRACE")) + "." + std::to_string(getpid());
  FILE* file = std::fopen(path.c_str(), "w");
  if (!file) return;
  const uint32_t end = next.load(), begin = end > kStamps ? end - kStamps : 0;
  for (uint32_t i = begin; i < end; ++i) {
    const Stamp& one = stamps[i % kStamps];
    const double ns = static_cast<double>(ns0) + static_cast<double>(static_cast<int64_t>(one.at - tsc0)) * per;
    std::fprintf(file, "%.0f %u %u\n", ns, one.what, one.more);
  }
  std::fclose(file);
}

}  // namespace aiocomm::trace
