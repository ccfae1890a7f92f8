// Which of two ways a call that repeats should go, by how long it took on each: pure.
//
// Way 1 is likely the better one and goes first; the other is tried after some calls, and the worse one now and then. What
// counts is the shortest of late: times in which a processor was taken away say nothing of a way.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace aiocomm {

class WayChoice {
 public:
  size_t next() {
    if (seen_[1] < kFirst) return 1;
    if (seen_[0] < kTries) return 0;
    const size_t better = shortest_[1] <= shortest_[0];
    return ++calls_ % kAgain < kTries ? 1 - better : better;
  }

  void took(size_t way, uint64_t ns) {
    const uint64_t before = seen_[way] ? shortest_[way] + shortest_[way] / kForgets : ns;
    shortest_[way] = std::min(ns, before);
    ++seen_[way];
  }

 private:
  static constexpr uint64_t kFirst = 8, kTries = 2, kAgain = 256, kForgets = 16;
  std::array<uint64_t, 2> shortest_{}, seen_{};
  uint64_t calls_ = kTries;  // it has been tried just now
};

}  // namespace aiocomm
