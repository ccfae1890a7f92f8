// Which way a message of device memory goes: what the two sides tell each other, and what they wait for.

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kPushFrom = 1 << 20;  // larger: bulk, which leaves the other end's engine free
constexpr uint8_t kBulkClass = 1;        // and below: its messages never decide by load
constexpr uint64_t kBusy = 1 << 20;      // bytes with an engine that make what is urgent go another way
constexpr uint64_t kMostDetour = 256 << 10;
constexpr uint64_t kUrgentLatelyNs = 5000000;
constexpr uint64_t kLargeUrgentNs = 1000000000;  // for which windows stay small after a large urgent message
}  // namespace

// ---------------------------------------------------------------- announcing and answering

Post DeviceProtocol::announce(Op& op, Peer& peer) {
  const Channel& channel = *op.scope;
  DeviceBuffer& gpu = *op.gpu;
  note_urgent(op);
  const uint8_t flags = describe(op, peer);
  std::array<std::byte, sizeof(Op::meta) + sizeof(DevicePlace)> meta;
  std::memcpy(meta.data(), op.meta.data(), op.meta_bytes);
  std::memcpy(meta.data() + op.meta_bytes, &gpu.place, sizeof gpu.place);
  FrameHeader h{};
  h.kind = FrameKind::rts;
  h.flags = flags;
  h.channel = channel.wire;
  h.tag = op.tag;
  h.nbytes = op.nbytes;
  h.meta_bytes = static_cast<uint16_t>(op.meta_bytes + sizeof gpu.place);
  h.cls = channel.cls;
  h.sop = op.id;
  if (peer.offers) h.rop = peer.offers->held.place(engine_.key_of(op)).packed();
  Post posted = peer.link->post(h, meta.data(), nullptr, Wake::engine);
  if (posted != Post::ok) return posted;
  if (peer.offers) peer.offers->held.sent(engine_.key_of(op));
  ++engine_.counters_[op.link].frames_sent;
  op.started_ns = op.submitted_ns;
  op.state = OpState::posted;
  op.awaits_fin = true;
  return Post::ok;
}

uint8_t DeviceProtocol::describe(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  mover_->offer(gpu, *peer.link);
  gpu.place.load = mover_->load(gpu.device);
  return kDevice | (gpu.gate.open() ? 0 : kNotYet);
}

void DeviceProtocol::serve(Op& op, Peer& peer) {
  FrameHeader h{};
  h.rop = op.remote_op;
  if (op.gpu->by_rows) {  // nobody but the reader moves them, and it does not wait for our stream
    op.state = OpState::moving;
    if (wait_for_gate(op)) return;
    op.state = OpState::posted;
  }
  h.kind = FrameKind::get_ready;
  h.flags = describe(op, peer);
  h.sop = op.id;
  h.nbytes = op.nbytes;
  engine_.send_control(peer, h, Wake::engine, &op.gpu->place, sizeof op.gpu->place);
}

void DeviceProtocol::deliver(Op& op, Peer& peer, const FrameHeader& header, const std::byte* place,
                             const std::byte* payload) {
  op.started_ns = engine_.now();
  op.state = OpState::moving;
  op.source_address = header.address;
  op.source_segment = header.segment;
  const bool here = header.kind == FrameKind::eager || header.kind == FrameKind::put;  // in its frame
  if (!op.gpu) {  // from a device to the host: the sender's process brings it to its host memory
    op.path = Path::stream;
    op.ready = 0;
    FrameHeader h{};
    h.kind = FrameKind::cts;
    h.sop = header.sop;
    h.rop = op.id;
    h.flags = engine_.can_copy_from(peer) ? kReads : 0;
    const uint64_t extent = header.flags & kRows ? header.address : op.nbytes;
    const Location at = op.listed ? Location{} : peer.link->locate(op.data, extent);
    if (at.segment) {  // or its device does
      h.address = at.address;
      h.segment = at.segment;
      op.written = true;
    }
    return engine_.send_control(peer, h, Wake::engine);
  }
  DeviceBuffer& gpu = *op.gpu;
  note_urgent(op);
  gpu.from_device = place != nullptr;
  gpu.not_yet = header.flags & kNotYet;
  if (place) {
    std::memcpy(&gpu.theirs, place, sizeof gpu.theirs);
    peer.device_owner = gpu.theirs.owner;
  }
  if (here) {
    if (header.kind == FrameKind::eager) engine_.owe_credit(peer, header.payload_bytes);
    if (mover_->take_bounce(gpu, op.nbytes, 0) != Reach::State::ready) return fail(op, 0);
    std::memcpy(gpu.bounce, payload, header.payload_bytes);
    gpu.role = Role::stage_in;
    op.moved = op.nbytes;
  }
  continue_receive(op, peer);
}

