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
#include <ctime>
#include <utility>

#include "core/doorbell.hpp"
#include "core/offers.hpp"
#include "links/rdma/lanes.hpp"
#include "links/rdma/link.hpp"

namespace aiocomm::rdma {

namespace {

constexpr uint64_t kPartNs =
    20000000;  // how long a pair that is closed from here waits for its last words to arrive
constexpr uint32_t kMaxRegistrations = 1 << 20;
constexpr uint32_t kLaunchBits = 12;
constexpr uint32_t kLaneChunks = Rail::kBulkDepth / 2;

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

// Before every frame.
struct Prefix {
  uint32_t seq;
  uint32_t consumed;  // frames of the receiver's that the sender has handed over
  uint8_t wake;       // Wake
  uint8_t keys;       // how many of these follow from `key`, for the registration that the header names
  uint16_t reserved;
  uint32_t key[kMaxRails];
  uint32_t reserved2;
};
static_assert(sizeof(Prefix) == 32);
static_assert(sizeof(Prefix) + sizeof(FrameHeader) + kMaxMeta + 4096 <= Rail::kSlotBytes);

}  // namespace

// ---------------------------------------------------------------- told by the pollers, without the token

void Lane::arrived(uint32_t slot, uint32_t nbytes, const std::byte* data) {
  Prefix prefix{};
  if (nbytes >= sizeof prefix) std::memcpy(&prefix, data, sizeof prefix);
  peer.put({RdmaPeer::Event::Kind::frame, index, slot, nbytes, {}}, static_cast<Wake>(prefix.wake));
}

void Lane::immediate(uint32_t value, uint32_t nbytes) {
  // With the last chunk a receive ends, and its task runs; the others only have to be counted.
  peer.put({RdmaPeer::Event::Kind::immediate, index, value, nbytes, {}},
           value & kLastChunk ? Wake::loop : Wake::none);
}

void Lane::frame_sent(uint32_t seq) {
  last_sign_ns.store(now_ns(), std::memory_order_relaxed);
  peer.acks_.one(seq);
}

void Lane::chunk_done(uint32_t chunk, int error) {
  outstanding.fetch_sub(1, std::memory_order_relaxed);
  last_sign_ns.store(now_ns(), std::memory_order_relaxed);
  peer.put({RdmaPeer::Event::Kind::chunk, index, chunk, static_cast<uint32_t>(error), {}}, Wake::engine);
}

void Lane::failed(const std::string& reason) {
  peer.put({RdmaPeer::Event::Kind::failed, index, 0, 0, reason}, Wake::engine);
}

bool Lane::expects() const {
  return outstanding.load(std::memory_order_relaxed) || peer.starved_.load(std::memory_order_acquire) ||
         (peer.active_.load(std::memory_order_relaxed) == index &&
          peer.due_.load(std::memory_order_acquire) != peer.acks_.all_before());
}

void Lane::chunk_posted() { last_sign_ns.store(now_ns(), std::memory_order_relaxed); }

// A device whose own port is down may report nothing at all. Whoever is being posted to is no such case.
void Lane::look(uint64_t now_ns) {
  bool due = outstanding.load(std::memory_order_relaxed) ||
             peer.due_.load(std::memory_order_acquire) != peer.acks_.all_before();
  uint64_t patience = rail.transport().patience_ns;
  if (!due || now_ns < last_sign_ns.load(std::memory_order_relaxed) + patience) return;
  std::unique_lock idle(posting, std::try_to_lock);
  if (!idle || stalled.exchange(true)) return;
  peer.put({RdmaPeer::Event::Kind::stalled, index, 0, 0, rail.name() + ": no word of what was posted"},
           Wake::engine);
}

void Lane::attend() { peer.poll(1 << 20); }

void RdmaPeer::put(Event event, Wake wake) {
  bool many;
  {
    std::lock_guard lock(inbox_mutex_);
    inbox_.push_back(std::move(event));
    many = inbox_.size() >= Rail::kCredits / 4;  // what nobody looks at uses credits up
    has_inbox_.store(true, std::memory_order_release);
  }
  if (Attending::to(this)) return;
  if (wake == Wake::loop)
    ring(host_.wake_page().loop, host_.loop_fd());
  else if (wake != Wake::none || many || starved_.load(std::memory_order_acquire))
    ring(host_.wake_page().engine, host_.engine_fd());
}

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
  for (uint32_t i = 0; i < theirs.size(); ++i) {
    auto lane = std::make_unique<Lane>(*this, *link_.rails()[i], i);
    lane->theirs = theirs[i];
    lane->pairs = lane->rail.open();
    lane->rail.add(lane->pairs, lane.get());
    lanes_.push_back(std::move(lane));
  }
}

