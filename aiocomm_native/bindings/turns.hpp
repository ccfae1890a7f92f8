// When calls that never wait let other tasks run.
#pragma once

#include <atomic>
#include <cstdint>

namespace aiocomm::py {

// Of one engine's calls, of all kinds: what they share is the loop. Any thread.
class Turns {
 public:
  static constexpr uint64_t kNs = 1000000;  // between two, at least

  // Whether other tasks are to have a turn, now that a call has ended; they have it then.
  bool due(uint64_t now_ns, uint64_t after_ns = kNs) {
    if (now_ns - last_ns_.load(std::memory_order_relaxed) < after_ns) return false;
    had(now_ns);
    return true;
  }
  void had(uint64_t now_ns) { last_ns_.store(now_ns, std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> last_ns_{0};
};

}  // namespace aiocomm::py
