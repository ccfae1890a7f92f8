// From frames to matched receives, and the rendezvous that moves what did not fit into a frame.

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/cma.hpp"
#include "core/engine.hpp"
#include "core/listed.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kHeaderCost = 64;  // what a message without bytes costs its receiver
constexpr uint64_t kHeldFactor = 4;
constexpr uint64_t kMaxMessage = 1ull << 56;  // sizes are rounded up and added to: no sum may overflow
}  // namespace

void Engine::on_frame(LinkPeer& from, const FrameHeader& header, const std::byte* meta,
                      const std::byte* payload) {
  Peer* peer = peer_of(from);
  if (!peer) return;
  ++counters_[peer->link_index].frames_received;
  if (header.kind != FrameKind::rest) peer->used = true;
  try {
    if (header.meta_bytes > kMaxMeta) throw ProtocolViolation("oversized metadata");
    switch (header.kind) {
      case FrameKind::eager:
      case FrameKind::rts:
        return arrived(*peer, header, meta, payload);
      case FrameKind::fin:
        return on_fin(*peer, header);
      case FrameKind::cts:
        return on_cts(*peer, header, meta);
      case FrameKind::cancel:
        return on_cancel(*peer, header);
      case FrameKind::stop:
        return on_stop(*peer, header);
      case FrameKind::put:
      case FrameKind::put_rts:
        return on_put(*peer, header, meta, payload);
      case FrameKind::get:
        return on_get(*peer, header, payload);
      case FrameKind::get_ready:
        return on_get_ready(*peer, header, meta);
      case FrameKind::get_fail:
        return on_get_fail(*peer, header);
      case FrameKind::credit:
        if (header.nbytes > peer->eager_unconsumed)
          throw ProtocolViolation("credit for bytes that were never sent");
        peer->eager_unconsumed -= header.nbytes;
        return;
      case FrameKind::undelivered:
        emit({EngineEvent::Kind::undelivered, peer->rank, static_cast<uint64_t>(header.tag),
              channels_.name_of(header.channel),
              header.code == static_cast<uint8_t>(Code::truncated) ? "truncated" : "refused"});
        return;
      case FrameKind::offer:
        return on_offer(*peer, header, meta);
      case FrameKind::withdraw:
        return on_withdraw(*peer, header);
      case FrameKind::withdrawn:
        return on_withdrawn(*peer, header);
      case FrameKind::took:
        return on_took(*peer, header);
      case FrameKind::quit:
        return on_quit(*peer, header);
      case FrameKind::goodbye:
        return end_peer(*peer, kLeft);
      case FrameKind::moved:
        return device_.on_moved(*peer, header);
      case FrameKind::staged:
        return device_.on_staged(*peer, header);
      case FrameKind::key_ask:
        return on_key_ask(*peer, header);
      case FrameKind::key_is:
        return on_key(*peer, header);
      case FrameKind::key_revoke:
        return on_key_revoke(*peer, header);
      case FrameKind::key_revoked:
        return on_key_revoked(*peer, header);
      case FrameKind::note:
        return on_note(*peer, header, meta);
      case FrameKind::rest:
        return on_rest(*peer);
      case FrameKind::resting:
        return on_resting(*peer, header);
      case FrameKind::heartbeat:
        return;
      case FrameKind::freed:
        return device_.on_freed(*peer, header);
      case FrameKind::soon:
        if (header.flags & kPrepare) return device_.want_rehearsal();
        return device_.expect(header.nbytes, header.flags & kOneSided);
      default:
        throw ProtocolViolation("unknown frame kind " + std::to_string(static_cast<int>(header.kind)));
    }
  } catch (const ProtocolViolation& violation) {
    tear_down(*peer, std::string("protocol violation: ") + violation.what());
  } catch (const std::bad_alloc&) {
    tear_down(*peer, "there is no memory for what it sends");
  }
}

// ---------------------------------------------------------------- matching

void Engine::start_recv(Op& op) {
  op.state = OpState::posted;
  Peer* peer = nullptr;
  if (op.peer != kAnySource) {
    peer = find_peer(op.peer);
    if (!peer) return finish(op, Code::peer_lost);
  }
  const ChannelId channel = op.scope->wire;
  auto try_match = [&]() -> bool {
    auto arrival = matcher_.post_recv(op.id, channel, op.peer, op.tag);
    if (!arrival) return false;
    const Unexpected found = take_unexpected(*arrival);
    op.matched = true;
    op.peer = found.source;
    Peer* source = find_peer(found.source);
    bool same = source && source->generation == found.generation;
    if (!same && found.header.kind == FrameKind::rts) {
      finish(op, Code::peer_lost);
      return true;
    }
    if (same) {
      deliver(op, *source, found.header, found.meta(), found.payload());
    } else {  // an eager message outlives its sender: its bytes are here
      Peer ghost;
      deliver(op, ghost, found.header, found.meta(), found.payload());
    }
    return true;
  };
  if (try_match()) return;
  if (peer && peer->offers && op.tag != kAnyTag) peer->offers->made.posted(key_of(op));
  if (peer && peer->state == Peer::State::lost) {
    matcher_.cancel_recv(op.id);
    return finish(op, Code::peer_lost);
  }
  // A dead peer is noticed only over a connection.
  if (peer && peer->state == Peer::State::known) want_connection(*peer);
  if (!peer) fail_hopeless_receives();
  if (in_loop_thread_ && op.live) {
    if (peer && peer->link)
      peer->link->poll(16);
    else
      poll_links();
  }
  if (peer && peer->offers && op.live && !op.matched && op.state == OpState::posted) offer(op, *peer);
}