void RdmaPeer::start() {
  std::vector<uint32_t> hello{kHello, kVersion, static_cast<uint32_t>(lanes_.size())};
  for (auto& lane : lanes_) {
    Numbers numbers = lane->pairs.numbers();
    hello.insert(hello.end(), numbers.begin(), numbers.end());
  }
  say(hello.data(), hello.size() * sizeof hello[0]);
  host_.watch(socket_, EPOLLIN | EPOLLRDHUP, this, false);
}

void RdmaPeer::close() {
  if (dead_) return;
  // Closing the queue pairs takes back what the peer's device has not acknowledged.
  uint64_t until = host_.now() + kPartNs;
  while (open_ && acks_.all_before() != sent_ && host_.now() < until) {
    for (auto& lane : lanes_) lane->rail.poll();
    sched_yield();
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
  for (auto& lane : lanes_) lane->rail.remove(lane->pairs, lane->posting);
  // No poller knows this pair any more.
  for (const Event& event : inbox_)
    if (event.kind == Event::Kind::frame) lanes_[event.lane]->rail.give_back(event.which);
  inbox_.clear();
  for (const auto& [seq, frame] : early_) lanes_[frame.lane]->rail.give_back(frame.slot);
  early_.clear();
  if (frames_registration_) link_.registrations().release(frames_registration_);
  if (socket_ >= 0) {
    host_.unwatch(socket_, false);
    ::close(socket_);
    socket_ = -1;
  }
}

// ---------------------------------------------------------------- out

Post RdmaPeer::post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) {
  if (dead_) return Post::lost;
  if (!open_ || !has_credit(kReserve)) {
    blocked_ = true;
    starved_.store(open_, std::memory_order_release);
    if (open_) lanes_[active_]->rail.kick();
    if (has_inbox_.load(std::memory_order_acquire)) ring(host_.wake_page().engine, host_.engine_fd());
    return Post::again;
  }
  emit(header, meta, payload, wake);
  return Post::ok;
}

Post RdmaPeer::post_data(const FrameHeader& header, const std::byte* payload, Wake) {
  if (dead_) return Post::lost;
  if (!open_ || streamed_.payload) {
    remote_blocked_ = true;
    return Post::again;
  }
  streamed_ = {header, payload, 0};
  stream();
  return streamed_.payload ? Post::pending : Post::ok;
}

void RdmaPeer::stream() {
  Streamed& chunk = streamed_;
  while (chunk.payload && has_credit(kReserve)) {
    FrameHeader part = chunk.header;
    part.address += chunk.done;
    part.payload_bytes =
        static_cast<uint32_t>(std::min<uint64_t>(4096, chunk.header.payload_bytes - chunk.done));
    emit(part, nullptr, chunk.payload + chunk.done, Wake::engine);
    chunk.done += part.payload_bytes;
    if (chunk.done == chunk.header.payload_bytes) chunk.payload = nullptr;
  }
}

void RdmaPeer::emit(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) {
  uint32_t seq = sent_++;
  // A loop that computes gives no credits back, nor sees those that it gets: the engine does.
  if (sent_ - consumed_there_ > Rail::kCredits / 2 || expected_ - told_ >= Rail::kCredits / 2)
    wake = Wake::engine;
  Prefix prefix{};
  prefix.seq = seq;
  prefix.consumed = told_ = expected_;
  prefix.wake = static_cast<uint8_t>(wake);
  if (Registration* named = header.segment ? link_.registrations().get(header.segment) : nullptr) {
    Keys keys = named->peer();
    prefix.keys = static_cast<uint8_t>(lanes_.size());
    std::copy_n(keys.of.begin(), lanes_.size(), prefix.key);
  }
  std::byte* at = frame_slot(seq);
  std::memcpy(at, &prefix, sizeof prefix);
  std::memcpy(at + sizeof prefix, &header, sizeof header);
  size_t nbytes = sizeof prefix + sizeof header;
  if (header.meta_bytes) std::memcpy(at + nbytes, meta, header.meta_bytes);
  nbytes += header.meta_bytes;
  if (header.payload_bytes) std::memcpy(at + nbytes, payload, header.payload_bytes);
  frame_bytes_[seq % Rail::kCredits] = static_cast<uint32_t>(nbytes + header.payload_bytes);
  if (due_.load(std::memory_order_relaxed) == acks_.all_before())
    lanes_[active_]->last_sign_ns.store(host_.now(), std::memory_order_relaxed);
  due_.store(sent_, std::memory_order_release);
  transmit(seq);
}

