#include "links/rdma/peer.hpp"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "links/rdma/lanes.hpp"
#include "links/rdma/link.hpp"

namespace aiocomm::rdma {

namespace {

constexpr uint64_t kPartNs =
    20000000;  // how long a pair that is closed from here waits for its last words to arrive

}  // namespace

// ---------------------------------------------------------------- life

RdmaPeer::RdmaPeer(RdmaLink& link, Rank rank, uint64_t generation, int socket, bool initiator)
    : link_(link),
      host_(link.host()),
      socket_(socket),
      heartbeat_ns_(static_cast<uint64_t>(host_.setting("heartbeat_s", 1.0) * 1e9)),
      initiator_(initiator),
      heard_ns_(host_.now()),
      said_ns_(heard_ns_),
      ticked_ns_(heard_ns_) {
  this->rank = rank;
  this->generation = generation;
}

RdmaPeer::~RdmaPeer() { shut(); }

void RdmaPeer::open(const std::vector<Address>& theirs) {
  size_t room = Rail::kCredits * size_t{Rail::kSlotBytes};
  frames_ = {static_cast<std::byte*>(std::aligned_alloc(4096, room)), std::free};
  if (!frames_) throw LinkFailure("rdma: no memory for frames", ENOMEM);
  frames_registration_ = link_.registrations().acquire(frames_.get(), room, Access::local).id;
  std::string reasons;
  int error = 0;
  for (uint32_t i = 0; i < theirs.size(); ++i) {
    auto lane = std::make_unique<Lane>(*this, *link_.rails()[i], i);
    lane->theirs = theirs[i];
    try {
      lane->pairs = lane->rail.open();
      lane->rail.add(lane->pairs, lane.get());
    } catch (const LinkFailure& failure) {  // the others will do: the handshake leaves it out
      leave_out(*lane, failure.what());
      reasons += (reasons.empty() ? "" : "; ") + lane->lacks;
      error = failure.code;
    }
    lanes_.push_back(std::move(lane));
  }
  if (std::none_of(lanes_.begin(), lanes_.end(), [](auto& lane) { return bool(lane->pairs); }))
    throw LinkFailure("rdma: " + reasons, error);
}

void RdmaPeer::start() {
  std::vector<uint32_t> hello{kHello, kVersion, static_cast<uint32_t>(lanes_.size())};
  for (auto& lane : lanes_) {
    Numbers numbers = lane->pairs.numbers();
    hello.insert(hello.end(), numbers.begin(), numbers.end());
  }
  say(hello.data(), hello.size() * sizeof hello[0]);
  host_.watch(socket_, EPOLLIN | EPOLLRDHUP, this, false);
  for (const auto& [name, reason] : link_.left_out()) host_.fallback(rank, "without " + name, reason);
}

void RdmaPeer::close() {
  if (dead_) return;
  // Closing the queue pairs takes back what the peer's device has not acknowledged.
  uint64_t until = host_.now() + kPartNs;
  try {
    while (open_ && acks_.all_before() != sent_ && host_.now() < until) {
      for (auto& lane : lanes_) lane->rail.poll();
      sched_yield();
    }
  } catch (const std::bad_alloc&) {  // for what has come; its queue pairs are closed all the same
  }
  shut();
}

void RdmaPeer::lose(const std::string& reason) {
  if (dead_) return;
  shut();
  host_.sink().on_lost(*this, reason);
}

void RdmaPeer::shut() {
  if (dead_) return;
  dead_ = true;
  for (auto& lane : lanes_) close_lane(*lane);
  link_.retire_rails();
  // No poller knows this pair any more.
  for (const Event& event : inbox_)
    if (event.kind == Event::Kind::frame) lanes_[event.lane]->rail.give_back(event.which);
  inbox_.clear();
  for (const auto& [seq, frame] : early_) lanes_[frame.lane]->rail.give_back(frame.slot);
  early_.clear();
  for (uint32_t held : {frames_registration_, ring_registration_})
    if (held) link_.registrations().release(held);
  if (socket_ >= 0) {
    host_.unwatch(socket_, false);
    ::close(socket_);
    socket_ = -1;
  }
}

// ---------------------------------------------------------------- what has come

int RdmaPeer::poll(int) { return take_in(true); }

// A chunk may be in another queue than the word that its sender leaves, or in another thread's hands.
int RdmaPeer::poll_last(int budget) {
  for (auto& lane : lanes_) lane->rail.drain();
  return poll(budget);
}

// While the peer writes to the ring, completions are mostly those of our own, and can wait.
int RdmaPeer::poll_spinning(int) { return take_in(!looks_told_ || ++looks_ % kLooksPerPoll == 0); }

int RdmaPeer::take_in(bool completions) {
  int done = 0;
  while (!dead_) {
    done += take_from_ring();
    // Where a frame has come before its turn, the one before it may stand in any queue.
    const bool looks = early_.empty() ? completions && !done : true;
    if (looks && !has_inbox_.load(std::memory_order_acquire)) {
      Attending self(this);
      for (auto& lane : lanes_) lane->rail.poll();
    }
    if (!has_inbox_.load(std::memory_order_acquire) && handled_ == events_.size()) break;
    if (handled_ == events_.size()) {
      events_.clear();
      handled_ = 0;
      std::lock_guard lock(inbox_mutex_);
      events_.swap(inbox_);
      inbox_frames_ = 0;
      has_inbox_.store(false, std::memory_order_release);
    }
    for (; handled_ < events_.size(); ++done) {
      Event event =
          std::move(events_[handled_++]);  // handling may come back here, and go on with those after it
      handle(event);
    }
    if (early_.empty()) break;  // else the frame before it came by the other queue
  }
  if (!done || dead_) return done;
  answer();
  // A frame that was sent has overtaken one that was written, which nobody is told of.
  if (ring_ && !early_.empty()) ring(host_.wake_page().engine, host_.engine_fd());
  return done;
}

void RdmaPeer::handle(Event& event) {
  switch (event.kind) {
    case Event::Kind::frame:
      return frame({event.lane, event.which, event.nbytes});
    case Event::Kind::immediate:
      if (!dead_) host_.sink().on_immediate(*this, event.which, event.nbytes);
      return;
    case Event::Kind::chunk:
      if (!dead_) chunk(*lanes_[event.lane], event.which, static_cast<int>(event.nbytes));
      return;
    case Event::Kind::stalled:
      // With nowhere else to go it is better to wait: the peer's own signs of life decide.
      if (!dead_ && another_lane(*lanes_[event.lane])) return lane_failed(*lanes_[event.lane], event.reason);
      lanes_[event.lane]->stalled.store(false);
      return;
    case Event::Kind::failed:
      if (!dead_) lane_failed(*lanes_[event.lane], event.reason);
      return;
  }
}

// To what has been taken in: the peer gets its credits back, and what waited for ours goes out.
void RdmaPeer::answer() {
  tell_credit();
  if (!dead_) unblock();
  tell_of_ring();
}

void RdmaPeer::violated(const char* what) { lose(std::string("protocol violation: ") + what); }

void RdmaPeer::unblock() {
  if (!open_) return;
  bool streaming = streamed_.payload != nullptr;
  stream();
  if (streaming && !streamed_.payload)
    host_.sink().on_sent(*this, streamed_.header.sop, streamed_.header.payload_bytes);
  if (dead_) return;
  bool frames = blocked_ && has_credit(kReserve);
  bool bulk = remote_blocked_ && !streamed_.payload && best_lane(0, kNoNode);
  if (!frames && !bulk) return;
  if (frames) {
    blocked_ = false;
    starved_.store(false, std::memory_order_release);
  }
  if (bulk) remote_blocked_ = false;
  host_.sink().on_writable(*this);
}

// ---------------------------------------------------------------- the socket: handshake and signs of life

void RdmaPeer::on_ready(uint32_t) { read_socket(); }

void RdmaPeer::read_socket() {
  std::byte buffer[4096];
  while (!dead_) {
    ssize_t n = ::recv(socket_, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
      // What the peer had sent has been acknowledged, or is lost with it.
      std::string reason = n == 0 ? "the peer closed the connection" : strerror(errno);
      while (!dead_ && poll_last(1 << 20) > 0) {
      }
      return lose(reason);
    }
    heard_ns_ = host_.now();
    if (!handshake(buffer, static_cast<size_t>(n))) return;
  }
}

bool RdmaPeer::handshake(const std::byte* data, size_t nbytes) {
  incoming_.insert(incoming_.end(), data, data + nbytes);
  if (!greeted_ && !greet()) return !dead_;
  size_t used = 0;
  while (used < incoming_.size() && !dead_) {
    size_t taken = word(incoming_.data() + used, incoming_.size() - used);
    if (!taken) break;
    used += taken;
  }
  if (dead_) return false;
  incoming_.erase(incoming_.begin(), incoming_.begin() + static_cast<std::ptrdiff_t>(used));
  begin();
  return !dead_;
}

bool RdmaPeer::greet() {
  std::vector<uint32_t> hello(3 + kQueuePairs * lanes_.size());
  const size_t nbytes = hello.size() * sizeof hello[0];
  if (incoming_.size() < nbytes) return false;
  std::memcpy(hello.data(), incoming_.data(), nbytes);
  incoming_.erase(incoming_.begin(), incoming_.begin() + static_cast<std::ptrdiff_t>(nbytes));
  if (hello[0] != kHello || hello[1] != kVersion || hello[2] != lanes_.size()) {
    violated("a greeting of another version");
    return false;
  }
  greeted_ = true;
  for (auto& lane : lanes_) {
    if (lane->state == Lane::State::failed) continue;
    Numbers numbers;
    std::copy_n(hello.begin() + 3 + kQueuePairs * lane->index, kQueuePairs, numbers.begin());
    if (numbers[0])
      connect(*lane, numbers, false);
    else
      leave_out(*lane, lane->rail.name() + ": the peer's device there is out of use");
  }
  get_ready();
  return !dead_;
}

// Once no thread connects a lane any more.
void RdmaPeer::get_ready() {
  if (std::any_of(lanes_.begin(), lanes_.end(), [](auto& lane) { return lane->connecting != nullptr; }))
    return;
  Lane* nearest = nearest_lane();
  if (!nearest) {
    std::string reasons;
    for (auto& lane : lanes_) reasons += (reasons.empty() ? "" : "; ") + lane->lacks;
    return no_rail(reasons);
  }
  active_ = nearest->index;
  say(&kReady, 1);
  ready_told_ = true;
  for (auto& lane : lanes_) {
    if (lane->state != Lane::State::failed) continue;
    tell_failed(*lane);
    host_.part_down(rank, lane->name(), lane->lacks);
  }
  begin();
}

void RdmaPeer::begin() {
  if (!ready_told_ || !ready_heard_ || open_) return;
  open_ = true;
  answer();  // the peer was open before, and may have used up its credits
}

// A few bytes now and then: a socket that does not take them has not been read for long, and its end is near.
void RdmaPeer::say(const void* data, size_t nbytes) {
  said_ns_ = host_.now();
  if (::send(socket_, data, nbytes, MSG_DONTWAIT | MSG_NOSIGNAL) != static_cast<ssize_t>(nbytes) &&
      nbytes > 1)
    broken_ = true;  // ends with the next tick: callers are in the middle of something
}

void RdmaPeer::tick(uint64_t now_ns) {
  if (dead_ || !heartbeat_ns_) return;
  // Whoever was away himself (suspended, stopped) has not listened: the peer gets its full time again.
  if (now_ns > ticked_ns_ + 2 * heartbeat_ns_) heard_ns_ = now_ns;
  ticked_ns_ = now_ns;
  if (now_ns > heard_ns_ + 3 * heartbeat_ns_) read_socket();
  if (dead_) return;
  if (now_ns > heard_ns_ + 3 * heartbeat_ns_) {
    char text[64];
    std::snprintf(text, sizeof text, "no sign of life for %.3g s",
                  static_cast<double>(now_ns - heard_ns_) / 1e9);
    return lose(text);
  }
  if (broken_) return lose("the pair's connection takes no more words");
  link_.look_for_devices(now_ns);
  if (dark_ns_ && now_ns > dark_ns_ + lanes_[active_]->rail.transport().patience_ns)
    return no_rail("its queue pairs could not be made anew");
  for (auto& lane : lanes_)
    if (lane->state == Lane::State::up) lane->look(now_ns);
  // A rail that has come back gets the small messages again, once none is on its way over another.
  if (open_ && !dark_ns_ && acks_.all_before() == sent_) active_ = nearest_lane()->index;
  if (now_ns - said_ns_ >= heartbeat_ns_ / 2) say(&kAlive, 1);
  if (open_ && initiator_)
    for (auto& lane : lanes_)
      if (lane->state == Lane::State::down && lane->rail.up()) try_again(*lane);
}

}  // namespace aiocomm::rdma
