// Whether spinning pays, pure: the time is an argument.
//
// A spin that finds its answer saves a wake-up; one that does not has cost a core for nothing, and where processes
// outnumber the cores it keeps the very peer from running that it waits for. So after some fruitless spins in a row,
// or once the core was taken away in the middle of one, spins are left out for a while, which grows up to kLongest and
// ends with the first success.
#pragma once

#include <algorithm>
#include <cstdint>

namespace aiocomm {

class Patience {
 public:
  bool may_spin(uint64_t now_ns) const { return now_ns >= resume_ns_; }

  void spun(bool found, bool core_taken, uint64_t now_ns) {
    if (found && !core_taken) {
      fruitless_ = 0;
      pause_ns_ = kShortest;
      return;
    }
    if (!core_taken && ++fruitless_ < kTolerated) return;
    resume_ns_ = now_ns + pause_ns_;
    pause_ns_ = std::min(2 * pause_ns_, kLongest);
  }

 private:
  static constexpr uint64_t kShortest = 200000, kLongest = 3200000;
  static constexpr uint32_t kTolerated = 3;
  uint64_t resume_ns_ = 0, pause_ns_ = kShortest;
  uint32_t fruitless_ = 0;
};

}  // namespace aiocomm
