// Chunks of device memory: which may be posted now, and what follows when they have moved.

#include <algorithm>
#include <cstring>
#include <deque>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kRated = 1 << 20;         // smaller copies tell the latency
constexpr uint64_t kBusy = 1 << 20;          // bytes with an engine that make what is urgent go another way
constexpr uint64_t kNeverPreempt = 1 << 30;  // ns
constexpr uint64_t kHoldNs = 3000000;        // what was seen of the load counts for so long
// Each copy costs the engine 2.6 us between: chunks of 16 MiB reach 0.93 of its rate, of 128 MiB 0.99.
constexpr uint64_t kWholeChunk = 1ull << 30, kRoundChunk = 128 << 20, kBusyChunk = 48 << 20,
                   kLeastChunk = 4 << 20, kChunkStep = 2 << 20;
constexpr uint64_t kOwnNs = 12000;  // of what an urgent message may take, what it needs itself
constexpr uint64_t kEarlyWake = 256 << 10;
constexpr uint64_t kDirectChunk = 16 << 20;  // between a device and host memory, where no other step follows
}  // namespace

DeviceQueue& DeviceProtocol::queue_of(int device, Lane lane) {
  size_t at = static_cast<size_t>(device) * static_cast<size_t>(Lane::count) + static_cast<size_t>(lane);
  if (queues_.size() <= at) queues_.resize(at + 1);
  if (!queues_[at]) {
    queues_[at] = std::make_unique<DeviceQueue>(device, lane, engine_.setting("min_share", 0.05), index_);
    for (uint8_t cls = 0; cls < Scheduler::kClasses; ++cls)
      queues_[at]->sched.declare(cls, engine_.channels_.opened(cls) > 0);
  }
  return *queues_[at];
}

void DeviceProtocol::queue_move(Op& op, Lane lane, uint64_t nbytes) {
  DeviceBuffer& gpu = *op.gpu;
  DeviceQueue& queue = queue_of(gpu.device, lane);
  Flow& flow = queue.flows.of(*op.scope, op.peer);
  flow.remote_device = gpu.theirs.device;
  gpu.lane = lane;
  gpu.in_sched = true;
  queue.sched.push(flow.id, op.id, nbytes, false);
  pump(queue);
}

// How much may be posted. What is urgent goes by the other end's engine while that has nothing to do, and if it is small
// round both; only else must our window be small. And channels share the engine only as far as their chunks wait here
// rather than there.
void DeviceProtocol::limit_window(DeviceQueue& queue) {
  uint64_t t = engine_.now();
  const bool urgent = queue.sched.has_urgent();
  queue.flows.each([&](const Flow& flow) {
    Peer* peer = engine_.find_peer(flow.rank);
    if (!peer || peer->state != Peer::State::up || queue.busy_until_ns > t + kHoldNs / 2) return;
    WakePage* page = peer->link->page();
    if (!page || flow.remote_device >= WakePage::kDevices ||
        page->load[flow.remote_device].load(std::memory_order_relaxed) > kBusy)
      queue.busy_until_ns = t + kHoldNs;
  });
  if (queue.sched.has_rivals()) queue.shared_until_ns = t + kHoldNs;
  const bool busy = queue.busy_until_ns > t, shared = queue.shared_until_ns > t;
  const bool large = large_urgent_until_ns_ > t;
  uint64_t chunk = urgent ? busy ? kBusyChunk : kRoundChunk : kWholeChunk;
  uint64_t preempt = kNeverPreempt;
  double rate = queue.sched.rate();
  if (shared || (urgent && busy && large)) {
    // Two chunks of half the window: in whole steps, so that the second always finds room beside the first.
    auto window =
        static_cast<uint64_t>(rate * static_cast<double>(preempt_ns_ - std::min(preempt_ns_ / 2, kOwnNs)));
    chunk = std::clamp(window / 2, kLeastChunk, kRoundChunk) & ~(kChunkStep - 1);
  }
  if (urgent && busy) preempt = static_cast<uint64_t>(2.04 * static_cast<double>(chunk) / rate);
  if (queue.chunk != chunk) {
    queue.chunk = chunk;
    queue.sched.set_limits(chunk, urgent && busy ? 4 * chunk : 2 * chunk);
  }
  if (queue.preempt_ns != preempt) {
    queue.preempt_ns = preempt;
    for (uint8_t cls = 0; cls < Scheduler::kClasses; ++cls) queue.sched.set_preempt(cls, preempt);
  }
}

