// From a submission to frames on a link: headers, control frames, chunks.

#include <algorithm>
#include <cstring>
#include <exception>

#include "core/engine.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kSpinCopy = 1 << 20;  // the most that a spinning loop copies by itself at a time
constexpr uint64_t kHeaderCost = 64;     // what a message without bytes costs its receiver

uint16_t packed_weight(double weight) {
  const double w = weight * kWeightOne;
  return static_cast<uint16_t>(w < 1 ? 1 : w > 65535 ? 65535 : w);
}
}  // namespace

Peer* Engine::find_peer(Rank rank) {
  return rank >= 0 && static_cast<size_t>(rank) < peers_.size() ? peers_[rank].get() : nullptr;
}

Peer* Engine::peer_of(LinkPeer& link_peer) {
  Peer* peer = find_peer(link_peer.rank);
  return peer && peer->link.get() == &link_peer && peer->state == Peer::State::up ? peer : nullptr;
}

Op* Engine::find(OpId id) {
  if (Op* op = ops_.find(id)) return op;
  return served_.find(id);
}

void Engine::start(Op& op) noexcept {
  try {
    if (closed_) return finish(op, Code::closed);
    if (!fault_.empty()) return finish(op, Code::link_failed);
    Channel* channel = channels_.find(op.channel);
    if (!channel || !channel->open) return finish(op, Code::closed);
    enter(op, *channel);
    if (op.deadline_ns) start_deadline(op);
    if (op.kind == OpKind::recv) return start_recv(op);
    if (op.gpu && op.gpu->kernel) return device_.start_kernel(op);
    if (op.gpu && op.listed && op.kind == OpKind::put) return device_.pack(op);
    go(op);
  } catch (const std::exception& error) {
    break_down(error.what());
  }
}

void Engine::go(Op& op) {
  Peer* peer = find_peer(op.peer);
  if (!peer || peer->state == Peer::State::lost) return finish(op, Code::peer_lost);
  if (peer->state == Peer::State::up && !peer->resting) return start_on(op, *peer);
  if (peer->state == Peer::State::known) want_connection(*peer);
  if (op.no_wait) return finish(op, Code::would_block);
  peer->waiting.push_back(op.id);
}

// The loop's thread passes it on; it has to be woken where the op was queued and is started by another thread.
void Engine::want_connection(Peer& peer) {
  peer.state = Peer::State::connecting;
  wanted_.push_back(peer.rank);
  has_wanted_.store(true, std::memory_order_release);
  wake_loop();
}

void Engine::start_on(Op& op, Peer& peer) {
  op.link = peer.link_index;
  peer.used = true;
  count_submitted(op, executor_of(op));
  if (op.no_wait && !fits_frame(op, peer)) {  // its receiver bounds what it holds of small ones
    const LinkCounters& c = counters_[op.counted_by];
    if (c.submitted - c.completed - c.failed - c.cancelled > queue_depth_) {
      would_block(op);
      return;
    }
  }
  // Its receiver may have said where it goes.
  if (peer.offers && op.kind == OpKind::send && !fits_frame(op, peer)) {
    peer.link->poll(16);
    if (peer.state != Peer::State::up || !op.live) return;
  }
  // A header may not overtake an earlier one of its flow, nor control frames that wait.
  const Flow* flow = flows_[peer.link_index]->find(*op.scope, peer.rank);
  if (peer.blocked || !peer.control.empty() || (flow && flow->headers)) return queue_header(op, peer);
  if (send_header(op, peer) == Post::again) {
    if (!op.holding) peer.blocked = true;
    queue_header(op, peer);
  } else if (op.live && op.in_sched) {
    pump(peer.link_index);
  }
}

