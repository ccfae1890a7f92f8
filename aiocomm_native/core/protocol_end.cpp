// Every way an operation ends.
//
// `finish` is the only place where an op leaves the engine, and it is called only when nothing can touch the op's
// buffer any more. `end_early` decides an outcome before that is so; `settle` finishes what it left draining.

#include <algorithm>
#include <cerrno>
#include <utility>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr int kLastTurns = 1024;  // a peer that still writes must not keep us
// Far longer than devices take for what a process has with them at a time.
constexpr uint64_t kLastWritesNs = 25000000;
}  // namespace

void Engine::finish(Op& op, Code code) {
  if (op.deadline_ns || op.state == OpState::draining) timers_.cancel(op.id);
  if (op.cancel_requested) code = Code::cancelled;  // whoever cancelled was promised this end
  op.code = code;
  if (op.kind == OpKind::recv && !op.matched) matcher_.cancel_recv(op.id);  // given up, and still there
  if (op.offer) drop_offer(op);
  if (op.has_key) end_access(op);
  // Nobody tells when it is given back once the engine has failed; but then no pair is left by which a peer could write.
  if (op.registration && !links_[op.link]->release(op.registration) && fault_.empty()) {
    op.state = OpState::draining;
    op.letting_go = true;
    return;
  }
  op.registration = 0;
  op.state = OpState::ended;
  op.live = false;
  op.ended_ns = now();
  if (code == Code::ok) counters_[executor_of(op)].came(op.path, op.moved);
  if (Channel* channel = std::exchange(op.scope, nullptr)) leave(*channel);
  if (served_.find(op.id) != nullptr || (op.id >> 62) != 0) {
    uint64_t region = op.region;
    if (Peer* peer = find_peer(op.peer); op.listed && peer)
      peer->listed -= std::min(peer->listed, op.capacity);
    served_.give_back(&op);
    return region_idle(region);
  }
  // It may have ended before any link had it: unmatched, or unconnected.
  count_submitted(op, op.gpu || op.link ? executor_of(op) : usual_link(op.peer));
  counters_[op.counted_by].ended(op);
  if (&op == inline_op_) return;
  if (!overflow_.empty() || !completed_.push(&op)) {
    overflow_.push_back(&op);
    overflowed_.store(true, std::memory_order_release);
  }
  wake_loop();
}

// The link has closed and dropped what it held of this op.
void Engine::drop_inflight(Op& op) {
  if (op.inflight_bytes) schedulers_[op.link]->complete(op.inflight_bytes, 0, op.scope->cls);
  op.inflight = 0;
  op.inflight_bytes = 0;
}

// Who is slow to take what was posted, or to answer, is not lost for that, where it does not reach our memory.
bool Engine::let_go_by_link(Op& op, Peer& peer) {
  const bool sends = op.kind == OpKind::send || op.kind == OpKind::put || op.kind == OpKind::serve;
  if (!sends || op.gpu || peer.state != Peer::State::up || !peer.link->let_go(op.id)) return false;
  op.inflight = 0;
  op.awaits_fin = false;
  return settle(op);
}

bool Engine::settle(Op& op) {
  if (op.inflight || op.awaits_fin || op.letting_go || op.written) return false;
  if (op.gpu) {
    if (op.gpu->inflight) return false;
    device_.settle(op);
  }
  if (std::exchange(op.owes_word, false)) tell_other(op, op.code);
  finish(op, op.code);
  return true;
}

// Of a draining op, should all of it be done, and the other end know it: whether what has come in between, a deadline or the
// end of its channel, came too late. Who cancelled was promised that end.
bool Engine::may_be_done(const Op& op) {
  return !op.cancel_requested && (op.code == Code::deadline || op.code == Code::closed);
}

// All of a draining op is done, and the other end knows it.
void Engine::done_after_all(Op& op) {
  if (!may_be_done(op)) return;
  op.code = Code::ok;
  op.moved = op.nbytes;
}