void DeviceProtocol::pump(DeviceQueue& queue) {
  if (queue.lane == Lane::peer) limit_window(queue);
  while (!queue.overflow.empty() && mover_->post(queue.overflow.front())) queue.overflow.pop_front();
  while (queue.overflow.empty()) {
    auto chunk = queue.sched.next();
    if (!chunk) return;
    Op* op = engine_.find(chunk->item);
    if (!op || !op->gpu) {
      queue.sched.complete(chunk->nbytes, 0, chunk->cls);
      continue;
    }
    DeviceBuffer& gpu = *op->gpu;
    if (gpu.kernel) {
      post_copies(*op, *chunk);
      continue;
    }
    if (gpu.pinned_from) take_more(queue, *chunk);
    MoveJob job;
    job.op = op->id;
    job.offset = chunk->offset;
    job.nbytes = chunk->nbytes;
    job.device = static_cast<uint8_t>(queue.device);
    std::memcpy(&job.other, gpu.theirs.uuid.data(), sizeof job.other);
    job.lane = queue.lane;
    job.cls = chunk->cls;
    job.posted_ns = engine_.now();
    const uint64_t skip = op->rows ? 0 : chunk->offset;
    job.rows = op->rows.get();
    job.gather = gpu.gather.get();
    uint64_t ours = reinterpret_cast<uint64_t>(op->data) + skip;
    uint64_t other = (gpu.remote ? gpu.remote : reinterpret_cast<uint64_t>(gpu.bounce)) + skip;
    bool incoming = gpu.role == Role::pull || queue.lane == Lane::in;
    job.to = incoming ? ours : other;
    job.from = incoming ? other : ours;
    job.pinned_from = gpu.pinned_from;
    ++gpu.inflight;
    if (chunk->last) gpu.in_sched = false;
    job.local =
        queue.lane == Lane::peer && gpu.theirs.owner == gpu.place.owner && gpu.theirs.device == gpu.device;
    if (queue.lane == Lane::peer && !job.local)
      engine_.page_->load[queue.device].fetch_add(chunk->nbytes, std::memory_order_relaxed);
    // The copy of a small message takes about as long as a loop takes to wake up.
    job.early = gpu.role == Role::pull && op->nbytes <= kEarlyWake;
    if (!mover_->post(job)) queue.overflow.push_back(job);
  }
}

// Chunks of one op that would leave behind each other, as one: each costs its engine some microseconds.
void DeviceProtocol::take_more(DeviceQueue& queue, Scheduler::Chunk& chunk) {
  while (!chunk.last && chunk.nbytes < kDirectChunk) {
    const auto more = queue.sched.next();
    if (!more) return;
    if (more->item != chunk.item) return queue.sched.unget(*more);
    chunk.nbytes += more->nbytes;
    chunk.last = more->last;
  }
}

void DeviceProtocol::cancel_move(Op& op) {
  queue_of(op.gpu->device, op.gpu->lane).sched.cancel(op.id);
  op.gpu->in_sched = false;
}

void DeviceProtocol::landing(Op& op, uint64_t offset, uint64_t nbytes) {
  if (op.listed) return op.moved == op.nbytes ? unpack(op) : void();
  MoveJob job;
  job.op = op.id;
  job.offset = offset;
  job.nbytes = nbytes;
  job.device = static_cast<uint8_t>(op.gpu->device);
  job.lane = Lane::in;
  job.unscheduled = true;
  job.cls = op.scope->cls;
  job.posted_ns = engine_.now();
  job.to = reinterpret_cast<uint64_t>(op.data) + offset;
  job.from = (op.gpu->bounce ? reinterpret_cast<uint64_t>(op.gpu->bounce) : op.gpu->relay) + offset;
  post_or_keep(op, job);
}

