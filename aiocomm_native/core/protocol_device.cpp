// Messages whose bytes lie in device memory; core/device.hpp tells how they move.
//
// A receive's way:  deliver_device -> continue_receive (again after every wait) -> pull | pushed | stage_in
// A send's way:     send_device -> cts -> continue_send (again after every wait) -> push | stage_out

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <utility>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kPushFrom = 1 << 20;      // larger: bulk, which leaves the other end's engine free
constexpr uint64_t kBusy = 1 << 20;          // bytes with an engine that make what is urgent go another way
constexpr uint64_t kNeverPreempt = 1 << 30;  // ns
constexpr uint64_t kHoldNs = 3000000;        // what was seen of the load counts for so long
// Each copy costs the engine 2.6 us between: chunks of 16 MiB reach 0.93 of its rate, of 128 MiB 0.99.
constexpr uint64_t kWholeChunk = 1ull << 30, kRoundChunk = 128 << 20, kLeastChunk = 4 << 20,
                   kChunkStep = 2 << 20;
constexpr double kRateMemory = 256 << 20;
constexpr uint64_t kOwnNs = 12000;  // of what an urgent message may take, what it needs itself
constexpr uint64_t kEarlyWake = 256 << 10;
constexpr uint8_t kBulkClass = 1;  // and below: its messages never decide by load

}  // namespace

DeviceQueue& Engine::device_queue(int device, Lane lane) {
  size_t at = static_cast<size_t>(device) * static_cast<size_t>(Lane::count) + static_cast<size_t>(lane);
  if (device_queues_.size() <= at) device_queues_.resize(at + 1);
  if (!device_queues_[at])
    device_queues_[at] = std::make_unique<DeviceQueue>(device, lane, setting("min_share", 0.05));
  return *device_queues_[at];
}

// ---------------------------------------------------------------- announcing and answering

Post Engine::send_device(Op& op, Peer& peer) {
  if (peer.link->takes_offers()) {  // its device reads registered host memory only
    fail_device(op, EOPNOTSUPP);
    return Post::ok;
  }
  const ChannelInfo& channel = channels_[op.channel];
  DeviceBuffer& gpu = *op.gpu;
  mover_->offer(gpu, *peer.link);
  gpu.place.load = mover_->load(gpu.device);
  std::array<std::byte, sizeof(Op::meta) + sizeof(DevicePlace)> meta;
  std::memcpy(meta.data(), op.meta.data(), op.meta_bytes);
  std::memcpy(meta.data() + op.meta_bytes, &gpu.place, sizeof gpu.place);
  FrameHeader h{};
  h.kind = FrameKind::rts;
  h.flags = kDevice | (gpu.gate.open() ? 0 : kNotYet);
  h.channel = channel.id;
  h.tag = op.tag;
  h.nbytes = op.nbytes;
  h.meta_bytes = static_cast<uint16_t>(op.meta_bytes + sizeof gpu.place);
  h.cls = channel.cls;
  h.sop = op.id;
  if (peer.offers) h.rop = peer.offers->held.place(key_of(op)).packed();
  Post posted = peer.link->post(h, meta.data(), nullptr, Wake::engine);
  if (posted != Post::ok) return posted;
  if (peer.offers) peer.offers->held.sent(key_of(op));
  ++counters_[mover_index_].frames_sent;
  op.started_ns = op.submitted_ns;
  op.state = OpState::posted;
  op.awaits_fin = true;
  return Post::ok;
}

