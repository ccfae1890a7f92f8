// How fast something moves, of what was seen last. Pure: no clock.
#pragma once

#include <cstdint>

namespace aiocomm {

// Sums that decay, as `memory` more bytes come: one odd piece must not move the rate much.
class Rate {
 public:
  explicit Rate(double memory, double bytes = 0, double ns = 0) : memory_(memory), bytes_(bytes), ns_(ns) {}
  void add(uint64_t nbytes, uint64_t ns) {
    const double sample = static_cast<double>(nbytes);
    const double keep = memory_ / (memory_ + sample);
    bytes_ = bytes_ * keep + sample;
    ns_ = ns_ * keep + static_cast<double>(ns);
  }
  double bytes() const { return bytes_; }
  double ns() const { return ns_; }

 private:
  double memory_, bytes_, ns_;
};

}  // namespace aiocomm
