// The monotonic clock, in nanoseconds.
#pragma once

#include <cstdint>
#include <ctime>

namespace aiocomm {

inline uint64_t now_ns(clockid_t clock = CLOCK_MONOTONIC) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

}  // namespace aiocomm