bool DeviceProtocol::wait_for_gate(Op& op) {
  if (op.gpu->gate.open()) return false;
  if (std::exchange(op.gpu->waiting, true)) return true;
  mover_->await_gate(op.gpu->gate, op.gpu->device, op.id);
  return true;
}

void DeviceProtocol::proceed(Op& op, Peer& peer) {
  if (op.gpu->kernel)
    start_kernel(op);
  else if (op.kind == OpKind::recv || op.kind == OpKind::get)
    continue_receive(op, peer);
  else if (op.kind == OpKind::serve && op.gpu->by_rows)
    serve(op, peer);
  else
    continue_send(op, peer);
}

bool DeviceProtocol::prefer_push(const Op& op, Peer& peer) const {
  const DeviceBuffer& gpu = *op.gpu;
  if (gpu.not_yet) return true;
  if (op.nbytes > kPushFrom && op.scope->cls <= kBulkClass) return true;
  WakePage* page = peer.link->page();
  uint64_t theirs = page && gpu.theirs.device < WakePage::kDevices
                        ? page->load[gpu.theirs.device].load(std::memory_order_relaxed)
                        : gpu.theirs.load;
  return engine_.page_->load[gpu.device].load(std::memory_order_relaxed) > theirs;
}

// Where both ends' engines have bulk to move, a small urgent message waits for neither: it goes through host memory, for
// which devices have engines of their own. What is larger needs a small window of both instead: see limit_window().
bool DeviceProtocol::makes_detour(const Op& op, Peer& peer) {
  const DeviceBuffer& gpu = *op.gpu;
  if (op.scope->cls <= kBulkClass || op.nbytes > kMostDetour) return false;
  if (engine_.page_->load[gpu.device].load(std::memory_order_relaxed) <= kBusy) return false;
  if (queue_of(gpu.device, Lane::peer).busy_until_ns > engine_.now()) return true;
  WakePage* page = peer.link->page();
  return page && gpu.theirs.device < WakePage::kDevices &&
         page->load[gpu.theirs.device].load(std::memory_order_relaxed) > kBusy;
}

void DeviceProtocol::note_urgent(const Op& op) {
  if (op.scope->cls <= kBulkClass) return;
  const uint64_t t = engine_.now();
  urgent_ns_.store(t, std::memory_order_relaxed);
  if (op.nbytes > kMostDetour) large_urgent_until_ns_ = t + kLargeUrgentNs;
}

bool DeviceProtocol::urgent_lately() const {
  return engine_.now() < urgent_ns_.load(std::memory_order_relaxed) + kUrgentLatelyNs;
}

void DeviceProtocol::continue_receive(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (wait_for_gate(op)) return;
  if (gpu.allocates && !op.data) {
    Reach::State made = mover_->allocate(gpu, op.nbytes, op.id);
    gpu.waiting = made == Reach::State::opening;
    if (made == Reach::State::refused) return fail(op, 2);  // CUDA_ERROR_OUT_OF_MEMORY
    if (made != Reach::State::ready) return;
    op.data = reinterpret_cast<std::byte*>(gpu.place.address);
  }
  if (gpu.role == Role::stage_in) return landing(op, 0, op.nbytes);  // came in its frame
  if (!gpu.from_device) {
    Engine::Hold direct = engine_.reach(op, peer, Access::local);
    if (direct == Engine::Hold::pending) return;
    if (direct == Engine::Hold::failed) {
      if (reaches_shared(op, peer)) return move_shared(op, Role::pull);
      if (has_rows(op)) return engine_.end_early(op, Code::unreachable);
      if (!has_bounce(op)) return;
      gpu.role = Role::stage_in;
    }
    FrameHeader h{};
    h.kind = FrameKind::rts;
    h.sop = op.remote_op;
    h.address = op.source_address;
    h.segment = op.source_segment;
    return engine_.start_rendezvous(op, peer, h, true);
  }
  if (gpu.by_rows) {
    mover_->offer(gpu, *peer.link);
    if (gpu.place.exported != Export::none) return answer_with_place(op, peer);
    engine_.send_fin(peer, op.remote_op, Code::unreachable, 0);
    return engine_.finish(op, Code::unreachable);
  }
  if (op.rows) return move_rows(op, peer, Role::pull);
  if (makes_detour(op, peer)) return stage_in(op, peer, true);
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
  // Neither can we read it (now), nor can the peer write ours: by memory of ours that it can, or by the host. A put has
  // ended once its sender has written: its bytes must be in place by then.
  const bool into_region = op.kind == OpKind::recv && op.region != 0;
  Reach::State relay =
      into_region ? Reach::State::refused : mover_->take_relay(gpu, op.nbytes, *peer.link, op.id);
  if (relay == Reach::State::opening) {
    gpu.waiting = true;
    return;
  }
  staged_because(peer, reach.reason);
  if (relay == Reach::State::ready) return answer_with_place(op, peer);
  stage_in(op, peer, true);
}

