// Whether spinning pays, and for how long, pure: the time is an argument.
//
// A spin that finds its answer saves a wake-up; one that does not has cost a core for nothing, and where processes
// outnumber the cores it keeps the very peer from running that it waits for. So after some fruitless spins in a row,
// or once the core was taken away in the middle of one, spins are left out for a while, which grows up to kLongest and
// ends with the first success.
//
// Two peers that both give up just before the other's answer would wake each other through the kernel for ever, though
// either could have had it by waiting a little more. So where the sleep after a fruitless spin was short, the next
// spins are longer, by up to kStretches doublings.
#pragma once

#include <algorithm>
#include <cstdint>

namespace aiocomm {

// What a loop waits for beside its engines: a descriptor that is readable when any of that is.
struct Others {
  int fd = -1;
  uint64_t looked_ns = 0;
  bool rehearses = false;  // a spin has ended for an idle turn of the loop: DeviceProtocol::take_rehearsal

  static constexpr uint64_t kLookNs = 20000;  // between looks, in spins
  bool looked(uint64_t now_ns) const { return now_ns < looked_ns + kLookNs; }
};

class Patience {
 public:
  bool may_spin(uint64_t now_ns) const { return now_ns >= resume_ns_; }
  // How long to spin where `asked_ns` is what the user allows.
  uint64_t stretched(uint64_t asked_ns) const { return asked_ns << stretches_; }

  // A spin of `stretched(asked_ns)` that began then has ended.
  void spun(bool found, bool core_taken, uint64_t began_ns, uint64_t now_ns, uint64_t asked_ns) {
    if (found && !core_taken) {
      fruitless_ = 0;
      pause_ns_ = kShortest;
      vain_ns_ = 0;
      if (now_ns - began_ns <= asked_ns) stretches_ = 0;
      return;
    }
    if (!vain_ns_) vain_ns_ = began_ns, asked_ns_ = asked_ns;
    if (!core_taken && ++fruitless_ < kTolerated) return;
    resume_ns_ = now_ns + pause_ns_;
    pause_ns_ = std::min(2 * pause_ns_, kLongest);
    vain_ns_ = 0;
    stretches_ = 0;
  }

  // The loop has slept after its spins, if any, and runs again.
  void woke(uint64_t now_ns) {
    if (!vain_ns_) return;
    const bool soon = now_ns - vain_ns_ <= asked_ns_ << kStretches;
    vain_ns_ = 0;
    if (!soon) {
      stretches_ = 0;
    } else if (stretches_ < kStretches) {
      ++stretches_;
    }
  }

 private:
  static constexpr uint64_t kShortest = 200000, kLongest = 3200000;
  static constexpr uint32_t kTolerated = 4, kStretches = 3;
  uint64_t resume_ns_ = 0, pause_ns_ = kShortest;
  uint64_t vain_ns_ = 0, asked_ns_ = 0;  // when fruitless spins began, of which the loop has not slept since
  uint32_t fruitless_ = 0, stretches_ = 0;
};

}  // namespace aiocomm