void Engine::arrived(Peer& peer, const FrameHeader& header, const std::byte* meta, const std::byte* payload) {
  if (header.tag < 0) throw ProtocolViolation("negative tag");
  if (header.nbytes > kMaxMessage) throw ProtocolViolation("a message larger than any memory");
  size_t place = header.flags & kDevice ? sizeof(DevicePlace) : 0;
  if (header.meta_bytes > sizeof(Op::meta) + place) throw ProtocolViolation("oversized metadata");
  if (place && (header.kind != FrameKind::rts || header.meta_bytes < place || header.nbytes == 0))
    throw ProtocolViolation("device memory without its place");
  if (header.kind == FrameKind::eager && header.payload_bytes != header.nbytes)
    throw ProtocolViolation("eager message without all of its bytes");
  counters_[peer.link_index].bytes_received += header.payload_bytes;
  MessageKey key{header.channel, header.tag};
  if (peer.offers)
    for (OpId id : peer.offers->made.arrived(key, Place::unpacked(header.rop))) taken(*ops_.find(id));
  std::optional<OpId> op_id;
  for (;;) {
    op_id =
        matcher_.arrive({unexpected_.next_id(), header.channel, peer.rank, header.tag, header.payload_bytes});
    Op* op = op_id ? ops_.find(*op_id) : nullptr;  // the matcher is told of every end
    if (!op || op->state != OpState::draining) break;
    // A receive that is being given up and that the sender may still hold as an offer. The message came as a frame, so
    // nothing will be written into it; the next receive gets the message, unless that one has a later one on its way.
    bool others = peer.offers && peer.offers->made.offers(key, op->offer);
    op->awaits_fin = false;
    if (peer.offers) peer.offers->made.unposted(key);
    settle(*op);
    if (!others) continue;
    if (peer.offers) peer.offers->made.matched(key, false);
    return refuse(peer, header);
  }
  if (op_id) {
    Op* op = ops_.find(*op_id);
    if (peer.offers) {
      peer.offers->made.matched(key, op->peer != kAnySource && op->tag != kAnyTag);
      drop_offer(*op);
    }
    op->matched = true;
    op->peer = peer.rank;
    return deliver(*op, peer, header, meta, payload);
  }
  if (peer.offers) peer.offers->made.matched(key, false);
  Unexpected kept;
  kept.header = header;
  kept.source = peer.rank;
  kept.generation = peer.generation;
  kept.keep(meta, payload);
  const uint64_t id = unexpected_.next_id();
  unexpected_.put(std::move(kept));
  // The sender's bound may differ from ours; this one only stops a peer that keeps none.
  peer.held += kHeaderCost + header.payload_bytes;
  if (peer.held > kHeldFactor * (unexpected_max_ + (64 << 20)))
    throw ProtocolViolation("more unexpected messages than any bound allows");
  if (channels_.is_unread(header.channel, header.tag) && nobody_waits_for(header)) drop_unread(id);
}

// A message that nobody here will receive. What waits at its sender is left to that: it has it, and is told otherwise.
void Engine::drop_unread(uint64_t id) {
  matcher_.drop_arrival(id);
  const Unexpected dropped = take_unexpected(id);
  Peer* source = find_peer(dropped.source);
  if (source && source->generation == dropped.generation) owe_credit(*source, dropped.header.payload_bytes);
}

// Nobody takes the message: its sender is told.
void Engine::refuse(Peer& peer, const FrameHeader& header) {
  if (header.kind == FrameKind::eager) owe_credit(peer, header.payload_bytes);
  if (header.sop) return send_fin(peer, header.sop, Code::cancelled, 0);
  FrameHeader h{};
  h.kind = FrameKind::undelivered;
  h.channel = header.channel;
  h.tag = header.tag;
  h.code = static_cast<uint8_t>(Code::cancelled);
  send_control(peer, h, Wake::loop);
}