void DeviceProtocol::not_direct(Op& op, Peer& peer, const std::string& reason) {
  op.gpu->not_direct = true;
  staged_because(peer, reason);
}

void DeviceProtocol::go_another_way(Op& op, const std::string& reason) {
  Peer* peer = engine_.find_peer(op.peer);
  engine_.links_[op.link]->release(std::exchange(op.registration, 0));
  op.gpu->direct = false;
  not_direct(op, *peer, reason);
  if (op.state == OpState::queued) return engine_.let_flow_go_on(op);
  op.holding = false;
  if (op.kind == OpKind::recv && peer->state == Peer::State::up) continue_receive(op, *peer);
}

// Counted for every message, told once.
void DeviceProtocol::staged_because(Peer& peer, const std::string& reason) {
  ++engine_.counters_[index_].fallbacks;
  peer.staged_ns = engine_.now();
  if (std::exchange(peer.told_staged, true)) return;
  engine_.emit({EngineEvent::Kind::fallback, peer.rank, 0, "staged", reason});
}

void DeviceProtocol::answer_with_place(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  gpu.role = Role::pushed;
  op.written = true;
  op.path = Path::device;
  FrameHeader h{};
  h.kind = FrameKind::cts;
  h.flags = kDevice;
  h.sop = op.remote_op;
  h.rop = op.id;
  engine_.send_control(peer, h, Wake::engine, &gpu.place, sizeof gpu.place);
}

// False: it comes later, by go_on, or the op has failed.
bool DeviceProtocol::has_bounce(Op& op, bool may_wait) {
  if (op.gpu->bounce) return true;
  switch (mover_->take_bounce(*op.gpu, op.nbytes, may_wait ? op.id : 0)) {
    case Reach::State::ready:
      return true;
    case Reach::State::opening:
      op.gpu->waiting = true;
      return false;
    default:
      fail(op, 0);
      return false;
  }
}

// The sender brings the bytes to host memory; from there they come like any others.
void DeviceProtocol::stage_in(Op& op, Peer& peer, bool ask) {
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
  // A small one comes in the link's own frames: for a copy out of the other's memory a thread would have to wake up.
  h.flags = op.nbytes > kMostDetour && engine_.can_copy_from(peer) ? kReads : 0;
  engine_.send_control(peer, h, Wake::engine);
}

void DeviceProtocol::on_cts(Op& op, Peer& peer, const FrameHeader& header, const std::byte* meta) {
  DeviceBuffer& gpu = *op.gpu;
  if (gpu.by_rows || (op.rows && !(header.flags & kDevice) && !header.segment))
    throw ProtocolViolation("rows are moved by whoever asked for them");
  op.state = OpState::moving;
  op.started_ns = engine_.now();
  gpu.direct = false;  // the receiver has it pushed all the same
  if (header.flags & kDevice) {
    std::memcpy(&gpu.theirs, meta, sizeof gpu.theirs);
    peer.device_owner = gpu.theirs.owner;
    gpu.role = Role::push;
    gpu.owes_moved = true;
    op.awaits_fin = false;  // from here on it is we who say when it is over
  } else {
    gpu.role = Role::stage_out;
    gpu.can_pull = header.flags & kReads;
    op.source_address = header.address;
    op.source_segment = header.segment;
    gpu.owes_moved = header.segment != 0;
  }
  continue_send(op, peer);
}

void DeviceProtocol::continue_send(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (wait_for_gate(op)) return;
  if (gpu.role == Role::stage_out) {
    const bool reached = reaches_shared(op, peer);
    if (!reached && !has_rows(op)) return stage_out(op, peer);
    op.awaits_fin = false;  // from here on it is we who say when it is over
    return reached ? move_shared(op, Role::push) : engine_.end_early(op, Code::unreachable);
  }
  if (op.rows) return move_rows(op, peer, Role::push);
  uint64_t within = gpu.theirs.address - gpu.theirs.base;
  bool sane = within <= gpu.theirs.extent && op.nbytes <= gpu.theirs.extent - within;
  if (!sane) return engine_.tear_down(peer, "protocol violation: a place outside its allocation");
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
  gpu.role = Role::stage_out;  // `owes_moved` all the same: until bytes come the peer expects us to write
  gpu.can_pull = false;
  op.awaits_fin = true;
  stage_out(op, peer);
}

