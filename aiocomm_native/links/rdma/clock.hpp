// The time of signs of life, which are kept per frame and compared by the second.
#pragma once

#include <cstdint>
#include <ctime>

namespace aiocomm::rdma {

// That of the monotonic clock, as of the kernel's last tick: it costs a read of memory.
inline uint64_t tick_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

}  // namespace aiocomm::rdma
