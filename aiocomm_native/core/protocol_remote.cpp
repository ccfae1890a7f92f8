// Bytes that devices move: memory held for them, chunks posted to them, and what comes of those.

#include <cerrno>

#include "core/engine.hpp"

namespace aiocomm {

// False: the memory cannot be reached by the device, and the op has ended with that.
bool Engine::hold(Op& op, Access access) {
  if (op.registration || op.nbytes == 0) return true;
  try {
    op.registration = links_[op.link]->hold(host_data(op), op.nbytes, access);
    return true;
  } catch (const LinkFailure& failure) {
    op.error = failure.code;
    Peer* peer = find_peer(op.peer);
    if (peer && op.remote_op && op.kind == OpKind::recv) send_fin(*peer, op.remote_op, Code::link_failed, 0);
    finish(op, Code::link_failed);
    return false;
  }
}

// False: nothing more can be posted on this link now.
bool Engine::post_remote(Op& op, Peer& peer, const Scheduler::Chunk& chunk) {
  Scheduler& sched = *schedulers_[peer.link_index];
  RemoteChunk what;
  what.op = op.id;
  what.read = op.path == Path::read;
  what.local = host_data(op) + chunk.offset;
  what.registration = op.registration;
  what.remote = {op.source_address + chunk.offset, op.source_segment};
  what.nbytes = chunk.nbytes;
  what.cls = chunk.cls;
  if (op.kind == OpKind::put) {
    if (hold_back(op, chunk)) return true;
    what.has_immediate = op.has_notify && chunk.last;
    what.immediate = kNoteMark | peer.onesided->announced;
  } else if (!what.read) {
    what.has_immediate = op.immediate != 0;
    what.immediate = op.immediate | (chunk.last ? kLastChunk : 0) | (op.chunks & 0xffff);
  }
  switch (peer.link->post_remote(what)) {
    case Post::again:
      sched.unget(chunk);
      sched.set_ready(chunk.flow, false);
      return true;
    case Post::lost:
      sched.complete(chunk.nbytes, 0, chunk.cls);
      return true;
    default:
      break;
  }
  ++op.chunks;
  ++op.inflight;
  op.inflight_bytes += chunk.nbytes;
  if (chunk.last) op.in_sched = false;
  if (op.kind == OpKind::put && what.has_immediate) announce(op, peer);
  return true;
}

// Whether this side's threads can read the peer's memory; a device's reads need it registered there.
bool Engine::can_copy_from(Peer& peer) const {
  Path path = peer.link->pull_path({});
  return path != Path::none && path != Path::read;
}

// Our send that is being written into this receive of the peer's.
Op* Engine::writing_into(Peer& peer, OpId receive) {
  Op* found = nullptr;
  ops_.for_each_live([&](Op& op) {
    if (op.kind == OpKind::send && op.path == Path::write && op.peer == peer.rank && op.remote_op == receive)
      found = &op;
  });
  return found;
}

void Engine::on_remote(LinkPeer& with, OpId id, uint64_t nbytes, int error, uint64_t elapsed_ns) {
  Peer* peer = peer_of(with);
  Op* op = peer ? find(id) : nullptr;  // its chunk in flight has kept it from ending
  if (!op || op->inflight == 0) return;
  uint8_t link_index = peer->link_index;
  schedulers_[link_index]->complete(nbytes, error ? 0 : elapsed_ns, channels_[op->channel].cls);
  --op->inflight;
  op->inflight_bytes -= nbytes;
  LinkCounters& counters = counters_[link_index];
  (op->path == Path::read ? counters.bytes_received : counters.bytes_sent) += nbytes;
  if (error && op->state != OpState::draining) {
    op->error = error;
    // The owner's device refuses a key that was revoked.
    end_early(*op, op->has_key && error == EACCES ? Code::stale : Code::link_failed);
  } else {
    op->moved += error ? 0 : nbytes;
    if (op->state == OpState::draining)
      settle(*op);
    else if (op->moved == op->nbytes)
      op->path == Path::read ? received(*op) : finish(*op, Code::ok);
    else if (op->has_key && op->inflight == 0)
      release_held_back(*op);
  }
  pump(link_index);
}

}  // namespace aiocomm
