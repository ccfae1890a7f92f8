// What a rail's poller tells a lane, without the token: it is put into the pair's inbox, and somebody is woken for it.

#include <cstring>
#include <utility>

#include "core/doorbell.hpp"
#include "core/notes.hpp"
#include "core/offers.hpp"
#include "links/rdma/clock.hpp"
#include "links/rdma/peer.hpp"
#include "links/rdma/wire.hpp"

namespace aiocomm::rdma {

std::string Lane::name() const {
  return "rdma/" + rail.port().device + ":" + std::to_string(rail.port().number);
}

void Lane::arrived(uint32_t slot, uint32_t nbytes, const std::byte* data) {
  Prefix prefix{};
  if (nbytes >= sizeof prefix) std::memcpy(&prefix, data, sizeof prefix);
  peer.put({RdmaPeer::Event::Kind::frame, index, slot, nbytes, {}}, static_cast<Wake>(prefix.wake));
}

void Lane::immediate(uint32_t value, uint32_t nbytes) {
  // With the last chunk a receive ends, or a notification is told, and a task runs; the others only have to be counted.
  peer.put({RdmaPeer::Event::Kind::immediate, index, value, nbytes, {}},
           is_note(value) || value & kLastChunk ? Wake::loop : Wake::none);
}

void Lane::frame_sent(uint32_t seq) {
  last_sign_ns.store(tick_ns(), std::memory_order_relaxed);
  peer.acks_.one(seq);
}

void Lane::chunk_done(uint32_t chunk, int error) {
  outstanding.fetch_sub(1, std::memory_order_relaxed);
  last_sign_ns.store(tick_ns(), std::memory_order_relaxed);
  peer.put({RdmaPeer::Event::Kind::chunk, index, chunk, static_cast<uint32_t>(error), {}}, Wake::engine);
}

void Lane::failed(const std::string& reason) {
  peer.put({RdmaPeer::Event::Kind::failed, index, 0, 0, reason}, Wake::engine);
}

bool Lane::moves() const {
  return outstanding.load(std::memory_order_relaxed) || peer.writes_due_.load(std::memory_order_relaxed);
}

bool Lane::expects() const {
  return outstanding.load(std::memory_order_relaxed) || peer.starved_.load(std::memory_order_acquire) ||
         (peer.active_.load(std::memory_order_relaxed) == index &&
          peer.due_.load(std::memory_order_acquire) != peer.acks_.all_before());
}

void Lane::chunk_posted() { last_sign_ns.store(tick_ns(), std::memory_order_relaxed); }

// A device whose own port is down may report nothing at all. Whoever is being posted to is no such case, nor who hears
// something: a network that loses packets makes a request take as long as it likes, and its transport counts the tries.
void Lane::look(uint64_t now_ns) {
  bool due = outstanding.load(std::memory_order_relaxed) ||
             (peer.active_.load(std::memory_order_relaxed) == index &&
              peer.due_.load(std::memory_order_acquire) != peer.acks_.all_before());
  if (!due || stalled.load(std::memory_order_relaxed)) return;
  std::unique_lock idle(posting, std::try_to_lock);
  if (!idle || !silence.over(now_ns, last_sign_ns.load(std::memory_order_relaxed),
                             rail.transport().patience_ns, [this] { return heard(rail.port()); }))
    return;
  if (stalled.exchange(true)) return;
  peer.put({RdmaPeer::Event::Kind::stalled, index, 0, 0, rail.name() + ": no word of what was posted"},
           Wake::engine);
}

void Lane::attend() { peer.poll(1 << 20); }

void RdmaPeer::put(Event event, Wake wake) {
  bool many;
  {
    std::lock_guard lock(inbox_mutex_);
    if (event.kind == Event::Kind::immediate && wake == Wake::none &&
        writes_due_.load(std::memory_order_relaxed))
      wake = Wake::engine;
    inbox_frames_ += event.kind == Event::Kind::frame;
    inbox_.push_back(std::move(event));
    many = inbox_frames_ >= Rail::kCredits / 4;  // what nobody looks at uses credits up
    has_inbox_.store(true, std::memory_order_release);
  }
  if (Attending::to(this)) return;
  if (wake == Wake::loop)
    ring(host_.wake_page().loop, host_.loop_fd());
  else if (wake != Wake::none || many || starved_.load(std::memory_order_acquire))
    ring(host_.wake_page().engine, host_.engine_fd());
}

// The others of these writes wake nobody by themselves, and may be in the inbox by now.
void RdmaPeer::expect_writes(bool due) {
  bool waits;
  {
    std::lock_guard lock(inbox_mutex_);
    writes_due_.fetch_add(due ? 1 : -1, std::memory_order_relaxed);
    waits = !inbox_.empty();
  }
  if (!due) return;
  for (auto& lane : lanes_)
    if (lane->state == Lane::State::up) lane->rail.kick();
  if (waits) ring(host_.wake_page().engine, host_.engine_fd());
}

}  // namespace aiocomm::rdma