// A receive has been matched, and its message or its buffer (or both) are device memory.
void Engine::deliver_device(Op& op, Peer& peer, const FrameHeader& header, const std::byte* place,
                            const std::byte* payload) {
  op.started_ns = now();
  op.state = OpState::moving;
  op.source_address = header.address;
  op.source_segment = header.segment;
  if (peer.link->takes_offers() && header.kind != FrameKind::eager) return fail_device(op, EOPNOTSUPP);
  if (!op.gpu) {  // from a device to the host: the sender's process brings it to its host memory
    op.path = Path::stream;
    op.ready = 0;
    FrameHeader h{};
    h.kind = FrameKind::cts;
    h.sop = header.sop;
    h.rop = op.id;
    h.flags = can_copy_from(peer) ? kReads : 0;
    return send_control(peer, h, Wake::engine);
  }
  DeviceBuffer& gpu = *op.gpu;
  gpu.from_device = place != nullptr;
  gpu.not_yet = header.flags & kNotYet;
  if (place) {
    std::memcpy(&gpu.theirs, place, sizeof gpu.theirs);
    peer.device_owner = gpu.theirs.owner;
  }
  if (header.kind == FrameKind::eager) {
    if (mover_->take_bounce(gpu, op.nbytes, 0) != Reach::State::ready) {
      owe_credit(peer, header.payload_bytes);
      return fail_device(op, 0);
    }
    std::memcpy(gpu.bounce, payload, header.payload_bytes);
    owe_credit(peer, header.payload_bytes);
    gpu.role = Role::stage_in;
    op.moved = op.nbytes;
  }
  continue_receive(op, peer);
}

bool Engine::wait_for_gate(Op& op) {
  if (op.gpu->gate.open()) return false;
  op.gpu->waiting = true;
  mover_->await_gate(op.gpu->gate, op.gpu->device, op.id);
  return true;
}

void Engine::continue_device(Op& op, Peer& peer) {
  if (op.kind == OpKind::recv)
    continue_receive(op, peer);
  else
    continue_send(op, peer);
}

bool Engine::prefer_push(const Op& op, Peer& peer) const {
  const DeviceBuffer& gpu = *op.gpu;
  if (gpu.not_yet) return true;
  if (op.nbytes > kPushFrom && channels_[op.channel].cls <= kBulkClass) return true;
  WakePage* page = peer.link->page();
  uint64_t theirs = page && gpu.theirs.device < WakePage::kDevices
                        ? page->load[gpu.theirs.device].load(std::memory_order_relaxed)
                        : gpu.theirs.load;
  return page_->load[gpu.device].load(std::memory_order_relaxed) > theirs;
}

void Engine::continue_receive(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (wait_for_gate(op)) return;
  if (gpu.allocates && !op.data) {
    Reach::State made = mover_->allocate(gpu, op.nbytes, op.id);
    gpu.waiting = made == Reach::State::opening;
    if (made == Reach::State::refused) return fail_device(op, 2);  // CUDA_ERROR_OUT_OF_MEMORY
    if (made != Reach::State::ready) return;
    op.data = reinterpret_cast<std::byte*>(gpu.place.address);
  }
  if (gpu.role == Role::stage_in) return landing(op, 0, op.nbytes);  // came in its frame
  if (!gpu.from_device) {
    if (!has_bounce(op)) return;
    gpu.role = Role::stage_in;
    FrameHeader h{};
    h.kind = FrameKind::rts;
    h.sop = op.remote_op;
    h.address = op.source_address;
    h.segment = op.source_segment;
    return start_rendezvous(op, peer, h, true);
  }
  bool push = prefer_push(op, peer);
  if (push) {
    mover_->offer(gpu, *peer.link);
    if (gpu.place.exported != Export::none) return answer_with_place(op, peer);
  }
  Reach reach = mover_->reach(gpu.device, gpu.theirs, *peer.link, op.id);
  bool sane = gpu.theirs.address - gpu.theirs.base <= gpu.theirs.extent &&
              op.nbytes <= gpu.theirs.extent - (gpu.theirs.address - gpu.theirs.base);
  if (reach.state == Reach::State::opening) {
    gpu.waiting = true;
    return;
  }
  if (reach.state == Reach::State::ready && sane && !gpu.not_yet) {
    gpu.role = Role::pull;
    gpu.mapping = std::move(reach.mapping);
    gpu.remote = reach.base + (gpu.theirs.address - gpu.theirs.base);
    op.path = Path::device;
    return queue_move(op, Lane::peer, op.nbytes);
  }
  if (!push) {
    mover_->offer(gpu, *peer.link);
    if (gpu.place.exported != Export::none) return answer_with_place(op, peer);
  }
  // Neither can we read it (now), nor can the peer write ours: by memory of ours that it can, or by the host.
  Reach::State relay = mover_->take_relay(gpu, op.nbytes, *peer.link, op.id);
  if (relay == Reach::State::opening) {
    gpu.waiting = true;
    return;
  }
  staged_because(peer, reach.reason);
  if (relay == Reach::State::ready) return answer_with_place(op, peer);
  stage_in(op, peer, true);
}

