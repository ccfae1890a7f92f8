// How long a thread of ours may keep a core from a thread that was woken.
#pragma once

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace aiocomm {

// Threads that move bulk run for as long as there is some. Where they are as many as the cores, an event loop that is woken
// would wait for the end of their slice: some 3 ms. Linux 6.12 and later take a slice per thread; others ignore it. The
// share of the cores that a thread gets stays the same.
inline void take_short_slices(int policy = SCHED_OTHER) {
  struct {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  static_assert(sizeof attributes == 48);
  if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;  // keeps its niceness
  attributes.size = sizeof attributes;
  attributes.policy = static_cast<uint32_t>(policy);
  attributes.runtime = 200'000;  // ns
  ::syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace aiocomm
