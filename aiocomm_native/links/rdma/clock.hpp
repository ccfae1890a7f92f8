// The time of signs of life, which are kept per frame and compared by the second.
#pragma once

#include "core/clock.hpp"

namespace aiocomm::rdma {

// That of the monotonic clock, as of the kernel's last tick: it costs a read of memory.
inline uint64_t tick_ns() { return now_ns(CLOCK_MONOTONIC_COARSE); }

}  // namespace aiocomm::rdma