void Engine::queue_header(Op& op, Peer& peer) {
  if (op.no_wait && !op.holding) {
    would_block(op);
    return;
  }
  Flow& flow = flow_of(op, peer);
  ++flow.headers;
  op.in_sched = true;
  Scheduler& sched = *schedulers_[peer.link_index];
  const uint64_t cost = fits_frame(op, peer) ? std::min(op.nbytes, sched.max_chunk()) : 0;
  sched.push(flow.id, op.id, cost, true);
  if (peer.blocked || op.holding) sched.set_ready(flow.id, false);
}

Post Engine::would_block(Op& op) {
  finish(op, Code::would_block);
  return Post::ok;
}

Post Engine::send_header(Op& op, Peer& peer) {
  switch (op.kind) {
    case OpKind::put:
      return send_put(op, peer);
    case OpKind::get:
      return send_get(op, peer);
    default:
      return send_message(op, peer);
  }
}

bool Engine::fits_frame(const Op& op, const Peer& peer) const {
  if (is_on_device(op)) return op.nbytes == 0;
  return op.nbytes <= eager_max_ && op.nbytes + sizeof(FrameHeader) + kMaxMeta <= peer.link->frame_limit();
}

Post Engine::send_message(Op& op, Peer& peer) {
  if (op.gpu && op.nbytes) {
    Hold direct = reach(op, peer, Access::peer_reads);
    if (direct == Hold::pending) return Post::again;
    if (direct == Hold::failed) return device_.announce(op, peer);
  }
  const Channel& channel = *op.scope;
  FrameHeader h{};
  h.channel = channel.wire;
  h.tag = op.tag;
  h.nbytes = op.nbytes;
  h.meta_bytes = op.meta_bytes;
  h.cls = channel.cls;
  h.weight = packed_weight(channel.weight);
  bool fits = fits_frame(op, peer);
  if (peer.offers && !fits)
    if (const Offer* into = peer.offers->held.next(key_of(op), op.nbytes)) return send_into(op, peer, *into);
  if (peer.offers) h.rop = peer.offers->held.place(key_of(op)).packed();
  bool eager = fits && peer.eager_unconsumed + op.nbytes + kHeaderCost <= unexpected_max_;
  if (op.no_wait && fits && !eager) return would_block(op);  // it holds all that it may hold unread
  Post posted;
  if (eager) {
    h.kind = FrameKind::eager;
    h.payload_bytes = static_cast<uint32_t>(op.nbytes);
    h.sop = op.synchronous ? op.id : 0;
    posted = peer.link->post(h, op.meta.data(), op.data, Wake::loop);
    if (posted != Post::ok) return posted;
    peer.eager_unconsumed += op.nbytes + kHeaderCost;
    op.path = Path::eager;
    op.moved = op.nbytes;
    counters_[op.link].bytes_sent += op.nbytes;
  } else {
    if (Hold held = hold(op, Access::peer_reads); held != Hold::ready)
      return held == Hold::pending ? Post::again : Post::ok;
    Location at = peer.link->locate(op.data, op.nbytes);
    h.kind = FrameKind::rts;
    h.sop = op.id;
    h.address = at.address;
    h.segment = op.registration ? op.registration : at.segment;
    op.source_segment = at.segment;
    posted = peer.link->post(h, op.meta.data(), nullptr, Wake::engine);
    if (posted != Post::ok) return posted;
  }
  if (peer.offers) peer.offers->held.sent(key_of(op));
  ++counters_[op.link].frames_sent;
  op.started_ns = op.submitted_ns;
  op.state = OpState::posted;
  op.awaits_fin = h.sop != 0;
  if (!op.awaits_fin) finish(op, Code::ok);
  return Post::ok;
}

