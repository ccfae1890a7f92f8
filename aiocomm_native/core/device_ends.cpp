// How transfers of device memory end, and the engine's progress by copy threads.

#include <algorithm>
#include <utility>

#include "core/engine.hpp"
#include "core/relax.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kMostLinger = 40000, kMostDue = 1000000;  // ns
}  // namespace

void DeviceProtocol::use(Mover* mover, uint8_t index, uint64_t preempt_ns) {
  mover_ = mover;
  index_ = index;
  preempt_ns_ = preempt_ns;
}

// ---------------------------------------------------------------- ends

// `error` 0: no host memory for staging.
void DeviceProtocol::fail(Op& op, int error) {
  op.error = error ? error : -1;
  if (op.kind == OpKind::serve && op.gpu->packing) return engine_.cannot_hold(op, op.error);
  if ((op.kind == OpKind::recv || op.kind == OpKind::get) && !(op.gpu && op.gpu->kernel)) {
    Peer* peer = engine_.find_peer(op.peer);
    if (op.gpu) {
      op.gpu->owes_fin = true;
      op.gpu->fin_code = static_cast<uint8_t>(Code::link_failed);
    } else if (peer) {
      engine_.send_fin(*peer, op.remote_op, Code::link_failed, 0);
    }
  }
  engine_.end_early(op, Code::link_failed);
}

// What was put off while our engine was at work, or the other side's.
void DeviceProtocol::settle(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  Peer* peer = engine_.find_peer(op.peer);
  if (!peer || peer->state != Peer::State::up) return;
  if (std::exchange(gpu.owes_moved, false))
    send_moved(*peer, op.remote_op, op.code == Code::link_failed ? Code::link_failed : Code::cancelled, 0);
  if (std::exchange(gpu.owes_fin, false))
    engine_.send_fin(*peer, op.remote_op, static_cast<Code>(gpu.fin_code), op.moved);
}

// The peer is gone.
void DeviceProtocol::forget(Peer& peer) {
  for (auto& queue : queues_)
    if (queue) queue->flows.end_peer(peer.rank);
  if (mover_ && peer.device_owner) mover_->forget(peer.device_owner);
}

void DeviceProtocol::forget(const Channel& channel) {
  for (auto& queue : queues_)
    if (queue) queue->flows.end_channel(channel);
}

void DeviceProtocol::declare(uint8_t cls, bool declared) {
  for (auto& queue : queues_)
    if (queue) queue->sched.declare(cls, declared);
}

void DeviceProtocol::freed(const Gone* memory, size_t count) {
  Engine::Token token(engine_);
  for (auto& link : engine_.links_)
    for (size_t i = 0; i < count; ++i) link->forget_device(memory[i]);
  for (auto& peer : engine_.peers_) {
    if (!peer || peer->state != Peer::State::up || peer->link->process() < 0) continue;
    for (size_t i = 0; i < count; ++i) {
      FrameHeader h{};
      h.kind = FrameKind::freed;
      h.address = memory[i].base;
      h.rop = memory[i].buffer_id;
      engine_.send_control(*peer, h, Wake::engine);
    }
  }
}

void DeviceProtocol::on_freed(Peer& peer, const FrameHeader& header) {
  if (mover_ && peer.device_owner) mover_->forget(peer.device_owner, {header.address, header.rop});
}

// Before memory is given back at close, peers whose engines write it have their word to say.
void DeviceProtocol::finish_writers() {
  uint64_t limit = engine_.now() + engine_.drain_ns_;
  auto writing = [&] {
    bool any = false;
    auto look = [&](Op& op) { any |= op.written; };
    engine_.ops_.for_each_live(look);
    engine_.served_.for_each_live(look);
    return any;
  };
  for (;;) {
    Engine::Token token(engine_);
    if (!writing()) return;
    engine_.poll_links();
    if (engine_.now() < limit) continue;
    auto give_up = [](Op& op) { op.written = false; };
    engine_.ops_.for_each_live(give_up);
    engine_.served_.for_each_live(give_up);
    return;
  }
}

void DeviceProtocol::failed(const char* why) noexcept { engine_.failed(why); }

void DeviceProtocol::stop() {
  if (mover_) mover_->stop();
}

// ---------------------------------------------------------------- statistics

// The first device's: a process rarely uses more than one.
const Scheduler& DeviceProtocol::sched_of(Lane lane, const Scheduler& otherwise) const {
  for (const auto& queue : queues_)
    if (queue && queue->lane == lane) return queue->sched;
  return otherwise;
}

uint64_t DeviceProtocol::served(const Channel& channel) const {
  uint64_t served = 0;
  for (const auto& queue : queues_)
    if (queue) served += queue->flows.served(channel);
  return served;
}

size_t DeviceProtocol::flows() const {
  size_t flows = 0;
  for (const auto& queue : queues_)
    if (queue) flows += queue->flows.size();
  return flows;
}

// ---------------------------------------------------------------- progress by copy threads

