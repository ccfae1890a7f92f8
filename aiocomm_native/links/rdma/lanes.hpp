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
// Bytes of a far buffer cross the processors' interconnect, which others need, too: a rail that is far takes a chunk
// only where it would be through with it this much sooner than the near ones.
constexpr double kFarCost = 1.5;

// The lane that would be through first with `nbytes` of memory on `node`; of equals the first. kNoLane: none takes it.
inline size_t choose_lane(const LaneLoad* lanes, size_t count, uint64_t nbytes, int node) {
  size_t best = kNoLane;
  double least = 0;
  for (size_t i = 0; i < count; ++i) {
    const LaneLoad& lane = lanes[i];
    if (!lane.takes) continue;
    bool far = node != kNoNode && lane.node != kNoNode && lane.node != node;
    double due = static_cast<double>(lane.bytes + nbytes) / lane.rate * (far ? kFarCost : 1.0);
    if (best == kNoLane || due < least) best = i, least = due;
  }
  return best;
}

}  // namespace aiocomm::rdma