// Counted for every message, told once.
void Engine::staged_because(Peer& peer, const std::string& reason) {
  ++counters_[mover_index_].fallbacks;
  if (std::exchange(peer.told_staged, true)) return;
  emit({EngineEvent::Kind::fallback, peer.rank, 0, "staged", reason});
}

void Engine::answer_with_place(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  gpu.role = Role::pushed;
  gpu.remote_writes = true;
  op.path = Path::device;
  FrameHeader h{};
  h.kind = FrameKind::cts;
  h.flags = kDevice;
  h.sop = op.remote_op;
  h.rop = op.id;
  send_control(peer, h, Wake::engine, &gpu.place, sizeof gpu.place);
}

// False: it comes later, by go_on, or the op has failed.
bool Engine::has_bounce(Op& op, bool may_wait) {
  if (op.gpu->bounce) return true;
  switch (mover_->take_bounce(*op.gpu, op.nbytes, may_wait ? op.id : 0)) {
    case Reach::State::ready:
      return true;
    case Reach::State::opening:
      op.gpu->waiting = true;
      return false;
    default:
      fail_device(op, 0);
      return false;
  }
}

// The sender brings the bytes to host memory; from there they come like any others.
void Engine::stage_in(Op& op, Peer& peer, bool ask) {
  DeviceBuffer& gpu = *op.gpu;
  if (!has_bounce(op, ask)) return;
  gpu.role = Role::stage_in;
  op.path = Path::stream;
  op.ready = 0;
  if (!ask) return;
  FrameHeader h{};
  h.kind = FrameKind::cts;
  h.sop = op.remote_op;
  h.rop = op.id;
  h.flags = can_copy_from(peer) ? kReads : 0;
  send_control(peer, h, Wake::engine);
}

void Engine::on_device_cts(Op& op, Peer& peer, const FrameHeader& header, const std::byte* meta) {
  DeviceBuffer& gpu = *op.gpu;
  op.state = OpState::moving;
  op.started_ns = now();
  if (header.flags & kDevice) {
    std::memcpy(&gpu.theirs, meta, sizeof gpu.theirs);
    peer.device_owner = gpu.theirs.owner;
    gpu.role = Role::push;
    gpu.owes_moved = true;
    op.awaits_fin = false;  // from here on it is we who say when it is over
  } else {
    gpu.role = Role::stage_out;
    gpu.can_pull = header.flags & kReads;
  }
  continue_send(op, peer);
}

void Engine::continue_send(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (wait_for_gate(op)) return;
  if (gpu.role == Role::stage_out) return stage_out(op, peer);
  uint64_t within = gpu.theirs.address - gpu.theirs.base;
  bool sane = within <= gpu.theirs.extent && op.nbytes <= gpu.theirs.extent - within;
  if (!sane) return tear_down(peer, "protocol violation: a place outside its allocation");
  Reach reach = mover_->reach(gpu.device, gpu.theirs, *peer.link, op.id);
  if (reach.state == Reach::State::opening) {
    gpu.waiting = true;
    return;
  }
  if (reach.state == Reach::State::ready) {
    gpu.mapping = std::move(reach.mapping);
    gpu.remote = reach.base + within;
    op.path = Path::device;
    return queue_move(op, Lane::peer, op.nbytes);
  }
  staged_because(peer, reach.reason);
  gpu.role = Role::stage_out;
  gpu.owes_moved = false;
  gpu.can_pull = false;
  op.awaits_fin = true;
  stage_out(op, peer);
}

void Engine::stage_out(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (!has_bounce(op)) return;
  op.ready = 0;
  op.path = Path::stream;
  queue_move(op, Lane::out, op.nbytes);
  if (!gpu.can_pull && op.live && peer.state == Peer::State::up) queue_data(op, peer);
}

