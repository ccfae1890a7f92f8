// Chunks of a pair: reads and writes by the devices, each over the lane that has least to do.

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "core/notes.hpp"
#include "core/offers.hpp"
#include "links/rdma/lanes.hpp"
#include "links/rdma/link.hpp"
#include "links/rdma/peer.hpp"

namespace aiocomm::rdma {

namespace {
constexpr uint32_t kLaunchBits = 12;
constexpr uint32_t kQuiet = 64;  // chunks for which nobody is woken; each uses up a receive of the peer's
constexpr uint32_t kRowRequests = 16;  // posted together
// In flight on a lane, before the last that are posted together: of what its queues have room for, half is for those of
// another lane that has failed.
constexpr uint32_t kLaneRequests = Rail::kBulkDepth / 2 - kRowRequests;
}  // namespace

Lane* RdmaPeer::best_lane(uint64_t nbytes, int node) {
  std::array<LaneLoad, kMaxRails> loads;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    const Lane& lane = *lanes_[i];
    loads[i] = {lane.state == Lane::State::up && lane.requests < kLaneRequests, lane.rail.port().node,
                lane.bytes, lane.rate};
  }
  size_t best = choose_lane(loads.data(), lanes_.size(), nbytes, node);
  return best == kNoLane ? nullptr : lanes_[best].get();
}

Lane* RdmaPeer::nearest_lane() {
  std::array<LaneLoad, kMaxRails> loads;
  for (size_t i = 0; i < lanes_.size(); ++i)
    loads[i] = {lanes_[i]->state == Lane::State::up, lanes_[i]->rail.port().node};
  const Registration* frames = link_.registrations().get(frames_registration_);
  size_t nearest = choose_lane(loads.data(), lanes_.size(), 0, frames->node);
  return nearest == kNoLane ? nullptr : lanes_[nearest].get();
}

Post RdmaPeer::post_remote(const RemoteChunk& what) {
  if (dead_) return Post::lost;
  Registration* local = link_.registrations().get(what.registration);
  Lane* lane = open_ ? best_lane(what.nbytes, local ? local->node : kNoNode) : nullptr;
  if (!lane) {
    remote_blocked_ = true;
    return Post::again;
  }
  auto keys = remote_keys_.find(what.remote.segment);
  if (what.nbytes && (keys == remote_keys_.end() || !local)) {
    lose("protocol violation: memory that was never announced");
    return Post::lost;
  }
  if (free_chunks_.empty()) {
    free_chunks_.push_back(static_cast<uint32_t>(chunks_.size()));
    chunks_.emplace_back();
  }
  uint32_t index = free_chunks_.back();
  free_chunks_.pop_back();
  Chunk& chunk = chunks_[index];
  chunk.of = what;
  chunk.local = what.nbytes ? local->local() : Keys{};  // no bytes, no keys: only the immediate goes
  chunk.remote = what.nbytes ? keys->second : Keys{};
  chunk.busy = true;
  chunk.refused = false;
  launch(index, *lane);
  return Post::pending;
}

void RdmaPeer::launch(uint32_t index, Lane& lane) {
  Chunk& chunk = chunks_[index];
  chunk.lane = lane.index;
  chunk.posted_ns = host_.now();
  chunk.parked = false;
  ++chunk.launches;
  chunk.handed = 0;
  chunk.posted.clear();
  if (chunk.of.rows)
    post_rows(index, lane);
  else
    hand_over(chunk, work_of(index, lane), lane);
}

// As many as there is room for, and at least some: with the end of those the next follow.
void RdmaPeer::post_rows(uint32_t index, Lane& lane) {
  Chunk& chunk = chunks_[index];
  const RemoteChunk& of = chunk.of;
  while (chunk.handed < of.nbytes &&
         (chunk.posted.empty() || lane.requests + kRowRequests <= kLaneRequests)) {
    Work work = work_of(index, lane);
    work.rows = requests_of(*of.rows, of.read, of.offset + chunk.handed, of.nbytes - chunk.handed, work.local,
                            work.remote, kRowRequests, lane.rail.most_pieces(of.read));
    work.nbytes = static_cast<uint32_t>(work.rows.nbytes);
    if (chunk.handed + work.nbytes < of.nbytes && of.has_immediate) work.opcode = IBV_WR_RDMA_WRITE;
    hand_over(chunk, std::move(work), lane);
  }
}

