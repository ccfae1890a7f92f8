// Pairs that nobody has used for a while are closed, and connected again when one of the two has something to say.
//
//   one end                                     the other
//   idle for `pair_idle_s`     ── rest ──►      idle as well: says so, and begins nothing more
//   begins nothing more        ◄── resting ──   (else: goes on, and so does the one that asked)
//   closes                                      sees the connection end: closes, and nobody is lost
//
// Frames come in order, so whatever was sent before either word has been taken in. Operations that come meanwhile wait,
// as they do for a first connection. An end that has agreed and is left waiting closes by itself.

#include <utility>

#include "core/engine.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kPatience = 3;  // heartbeats
}

// Whether the pair carries nothing, and nothing is expected of it. A receive from this peer expects its end, too.
bool Engine::is_idle(const Peer& peer) {
  bool busy = !peer.control.empty() || peer.blocked;
  auto look = [&](Op& op) { busy = busy || op.peer == peer.rank; };
  ops_.for_each_live(look);
  served_.for_each_live(look);
  return !busy;
}

void Engine::look_at_rest(Peer& peer, uint64_t now, uint64_t heartbeat_ns) {
  if (peer.resting) {
    if (now > peer.used_ns + kPatience * heartbeat_ns && !is_under_way(peer)) rest(peer);
    return;
  }
  if (std::exchange(peer.used, false) || !peer.used_ns) peer.used_ns = now;
  if (now < peer.used_ns + rest_ns_) return;
  peer.used_ns = now;  // whatever comes of it
  if (!is_idle(peer)) return;
  FrameHeader h{};
  h.kind = FrameKind::rest;
  send_control(peer, h, Wake::engine);
  peer.resting = true;
}

void Engine::on_rest(Peer& peer) {
  bool agreed = peer.resting || is_idle(peer);
  FrameHeader h{};
  h.kind = FrameKind::resting;
  h.code = static_cast<uint8_t>(agreed ? Code::ok : Code::would_block);
  send_control(peer, h, Wake::engine);
  if (!agreed || std::exchange(peer.resting, true)) return;
  peer.used_ns = now();
}

void Engine::on_resting(Peer& peer, const FrameHeader& header) {
  if (!peer.resting) throw ProtocolViolation("an answer to no question");
  if (header.code == static_cast<uint8_t>(Code::ok) && is_under_way(peer))
    throw ProtocolViolation("a pair is idle that carries something");
  if (header.code == static_cast<uint8_t>(Code::ok)) return rest(peer);
  peer.resting = false;
  begin_waiting(peer);
}

// Whether the two ends have begun anything that would not end without the pair. None has that both said were idle.
bool Engine::is_under_way(const Peer& peer) {
  bool found = false;
  auto look = [&](Op& op) {
    if (op.peer != peer.rank || (op.state != OpState::posted && op.state != OpState::moving)) return;
    const bool alone = op.gpu && (op.gpu->kernel || (op.gpu->packing && op.kind == OpKind::put));
    found = found || (op.kind == OpKind::recv ? op.matched : !alone);
  };
  ops_.for_each_live(look);
  served_.for_each_live(look);
  return found;
}

// Closes the pair; nothing is lost by it.
void Engine::rest(Peer& peer) {
  peer.resting = false;
  peer.rested = true;
  let_go_of_link(peer, false);
  bool expected = !peer.waiting.empty();
  ops_.for_each_live([&](Op& op) { expected = expected || op.peer == peer.rank; });
  if (expected) want_connection(peer);
}

void Engine::begin_waiting(Peer& peer) {
  std::vector<OpId> waiting;
  waiting.swap(peer.waiting);
  for (OpId id : waiting)
    if (Op* op = find(id); op && op->state == OpState::queued) start_on(*op, peer);
}

}  // namespace aiocomm