// ---------------------------------------------------------------- chunks

void Engine::queue_move(Op& op, Lane lane, uint64_t nbytes) {
  DeviceBuffer& gpu = *op.gpu;
  DeviceQueue& queue = device_queue(gpu.device, lane);
  auto flow_in_queue = [&](uint32_t channel) {
    for (auto& flow : queue.flows)
      if (flow.rank == op.peer && flow.channel == channel) {
        flow.remote_device = gpu.theirs.device;
        return flow.id;
      }
    const ChannelInfo& info = channels_[channel];
    queue.sched.add_flow(queue.next_flow, info.cls, info.weight, channel);
    queue.flows.push_back({op.peer, channel, gpu.theirs.device, info.cls, queue.next_flow});
    return queue.next_flow++;
  };
  // More urgent channels bound what may be posted, whether or not they have anything to move now.
  for (uint32_t c = 0; c < channels_.size(); ++c)
    if (channels_[c].open && channels_[c].cls > channels_[op.channel].cls) flow_in_queue(c);
  gpu.lane = lane;
  gpu.in_sched = true;
  queue.sched.push(flow_in_queue(op.channel), op.id, nbytes, false);
  pump_device(queue);
}

// How much may be posted. What is urgent goes by the other end's engine while that has nothing to do; only else must
// our window be small. And channels share the engine only as far as their chunks wait here rather than there.
void Engine::limit_window(DeviceQueue& queue) {
  uint64_t t = now();
  bool urgent = false;
  uint32_t waiting = 0;
  for (const auto& flow : queue.flows) {
    urgent |= flow.cls != queue.flows.front().cls;
    if (queue.flows.size() > 1 && queue.sched.backlog(flow.id)) {
      for (const auto& other : queue.flows)
        if (other.channel != flow.channel && other.cls == flow.cls && queue.sched.backlog(other.id))
          ++waiting;
    }
    Peer* peer = find_peer(flow.rank);
    if (!peer || peer->state != Peer::State::up || queue.busy_until_ns > t + kHoldNs / 2) continue;
    WakePage* page = peer->link->page();
    if (!page || flow.remote_device >= WakePage::kDevices ||
        page->load[flow.remote_device].load(std::memory_order_relaxed) > kBusy)
      queue.busy_until_ns = t + kHoldNs;
  }
  if (waiting) queue.shared_until_ns = t + kHoldNs;
  const bool busy = queue.busy_until_ns > t, shared = queue.shared_until_ns > t;
  uint64_t chunk = urgent ? kRoundChunk : kWholeChunk;
  uint64_t preempt = kNeverPreempt;
  double rate = queue.sched.rate();
  if (shared || (urgent && busy)) {
    // Two chunks of half the window: in whole steps, so that the second always finds room beside the first.
    auto window =
        static_cast<uint64_t>(rate * static_cast<double>(preempt_ns_ - std::min(preempt_ns_ / 2, kOwnNs)));
    chunk = std::clamp(window / 2, kLeastChunk, kRoundChunk) & ~(kChunkStep - 1);
    if (urgent && busy) preempt = static_cast<uint64_t>(2.04 * static_cast<double>(chunk) / rate);
  }
  if (queue.chunk != chunk) {
    queue.chunk = chunk;
    queue.sched.set_limits(chunk, urgent && busy ? 4 * chunk : 2 * chunk);
  }
  if (queue.preempt_ns != preempt) {
    queue.preempt_ns = preempt;
    for (uint8_t cls = 0; cls < Scheduler::kClasses; ++cls) queue.sched.set_preempt(cls, preempt);
  }
}