// The word to the other end that this one has let go of its memory.
void Engine::tell_other(Op& op, Code code) {
  Peer* peer = find_peer(op.peer);
  if (!peer || peer->state != Peer::State::up || !op.remote_op) return;
  if (op.kind == OpKind::send)
    return send_quit(*peer, op.remote_op, code == Code::ok ? code : Code::peer_cancelled);
  if (code == Code::unreachable) {  // of a get; a put says so by `moved`
    send_fin(*peer, op.remote_op, Code::cancelled, 0);
  } else if (code == Code::link_failed) {
    if (op.path == Path::read) send_fin(*peer, op.remote_op, code, op.moved);  // else job_done has told
  } else if (code == Code::peer_cancelled || code == Code::peer_lost) {
    send_fin(*peer, op.remote_op, Code::cancelled, op.moved);
  } else {
    FrameHeader h{};
    h.kind = FrameKind::stop;
    h.sop = op.remote_op;
    send_control(*peer, h, Wake::engine);
  }
}

void Engine::end_early(Op& op, Code code) {
  if (op.state == OpState::draining)
    return;  // decided already; cancel_requested still turns it into `cancelled`
  Peer* peer = find_peer(op.peer);
  bool reachable = peer && peer->state == Peer::State::up;
  if (op.kind == OpKind::recv && !op.matched) {
    if (withdraw(op, code)) return;
    matcher_.cancel_recv(op.id);
    return finish(op, code);
  }
  if (op.in_sched) {
    schedulers_[op.link]->cancel(op.id);
    op.in_sched = false;
    if (op.has_key) drop_held_back(op);
    if (op.state == OpState::queued) --flow_of(op, *peer).headers;
    // What comes after it has waited for its memory, or for what its device was to bring.
    const bool kept_waiting = op.state == OpState::queued ? op.holding : op.ready < op.nbytes;
    if (kept_waiting) {
      let_flow_go_on(op);
      ring_engine();  // which posts
    }
  }
  if (op.gpu && op.gpu->in_sched) device_.cancel_move(op);
  if (op.state == OpState::queued) return finish(op, code);  // the peer never heard of it

  bool from_peer = code == Code::peer_cancelled || code == Code::peer_lost;
  op.code = code;
  op.state = OpState::draining;
  if (!reachable) op.awaits_fin = false;
  if (op.kind == OpKind::recv || op.kind == OpKind::get) {
    // Tell the source to let go; our own buffer is safe once no chunk is in flight.
    if (op.path == Path::write) {
      // The peer's device writes into our buffer: it is ours again when the peer says so.
      FrameHeader h{};
      h.kind = FrameKind::stop;
      h.rop = op.id;
      if (reachable) send_control(*peer, h, Wake::engine);
      op.awaits_fin = reachable;
      if (settle(op)) return;
      return drain(op);
    }
    // A device that still reads would find its source gone.
    op.owes_word = op.path == Path::read && op.inflight;
    if (reachable && op.remote_op && code != Code::link_failed && op.gpu && op.gpu->role == Role::pull &&
        op.gpu->inflight) {
      op.gpu->owes_fin = true;  // we still read
      op.gpu->fin_code = static_cast<uint8_t>(Code::cancelled);
    } else if (!op.owes_word) {
      tell_other(op, code);
    }
    op.awaits_fin = false;
  } else if (op.awaits_fin && reachable && !from_peer && op.kind != OpKind::serve) {
    FrameHeader h{};
    h.kind = FrameKind::cancel;
    h.sop = op.id;
    h.rop = op.remote_op;
    send_control(*peer, h, Wake::engine);
  }
  if (op.kind == OpKind::send && op.path == Path::write) op.owes_word = reachable;
  if (!settle(op)) drain(op);
}

// ---------------------------------------------------------------- the engine itself

