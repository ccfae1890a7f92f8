// What the driver has refused may be had later: a device or a host whose memory was full has some again. So it is tried
// again after a while, which doubles with each refusal in a row: what it costs stays small where nothing ever changes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/clock.hpp"

namespace aiocomm::cuda {

class Refusal {
 public:
  bool holds() const { return until_ns_ && now_ns() < until_ns_; }
  void refused() {
    pause_ns_ = pause_ns_ ? std::min(2 * pause_ns_, kLongestNs) : kShortestNs;
    until_ns_ = now_ns() + pause_ns_;
  }
  void granted() { *this = {}; }

 private:
  static constexpr uint64_t kShortestNs = 100'000'000, kLongestNs = 30'000'000'000;
  uint64_t until_ns_ = 0, pause_ns_ = 0;
};

}  // namespace aiocomm::cuda