void Engine::pump_device(DeviceQueue& queue) {
  if (queue.lane == Lane::peer) limit_window(queue);
  while (!queue.overflow.empty() && mover_->post(queue.overflow.front())) queue.overflow.pop_front();
  while (queue.overflow.empty()) {
    auto chunk = queue.sched.next();
    if (!chunk) return;
    Op* op = find(chunk->item);
    if (!op || !op->gpu) {
      queue.sched.complete(chunk->nbytes, 0, chunk->cls);
      continue;
    }
    DeviceBuffer& gpu = *op->gpu;
    MoveJob job;
    job.op = op->id;
    job.offset = chunk->offset;
    job.nbytes = chunk->nbytes;
    job.device = static_cast<uint8_t>(queue.device);
    job.lane = queue.lane;
    job.cls = chunk->cls;
    job.posted_ns = now();
    uint64_t ours = reinterpret_cast<uint64_t>(op->data) + chunk->offset;
    uint64_t other = queue.lane == Lane::peer ? gpu.remote + chunk->offset
                                              : reinterpret_cast<uint64_t>(gpu.bounce) + chunk->offset;
    bool incoming = gpu.role == Role::pull || queue.lane == Lane::in;
    job.to = incoming ? ours : other;
    job.from = incoming ? other : ours;
    ++gpu.inflight;
    if (chunk->last) gpu.in_sched = false;
    if (queue.lane == Lane::peer)
      page_->load[queue.device].fetch_add(chunk->nbytes, std::memory_order_relaxed);
    // The copy of a small message takes about as long as its receiver's loop takes to wake up.
    if (gpu.role == Role::pull && job.nbytes <= kEarlyWake) wake_loop();
    if (!mover_->post(job)) queue.overflow.push_back(job);
  }
}

void Engine::cancel_move(Op& op) {
  device_queue(op.gpu->device, op.gpu->lane).sched.cancel(op.id);
  op.gpu->in_sched = false;
}

void Engine::forget_flows(Rank rank) {
  for (auto& queue : device_queues_) {
    if (!queue) continue;
    std::erase_if(queue->flows, [&](const DeviceQueue::Flow& flow) {
      if (flow.rank == rank) queue->sched.remove_flow(flow.id);
      return flow.rank == rank;
    });
  }
}

// Bytes of a staged message have come to the bounce: on to the device.
void Engine::landing(Op& op, uint64_t offset, uint64_t nbytes) {
  DeviceQueue& queue = device_queue(op.gpu->device, Lane::in);
  MoveJob job;
  job.op = op.id;
  job.offset = offset;
  job.nbytes = nbytes;
  job.device = static_cast<uint8_t>(op.gpu->device);
  job.lane = Lane::in;
  job.cls = channels_[op.channel].cls;
  job.posted_ns = now();
  job.to = reinterpret_cast<uint64_t>(op.data) + offset;
  job.from = (op.gpu->bounce ? reinterpret_cast<uint64_t>(op.gpu->bounce) : op.gpu->relay) + offset;
  ++op.gpu->inflight;
  if (!queue.overflow.empty() || !mover_->post(job)) queue.overflow.push_back(job);
}

// Part of a streamed chunk is in the bounce; the device takes whole chunks.
void Engine::arriving(Op& op, const FrameHeader& header, uint64_t nbytes) {
  if (nbytes == header.payload_bytes) return landing(op, header.address, nbytes);
  auto& partial = op.gpu->partial;
  auto it = std::find_if(partial.begin(), partial.end(), [&](auto& p) { return p.first == header.address; });
  if (it == partial.end()) it = partial.insert(partial.end(), {header.address, 0});
  it->second += nbytes;
  if (it->second < header.payload_bytes) return;
  partial.erase(it);
  landing(op, header.address, header.payload_bytes);
}