// A thread of ours has ended with an exception: what it was at may be half done, so nothing goes on. Where ending what is
// under way fails, too, close() ends it.
void Engine::break_down(const char* why) noexcept {
  if (closed_ || !fault_.empty()) return;
  auto attempt = [](auto&& f) {
    try {
      f();
    } catch (...) {
    }
  };
  attempt([&] { fault_ = std::string("this process's engine has failed: ") + why; });
  if (fault_.empty()) fault_ = "no memory";  // it needs none of its own
  for (auto& peer : peers_)
    if (peer && peer->state != Peer::State::lost)
      attempt([&] {
        peer->state = Peer::State::lost;
        peer->lost_reason = fault_;
        peer->waiting.clear();
        if (peer->link) {
          peer->link->failure = ENOTRECOVERABLE;
          end_link(*peer, true);
        }
        drop_announced(*peer);
        if (peer->rank != rank_)
          emit({EngineEvent::Kind::peer_lost, peer->rank, peer->generation, fault_, {}});
      });
  auto end = [&](Op& op) { attempt([&] { end_early(op, Code::link_failed); }); };
  ops_.for_each_live(end);
  served_.for_each_live(end);
  attempt([&] { let_go({}); });
  ring_fd(loop_fd_);  // whatever its word says: who claimed to wake it may have died
}

void Engine::failed(const char* why) noexcept {
  Token token(*this);
  break_down(why);
}

// ---------------------------------------------------------------- draining

// Its outcome is decided; whoever holds its buffer has this long to let go.
void Engine::drain(Op& op) {
  if (op.deadline_ns) timers_.cancel(op.id);
  op.deadline_ns = now() + drain_ns_;
  start_deadline(op);
}

// A device of a peer that is gone was writing its memory. It is given nothing any more; what it was given before may still come.
void Engine::outlast(Op& op) {
  timers_.cancel(op.id);
  op.outlasts = true;
  op.deadline_ns = now() + kLastWritesNs;
  start_deadline(op);
}

// ---------------------------------------------------------------- peers

void Engine::on_unsure(LinkPeer& to, const FrameHeader& header) {
  Peer* peer = peer_of(to);
  // Of all that has ended here already; other operations end with the pair.
  if (!peer || header.kind != FrameKind::eager || header.sop) return;
  emit({EngineEvent::Kind::undelivered, peer->rank, static_cast<uint64_t>(header.tag),
        channels_.name_of(header.channel), "the link failed: it may not have arrived"});
}

void Engine::on_lost(LinkPeer& link_peer, const std::string& reason) {
  Peer* peer = peer_of(link_peer);
  if (!peer) return;
  if (peer->resting && !peer->leaving && !is_under_way(*peer)) return rest(*peer);
  if (link_peer.failure && !peer->leaving) return break_pair(*peer, reason);
  end_peer(*peer, peer->leaving ? kLeft : reason);
}

// The pair is closed by us: the other side sees a lost peer, too.
void Engine::tear_down(Peer& peer, const std::string& reason) { end_peer(peer, reason); }

void Engine::end_peer(Peer& peer, const std::string& reason) {
  if (peer.state == Peer::State::lost) return;
  if (peer.link && reason.starts_with(kViolation)) ++counters_[peer.link_index].violations;
  // What the peer has sent before its end is still delivered.
  for (int turn = 0; turn < kLastTurns && peer.link && peer.state == Peer::State::up; ++turn)
    if (peer.link->poll_last(1 << 20) <= 0) break;
  if (peer.state == Peer::State::lost) return;
  if (peer.link && peer.state == Peer::State::up && reason == kLeft) {
    FrameHeader answer{};  // closing without a word would look like a death
    answer.kind = FrameKind::goodbye;
    peer.link->post(answer, nullptr, nullptr, Wake::engine);
  }
  peer.state = Peer::State::lost;
  peer.lost_reason = reason;
  if (peer.link) {
    end_link(peer, true);
  } else {
    std::vector<Op*> live;
    ops_.for_each_live([&](Op& op) {
      if (op.peer == peer.rank) live.push_back(&op);
    });
    for (Op* op : live)
      if (op->live) end_early(*op, Code::peer_lost);
  }
  peer.waiting.clear();
  drop_announced(peer);
  if (peer.rank != rank_) emit({EngineEvent::Kind::peer_lost, peer.rank, peer.generation, reason, {}});
  fail_hopeless_receives();
  // It may have said that it wakes the loop, and have died before it did: nobody else would.
  if (!in_loop_thread_) ring_fd(loop_fd_);
}