Unexpected Engine::take_unexpected(uint64_t id) {
  Unexpected message = unexpected_.take(id);
  if (Peer* peer = find_peer(message.source); peer && peer->generation == message.generation)
    peer->held -= kHeaderCost + message.header.payload_bytes;
  return message;
}

void Engine::deliver(Op& op, Peer& peer, const FrameHeader& header, const std::byte* meta,
                     const std::byte* payload) {
  op.tag = header.tag;
  op.capacity = op.nbytes;
  op.remote_op = header.sop;
  op.link = peer.link_index;
  if (op.gpu || op.link || op.peer == rank_) count_submitted(op, executor_of(op));  // else its sender is gone
  size_t place = header.flags & kDevice ? sizeof(DevicePlace) : 0;
  op.meta_bytes = static_cast<uint16_t>(header.meta_bytes - place);
  std::memcpy(op.meta.data(), meta, op.meta_bytes);
  if (!op.allocate && header.nbytes > op.capacity) {
    op.nbytes = header.nbytes;
    if (header.kind == FrameKind::eager) owe_credit(peer, header.payload_bytes);
    if (header.sop) {
      send_fin(peer, header.sop, Code::truncated, 0);
    } else {
      FrameHeader h{};
      h.kind = FrameKind::undelivered;
      h.channel = header.channel;
      h.tag = header.tag;
      h.code = static_cast<uint8_t>(Code::truncated);
      send_control(peer, h, Wake::loop);
    }
    return finish(op, Code::truncated);
  }
  op.nbytes = header.nbytes;
  if (op.allocate && !op.gpu && !make_room(op, header)) {
    refuse(peer, header);
    return finish(op, Code::link_failed);
  }
  if (place || (op.gpu && header.nbytes))
    return device_.deliver(op, peer, header, place ? meta + op.meta_bytes : nullptr, payload);
  if (header.kind == FrameKind::eager) return deliver_eager(op, peer, header, payload);
  start_rendezvous(op, peer, header, true);
}

void Engine::deliver_eager(Op& op, Peer& peer, const FrameHeader& header, const std::byte* payload) {
  if (header.payload_bytes) std::memcpy(op.data, payload, header.payload_bytes);
  op.moved = header.payload_bytes;
  op.path = Path::eager;
  op.started_ns = op.submitted_ns;
  owe_credit(peer, header.payload_bytes);
  send_fin(peer, header.sop, Code::ok, op.moved);
  finish(op, Code::ok);
}

bool Engine::make_room(Op& op, const FrameHeader& header) {
  const bool large = header.nbytes >= (4u << 20);
  const size_t alignment = large ? 4096 : 64;
  const size_t room = (std::max<uint64_t>(header.nbytes, 1) + alignment - 1) / alignment * alignment;
  op.data = static_cast<std::byte*>(std::aligned_alloc(alignment, room));
  if (!op.data) {
    op.error = ENOMEM;
    return false;
  }
  if (large) madvise(op.data, room, MADV_HUGEPAGE);
  return true;
}

void Engine::owe_credit(Peer& peer, uint64_t nbytes) {
  peer.credit_owed += nbytes + 64;
  if (peer.credit_owed < unexpected_max_ / 4) return;
  FrameHeader h{};
  h.kind = FrameKind::credit;
  h.nbytes = peer.credit_owed;
  peer.credit_owed = 0;
  send_control(peer, h, Wake::none);
}

// ---------------------------------------------------------------- rendezvous

// The op has a buffer and its message waits at the peer: fetch it, or (`ask`) have it pushed.
void Engine::start_rendezvous(Op& op, Peer& peer, const FrameHeader& header, bool ask) {
  Location from{header.address, header.segment};
  op.source_address = header.address;
  op.source_segment = header.segment;
  Path path = peer.link->pull_path(from);
  if (path == Path::read && op.gpu && !op.gpu->direct)
    path = Path::none;  // what lands in a bounce buffer goes on chunk by chunk
  if (!op.live || peer.state != Peer::State::up) return;  // looking for the segment found the peer dead
  op.path = path;
  op.started_ns = now();
  op.state = OpState::moving;
  if (op.nbytes == 0) {
    op.path = Path::eager;
    return received(op);
  }
  if (op.path == Path::read && hold(op, Access::local) != Hold::ready) return;
  if (op.path != Path::none) return queue_data(op, peer);
  op.path = Path::stream;
  if (ask) ask_for(op, peer, header.sop);
}

void Engine::ask_for(const Op& op, Peer& peer, OpId message) {
  FrameHeader h{};
  h.kind = FrameKind::cts;
  h.sop = message;
  h.rop = op.id;
  send_control(peer, h, Wake::engine);
}

