// How fast the lanes of a pair drain, and how much to hand to one of them at a time. Pure: no I/O, no clock.
//
// What a lane has been given is sent before anything that comes later, so it is to be no more than it drains within
// kChunkNs. An urgent message has a lane of its own; this is for those of equal rank.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/rate.hpp"

namespace aiocomm::tcp {

class Pace {
 public:
  static constexpr uint64_t kChunkNs = 4'000'000;
  static constexpr uint64_t kLeast = 64 << 10;
  static constexpr uint64_t kUnsentLeast = 128 << 10, kUnsentMost = 1 << 20;

  // Until it is known: a lane of 1 Gbit/s; within a host, where no link is slow and a frame more costs most, of 16.
  explicit Pace(bool within_host) : rate_{kMemory, kMemory, kMemory / (within_host ? 2.0 : 0.125)} {}

  // A busy lane took that long to send so many bytes.
  void drained(uint64_t nbytes, uint64_t ns) { rate_.add(nbytes, ns); }
  uint64_t chunk() const {
    const double most = 1 << 30;  // a frame's limit is no less
    return std::max(
        kLeast, static_cast<uint64_t>(std::min(rate_.bytes() / std::max(rate_.ns(), 1.0) * kChunkNs, most)));
  }
  // What the kernel may hold of a lane before it can send it, which is what it sleeps on: in coarse steps.
  uint64_t unsent() const { return std::clamp(std::bit_floor(chunk()), kUnsentLeast, kUnsentMost); }

 private:
  static constexpr double kMemory = 4 << 20;
  Rate rate_;
};

}  // namespace aiocomm::tcp