Post Engine::send_put(Op& op, Peer& peer) {
  const bool by_adapters = peer.link->takes_offers();
  if (op.gpu && by_adapters && reach(op, peer, Access::local) == Hold::pending) return Post::again;
  if (by_key(op, peer)) return access(op, peer);
  if (has_rows(op) && (by_adapters || (!op.gpu && !rows_fit(op, peer)))) return not_by_rows(op);
  const Channel& channel = *op.scope;
  FrameHeader h{};
  h.channel = channel.wire;
  h.cls = channel.cls;
  h.weight = packed_weight(channel.weight);
  h.flags = static_cast<uint8_t>((op.has_notify ? kHasNotify : 0) | (op.listed ? kListed : 0));
  h.meta_bytes = static_cast<uint16_t>(op.notify.size());
  h.tag = static_cast<int64_t>(op.offset);
  h.nbytes = op.nbytes;
  h.sop = op.id;
  h.rop = op.region;
  auto meta = reinterpret_cast<const std::byte*>(op.notify.data());
  bool inline_bytes = fits_frame(op, peer) && !has_rows(op);
  const std::byte* payload = inline_bytes ? host_data(op) : nullptr;
  if (inline_bytes) {
    h.kind = FrameKind::put;
    h.payload_bytes = static_cast<uint32_t>(op.nbytes);
  } else if (is_on_device(op)) {  // its place is the payload: the notification may take all that metadata can
    h.kind = FrameKind::put_rts;
    h.flags |= device_.describe(op, peer);
    h.payload_bytes = sizeof op.gpu->place;
    if (op.rows) {
      h.flags |= kRows;
      h.address = op.reach;
    }
    payload = reinterpret_cast<const std::byte*>(&op.gpu->place);
  } else {
    if (Hold held = hold(op, Access::peer_reads); held != Hold::ready)
      return held == Hold::pending ? Post::again : Post::ok;
    Location at = peer.link->locate(host_data(op), extent_of(op));
    h.kind = FrameKind::put_rts;
    h.address = at.address;
    h.segment = op.registration ? op.registration : at.segment;
    op.source_segment = at.segment;
    if (has_rows(op)) {
      const auto rows = std::as_bytes(op.rows->rows());
      h.flags |= kRows;
      h.payload_bytes = static_cast<uint32_t>(rows.size());
      payload = rows.data();
    }
  }
  Post posted = peer.link->post(h, meta, payload, Wake::engine);
  if (posted != Post::ok) return posted;
  ++counters_[op.link].frames_sent;
  op.started_ns = now();
  op.state = OpState::posted;
  op.awaits_fin = true;
  if (inline_bytes) {
    op.path = Path::eager;
    counters_[op.link].bytes_sent += op.nbytes;
  }
  return Post::ok;
}

Post Engine::send_get(Op& op, Peer& peer) {
  const bool by_adapters = peer.link->takes_offers();
  if (op.gpu && by_adapters && reach(op, peer, Access::local) == Hold::pending) return Post::again;
  if (by_key(op, peer)) return access(op, peer);
  if (has_rows(op) && (by_adapters || (!op.gpu && !shares_memory(peer)))) return not_by_rows(op);
  FrameHeader h{};
  h.kind = FrameKind::get;
  h.flags = op.gpu && op.nbytes ? kDevice : 0;
  if (has_rows(op)) {
    h.flags |= kRows;
    h.address = op.reach;
  }
  h.channel = op.scope->wire;
  h.cls = op.scope->cls;
  h.weight = packed_weight(op.scope->weight);
  h.tag = static_cast<int64_t>(op.offset);
  h.nbytes = op.nbytes;
  h.sop = op.region;
  h.rop = op.id;
  h.code = static_cast<uint8_t>(
      peer.link->pull_path({0, 0}));  // tells the owner whether we can read for ourselves
  if (op.listed) {
    h.flags |= kListed;
    h.payload_bytes = op.list_bytes;
  }
  Post posted = peer.link->post(h, nullptr, op.own.get(), Wake::engine);
  if (posted != Post::ok) return posted;
  ++counters_[op.link].frames_sent;
  op.started_ns = now();
  op.state = OpState::posted;
  return Post::ok;
}

