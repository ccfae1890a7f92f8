// Bytes that devices move: memory held for them, chunks posted to them, and what comes of those.

#include <cerrno>

#include "core/engine.hpp"

namespace aiocomm {

Engine::Hold Engine::hold(Op& op, Access access) {
  if (op.nbytes == 0) return Hold::ready;
  Link& link = *links_[op.link];
  try {
    if (!op.registration) op.registration = link.hold(host_data(op), extent_of(op), access);
  } catch (const LinkFailure& failure) {
    cannot_hold(op, failure.code);
    return Hold::failed;
  }
  op.holding = op.registration && !link.held(op.registration);
  return op.holding ? Hold::pending : Hold::ready;
}

Engine::Hold Engine::reach(Op& op, Peer& peer, Access access) {
  DeviceBuffer& gpu = *op.gpu;
  if (gpu.not_direct || gpu.by_rows || op.listed || op.nbytes == 0) return Hold::failed;
  Link& link = *links_[op.link];
  try {
    if (!op.registration) op.registration = link.hold_device(gpu.place, extent_of(op), access, *mover());
  } catch (const LinkFailure& failure) {
    device_.not_direct(op, peer, failure.what());
    return Hold::failed;
  }
  if (!op.registration) return Hold::failed;
  gpu.direct = true;
  op.holding = !link.held(op.registration);
  if (op.holding) return Hold::pending;
  if (!device_.wait_for_gate(op)) return Hold::ready;
  op.holding = true;  // go_on ends it
  return Hold::pending;
}

// The device does not reach the op's memory: it ends with that.
void Engine::cannot_hold(Op& op, int error) {
  op.error = error;
  Peer* peer = find_peer(op.peer);
  if (op.kind == OpKind::serve) {
    op.awaits_fin = false;
    FrameHeader h{};
    h.kind = FrameKind::get_fail;
    h.rop = op.remote_op;
    h.code = static_cast<uint8_t>(Code::link_failed);
    if (peer) send_control(*peer, h, Wake::loop);
  }
  end_early(op, Code::link_failed);
}

// An op may have ended while its memory was being registered: nothing was posted for it. It does not hold it any more.
void Engine::on_held(Link& link, uint32_t id, int error, const std::string& reason) {
  uint8_t index = link_index(std::string(link.name()));
  std::vector<OpId> waiting;
  auto waits = [&](Op& op) {
    if (op.holding && op.registration == id && op.link == index) waiting.push_back(op.id);
  };
  ops_.for_each_live(waits);
  served_.for_each_live(waits);
  for (OpId op_id : waiting) {
    Op* op = find(op_id);
    if (!op || !op->live || !op->holding) continue;
    if (op->state == OpState::draining)
      op->holding = false;
    else if (error && is_on_device(*op))
      device_.go_another_way(*op, reason);
    else if (error)
      cannot_hold(*op, error);
    else
      go_on_held(*op);
  }
  std::vector<uint64_t> asked;
  for (auto& [region_id, region] : regions_)
    if (region.registration == id && region.link == index && !region.asking.empty())
      asked.push_back(region_id);
  for (uint64_t region_id : asked) answer_askers(region_id, error, reason);
  pump(index);
}

void Engine::on_released(Link& link, uint32_t id) { let_go(Held{link_index(std::string(link.name())), id}); }

// What waited for that alone ends. Without `which`: for any memory, since the links are closed.
void Engine::let_go(std::optional<Held> which) {
  auto waits = [&](const auto& one) {
    return one.letting_go && (!which || *which == Held{one.link, one.registration});
  };
  std::vector<Op*> ops;
  ops_.for_each_live([&](Op& op) {
    if (waits(op)) ops.push_back(&op);
  });
  for (Op* op : ops) {
    op->letting_go = false;
    op->registration = 0;
    finish(*op, op->code);
  }
  std::vector<uint64_t> ids;
  for (auto& [id, region] : regions_)
    if (waits(region)) ids.push_back(id);
  for (uint64_t id : ids) {
    RegionInfo& region = regions_.at(id);
    region.letting_go = false;
    region.registration = 0;
    if (free_region(id)) emit({EngineEvent::Kind::region_free, rank_, id, {}, {}});
  }
}

void Engine::go_on_held(Op& op) {
  Peer* peer = find_peer(op.peer);
  if (op.state == OpState::queued) return let_flow_go_on(op);  // its header comes next
  op.holding = false;
  if (!peer || peer->state != Peer::State::up) return;
  if (op.gpu && op.kind == OpKind::recv)
    device_.held(op, *peer);
  else if (op.kind == OpKind::serve)
    get_ready(op, *peer, true, false);  // devices read what they have registered
  else if (op.kind == OpKind::recv && !op.matched)
    offer(op, *peer);
  else
    queue_data(op, *peer, false);
}

// Its header kept what comes after it from leaving, until its memory was there or it was given up.
void Engine::let_flow_go_on(Op& op) {
  op.holding = false;
  Peer* peer = find_peer(op.peer);
  if (closed_ || !peer || peer->state != Peer::State::up || peer->blocked) return;
  schedulers_[peer->link_index]->set_ready(flow_of(op, *peer).id, true);
}

// False: nothing more can be posted on this link now.
bool Engine::post_remote(Op& op, Peer& peer, const Scheduler::Chunk& chunk) {
  Scheduler& sched = *schedulers_[peer.link_index];
  RemoteChunk what;
  what.op = op.id;
  what.read = op.path == Path::read;
  const uint64_t skip = op.rows ? 0 : chunk.offset;
  what.local = host_data(op) + skip;
  what.registration = op.registration;
  what.remote = {op.source_address + skip, op.source_segment};
  what.rows = op.rows.get();
  what.offset = chunk.offset;
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
  schedulers_[link_index]->complete(nbytes, error ? 0 : elapsed_ns, op->scope->cls);
  --op->inflight;
  op->inflight_bytes -= nbytes;
  LinkCounters& counters = counters_[link_index];
  (op->path == Path::read ? counters.bytes_received : counters.bytes_sent) += error ? 0 : nbytes;
  if (error && op->state != OpState::draining) {
    op->error = error;
    // The owner's device refuses a key that was revoked.
    end_early(*op, op->has_key && error == EACCES ? Code::stale : Code::link_failed);
  } else {
    op->moved += error ? 0 : nbytes;
    // What was written, the other end takes for all of it.
    if (!error && op->path == Path::write && op->moved == op->nbytes) done_after_all(*op);
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