void Engine::moved(MoveJob* jobs, size_t count) {
  Token token(*this, Token::Spin{});
  for (size_t i = 0; i < count; ++i) {
    MoveJob& job = jobs[i];
    DeviceQueue& queue = device_queue(job.device, job.lane);
    if (job.lane != Lane::in) {
      uint64_t began = std::max(job.posted_ns, queue.last_done_ns);
      uint64_t elapsed = 0;
      if (job.nbytes >= kPushFrom && job.ended_ns >= began) {
        auto bytes = static_cast<double>(job.nbytes);
        double keep = kRateMemory / (kRateMemory + bytes);
        queue.rate_bytes = queue.rate_bytes * keep + bytes;
        queue.rate_ns = queue.rate_ns * keep + static_cast<double>(job.ended_ns - began);
        if (queue.rate_bytes > kRateMemory / 4)
          elapsed = 1 + static_cast<uint64_t>(bytes * queue.rate_ns / queue.rate_bytes);
      }
      queue.sched.complete(job.nbytes, elapsed, job.cls);
      queue.last_done_ns = std::max(queue.last_done_ns, job.ended_ns);
    }
    if (job.lane == Lane::peer) page_->load[job.device].fetch_sub(job.nbytes, std::memory_order_relaxed);
    Op* op = find(job.op);  // its chunk in flight has kept it from ending
    if (!op) continue;
    DeviceBuffer& gpu = *op->gpu;
    --gpu.inflight;
    Peer* peer = find_peer(op->peer);
    if (op->state == OpState::draining) {
      settle(*op);
    } else if (job.error) {
      fail_device(*op, job.error);
    } else if (job.lane == Lane::in) {
      gpu.landed += job.nbytes;
      if (gpu.landed == op->nbytes) received(*op);
    } else if (job.lane == Lane::out) {
      op->ready = job.offset + job.nbytes;  // one flow's chunks leave and end in order
      if (!gpu.can_pull) {
        schedulers_[op->link]->set_ready(flow_of(*peer, op->channel), true);
        pump(op->link);
      } else {
        FrameHeader h{};
        h.kind = FrameKind::staged;
        h.sop = op->id;
        h.rop = op->remote_op;
        h.address = reinterpret_cast<uint64_t>(gpu.bounce);
        h.nbytes = op->ready;
        send_control(*peer, h, Wake::engine);
      }
    } else {
      op->moved += job.nbytes;
      LinkCounters& counters = counters_[mover_index_];
      (gpu.role == Role::push ? counters.bytes_sent : counters.bytes_received) += job.nbytes;
      if (op->moved < op->nbytes) continue;
      if (gpu.role == Role::pull) {
        received(*op);
      } else {
        gpu.owes_moved = false;
        send_moved(*peer, op->remote_op, Code::ok, op->moved);
        finish(*op, Code::ok);
      }
    }
  }
  for (size_t i = 0; i < count; ++i) pump_device(device_queue(jobs[i].device, jobs[i].lane));
}

void Engine::go_on(const OpId* ops, size_t count) {
  Token token(*this, Token::Spin{});
  for (size_t i = 0; i < count; ++i) {
    Op* op = find(ops[i]);
    if (!op || !op->gpu || !op->gpu->waiting) continue;
    op->gpu->waiting = false;
    if (op->state != OpState::moving) continue;
    Peer* peer = find_peer(op->peer);
    bool here = op->gpu->role == Role::stage_in && !op->gpu->from_device;
    Peer ghost;  // an eager message outlives its sender
    if (here)
      continue_receive(*op, peer ? *peer : ghost);
    else if (peer && peer->state == Peer::State::up)
      continue_device(*op, *peer);
  }
}

// ---------------------------------------------------------------- what the other side says

void Engine::send_moved(Peer& peer, OpId rop, Code code, uint64_t nbytes) {
  FrameHeader h{};
  h.kind = FrameKind::moved;
  h.rop = rop;
  h.code = static_cast<uint8_t>(code);
  h.nbytes = nbytes;
  send_control(peer, h, Wake::loop);
}

void Engine::on_moved(Peer& peer, const FrameHeader& header) {
  Op* op = find(header.rop);
  if (!op || op->peer != peer.rank || !op->gpu || op->gpu->role != Role::pushed || !op->gpu->remote_writes)
    return;
  op->gpu->remote_writes = false;
  if (op->state == OpState::draining) {
    settle(*op);
    return;
  }
  auto code = static_cast<Code>(header.code);
  if (code > Code::read_only) throw ProtocolViolation("unknown outcome");
  if (code == Code::ok) {
    if (header.nbytes != op->nbytes) throw ProtocolViolation("a push of another size than the message's");
    op->moved = op->nbytes;
    counters_[mover_index_].bytes_received += op->moved;
    if (!op->gpu->relay) return finish(*op, Code::ok);
    op->gpu->role = Role::stage_in;
    op->remote_op = 0;  // has ended there
    return landing(*op, 0, op->nbytes);
  }
  op->remote_op = 0;  // has ended there
  end_early(*op, code == Code::link_failed ? code : Code::peer_cancelled);
}