// Whether a peer may read our memory, or we its, by copy threads: if not all of it, what is shared.
bool Engine::shares_memory(const Peer& peer) const { return peer.rank == rank_ || peer.link->process() > 0; }

// Whether a peer may be asked to fetch these rows, which ride in the frame.
bool Engine::rows_fit(const Op& op, const Peer& peer) const {
  const uint64_t nbytes = sizeof(FrameHeader) + kMaxMeta + op.rows->rows().size_bytes();
  return shares_memory(peer) && nbytes <= peer.link->frame_limit();
}

// Nobody moves rows to or from this peer's memory.
Post Engine::not_by_rows(Op& op) {
  finish(op, Code::unreachable);
  return Post::ok;
}

void Engine::send_control(Peer& peer, FrameHeader header, Wake wake, const void* meta, size_t meta_bytes) {
  if (peer.state != Peer::State::up) return;
  auto bytes = static_cast<const std::byte*>(meta);
  header.meta_bytes = static_cast<uint16_t>(meta_bytes);
  if (peer.control.empty() && peer.link->post(header, bytes, nullptr, wake) != Post::again) {
    ++counters_[peer.link_index].frames_sent;
    return;
  }
  peer.control.push_back({header, std::vector<std::byte>(bytes, bytes + meta_bytes), wake});
}

bool Engine::flush_control(Peer& peer) {
  while (!peer.control.empty()) {
    ControlFrame& frame = peer.control.front();
    if (peer.link->post(frame.header, frame.meta.data(), nullptr, frame.wake) == Post::again) return false;
    ++counters_[peer.link_index].frames_sent;
    peer.control.pop_front();
  }
  return true;
}

void Engine::send_fin(Peer& peer, OpId sop, Code code, uint64_t nbytes, Wake wake) {
  if (!sop) return;
  FrameHeader h{};
  h.kind = FrameKind::fin;
  h.sop = sop;
  h.code = static_cast<uint8_t>(code);
  h.nbytes = nbytes;
  send_control(peer, h, wake);
}

void Engine::on_writable(LinkPeer& to) {
  Peer* peer = peer_of(to);
  if (!peer || !flush_control(*peer)) return;
  peer->blocked = false;
  Scheduler& sched = *schedulers_[peer->link_index];
  flows_[peer->link_index]->each_of(peer->rank, [&](const Flow& flow) { sched.set_ready(flow.id, true); });
  pump(peer->link_index);
}

void Engine::queue_data(Op& op, Peer& peer, bool at_once) {
  op.in_sched = true;
  op.state = OpState::moving;
  if (!op.started_ns) op.started_ns = now();
  const FlowId flow = flow_of(op, peer).id;
  schedulers_[peer.link_index]->set_chunk(flow, peer.link->best_chunk());
  schedulers_[peer.link_index]->push(flow, op.id, op.nbytes, false);
  if (at_once) pump(peer.link_index);
}

void Engine::pump(uint8_t link_index) {
  Scheduler& sched = *schedulers_[link_index];
  while (auto chunk = sched.next())
    if (!post_chunk(link_index, *chunk)) break;
}

// Copies take cores. Where these are few, and a more urgent channel is open, one copy thread less works for this class,
// so that the threads that handle the urgent messages need not wait for a core. The peer copies, too.
uint32_t Engine::copy_limit(uint8_t cls) const {
  auto threads = static_cast<uint32_t>(copier_->threads());
  const bool few_cores = 2 * threads >= cores_;
  return few_cores && channels_.any_above(cls) && threads > 1 ? threads - 1 : threads;
}