// Part of a streamed chunk is in the bounce; the device takes whole chunks.
void DeviceProtocol::arriving(Op& op, const FrameHeader& header, uint64_t nbytes) {
  if (nbytes == header.payload_bytes) return landing(op, header.address, nbytes);
  auto& partial = op.gpu->partial;
  auto it = std::find_if(partial.begin(), partial.end(), [&](auto& p) { return p.first == header.address; });
  if (it == partial.end()) it = partial.insert(partial.end(), {header.address, 0});
  it->second += nbytes;
  if (it->second < header.payload_bytes) return;
  partial.erase(it);
  landing(op, header.address, header.payload_bytes);
}

void DeviceProtocol::moved(MoveJob* jobs, size_t count) {
  Engine::Token token(engine_);
  for (size_t i = 0; i < count; ++i) {
    MoveJob& job = jobs[i];
    DeviceQueue& queue = queue_of(job.device, job.lane);
    if (!job.unscheduled) {
      uint64_t began = std::max(job.posted_ns, queue.last_done_ns);
      uint64_t elapsed = 0;
      if (job.nbytes >= kRated && job.ended_ns >= began && !job.local) {
        queue.rate.add(job.nbytes, job.ended_ns - began);
        if (queue.rate.bytes() > DeviceQueue::kRateMemory / 4)
          elapsed = 1 + static_cast<uint64_t>(static_cast<double>(job.nbytes) * queue.rate.ns() /
                                              queue.rate.bytes());
      }
      queue.sched.complete(job.nbytes, elapsed, job.cls);
      if (!job.local) queue.last_done_ns = std::max(queue.last_done_ns, job.ended_ns);
    }
    if (job.lane == Lane::peer && !job.local)
      engine_.page_->load[job.device].fetch_sub(job.nbytes, std::memory_order_relaxed);
    Op* op = engine_.find(job.op);  // its chunk in flight has kept it from ending
    if (!op) continue;
    DeviceBuffer& gpu = *op->gpu;
    --gpu.inflight;
    Peer* peer = engine_.find_peer(op->peer);
    if (op->state == OpState::draining) {
      engine_.settle(*op);
    } else if (job.error) {
      fail(*op, job.error);
    } else if (gpu.kernel && !job.kernel) {
      part_moved(*op, job);
    } else if (job.kernel) {
      op->moved = op->nbytes;
      op->path = Path::device;
      end_parts(*op);
    } else if (gpu.role == Role::stage_in) {
      gpu.landed += job.nbytes;
      if (gpu.landed == op->nbytes) engine_.received(*op);
    } else if (gpu.packing) {
      gpu.landed += job.nbytes;
      if (gpu.landed == op->rows->nbytes()) packed(*op);
    } else if (gpu.role == Role::stage_out) {
      op->ready = job.offset + job.nbytes;  // one flow's chunks leave and end in order
      if (!gpu.can_pull) {
        engine_.schedulers_[op->link]->set_ready(engine_.flow_of(*op, *peer).id, true);
        engine_.pump(op->link);
      } else {
        FrameHeader h{};
        h.kind = FrameKind::staged;
        h.sop = op->id;
        h.rop = op->remote_op;
        h.address = reinterpret_cast<uint64_t>(gpu.bounce);
        h.nbytes = op->ready;
        engine_.send_control(*peer, h, Wake::engine);
      }
    } else {
      op->moved += job.nbytes;
      // Where one end is host memory both count what the pair's link would have carried.
      LinkCounters& counters = engine_.counters_[gpu.pinned_from ? op->link : index_];
      (gpu.role == Role::push ? counters.bytes_sent : counters.bytes_received) += job.nbytes;
      if (op->moved < op->nbytes) continue;
      if (gpu.role == Role::pull) {
        engine_.received(*op);
      } else {
        gpu.owes_moved = false;
        send_moved(*peer, op->remote_op, Code::ok, op->moved);
        engine_.finish(*op, Code::ok);
      }
    }
  }
  for (size_t i = 0; i < count; ++i) pump(queue_of(jobs[i].device, jobs[i].lane));
  // The room that these leave with their device may be what another lane of it waits for.
  for (auto& queue : queues_)
    if (queue && !queue->overflow.empty()) pump(*queue);
}

}  // namespace aiocomm
