// Which of two ways a call that repeats should go, by how long it took on each: pure.
//
// Both are tried in turn at first, and the other one now and then afterwards. What counts is the shortest of late: times
// in which a processor was taken away say nothing of a way.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace aiocomm {

class WayChoice {
 public:
  // The way of the next call, 0 or 1.
  size_t next() {
    ++calls_;
    if (seen_[0] < kTries || seen_[1] < kTries) return seen_[1] < seen_[0];
    const size_t better = shortest_[1] < shortest_[0];
    return calls_ % kAgain < kTriesAgain ? 1 - better : better;
  }

  void took(size_t way, uint64_t ns) {
    const uint64_t before = seen_[way] ? shortest_[way] + shortest_[way] / kForgets : ns;
    shortest_[way] = std::min(ns, before);
    seen_[way] = std::min(seen_[way] + 1, kTries);
  }

 private:
  static constexpr uint32_t kTries = 4, kAgain = 256, kTriesAgain = 3;
  static constexpr uint64_t kForgets = 16;
  std::array<uint64_t, 2> shortest_{};
  std::array<uint32_t, 2> seen_{};
  uint32_t calls_ = kTriesAgain;  // not to begin with a try
};

}  // namespace aiocomm
