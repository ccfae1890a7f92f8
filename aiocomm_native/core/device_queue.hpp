// What one engine of a device has to do: its scheduler, and the flows in it. Guarded by the engine's token.
#pragma once

#include <cstdint>
#include <deque>

#include "core/device.hpp"
#include "core/flows.hpp"
#include "core/rate.hpp"
#include "core/sched.hpp"

namespace aiocomm {

inline SchedConfig lane_config(Lane lane, double min_share) {
  SchedConfig config;
  config.min_share = min_share;
  config.min_chunk = 1 << 20;
  if (lane == Lane::peer) {
    // Every copy costs the engine some microseconds between: where nobody urgent waits, as few as can be.
    config.max_chunk = 1ull << 30;
    config.max_window = 2ull << 30;
    config.min_window = 8 << 20;
    config.initial_rate = 300;
  } else {
    config.max_chunk = 4 << 20;
    config.max_window = 64 << 20;
    config.min_window = 2 << 20;
    config.initial_rate = 40;
  }
  return config;
}

struct DeviceQueue {
  // `link`: whose statistics count what is served.
  DeviceQueue(int device_, Lane lane_, double min_share, size_t link)
      : device(device_), lane(lane_), sched(lane_config(lane_, min_share)), flows(sched, link) {}

  const int device;
  const Lane lane;
  Scheduler sched;
  Flows flows;
  uint64_t chunk = 0, preempt_ns = 0;  // limits as they are set now
  uint64_t busy_until_ns = 0;          // the other end's engine is taken to be at work
  uint64_t shared_until_ns = 0;        // several channels are taken to have a backlog
  uint64_t last_done_ns = 0;
  static constexpr double kRateMemory = 256 << 20;
  Rate rate{kRateMemory};
  std::deque<MoveJob> overflow;  // chosen, and not yet taken by the mover
};

}  // namespace aiocomm