// Its link has failed, but not the peer: what was under way has failed with it, and the next operation connects anew.
void Engine::break_pair(Peer& peer, const std::string& reason) {
  peer.lost_reason = reason;
  let_go_of_link(peer, true);
  emit({EngineEvent::Kind::link_down, peer.rank, 0, link_names_[peer.link_index], reason});
}

// The pair is as if it had never been connected, but for what has arrived. `failed`: its operations end with it.
void Engine::let_go_of_link(Peer& peer, bool failed) {
  peer.state = Peer::State::known;
  end_link(peer, failed);
  peer.link.reset();  // still among the retired: it may be on the stack
  peer.blocked = false;
  peer.eager_unconsumed = peer.credit_owed = peer.held = peer.listed = 0;
  drop_announced(peer);
  // Eager messages that came over the old link stay; no word of them goes over the new one.
  unexpected_.each([&](Unexpected& kept) {
    if (kept.source == peer.rank) kept.generation = ~0ull;
  });
}

// What the pair's link was working on ends.
void Engine::end_link(Peer& peer, bool with_ops) {
  polled_.erase(std::remove(polled_.begin(), polled_.end(), peer.link.get()), polled_.end());
  peer.link->close();
  retired_.push_back(peer.link);
  ring_engine();  // whose thread frees it
  std::vector<Op*> live;
  auto collect = [&](Op& op) {
    if (with_ops && op.peer == peer.rank) live.push_back(&op);
  };
  ops_.for_each_live(collect);
  served_.for_each_live(collect);
  for (Op* op : live) {
    if (!op->live) continue;
    op->awaits_fin = false;
    const bool outlasts = op->written && fault_.empty() && !stopping_.load(std::memory_order_relaxed);
    op->written = outlasts;
    bool device = op->path == Path::read || op->path == Path::write;  // has let go: the link is closed
    if (device || op->kind == OpKind::send || op->kind == OpKind::put || op->kind == OpKind::serve)
      drop_inflight(*op);
    op->error = peer.link->failure;
    if (op->state == OpState::draining)
      settle(*op);
    else
      end_early(*op, peer.link->failure ? Code::link_failed : Code::peer_lost);
    if (outlasts) outlast(*op);
  }
  flows_[peer.link_index]->end_peer(peer.rank);
  peer.control.clear();
  peer.offers.reset();
  peer.onesided.reset();
  forget_holder(peer.rank);
  device_.forget(peer);
}

// Announcements whose bytes stayed at the peer are void; eager messages have arrived and stay.
void Engine::drop_announced(Peer& peer) {
  auto void_now = [&](const Unexpected& kept) {
    return kept.source == peer.rank && kept.header.kind != FrameKind::eager;
  };
  for (uint64_t id : unexpected_.select(void_now)) {
    matcher_.drop_arrival(id);
    take_unexpected(id);
  }
}

void Engine::set_open(bool open) {
  Token token(*this);
  open_ = open;
  fail_hopeless_receives();
}

// A wildcard receive can still be served while anybody is left, or may come; else it would wait for ever.
void Engine::fail_hopeless_receives() {
  if (open_) return;
  bool lost = false;
  for (auto& peer : peers_) {
    if (!peer || peer->rank == rank_) continue;
    if (peer->state != Peer::State::lost) return;
    lost = true;
  }
  if (!lost) return;
  for (OpId id : matcher_.any_source_recvs())
    if (Op* op = ops_.find(id)) end_early(*op, Code::peer_lost);
}