bool DeviceProtocol::assist() {
  if (engine_.stopping_.load(std::memory_order_relaxed)) return false;
  // Peers need not ring while we look. The engine's thread may have marked itself asleep meanwhile.
  if (engine_.page_->engine.word.load(std::memory_order_relaxed) == WakeWord::kAsleep)
    awake(engine_.page_->engine);
  if (engine_.loop_spins()) return false;  // it looks by itself
  if (!engine_.token_.try_lock()) return false;
  int did = 0;
  engine_.guarded([&] {
    Engine::Token token(engine_, std::adopt_lock, false);
    if (!engine_.closed_) did = engine_.poll_links();
  });
  return did > 0;
}

void DeviceProtocol::expect(uint64_t ns, bool by_engine) {
  const uint64_t due = engine_.now() + std::min(ns, kMostDue);
  if (by_engine) {
    if (engine_.spin_tries_) engine_due_ns_ = std::max(engine_due_ns_, due);
    return;
  }
  due_ns_.store(std::max(due_ns_.load(std::memory_order_relaxed), due), std::memory_order_relaxed);
  engine_.wake_loop();
}

uint64_t DeviceProtocol::take_due() {
  if (due_ns_.load(std::memory_order_relaxed) == 0) return 0;
  return due_ns_.exchange(0, std::memory_order_relaxed);
}

// The loop was woken a little before a copy ends: going to sleep once more would cost another wake-up. Its other tasks wait
// meanwhile, so this is not for long; a loop that spins does so when it has nothing else to do (Engine::spin).
void DeviceProtocol::linger() {
  if (engine_.page_->loop_spins.load(std::memory_order_relaxed)) return;
  const uint64_t t = engine_.now();
  const uint64_t until = std::min(take_due(), t + kMostLinger);
  if (until <= t || engine_.has_completed()) return;
  awake(engine_.page_->loop);
  do {
    if (engine_.token_.try_lock()) {
      engine_.guarded([&] {
        Engine::Token token(engine_, std::adopt_lock, true);
        engine_.poll_links();
      });
    }
    relax();
  } while (!engine_.has_completed() && !engine_.has_events() && engine_.now() < until);
  prepare_sleep(engine_.page_->loop);  // what comes after this look rings
  Engine::Token token(engine_, true);
  if (engine_.poll_links() >= Engine::kPollBudget)
    ring_fd(engine_.loop_fd_);  // who sent the rest saw it awake
}

// A loop that is woken a little before the end sees it at once. The sender of a message that is pulled, and the receiver
// of one that is pushed, hear of the end by a frame: theirs must be awake by then, too. Whose memory is accessed has no
// loop that waits; its engine's thread is woken, since the next access is likely to follow at once.
void DeviceProtocol::ends_soon(OpId id, uint64_t ns) {
  Engine::Token token(engine_);
  Op* op = engine_.find(id);
  if (!op || !op->gpu || op->state != OpState::moving) return;
  // Long before the end this is for loops that spin only.
  auto concerns = [&](WakePage& page) {
    return ns <= kMostLinger || page.loop_spins.load(std::memory_order_relaxed) != 0;
  };
  if (concerns(*engine_.page_)) expect(ns, false);
  Peer* peer = engine_.find_peer(op->peer);
  if (!peer || peer->state != Peer::State::up) return;
  WakePage* page = peer->link->page();
  const bool by_engine = op->kind == OpKind::put || op->kind == OpKind::get;
  if (!page || (!by_engine && !concerns(*page))) return;
  const WakeWord& sleeper = by_engine ? page->engine : page->loop;
  if (sleeper.word.load(std::memory_order_relaxed) != WakeWord::kAsleep) return;
  FrameHeader h{};
  h.kind = FrameKind::soon;
  h.flags = by_engine ? kOneSided : 0;
  h.nbytes = ns;
  engine_.send_control(*peer, h, by_engine ? Wake::engine : Wake::loop);
}

void DeviceProtocol::prepare_end(OpId id) {
  Engine::Token token(engine_);
  Op* op = engine_.find(id);
  if (!op || !op->gpu || op->state != OpState::moving) return;
  want_rehearsal();
  Peer* peer = engine_.find_peer(op->peer);
  if (!peer || peer->state != Peer::State::up || op->kind == OpKind::put || op->kind == OpKind::get) return;
  WakePage* page = peer->link->page();
  if (!page || !page->loop_spins.load(std::memory_order_relaxed)) return;
  FrameHeader h{};
  h.kind = FrameKind::soon;
  h.flags = kPrepare;
  engine_.send_control(*peer, h, Wake::none);
}

bool DeviceProtocol::loop_looks() const { return engine_.loop_spins(); }

bool DeviceProtocol::loop_away() const {
  const WakePage& page = *engine_.page_;
  return !page.loop_spins.load(std::memory_order_relaxed) ||
         page.loop.word.load(std::memory_order_relaxed) == WakeWord::kAsleep;
}

bool DeviceProtocol::end_assist() {
  prepare_sleep(engine_.page_->engine);
  Engine::Token token(engine_);
  return !engine_.closed_ && engine_.poll_links() > 0;
}

}  // namespace aiocomm