void DeviceProtocol::move_rows(Op& op, Peer& peer, Role role) {
  DeviceBuffer& gpu = *op.gpu;
  uint64_t within = gpu.theirs.address - gpu.theirs.base;
  if (within > gpu.theirs.extent || op.reach > gpu.theirs.extent - within)
    return engine_.tear_down(peer, "protocol violation: a place outside its allocation");
  Reach reach = mover_->reach(gpu.device, gpu.theirs, *peer.link, op.id);
  if (reach.state == Reach::State::opening) {
    gpu.waiting = true;
    return;
  }
  if (reach.state == Reach::State::refused) {
    staged_because(peer, reach.reason);
    return engine_.end_early(op, Code::unreachable);
  }
  gpu.role = role;
  gpu.mapping = std::move(reach.mapping);
  gpu.remote = reach.base + within;
  op.path = Path::device;
  queue_move(op, Lane::peer, op.nbytes);
}

void DeviceProtocol::stage_out(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (!has_bounce(op)) return;
  op.ready = 0;
  op.path = Path::stream;
  queue_move(op, Lane::out, op.nbytes);
  if (!gpu.can_pull && op.live && peer.state == Peer::State::up) engine_.queue_data(op, peer);
}

void DeviceProtocol::go_on(const OpId* ops, size_t count, int error) {
  Engine::Token token(engine_);
  for (size_t i = 0; i < count; ++i) {
    Op* op = engine_.find(ops[i]);
    if (!op || !op->gpu || !op->gpu->waiting) continue;
    op->gpu->waiting = false;
    const bool held = op->state == OpState::queued && op->holding;
    if (!held && op->state != OpState::moving) continue;
    // Else another process's engine might move it, and nobody say that what it was to follow has failed. A kernel does, as
    // it is launched.
    if (error && !op->gpu->kernel) {
      fail(*op, error);
      continue;
    }
    if (held) {
      engine_.let_flow_go_on(*op);
      engine_.pump(op->link);
      continue;
    }
    if (op->gpu->packing) {
      pack(*op);
      continue;
    }
    Peer* peer = engine_.find_peer(op->peer);
    bool here = op->gpu->role == Role::stage_in && !op->gpu->from_device;
    Peer ghost;  // an eager message outlives its sender
    if (here)
      continue_receive(*op, peer ? *peer : ghost);
    else if (peer && peer->state == Peer::State::up)
      proceed(*op, *peer);
  }
}

// ---------------------------------------------------------------- what the other side says

void DeviceProtocol::send_moved(Peer& peer, OpId rop, Code code, uint64_t nbytes) {
  FrameHeader h{};
  h.kind = FrameKind::moved;
  h.rop = rop;
  h.code = static_cast<uint8_t>(code);
  h.nbytes = nbytes;
  engine_.send_control(peer, h, Wake::loop);
}

void DeviceProtocol::on_moved(Peer& peer, const FrameHeader& header) {
  Op* op = engine_.find(header.rop);
  if (!op || op->peer != peer.rank || !op->written) return;
  op->written = false;
  const bool relayed = op->gpu && op->gpu->relay;
  auto code = static_cast<Code>(header.code);
  if (op->state == OpState::draining) {
    if (code == Code::ok && !relayed) engine_.done_after_all(*op);
    engine_.settle(*op);
    return;
  }
  if (code > kLastCode) throw ProtocolViolation("unknown outcome");
  if (code == Code::ok) {
    if (header.nbytes != op->nbytes) throw ProtocolViolation("a push of another size than the message's");
    op->moved = op->nbytes;
    op->path = Path::device;
    engine_.counters_[engine_.executor_of(*op)].bytes_received += op->moved;
    op->remote_op = 0;  // has ended there
    if (!relayed) return engine_.received(*op);
    op->gpu->role = Role::stage_in;
    return landing(*op, 0, op->nbytes);
  }
  op->remote_op = 0;  // has ended there
  engine_.end_early(*op, code == Code::link_failed ? code : Code::peer_cancelled);
}

void DeviceProtocol::on_staged(Peer& peer, const FrameHeader& header) {
  Op* op = engine_.find(header.rop);
  if (!op || op->peer != peer.rank || op->state != OpState::moving) return;
  if (op->kind != OpKind::recv && op->kind != OpKind::get) return;
  if (op->gpu ? op->gpu->role != Role::stage_in : op->ready == ~0ull) return;
  op->written = false;  // it does not reach our memory
  if (header.nbytes > op->nbytes || (op->ready != 0 && header.nbytes <= op->ready))
    throw ProtocolViolation("more staged than the message has");
  const bool first = op->ready == 0;
  if (first && (op->moved || op->inflight)) throw ProtocolViolation("staged, after bytes of it were sent");
  op->ready = header.nbytes;
  op->source_address = header.address;
  op->source_segment = 0;
  op->path = peer.link->pull_path({header.address, 0});
  if (op->path == Path::none || op->path == Path::read)
    throw ProtocolViolation("memory that cannot be read was staged");
  if (first) return engine_.queue_data(*op, peer);
  engine_.schedulers_[peer.link_index]->set_ready(engine_.flow_of(*op, peer).id, true);
  engine_.pump(peer.link_index);
}

}  // namespace aiocomm