void Engine::on_cts(Peer& peer, const FrameHeader& header, const std::byte* meta) {
  bool device = header.flags & kDevice;
  if (device && header.meta_bytes != sizeof(DevicePlace)) throw ProtocolViolation("no place to push to");
  Op* op = find(header.sop);
  if (!op || op->peer != peer.rank || op->state != OpState::posted || !op->awaits_fin) {
    if (device || header.segment) device_.send_moved(peer, header.rop, Code::cancelled, 0);
    return;  // cancelled meanwhile
  }
  if (device && !op->gpu) throw ProtocolViolation("a push from host memory");
  if (op->path == Path::eager || !op->nbytes) throw ProtocolViolation("a push of what was in its frame");
  op->remote_op = header.rop;
  if (is_on_device(*op)) return device_.on_cts(*op, peer, header, meta);
  if (has_rows(*op) || op->by_rows) throw ProtocolViolation("rows are moved by whoever writes them");
  op->path = Path::stream;
  if (peer.link->pull_path({}) == Path::cma &&
      !readable(host_data(*op), op->nbytes)) {  // it has been tried there
    op->error = EFAULT;
    return end_early(*op, Code::link_failed);
  }
  queue_data(*op, peer);
}

Op* Engine::streaming_to(Rank source, OpId rop) {
  Op* op = find(rop);
  if (!op || op->peer != source || (op->kind != OpKind::recv && op->kind != OpKind::get)) return nullptr;
  if (has_rows(*op)) return nullptr;  // they are read, never sent
  if (Peer* peer = find_peer(source); peer && !op->gpu && asked_for(*op, *peer)) {
    // Its first bytes have overtaken the answer, on a lane of their own.
    op->path = Path::stream;
    op->started_ns = now();
    op->state = OpState::moving;
  }
  if (op->written && op->state == OpState::moving && !(op->gpu && op->gpu->by_rows)) {
    Peer* peer = find_peer(source);  // it does not reach our memory, and sends the bytes over the link
    op->written = false;
    if (op->gpu) device_.stage_in(*op, *peer, false);
    if (!op->live) return nullptr;
  }
  if (op->gpu && !op->gpu->bounce) return nullptr;
  return op->state == OpState::moving && op->path == Path::stream ? op : nullptr;
}

namespace {
bool has_room(const Op& op, const FrameHeader& data) {
  return data.address <= op.nbytes && data.payload_bytes <= op.nbytes - data.address;
}
}  // namespace

std::byte* Engine::data_target(LinkPeer& from, const FrameHeader& header, uint64_t done) {
  Op* op = streaming_to(from.rank, header.rop);
  if (!op) return nullptr;
  if (!has_room(*op, header) || header.payload_bytes - done > op->nbytes - op->moved) return nullptr;
  ++op->inflight;
  return host_data(*op) + header.address + done;
}

void Engine::on_data(LinkPeer& from, const FrameHeader& header, uint64_t nbytes, const std::byte* into) {
  if (Op* held = into ? find(header.rop) : nullptr) {
    --held->inflight;
    if (held->state == OpState::draining) {
      settle(*held);
      into = nullptr;
    }
  }
  Peer* peer = peer_of(from);
  if (!peer) return;
  counters_[peer->link_index].bytes_received += nbytes;
  Op* op = nbytes ? streaming_to(from.rank, header.rop) : nullptr;
  if (!op || (!into && !has_room(*op, header))) return;
  op->moved += into ? nbytes : 0;
  op->remote_op = header.sop;
  // All have come, and another lane is still writing: a repetition, as is what had a place but no room was left for.
  if (!into || op->moved > op->nbytes || (op->moved == op->nbytes && op->inflight))
    return tear_down(*peer, "protocol violation: more bytes than the message has");
  if (op->gpu) return device_.arriving(*op, header, nbytes);
  if (op->moved == op->nbytes) received(*op);
}

void Engine::received(Op& op) {
  Peer* peer = find_peer(op.peer);
  if (op.gpu && op.gpu->direct) mover()->flush(op.gpu->device);
  if (op.listed && op.kind == OpKind::recv && !op.gpu) {
    const RegionInfo& region = regions_.at(op.region);
    const Code code = spread({op.data, op.nbytes}, {region.base, region.nbytes});
    if (code != Code::ok) {
      if (peer) send_fin(*peer, op.remote_op, code, 0);
      return finish(op, code);
    }
  }
  if (peer)
    send_fin(*peer, op.remote_op, Code::ok, op.moved, op.kind == OpKind::get ? Wake::engine : Wake::loop);
  if (op.gpu && op.gpu->role == Role::stage_in) op.path = Path::staged;
  if (op.region && op.has_notify && op.kind == OpKind::recv)
    notify(op.peer, reinterpret_cast<const std::byte*>(op.notify.data()), op.notify.size(), op.moved);
  finish(op, Code::ok);
}

}  // namespace aiocomm