// ---------------------------------------------------------------- ends told by the peer

void Engine::on_fin(Peer& peer, const FrameHeader& header) {
  Op* op = find(header.sop);
  if (!op || op->peer != peer.rank || !op->awaits_fin) return;
  auto code = static_cast<Code>(header.code);
  if (code > kLastCode) throw ProtocolViolation("unknown outcome");
  op->awaits_fin = false;
  const bool fetched =
      op->path == Path::none || (is_on_device(*op) && op->gpu->role == Role::stage_out && op->gpu->can_pull);
  if (op->gpu) {
    op->path = op->gpu->direct ? Path::read : op->gpu->role == Role::stage_out ? Path::staged : Path::device;
  } else if (op->path == Path::none) {
    // The peer has fetched it: where it cannot, a `cts` has said so.
    const Path reach = peer.link->pull_path({});
    const bool as_is = reach == Path::read || reach == Path::mapped;
    op->path = op->nbytes == 0 ? Path::eager
               : as_is         ? reach
                               : (op->source_segment ? Path::mapped : Path::cma);
  }
  if (fetched) {
    const uint8_t carrier = op->path == Path::device ? device_.index() : op->link;
    counters_[carrier].bytes_sent += code == Code::ok ? op->nbytes : std::min(header.nbytes, op->nbytes);
  }
  if (code == Code::cancelled || code == Code::deadline) code = Code::peer_cancelled;
  if (op->state == OpState::draining) {
    if (code == Code::ok) done_after_all(*op);
    settle(*op);
    return;
  }
  if (code == Code::ok) {
    op->moved = op->nbytes;
    // Else it was said too early, and the buffer is still being read.
    const bool staging = op->gpu && (op->gpu->inflight || op->gpu->in_sched);
    if (op->inflight == 0 && !op->in_sched && !staging) return finish(*op, Code::ok);
  }
  end_early(*op, code);
}

// The sender of message `sop` gives it up.
void Engine::on_cancel(Peer& peer, const FrameHeader& header) {
  OpId sop = header.sop;
  if (auto id = sop ? unexpected_.find(peer.rank, sop) : std::nullopt) {
    matcher_.drop_arrival(*id);
    const Unexpected kept = take_unexpected(*id);
    if (kept.header.kind == FrameKind::eager) owe_credit(peer, kept.header.payload_bytes);
    return send_fin(peer, sop, Code::cancelled, 0);
  }
  auto ours = [&](Op& op) { return op.peer == peer.rank && op.matched && op.remote_op == sop; };
  Op* found = nullptr;
  ops_.for_each_live([&](Op& op) {
    if (op.kind == OpKind::recv && ours(op)) found = &op;
  });
  if (!found)
    served_.for_each_live([&](Op& op) {
      if (op.kind == OpKind::recv && ours(op)) found = &op;
    });
  if (!found) return;  // ended here already: its `fin` is on the way
  end_early(*found, Code::peer_cancelled);
}

// The receiver of our message `sop` gives it up.
void Engine::on_stop(Peer& peer, const FrameHeader& header) {
  if (header.sop == 0 && header.rop) {  // a message that is being written into its buffer
    Op* op = writing_into(peer, header.rop);
    return op ? end_early(*op, Code::peer_cancelled) : send_quit(peer, header.rop, Code::ok);
  }
  Op* op = find(header.sop);
  if (!op || op->peer != peer.rank) return;
  if (op->kind == OpKind::recv || op->kind == OpKind::get || op->state == OpState::queued)
    throw ProtocolViolation("a message is given up that was never sent");
  op->awaits_fin = false;
  if (op->state == OpState::draining)
    settle(*op);
  else
    end_early(*op, Code::peer_cancelled);
}

}  // namespace aiocomm