Work RdmaPeer::work_of(uint32_t index, Lane& lane) const {
  const Chunk& chunk = chunks_[index];
  Work work;
  work.lane = &lane;
  work.qp = lane.pairs.bulk(lane.rail.transport().level[chunk.of.cls]);
  work.posting = &lane.posting;
  work.cls = chunk.of.cls;
  work.opcode = chunk.of.read            ? IBV_WR_RDMA_READ
                : chunk.of.has_immediate ? IBV_WR_RDMA_WRITE_WITH_IMM
                                         : IBV_WR_RDMA_WRITE;
  work.local = reinterpret_cast<uint64_t>(chunk.of.local);
  work.remote = chunk.of.remote.address;
  work.lkey = chunk.local.of[lane.index];
  work.rkey = chunk.remote.of[lane.index];
  work.nbytes = static_cast<uint32_t>(chunk.of.nbytes);
  work.immediate = chunk.of.immediate;
  work.solicited = chunk.of.has_immediate && (is_note(work.immediate) || work.immediate & kLastChunk ||
                                              work.immediate % kQuiet == kQuiet - 1);
  work.chunk = index << kLaunchBits | (chunk.launches & ((1u << kLaunchBits) - 1));
  return work;
}

void RdmaPeer::hand_over(Chunk& chunk, Work&& work, Lane& lane) {
  const auto requests = static_cast<uint32_t>(std::max<size_t>(1, work.rows.requests.size()));
  chunk.posted.push_back({requests, work.nbytes});
  chunk.handed += work.nbytes;
  if (lane.outstanding.fetch_add(1, std::memory_order_relaxed) == 0)
    lane.last_sign_ns.store(host_.now(), std::memory_order_relaxed);
  lane.requests += requests;
  lane.bytes += work.nbytes;
  lane.rail.post_bulk(std::move(work));
}

void RdmaPeer::chunk(Lane& lane, uint32_t which, int error) {
  if (which == kProbe) return probed(lane, error);
  uint32_t index = which >> kLaunchBits;
  if (index >= chunks_.size()) return;
  Chunk& done = chunks_[index];
  if (!done.busy || done.parked || done.lane != lane.index ||
      ((which ^ done.launches) & ((1u << kLaunchBits) - 1)))
    return;  // of an earlier launch
  if (error) {
    // The peer's device refused the access: it would do so on any lane. That breaks the queue pair, at both ends.
    done.refused = error == EACCES;
    return lane_failed(
        lane,
        lane.rail.name() + (done.refused ? ": the peer refuses access to its memory" : ": a transfer failed"),
        done.refused || error == ECONNRESET ? Loss::pairs : Loss::path);
  }
  lane.requests -= done.posted.front().requests;
  lane.bytes -= done.posted.front().nbytes;
  done.posted.pop_front();
  if (done.of.rows) post_rows(index, lane);
  if (!done.posted.empty()) return;
  uint64_t now = host_.now();
  uint64_t elapsed = now - std::max(done.posted_ns, link_.last_done_ns);
  link_.last_done_ns = now;
  if (done.of.nbytes >= 64 << 10) {
    uint64_t began = std::max(done.posted_ns, lane.last_done_ns);
    double rate =
        static_cast<double>(done.of.nbytes) / static_cast<double>(std::max<uint64_t>(now - began, 1));
    lane.rate += 0.25 * (rate - lane.rate);
  }
  lane.last_done_ns = now;
  finish(index, 0, elapsed);
}

void RdmaPeer::finish(uint32_t index, int error, uint64_t elapsed_ns) {
  RemoteChunk of = chunks_[index].of;
  chunks_[index].busy = false;
  free_chunks_.push_back(index);
  host_.sink().on_remote(*this, of.op, of.nbytes, error, elapsed_ns);
}

}  // namespace aiocomm::rdma
