// Receiver-initiated messages: a posted receive tells its source where to write, and the source writes. offers.hpp says
// which receives may be offered; here is what that means for operations.
//
//   receiver                                    sender
//   posts, offers          ── offer ──►         keeps it
//                          ◄── writes ──        sends: takes the offer; each write brings an immediate
//   counts its bytes: ends                      its device has them acknowledged: ends
//
// Giving up:
//   * A receive that is offered stays in the matcher until its source has dropped the offer (`withdraw`, `withdrawn`):
//     the message may be on its way. Its buffer is free when the source says that it writes no more (`quit`).
//   * A sender that gives up says `quit` once its device has let go: or that all had been written by then.

#include <algorithm>
#include <cstring>

#include "core/engine.hpp"

namespace aiocomm {

namespace {

struct OfferMeta {
  uint64_t seen;
  uint32_t immediate;
  uint32_t start;
};
static_assert(sizeof(OfferMeta) == 16);

constexpr uint64_t kMaxRoom = 1ull << 56;

// An illegal call of the pure classes, made by what the peer sent.
template <class F>
auto by_peer(F&& f) {
  try {
    return f();
  } catch (const std::invalid_argument& illegal) {
    throw ProtocolViolation(illegal.what());
  }
}

}  // namespace

// ---------------------------------------------------------------- the receiver's side

void Engine::offer(Op& op, Peer& peer) {
  if (op.allocate || op.gpu || op.tag == kAnyTag || op.nbytes == 0 || fits_frame(op, peer)) return;
  const ChannelId channel = op.scope->wire;
  MessageKey key = key_of(op);
  if (peer.state != Peer::State::up || peer.resting || matcher_.wildcards(channel) ||
      !peer.offers->made.possible(key))
    return;
  const std::vector<OpId> later = matcher_.behind(op.id);  // posted while its memory was being registered
  if (std::any_of(later.begin(), later.end(), [&](OpId id) { return ops_.find(id)->offer != 0; })) return;
  op.link = peer.link_index;
  if (hold(op, Access::peer_writes) != Hold::ready) return;
  auto behind = static_cast<uint32_t>(later.size());
  auto ahead = static_cast<uint32_t>(matcher_.waiting(channel, op.peer, op.tag)) - 1 - behind;
  OffersMade::Made made = peer.offers->made.offer(key, op.id, op.nbytes, ahead, behind);
  op.offer = slot_of(made.immediate);
  FrameHeader h{};
  h.kind = FrameKind::offer;
  h.channel = channel;
  h.tag = op.tag;
  h.nbytes = op.nbytes;
  h.rop = op.id;
  h.sop = made.place.packed();
  h.address = reinterpret_cast<uint64_t>(op.data);
  h.segment = op.registration;
  OfferMeta meta{peer.offers->made.seen, made.immediate, made.start};
  // The sender looks for offers before it announces anything: it need not wake for one.
  send_control(peer, h, Wake::none, &meta, sizeof meta);
}

// A message is being written into the receive: it is matched.
void Engine::taken(Op& op) {
  matcher_.cancel_recv(op.id);
  op.matched = true;
  count_submitted(op, op.link);
  op.path = Path::write;
  op.capacity = op.nbytes;
  op.started_ns = now();
  if (op.state == OpState::posted) op.state = OpState::moving;
}

void Engine::drop_offer(Op& op) {
  if (!op.offer) return;
  Peer* peer = find_peer(op.peer);
  if (peer && peer->offers) {
    if (peer->offers->made.slot(op.offer).expected) peer->link->expect_writes(false);
    peer->offers->made.release(op.offer);
  }
  op.offer = 0;
}

void Engine::on_immediate(LinkPeer& from, uint32_t value, uint64_t nbytes) {
  Peer* peer = peer_of(from);
  if (!peer || !peer->offers) return;
  OffersMade::Slot* slot;
  try {
    if (is_note(value) && peer->onesided) return tell(*peer, peer->onesided->due.written(note_of(value)));
    slot = peer->offers->made.chunk(value, nbytes);
  } catch (const std::invalid_argument& illegal) {
    return tear_down(*peer, std::string("protocol violation: ") + illegal.what());
  }
  if (!slot) return;
  counters_[peer->link_index].bytes_received += nbytes;
  Op& op = *ops_.find(slot->receive);  // it gives its slot back when it ends
  if (peer->offers->made.noticed(op.offer)) taken(op);
  if (slot->overtaken && !std::exchange(slot->expected, true)) from.expect_writes(true);
  complete_offer(op, *peer);
}

void Engine::on_took(Peer& peer, const FrameHeader& header) {
  Op* op = ops_.find(header.rop);
  if (!op || op->peer != peer.rank || !op->offer) return;  // given up meanwhile
  OffersMade::Slot& slot = peer.offers->made.slot(op->offer);
  if (header.nbytes > slot.total || header.nbytes < slot.bytes)
    throw ProtocolViolation("a message of another size than was written");
  if (peer.offers->made.noticed(op->offer)) taken(*op);
  slot.total = op->nbytes = header.nbytes;
  complete_offer(*op, peer);
}

void Engine::complete_offer(Op& op, Peer& peer) {
  OffersMade::Slot& slot = peer.offers->made.slot(op.offer);
  op.moved = slot.bytes;
  // While it drains, the peer's word is awaited: a repetition may be on its way.
  if (slot.bytes == slot.total && op.state != OpState::draining) finish(op, Code::ok);
}

// The receive is given up, or one before which others are offered. True: it ends with the peer's answer.
bool Engine::withdraw(Op& op, Code code) {
  Peer* peer = find_peer(op.peer);
  if (!peer || !peer->offers || op.tag == kAnyTag) return false;
  MessageKey key = key_of(op);
  if (peer->state != Peer::State::up || !peer->offers->made.offers(key, 0)) {
    peer->offers->made.unposted(key);
    return false;
  }
  peer->offers->made.withdraw(key);
  op.code = code;
  op.state = OpState::draining;
  op.awaits_fin = true;
  FrameHeader h{};
  h.kind = FrameKind::withdraw;
  h.channel = key.channel;
  h.tag = key.tag;
  h.rop = op.id;
  send_control(*peer, h, Wake::engine);
  drain(op);
  return true;
}

void Engine::on_withdrawn(Peer& peer, const FrameHeader& header) {
  if (!peer.offers) throw ProtocolViolation("an answer to no question");
  MessageKey key{header.channel, header.tag};
  auto outcome = by_peer([&] { return peer.offers->made.withdrawn(key, Place::unpacked(header.sop)); });
  for (OpId id : outcome.taken) taken(*ops_.find(id));
  for (OpId id : outcome.dropped) ops_.find(id)->offer = 0;
  Op* op = ops_.find(header.rop);
  if (!op || op->peer != peer.rank || op->kind != OpKind::recv || op->state != OpState::draining) return;
  if (!(key_of(*op) == key)) throw ProtocolViolation("an answer to another question");
  if (!op->matched) {
    matcher_.cancel_recv(op->id);
    peer.offers->made.unposted(key);
  }
  if (header.code) return;  // it is being written into: `quit` follows
  op->awaits_fin = false;
  if (!op->matched || !written_after_all(*op, peer)) settle(*op);
}

// The source has written all of it, which it takes for done. True: it ends so once all writes have been noticed here.
bool Engine::written_after_all(Op& op, Peer& peer) {
  if (!op.offer || !may_be_done(op)) return false;
  timers_.cancel(op.id);
  op.deadline_ns = 0;
  op.code = Code::ok;
  op.state = OpState::moving;
  complete_offer(op, peer);
  return true;
}

void Engine::on_quit(Peer& peer, const FrameHeader& header) {
  Op* op = ops_.find(header.rop);
  if (!op || op->peer != peer.rank || op->kind != OpKind::recv || !peer.offers) return;
  const bool all = header.code == static_cast<uint8_t>(Code::ok);
  const bool draining = op->state == OpState::draining;
  if (!draining && !op->offer) throw ProtocolViolation("the end of a message that nobody gave up");
  if (op->offer && peer.offers->made.noticed(op->offer)) taken(*op);
  if (draining) {
    op->awaits_fin = false;
    if (!all || !written_after_all(*op, peer)) settle(*op);
  } else if (!all) {
    finish(*op, Code::peer_cancelled);
  }  // else what it was about to give up was all written
}

// ---------------------------------------------------------------- the sender's side

void Engine::on_offer(Peer& peer, const FrameHeader& header, const std::byte* bytes) {
  OfferMeta meta;
  if (!peer.offers || header.meta_bytes != sizeof meta)
    throw ProtocolViolation("an offer that makes no sense");
  std::memcpy(&meta, bytes, sizeof meta);
  if (header.tag < 0 || header.nbytes > kMaxRoom) throw ProtocolViolation("an offer of no memory");
  if (!header.segment) throw ProtocolViolation("an offer without a key");
  if (!slot_of(meta.immediate) || (meta.immediate & (kLastChunk | 0xffff)))
    throw ProtocolViolation("an offer without a slot");
  Offer offer{
      Place::unpacked(header.sop), header.rop, header.address, header.segment, header.nbytes, meta.immediate};
  by_peer([&] {
    peer.offers->held.offered({header.channel, header.tag}, meta.start != 0, meta.seen, offer);
    return 0;
  });
}

Post Engine::send_into(Op& op, Peer& peer, const Offer& next) {
  Hold held = hold(op, Access::local_reads);
  if (held == Hold::failed) return Post::ok;
  if (op.nbytes != next.capacity) {
    FrameHeader h{};
    h.kind = FrameKind::took;
    h.rop = next.receive;
    h.nbytes = op.nbytes;
    Post posted = peer.link->post(h, nullptr, nullptr, Wake::engine);
    if (posted != Post::ok) return posted;
    ++counters_[op.link].frames_sent;
  }
  Offer into = peer.offers->held.take(key_of(op));
  op.remote_op = into.receive;
  op.source_address = into.address;
  op.source_segment = into.segment;
  op.immediate = into.immediate;
  op.path = Path::write;
  op.started_ns = op.submitted_ns;
  op.state = OpState::posted;
  if (held == Hold::ready) queue_data(op, peer, false);
  return Post::ok;
}

void Engine::on_withdraw(Peer& peer, const FrameHeader& header) {
  if (!peer.offers) throw ProtocolViolation("an offer is withdrawn where there can be none");
  MessageKey key{header.channel, header.tag};
  peer.offers->held.withdraw(key);
  Op* op = writing_into(peer, header.rop);
  FrameHeader h{};
  h.kind = FrameKind::withdrawn;
  h.channel = header.channel;
  h.tag = header.tag;
  h.rop = header.rop;
  h.sop = peer.offers->held.place(key).packed();
  h.code = op != nullptr;
  send_control(peer, h, Wake::engine);
  if (op) end_early(*op, Code::peer_cancelled);
}

void Engine::send_quit(Peer& peer, OpId receive, Code code) {
  FrameHeader h{};
  h.kind = FrameKind::quit;
  h.rop = receive;
  h.code = static_cast<uint8_t>(code);
  send_control(peer, h, Wake::engine);
}

}  // namespace aiocomm