void Engine::on_staged(Peer& peer, const FrameHeader& header) {
  Op* op = find(header.rop);
  if (!op || op->peer != peer.rank || op->kind != OpKind::recv || op->state != OpState::moving) return;
  if (op->gpu && op->gpu->role != Role::stage_in) return;
  if (header.nbytes > op->nbytes || (op->ready != 0 && header.nbytes <= op->ready))
    throw ProtocolViolation("more staged than the message has");
  bool first = op->ready == 0;
  op->ready = header.nbytes;
  op->source_address = header.address;
  op->source_segment = 0;
  op->path = peer.link->pull_path({header.address, 0});
  if (op->path == Path::none || op->path == Path::read)
    throw ProtocolViolation("memory that cannot be read was staged");
  if (first) return queue_data(*op, peer);
  schedulers_[peer.link_index]->set_ready(flow_of(peer, op->channel), true);
  pump(peer.link_index);
}

// ---------------------------------------------------------------- ends

// `error` 0: no host memory for staging.
void Engine::fail_device(Op& op, int error) {
  op.error = error ? error : -1;
  if (op.kind == OpKind::recv && op.gpu) {
    op.gpu->owes_fin = true;
    op.gpu->fin_code = static_cast<uint8_t>(Code::link_failed);
  }
  end_early(op, Code::link_failed);
}

// What was put off while our engine was at work, or the other side's.
void Engine::settle_device(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  Peer* peer = find_peer(op.peer);
  if (!peer || peer->state != Peer::State::up) return;
  if (std::exchange(gpu.owes_moved, false))
    send_moved(*peer, op.remote_op, op.code == Code::link_failed ? Code::link_failed : Code::cancelled, 0);
  if (std::exchange(gpu.owes_fin, false))
    send_fin(*peer, op.remote_op, static_cast<Code>(gpu.fin_code), op.moved);
}

// Before memory is given back at close, peers whose engines write it have their word to say.
void Engine::await_remote_writers() {
  uint64_t limit = now() + drain_ns_;
  auto writing = [&] {
    bool any = false;
    ops_.for_each_live([&](Op& op) { any |= op.gpu && op.gpu->remote_writes; });
    return any;
  };
  for (;;) {
    Token token(*this);
    if (!writing()) return;
    poll_links();
    if (now() < limit) continue;
    ops_.for_each_live([&](Op& op) {
      if (op.gpu) op.gpu->remote_writes = false;
    });
    return;
  }
}

// ---------------------------------------------------------------- progress by copy threads

void Engine::begin_assist() { assistants_.fetch_add(1, std::memory_order_relaxed); }

bool Engine::assist() {
  if (stopping_.load(std::memory_order_relaxed)) return false;
  // Peers need not ring while we look. The engine's thread may have marked itself asleep meanwhile.
  if (page_->engine.word.load(std::memory_order_relaxed) == WakeWord::kAsleep) awake(page_->engine);
  if (loop_spins()) return false;  // it looks by itself
  if (!token_.try_lock()) return false;
  drain_submissions();
  int did = closed_ ? 0 : poll_links();
  token_.unlock();
  after_unlock();
  return did > 0;
}

// The loops, ours and the other side's, sleep through a long copy. One that is woken a little early and spins sees the
// end at once.
void Engine::ends_soon(OpId id) {
  Token token(*this, Token::Spin{});
  Op* op = find(id);
  if (!op || !op->gpu || op->state != OpState::moving) return;
  wake_loop();
  Peer* peer = find_peer(op->peer);
  if (op->gpu->role != Role::push || !peer || peer->state != Peer::State::up) return;
  FrameHeader h{};
  h.kind = FrameKind::heartbeat;
  send_control(*peer, h, Wake::loop);
}

bool Engine::end_assist() {
  assistants_.fetch_sub(1, std::memory_order_relaxed);
  prepare_sleep(page_->engine);
  Token token(*this);
  return !closed_ && poll_links() > 0;
}

}  // namespace aiocomm