void RdmaPeer::transmit(uint32_t seq) {
  Lane& lane = *lanes_[active_];
  Prefix prefix;
  std::memcpy(&prefix, frame_slot(seq), sizeof prefix);
  uint32_t lkey = link_.registrations().get(frames_registration_)->local().of[lane.index];
  auto post = [&] {
    return lane.rail.post_frame(lane.pairs, static_cast<Wake>(prefix.wake), seq, frame_slot(seq),
                                frame_bytes_[seq % Rail::kCredits], lkey);
  };
  int error = post();
  if (error == ENOMEM) {  // the peer has given credits back for frames whose completions nobody has looked at
    lane.rail.drain();
    error = post();
  }
  if (error) lane.failed(lane.rail.name() + ": posting failed: " + strerror(error));
}

Lane* RdmaPeer::best_lane(uint64_t nbytes, int node) {
  std::array<LaneLoad, kMaxRails> loads;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    const Lane& lane = *lanes_[i];
    loads[i] = {lane.state == Lane::State::up && lane.chunks < kLaneChunks, lane.rail.port().node, lane.bytes,
                lane.rate};
  }
  size_t best = choose_lane(loads.data(), lanes_.size(), nbytes, node);
  return best == kNoLane ? nullptr : lanes_[best].get();
}

Post RdmaPeer::post_remote(const RemoteChunk& what) {
  if (dead_) return Post::lost;
  Registration* local = link_.registrations().get(what.registration);
  Lane* lane = open_ ? best_lane(what.nbytes, local ? local->node : kNoNode) : nullptr;
  if (!lane) {
    remote_blocked_ = true;
    return Post::again;
  }
  auto keys = remote_keys_.find(what.remote.segment);
  if (keys == remote_keys_.end() || !local) {
    lose("protocol violation: memory that was never announced");
    return Post::lost;
  }
  if (free_chunks_.empty()) {
    free_chunks_.push_back(static_cast<uint32_t>(chunks_.size()));
    chunks_.emplace_back();
  }
  uint32_t index = free_chunks_.back();
  free_chunks_.pop_back();
  Chunk& chunk = chunks_[index];
  chunk.of = what;
  chunk.local = local->local();
  chunk.remote = keys->second;
  chunk.busy = true;
  launch(index, *lane);
  return Post::pending;
}

void RdmaPeer::launch(uint32_t index, Lane& lane) {
  Chunk& chunk = chunks_[index];
  chunk.lane = lane.index;
  chunk.posted_ns = host_.now();
  chunk.parked = false;
  ++chunk.launches;
  if (lane.outstanding.fetch_add(1, std::memory_order_relaxed) == 0)
    lane.last_sign_ns.store(chunk.posted_ns, std::memory_order_relaxed);
  ++lane.chunks;
  lane.bytes += chunk.of.nbytes;
  Work work;
  work.lane = &lane;
  work.qp = lane.pairs.bulk(lane.rail.transport().level[chunk.of.cls]);
  work.posting = &lane.posting;
  work.opcode = chunk.of.read            ? IBV_WR_RDMA_READ
                : chunk.of.has_immediate ? IBV_WR_RDMA_WRITE_WITH_IMM
                                         : IBV_WR_RDMA_WRITE;
  work.local = reinterpret_cast<uint64_t>(chunk.of.local);
  work.remote = chunk.of.remote.address;
  work.lkey = chunk.local.of[lane.index];
  work.rkey = chunk.remote.of[lane.index];
  work.nbytes = static_cast<uint32_t>(chunk.of.nbytes);
  work.immediate = chunk.of.immediate;
  work.chunk = index << kLaunchBits | (chunk.launches & ((1u << kLaunchBits) - 1));
  lane.rail.post_bulk(work);
}

// ---------------------------------------------------------------- in