// False: nothing more can be posted on this link now.
bool Engine::post_chunk(uint8_t link_index, const Scheduler::Chunk& chunk) {
  Scheduler& sched = *schedulers_[link_index];
  Op* op = find(chunk.item);
  Peer* peer = op ? find_peer(op->peer) : nullptr;
  if (!op || !peer || peer->state != Peer::State::up) {
    sched.complete(chunk.nbytes, 0, chunk.cls);
    return true;
  }
  if (op->state == OpState::queued) {
    op->in_sched = false;
    Post posted = send_header(*op, *peer);
    if (posted == Post::again) {
      op->in_sched = true;
      if (!op->holding) peer->blocked = true;
      sched.unget(chunk);
      sched.set_ready(chunk.flow, false);
      return true;
    }
    --flows_[link_index]->at(chunk.flow).headers;
    sched.complete(chunk.nbytes, 0, chunk.cls);
    return true;
  }
  if (chunk.offset + chunk.nbytes > op->ready) {  // its device has not filled it yet
    sched.unget(chunk);
    sched.set_ready(chunk.flow, false);
    return true;
  }
  if (op->path == Path::read || op->path == Path::write) return post_remote(*op, *peer, chunk);
  bool pulls = op->path == Path::cma || op->path == Path::mapped;
  if (pulls) {
    if (jobs_ >= copy_limit(chunk.cls)) {
      sched.unget(chunk);
      return false;
    }
    CopyJob job;
    job.op = op->id;
    job.peer = peer->link;
    const uint64_t skip = has_rows(*op) ? 0 : chunk.offset;
    job.from = {op->source_address + skip, op->source_segment};
    job.into = host_data(*op) + skip;
    job.nbytes = chunk.nbytes;
    job.rows = has_rows(*op) ? op->rows.get() : nullptr;
    job.offset = chunk.offset;
    job.posted_ns = now();
    job.cls = chunk.cls;
    ++op->inflight;
    ++jobs_;
    if (chunk.last) op->in_sched = false;
    // A loop that spins has nothing better to do, and is sooner at it than a thread that must be woken.
    bool here = in_loop_thread_ && (loop_spins() || hosts_copies_) && jobs_ == 1 && job.nbytes <= kSpinCopy;
    spin_copies_ |= here;
    copier_->submit(std::move(job), !here);
    return true;
  }
  FrameHeader h{};
  h.kind = FrameKind::data;
  h.sop = op->id;
  h.rop = op->remote_op;
  h.address = chunk.offset;
  h.nbytes = op->nbytes;
  h.payload_bytes = static_cast<uint32_t>(chunk.nbytes);
  switch (peer->link->post_data(h, host_data(*op) + chunk.offset, chunk.cls)) {
    case Post::again:
      sched.unget(chunk);
      sched.set_ready(chunk.flow, false);
      return true;
    case Post::pending:
      // The pair's own room bounds it, not the link's window: a peer that takes nothing would keep others from theirs.
      sched.complete(chunk.nbytes, 0, chunk.cls);
      ++op->inflight;
      break;
    case Post::ok:
      sched.complete(chunk.nbytes, 0, chunk.cls);
      op->moved += chunk.nbytes;
      counters_[link_index].bytes_sent += chunk.nbytes;
      break;
    case Post::lost:
      sched.complete(chunk.nbytes, 0, chunk.cls);
      return true;
  }
  ++counters_[link_index].frames_sent;
  if (chunk.last) op->in_sched = false;
  return true;
}

void Engine::on_sent(LinkPeer& to, OpId sop, uint64_t nbytes) {
  Peer* peer = peer_of(to);
  if (!peer) return;
  counters_[peer->link_index].bytes_sent += nbytes;
  Op* op = find(sop);  // a chunk with the link keeps it from ending
  if (!op || op->inflight == 0) return;
  --op->inflight;
  op->moved = std::min(op->moved + nbytes, op->nbytes);  // a `fin` may be sooner than this word of the link
  if (op->in_sched) schedulers_[peer->link_index]->set_chunk(flow_of(*op, *peer).id, to.best_chunk());
  if (op->state == OpState::draining) settle(*op);
  pump(peer->link_index);
}

}  // namespace aiocomm
