// Which rail of a pair takes the next chunk. Pure.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aiocomm::rdma {

constexpr int kNoNode = -1;  // of NUMA: the machine has only one, or does not tell

struct LaneLoad {
  bool takes = false;  // it is up and has room
  int node = kNoNode;  // where its device is
  uint64_t bytes = 0;  // posted to it and not through
  double rate = 1.0;   // bytes per ns, of late
};

constexpr size_t kNoLane = ~size_t{0};
// Bytes of a far buffer cross the processors' interconnect, which others need, too. So a rail that is far takes a chunk
// only where every near one is saturated, that is where it has more than it drains in this time, and where the far one
// would be through with it this much sooner.
constexpr double kDrainNs = 100'000;
constexpr double kFarCost = 1.5;

// The lane for `nbytes` of memory on `node`: of those near to it the one that is through first, until they are saturated;
// of equals the first. kNoLane: none takes it.
inline size_t choose_lane(const LaneLoad* lanes, size_t count, uint64_t nbytes, int node) {
  size_t best = kNoLane, near = kNoLane;
  double least = 0, near_least = 0;
  for (size_t i = 0; i < count; ++i) {
    const LaneLoad& lane = lanes[i];
    if (!lane.takes) continue;
    bool far = node != kNoNode && lane.node != kNoNode && lane.node != node;
    double due = static_cast<double>(lane.bytes + nbytes) / lane.rate * (far ? kFarCost : 1.0);
    if (best == kNoLane || due < least) best = i, least = due;
    double drains = static_cast<double>(lane.bytes) / lane.rate;
    if (!far && drains <= kDrainNs && (near == kNoLane || due < near_least)) near = i, near_least = due;
  }
  return near == kNoLane ? best : near;
}

}  // namespace aiocomm::rdma