int RdmaPeer::poll(int) {
  int done = 0;
  while (!dead_) {
    if (!has_inbox_.load(std::memory_order_acquire)) {
      Attending self(this);
      for (auto& lane : lanes_) lane->rail.poll();
    }
    if (!has_inbox_.load(std::memory_order_acquire)) break;
    std::vector<Event> events;
    {
      std::lock_guard lock(inbox_mutex_);
      events.swap(inbox_);
      has_inbox_.store(false, std::memory_order_release);
    }
    for (Event& event : events) handle(event);
    done += static_cast<int>(events.size());
    if (early_.empty()) break;  // else the frame before it came by the other queue
  }
  if (!done || dead_) return done;
  tell_credit();
  if (!dead_) unblock();
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

void RdmaPeer::frame(const Arrived& from) {
  Rail& rail = lanes_[from.lane]->rail;
  if (dead_) return rail.give_back(from.slot);
  heard_ns_ = host_.now();
  Prefix prefix;
  if (from.nbytes < sizeof prefix + sizeof(FrameHeader)) {
    rail.give_back(from.slot);
    return violated("a frame that is too short");
  }
  std::memcpy(&prefix, rail.slot(from.slot), sizeof prefix);
  auto ahead = static_cast<int32_t>(prefix.seq - expected_);
  if (ahead < 0 ||
      early_.contains(prefix.seq)) {  // it came over a lane that failed before its word came back
    ++link_.repeated;
    return rail.give_back(from.slot);
  }
  if (ahead >= static_cast<int32_t>(Rail::kCredits)) {
    rail.give_back(from.slot);
    return violated("a frame beyond its credits");
  }
  if (ahead > 0) {
    early_[prefix.seq] = from;
    return;
  }
  if (!deliver(from)) return;
  for (auto it = early_.begin(); it != early_.end() && it->first == expected_; it = early_.begin()) {
    Arrived next = it->second;
    early_.erase(it);
    if (!deliver(next)) return;
  }
}

bool RdmaPeer::deliver(const Arrived& from) {
  Rail& rail = lanes_[from.lane]->rail;
  const std::byte* data = rail.slot(from.slot);
  Prefix prefix;
  FrameHeader header;
  std::memcpy(&prefix, data, sizeof prefix);
  std::memcpy(&header, data + sizeof prefix, sizeof header);
  const char* wrong = nullptr;
  constexpr size_t kHead = sizeof prefix + sizeof header;
  if (header.kind < FrameKind::eager || header.kind > FrameKind::link_private)
    wrong = "unknown frame kind";
  else if (header.kind == FrameKind::heartbeat || (header.kind == FrameKind::data && header.meta_bytes))
    wrong = "a frame that does not belong here";
  else if (header.meta_bytes > kMaxMeta || header.payload_bytes > 4096 ||
           from.nbytes != kHead + header.meta_bytes + header.payload_bytes)
    wrong = "a frame of another length than it says";
  else if (prefix.consumed - consumed_there_ > sent_ - consumed_there_)
    wrong = "credit for frames that were never sent";
  else if (prefix.keys > kMaxRails || (prefix.keys && header.segment > kMaxRegistrations))
    wrong = "keys of more rails than there can be";
  ++expected_;
  if (!wrong) {
    consumed_there_ = prefix.consumed;
    acks_.before(consumed_there_);
    if (prefix.keys && header.segment) {
      Keys& keys = remote_keys_[header.segment];
      keys = {};
      std::copy_n(prefix.key, prefix.keys, keys.of.begin());
    }
    if (header.kind == FrameKind::data) {
      if (std::byte* into = host_.sink().data_target(*this, header, 0)) {
        std::memcpy(into, data + kHead, header.payload_bytes);
        host_.sink().on_data(*this, header, header.payload_bytes);
      }
    } else if (header.kind != FrameKind::link_private)
      host_.sink().on_frame(*this, header, data + kHead, data + kHead + header.meta_bytes);
  }
  rail.give_back(from.slot);
  if (wrong && !dead_) violated(wrong);
  return !dead_;
}

void RdmaPeer::violated(const char* what) {
  ++link_.refused;
  lose(std::string("protocol violation: ") + what);
}

void RdmaPeer::tell_credit() {
  if (expected_ - told_ < Rail::kCredits / 2 || !open_ || !has_credit(0)) return;
  FrameHeader header{};
  header.kind = FrameKind::link_private;
  emit(header, nullptr, nullptr, Wake::engine);
}

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

void RdmaPeer::chunk(Lane& lane, uint32_t which, int error) {
  if (which == kProbe) return probed(lane, error);
  uint32_t index = which >> kLaunchBits;
  if (index >= chunks_.size()) return;
  Chunk& done = chunks_[index];
  if (!done.busy || done.parked || done.lane != lane.index ||
      ((which ^ done.launches) & ((1u << kLaunchBits) - 1)))
    return;  // of an earlier launch
  // The peer's device refused the access: it would do so on any lane.
  bool refused = error == EACCES;
  if (error) {
    if (refused) {
      done.busy = false;
      free_chunks_.push_back(index);
    }
    RemoteChunk of = done.of;
    lane_failed(lane, lane.rail.name() +
                          (refused ? ": the peer refuses access to its memory" : ": a transfer failed"));
    if (refused && !dead_) host_.sink().on_remote(*this, of.op, of.nbytes, error, 0);
    return;
  }
  --lane.chunks;
  lane.bytes -= done.of.nbytes;
  uint64_t now = host_.now();
  uint64_t elapsed = now - std::max(done.posted_ns, link_.last_done_ns);
  link_.last_done_ns = now;
  if (done.of.nbytes >= 64 << 10) {
    uint64_t began = std::max(done.posted_ns, lane.last_done_ns);
    double rate =
        static_cast<double>(done.of.nbytes) / static_cast<double>(std::max<uint64_t>(now - began, 1));
    lane.rate += 0.25 * (rate - lane.rate);
  }
  lane.last_done_ns = now;
  RemoteChunk of = done.of;
  done.busy = false;
  free_chunks_.push_back(index);
  host_.sink().on_remote(*this, of.op, of.nbytes, 0, elapsed);
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
      for (auto& lane : lanes_) lane->rail.drain();
      while (!dead_ && poll(1 << 20) > 0) {
      }
      return lose(reason);
    }
    heard_ns_ = host_.now();
    if (!handshake(buffer, static_cast<size_t>(n))) return;
  }
}

bool RdmaPeer::handshake(const std::byte* data, size_t nbytes) {
  incoming_.insert(incoming_.end(), data, data + nbytes);
  size_t used = 0;
  if (!greeted_) {
    std::vector<uint32_t> hello(3 + kQueuePairs * lanes_.size());
    if (incoming_.size() < hello.size() * sizeof hello[0]) return true;
    used = hello.size() * sizeof hello[0];
    std::memcpy(hello.data(), incoming_.data(), used);
    if (hello[0] != kHello || hello[1] != kVersion || hello[2] != lanes_.size()) {
      violated("a greeting of another version");
      return false;
    }
    greeted_ = true;
    std::string reason;
    for (auto& lane : lanes_) {
      try {
        Numbers numbers;
        std::copy_n(hello.begin() + 3 + kQueuePairs * lane->index, kQueuePairs, numbers.begin());
        lane->rail.connect(lane->pairs, lane->theirs, numbers);
        lane->state = Lane::State::up;
      } catch (const LinkFailure& failure) {
        lane->state = Lane::State::failed;
        reason = failure.what();
      }
    }
    auto first = std::find_if(lanes_.begin(), lanes_.end(),
                              [](const auto& lane) { return lane->state == Lane::State::up; });
    if (first == lanes_.end()) {
      lose(reason);
      return false;
    }
    active_ = (*first)->index;
    say(&kReady, 1);
    ready_told_ = true;
  }
  while (used < incoming_.size() && !dead_) {
    size_t taken = word(incoming_.data() + used, incoming_.size() - used);
    if (!taken) break;
    used += taken;
  }
  if (dead_) return false;
  incoming_.erase(incoming_.begin(), incoming_.begin() + static_cast<std::ptrdiff_t>(used));
  if (ready_told_ && ready_heard_ && !open_) {
    open_ = true;
    unblock();
  }
  return !dead_;
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
  for (auto& lane : lanes_)
    if (lane->state == Lane::State::up) lane->look(now_ns);
  if (now_ns - said_ns_ >= heartbeat_ns_ / 2) say(&kAlive, 1);
  if (open_ && initiator_)
    for (auto& lane : lanes_)
      if (lane->state == Lane::State::down && lane->rail.up()) try_again(*lane);
}

}  // namespace aiocomm::rdma
