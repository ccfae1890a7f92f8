// needs: core/c[hlm]*.cpp core/copier.cpp core/de*.cpp core/engine.cpp core/f[al][io]*.cpp core/li[ns]*.cpp core/match.cpp
// needs: core/notes.cpp core/offers.cpp core/op.cpp core/pairs.cpp core/protocol_*.cpp core/rows.cpp core/sched*.cpp
// needs: core/spin.cpp core/statistics.cpp
//
// The engine beside a link that is made by hand: it says what the other end would, when it is polled, and throws where it
// is told to. What no honest peer says closes the pair before anything is done by it; what a thread of the engine throws
// ends its operations, with the reason, and not the process.

#include "core/engine.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"

using namespace aiocomm;

namespace {

class HandPeer final : public LinkPeer {
 public:
  explicit HandPeer(Host& host) : host(host) {}
  ~HandPeer() override {
    if (at_end) at_end();
  }
  Post post(const FrameHeader& header, const std::byte* meta, const std::byte*, Wake) override {
    if (throws_in_post) throw std::runtime_error("posting is broken");
    std::lock_guard lock(mutex_);
    sent_.push_back(header);
    if (header.kind == FrameKind::offer) std::memcpy(&immediate, meta + 8, sizeof immediate);
    return Post::ok;
  }
  Post post_data(const FrameHeader&, const std::byte*, uint8_t) override {
    return Post::pending;
  }  // and stays so
  Post post_remote(const RemoteChunk&) override { return Post::pending; }
  Path pull_path(const Location&) override { return on_pull ? Path::mapped : Path::none; }
  int pull(const Location&, std::byte*, size_t) override {
    on_pull();
    return 0;
  }
  bool takes_offers() const override { return with_offers; }
  bool reaches_regions() const override { return with_regions; }
  int poll(int budget) override {
    if (on_poll) on_poll();
    const int took = std::min<int>(budget, backlog);
    backlog -= took;
    std::function<void(HandPeer&)> what;
    {
      std::lock_guard lock(mutex_);
      what = std::exchange(says_, nullptr);
    }
    if (what) what(*this);
    return took + (what ? 1 : 0);
  }
  void close() override { closed = true; }

  Host& host;
  std::atomic<bool> throws_in_post{false}, closed{false};
  std::atomic<int> backlog{0};  // frames that say nothing
  uint32_t immediate = 0;       // what writes into the receive that was offered last bring
  static inline bool with_offers = false, with_regions = false;
  std::function<void()> at_end, on_poll, on_pull;  // the latter two by any thread
  // By the next poll, under the token, of whichever thread.
  void say(std::function<void(HandPeer&)> what) {
    std::lock_guard lock(mutex_);
    says_ = std::move(what);
  }
  bool is_to_say() {
    std::lock_guard lock(mutex_);
    return says_ != nullptr;
  }
  FrameHeader last() {
    std::lock_guard lock(mutex_);
    return sent_.back();
  }

 private:
  std::mutex mutex_;
  std::deque<FrameHeader> sent_;
  std::function<void(HandPeer&)> says_;
};

std::shared_ptr<HandPeer> hand;  // the last one

class HandLink final : public Link {
 public:
  explicit HandLink(Host& host) : host_(host) {}
  std::string_view name() const override { return "hand"; }
  uint32_t hold(const std::byte*, uint64_t, Access) override { return keeps ? 1 : 0; }
  bool release(uint32_t) override { return false; }  // and never says when
  static inline bool keeps = false;
  StreamNeed streams() const override { return {}; }
  bool polled() const override { return true; }
  std::shared_ptr<LinkPeer> attach(Rank, uint64_t, const std::vector<int>&, std::string_view, bool) override {
    return hand = std::make_shared<HandPeer>(host_);
  }

 private:
  Host& host_;
};

const LinkRegistration kHand{
    "hand", 1, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<HandLink>(host); }};

// An engine, and rank 1 at the other end of a pair.
struct World {
  Engine engine;
  uint32_t channel;
  explicit World(double drain_s = 0.01, double heartbeat_s = 1)
      : engine(EngineConfig{{"hand"}, {{"drain_timeout_s", drain_s}, {"heartbeat_s", heartbeat_s}}, {}}) {
    engine.set_identity(0, 1);
    channel = engine.open_channel("", 1, 1.0);
    engine.add_peer(1, 2);
    connect();
  }
  void connect() {
    engine.attach(1, 2, "hand", {}, "", true);
    engine.start_pair(1, 2);
  }
  Op* begin(OpKind kind, std::vector<std::byte>& memory, bool synchronous = false) {
    Op* op = engine.new_op();
    op->kind = kind;
    op->peer = 1;
    op->channel = channel;
    op->data = memory.data();
    op->nbytes = op->capacity = memory.size();
    op->synchronous = synchronous;
    op->region = kind == OpKind::get || kind == OpKind::put ? 1 : 0;
    if (engine.submit(op)) ended.push_back(op);  // else it waits for whoever has the token
    return op;
  }
  void look() {
    engine.progress(false, false);
    for (Op* op; engine.take_completed(op);) ended.push_back(op);
    for (EngineEvent& event : engine.take_events()) events.push_back(std::move(event));
  }
  void say(std::function<void(HandPeer&)> what) {
    hand->say(std::move(what));
    while (hand->is_to_say()) look();
    look();
  }
  void say(const FrameHeader& header) {
    say([&](HandPeer& peer) { peer.host.sink().on_frame(peer, header, nullptr, nullptr); });
  }
  bool has_ended(const Op* op) const { return std::find(ended.begin(), ended.end(), op) != ended.end(); }
  void await(const Op* op) {
    const auto hangs = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (!has_ended(op)) {
      CHECK(std::chrono::steady_clock::now() < hangs);
      look();
      std::this_thread::yield();
    }
  }
  bool violated() { return engine.why_lost(1).starts_with(kViolation); }
  std::vector<Op*> ended;
  std::vector<EngineEvent> events;
};

FrameHeader frame(FrameKind kind, uint64_t sop, uint64_t rop, uint64_t nbytes) {
  FrameHeader header{};
  header.kind = kind;
  header.sop = sop;
  header.rop = rop;
  header.nbytes = nbytes;
  return header;
}

FrameHeader data(uint64_t rop, uint64_t at, uint32_t nbytes) {
  FrameHeader header = frame(FrameKind::data, 7, rop, 0);
  header.address = at;
  header.payload_bytes = nbytes;
  return header;
}

constexpr uint64_t kBytes = 300000;

// A get that is answered, and refused while a chunk of it is being taken in.
void a_get_that_is_refused_late() {
  World world;
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::get, memory);
  const OpId id = op->id;
  world.say(frame(FrameKind::get_ready, 7, id, kBytes));
  FrameHeader refused = frame(FrameKind::get_fail, 0, id, 0);
  refused.code = static_cast<uint8_t>(Code::stale);
  world.say([&](HandPeer& peer) {
    FrameSink& sink = peer.host.sink();
    std::byte* into = sink.data_target(peer, data(id, 0, 1000), 0);
    CHECK(into == memory.data());
    sink.on_frame(peer, refused, nullptr, nullptr);
    CHECK(op->live && op->state == OpState::draining);  // its buffer is being written
    sink.on_data(peer, data(id, 0, 1000), 1000, into);
    CHECK(!op->live);
  });
  CHECK(world.has_ended(op) && op->code == Code::peer_lost && world.violated());
}

// All bytes have come, by their number, while one lane has yet to write: some of them have come twice.
void a_chunk_that_comes_twice() {
  World world;
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::get, memory);
  const OpId id = op->id;
  world.say(frame(FrameKind::get_ready, 7, id, kBytes));
  world.say([&](HandPeer& peer) {
    FrameSink& sink = peer.host.sink();
    const FrameHeader half = data(id, 0, kBytes / 2);
    std::byte* targets[3];
    for (std::byte*& into : targets) into = sink.data_target(peer, half, 0);
    sink.on_data(peer, half, kBytes / 2, targets[0]);
    CHECK(op->live && op->state == OpState::moving);
    sink.on_data(peer, half, kBytes / 2, targets[1]);
    CHECK(op->live && op->state == OpState::draining);
    sink.on_data(peer, half, kBytes / 2, targets[2]);
    CHECK(!op->live);
  });
  CHECK(world.has_ended(op) && op->code == Code::peer_lost && world.violated());
}

// More bytes than are left have no place to go to.
void a_chunk_without_room() {
  World world;
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::get, memory);
  const OpId id = op->id;
  world.say(frame(FrameKind::get_ready, 7, id, kBytes));
  world.say([&](HandPeer& peer) {
    FrameSink& sink = peer.host.sink();
    const FrameHeader most = data(id, 0, kBytes - 10), more = data(id, 100, 11);
    sink.on_data(peer, most, kBytes - 10, sink.data_target(peer, most, 0));
    CHECK(op->live && !sink.data_target(peer, more, 0));
    CHECK(sink.data_target(peer, more, 1));  // of one whose first byte has come
    sink.on_data(peer, more, 0, memory.data());
    sink.on_data(peer, more, 11, nullptr);
  });
  CHECK(world.has_ended(op) && world.violated());
}

// Answers to what was not asked, or not so.
void answers_that_make_no_sense() {
  for (int which = 0; which < 4; ++which) {
    World world;
    std::vector<std::byte> memory(which == 3 ? 100 : kBytes);
    Op* op = world.begin(which < 2 ? OpKind::get : OpKind::send, memory, true);
    const OpId id = op->id;
    FrameHeader refused = frame(FrameKind::get_fail, 0, id, 0);
    refused.code = static_cast<uint8_t>(Code::stale);
    if (which == 0) {  // answered, then refused
      world.say(frame(FrameKind::get_ready, 7, id, kBytes));
      CHECK(!world.has_ended(op));
      world.say(refused);
    } else if (which == 1) {  // a message is given up that is none
      world.say(frame(FrameKind::stop, id, 0, 0));
    } else if (which == 2) {  // an outcome that does not exist
      FrameHeader fin = frame(FrameKind::fin, id, 0, 0);
      fin.code = 200;
      world.say(fin);
    } else {  // its bytes were in the frame
      world.say(frame(FrameKind::cts, id, 9, 0));
    }
    CHECK(world.has_ended(op) && op->code == Code::peer_lost && world.violated());
  }
}

// Both ends were idle, and then one begins something, and has the pair closed under it.
void a_pair_that_rests_and_carries() {
  World world;
  std::vector<std::byte> memory(kBytes);
  const uint64_t region = world.engine.add_region(memory.data(), kBytes, true);
  world.say(frame(FrameKind::rest, 0, 0, 0));
  CHECK(hand->last().kind == FrameKind::resting && hand->last().code == 0);
  world.say(frame(FrameKind::put_rts, 7, region, kBytes));
  CHECK(hand->last().kind == FrameKind::cts);
  CHECK(!world.engine.close_region(region));
  world.say(frame(FrameKind::resting, 0, 0, 0));
  CHECK(world.violated());
  CHECK(std::any_of(world.events.begin(), world.events.end(),
                    [](const EngineEvent& event) { return event.kind == EngineEvent::Kind::region_free; }));
}

// A chunk of what a peer reads is at its lane when the engine closes: the region is free all the same.
void a_region_that_is_read_at_the_end() {
  World world;
  std::vector<std::byte> memory(kBytes);
  const uint64_t region = world.engine.add_region(memory.data(), kBytes, true);
  world.say(frame(FrameKind::get, region, 9, kBytes));
  CHECK(hand->last().kind == FrameKind::get_ready);
  CHECK(!world.engine.close_region(region));
  world.engine.close();
  const auto events = world.engine.take_events();
  CHECK(std::any_of(events.begin(), events.end(),
                    [](const EngineEvent& event) { return event.kind == EngineEvent::Kind::region_free; }));
}

// A peer does not give the keys of two regions back, and the time for both is over at once: with the pair, which is closed for
// the first, the second is free, and the engine lives.
void two_regions_whose_keys_are_kept() {
  HandPeer::with_regions = true;
  World world(0);
  HandPeer::with_regions = false;
  std::vector<std::byte> memory(kBytes);
  uint64_t regions[2];
  for (uint64_t& region : regions) {
    region = world.engine.add_region(memory.data(), kBytes, true);
    world.say(frame(FrameKind::key_ask, 0, region, 0));
    CHECK(hand->last().kind == FrameKind::key_is);
  }
  // The engine's thread stands still meanwhile, as it lets go of another peer.
  std::atomic<bool> stands{false}, goes_on{false};
  const auto first = hand;
  world.engine.add_peer(2, 3);
  world.engine.attach(2, 3, "hand", {}, "", true);
  hand->at_end = [&] {
    stands = true;
    stands.notify_all();
    goes_on.wait(false);
  };
  hand = first;
  world.engine.detach(2, 3);
  ring_fd(world.engine.engine_fd());
  stands.wait(false);
  for (uint64_t region : regions) CHECK(!world.engine.close_region(region));
  goes_on = true;
  goes_on.notify_all();
  auto count = [&](EngineEvent::Kind kind) {
    return std::count_if(world.events.begin(), world.events.end(),
                         [&](const EngineEvent& event) { return event.kind == kind; });
  };
  while (!count(EngineEvent::Kind::peer_lost)) world.look();
  CHECK(world.engine.why_lost(1).find("was not given back") != std::string::npos);
  CHECK(count(EngineEvent::Kind::region_free) == 2);
  Op* op = world.engine.new_op();
  op->kind = OpKind::recv;
  op->peer = 2;
  op->channel = world.channel;
  op->deadline_ns = 1;  // which that thread ends
  if (world.engine.submit(op)) world.ended.push_back(op);
  world.await(op);
  CHECK(op->code == Code::deadline);
  CHECK(world.engine.why_lost(1).find("was not given back") != std::string::npos);
}

// ---------------------------------------------------------------- one outcome at both ends

constexpr uint64_t kChannel = 1469598103934665603ull;  // the one of no name, as peers know it
constexpr double kLong = 100;                          // that a test never waits for

FrameHeader word(FrameKind kind, uint64_t sop, Code code) {
  FrameHeader header = frame(kind, sop, 0, 0);
  header.code = static_cast<uint8_t>(code);
  return header;
}

FrameHeader quit(uint64_t rop, Code code) {
  FrameHeader header = word(FrameKind::quit, 0, code);
  header.rop = rop;
  return header;
}

// The answer to what was asked last: `next`, of the messages that were counted.
FrameHeader withdrawn(uint32_t next) {
  FrameHeader header = hand->last();
  CHECK(header.kind == FrameKind::withdraw);
  header.kind = FrameKind::withdrawn;
  header.sop = Place{1, next}.packed();
  return header;
}

void an_eager_message_comes(World& world, std::vector<std::byte>& memory) {
  FrameHeader message = frame(FrameKind::eager, 0, 0, 0);
  message.channel = kChannel;
  world.say(message);
  Op* next = world.begin(OpKind::recv, memory);
  world.await(next);
  CHECK(next->code == Code::ok && next->moved == 0);
}

struct Offering {
  explicit Offering(bool is = true) { HandPeer::with_offers = is; }
  ~Offering() { HandPeer::with_offers = false; }
};

// Its sender has given it up, too, before anything was written: the next message is another's.
void a_receive_that_both_give_up() {
  Offering offering;
  World world(kLong);
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::recv, memory);
  world.look();
  CHECK(hand->last().kind == FrameKind::offer);
  CHECK(world.engine.cancel(op, Code::cancelled));
  const FrameHeader answer = withdrawn(1);
  world.say(quit(answer.rop, Code::peer_cancelled));
  CHECK(world.has_ended(op) && op->code == Code::cancelled);
  world.engine.release(op);
  world.say(answer);
  an_eager_message_comes(world, memory);
}

// The link fails before the sender has answered: what comes by the next one is another's.
void a_receive_that_is_given_up_as_its_link_fails() {
  Offering offering;
  World world(kLong);
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::recv, memory);
  world.look();
  CHECK(world.engine.cancel(op, Code::cancelled));
  world.say([](HandPeer& peer) {
    peer.failure = EIO;
    peer.host.sink().on_lost(peer, "the device is gone");
  });
  CHECK(world.has_ended(op) && op->code == Code::cancelled);
  world.engine.release(op);
  world.connect();
  an_eager_message_comes(world, memory);
}

// The peer's word that all is done crosses ours that we give it up.
void a_deadline_that_comes_too_late() {
  for (Code why : {Code::deadline, Code::closed, Code::cancelled}) {
    const Code then = why == Code::cancelled ? Code::cancelled : Code::ok;  // it was promised
    for (OpKind kind : {OpKind::send, OpKind::put}) {
      World world(kLong);
      std::vector<std::byte> memory(kBytes);
      Op* op = world.begin(kind, memory);
      world.look();
      CHECK(world.engine.cancel(op, why) && !world.has_ended(op));
      CHECK(hand->last().kind == FrameKind::cancel);
      world.say(word(FrameKind::fin, op->id, Code::ok));
      CHECK(world.has_ended(op) && op->code == then);
    }
    for (bool noticed : {false, true}) {
      Offering offering;
      World world(kLong);
      std::vector<std::byte> memory(kBytes);
      auto write = [&](HandPeer& peer, uint32_t chunk, bool last) {
        peer.host.sink().on_immediate(peer, peer.immediate | chunk | (last ? kLastChunk : 0), kBytes / 2);
      };
      Op* op = world.begin(OpKind::recv, memory);
      world.look();
      if (noticed) world.say([&](HandPeer& peer) { write(peer, 0, false); });
      CHECK(world.engine.cancel(op, why) && !world.has_ended(op));
      if (noticed)
        CHECK(hand->last().kind == FrameKind::stop);
      else
        CHECK(hand->last().kind == FrameKind::withdraw);
      world.say(noticed ? quit(op->id, Code::ok) : withdrawn(1));
      if (then == Code::ok) {  // of which some is still on its way through the device
        CHECK(!world.has_ended(op));
        world.say([&](HandPeer& peer) {
          if (!noticed) write(peer, 0, false);
          write(peer, 1, true);
        });
      }
      CHECK(world.has_ended(op) && op->code == then);
      an_eager_message_comes(world, memory);
    }
  }
}

// What is written into a receive is done once the device says so, and its receiver knows: it may ask what has become of it.
void a_deadline_that_comes_while_the_last_is_written() {
  for (int error : {0, EIO}) {
    Offering offering;
    World world(kLong);
    std::vector<std::byte> memory(kBytes);
    world.say([&](HandPeer& peer) {
      FrameHeader offer = frame(FrameKind::offer, Place{1, 0}.packed(), 9, kBytes);
      offer.channel = kChannel;
      offer.segment = 1;
      std::array<std::byte, 16> meta{};
      const uint32_t immediate = 1 << 20, start = 1;
      std::memcpy(meta.data() + 8, &immediate, sizeof immediate);
      std::memcpy(meta.data() + 12, &start, sizeof start);
      offer.meta_bytes = sizeof meta;
      peer.host.sink().on_frame(peer, offer, meta.data(), nullptr);
    });
    Op* op = world.begin(OpKind::send, memory);
    world.look();
    CHECK(op->path == Path::write && op->inflight == 1);
    CHECK(world.engine.cancel(op, Code::deadline) && !world.has_ended(op));
    world.say([&](HandPeer& peer) { peer.host.sink().on_remote(peer, op->id, kBytes, error, 0); });
    CHECK(world.has_ended(op) && op->code == (error ? Code::deadline : Code::ok));
    const FrameHeader said = hand->last();
    CHECK(said.kind == FrameKind::quit && said.rop == 9);
    CHECK(said.code == static_cast<uint8_t>(error ? Code::peer_cancelled : Code::ok));
  }
}

// That it has come is known here, while a chunk of it is still with its lane.
void a_cancel_that_comes_too_late() {
  World world(kLong);
  std::vector<std::byte> memory(kBytes);
  Op* op = world.begin(OpKind::send, memory);
  world.look();
  world.say(frame(FrameKind::cts, op->id, 9, 0));
  CHECK(op->inflight == 1);
  world.say(word(FrameKind::fin, op->id, Code::ok));
  CHECK(!world.has_ended(op));
  CHECK(!world.engine.cancel(op, Code::cancelled));
  world.say([&](HandPeer& peer) { peer.host.sink().on_sent(peer, op->id, kBytes); });
  CHECK(world.has_ended(op) && op->code == Code::ok);
}

// Peers that saw the engine's thread awake, since the loop looked for it, have not rung.
void what_a_spin_leaves_unread() {
  World world(kLong, kLong);
  world.look();  // what is news already is not waited for
  Engine* one = &world.engine;
  for (int times = 0; times < 1000; ++times) {  // mostly it does sleep
    hand->backlog = 1000;
    Patience patience;
    Engine::spin({&one, 1}, 0, patience, nullptr);
    while (hand->backlog) std::this_thread::yield();
    while (one->wake_page().engine.word.load() != WakeWord::kAsleep) std::this_thread::yield();
  }
}

void broken_by(std::function<void(World&)> what, const char* why) {
  World world;
  std::vector<std::byte> memory(kBytes);
  Op* before = world.begin(OpKind::get, memory);
  Op* receive = world.begin(OpKind::recv, memory);
  what(world);
  world.await(before);
  world.await(receive);
  CHECK(before->code == Code::link_failed && receive->code == Code::link_failed);
  CHECK(world.engine.why_lost(1).find(why) != std::string::npos);
  Op* after = world.begin(OpKind::get, memory);
  world.await(after);
  CHECK(after->code == Code::link_failed);
  CHECK(hand->closed);
  world.engine.close();
}

// By the loop's thread as it submits, as it looks, and by the engine's own.
void what_a_thread_throws() {
  broken_by(
      [](World& world) {
        hand->throws_in_post = true;
        std::vector<std::byte> memory(8);
        Op* op = world.begin(OpKind::put, memory);
        world.await(op);
        CHECK(op->code == Code::link_failed);
      },
      "posting is broken");
  broken_by(
      [](World& world) { world.say([](HandPeer&) { throw std::invalid_argument("looking is broken"); }); },
      "looking is broken");
  broken_by(
      [](World& world) {
        hand->say([](HandPeer&) { throw std::bad_alloc(); });
        while (world.engine.why_lost(1).empty()) ring_fd(world.engine.engine_fd());
      },
      std::bad_alloc().what());
}

// A transfer of which each chunk's end queues the next one keeps no thread of the engine from what else it is there for.
void what_comes_while_chunks_are_copied() {
  struct Always final : Pollable {  // a descriptor that can always be read
    std::function<void()> seen;
    void on_ready(uint32_t) override { seen(); }
  } always;
  const auto by_engine = [] {
    char name[16];
    pthread_getname_np(pthread_self(), name, sizeof name);
    return std::string_view(name) == "aiocomm-engine";
  };
  std::atomic<int> chunks{0}, since_poll{0}, since_ready{0}, most{0};  // copied by the engine's thread
  World world(kLong);
  always.seen = [&] { since_ready = 0; };
  Descriptor ready;
  ready = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
  world.say([&](HandPeer& peer) {  // the engine's thread polls it already
    peer.on_poll = [&] {
      if (by_engine()) since_poll = 0;
    };
    peer.on_pull = [&] {
      if (!by_engine()) return hand->host.ring_engine();
      const uint64_t until = world.engine.now() + 30'000;  // as a chunk takes
      while (world.engine.now() < until) std::this_thread::yield();
      ++chunks;
      most = std::max({most.load(), ++since_poll, ++since_ready});
    };
    peer.host.watch(ready, EPOLLIN, &always, false);
  });
  std::vector<std::byte> memory(1);
  Op* op = world.engine.new_op();
  op->kind = OpKind::get;
  op->peer = 1;
  op->channel = world.channel;
  op->data = memory.data();  // nothing is written there
  op->nbytes = op->capacity = 1ull << 45;
  op->region = 1;
  world.engine.submit(op);
  FrameHeader answer = frame(FrameKind::get_ready, 7, op->id, op->nbytes);
  answer.code = 1;
  world.say(answer);
  while (chunks < 200) world.look();
  CHECK(most == 1);
  world.engine.cancel(op, Code::cancelled);
  world.await(op);
  world.say([&](HandPeer& peer) { peer.host.unwatch(ready, false); });
}

// Memory that a link is giving back when that happens, or is to give back then: nobody is left to tell when that is over.
void what_is_given_back_as_a_thread_throws() {
  Offering offering;
  HandLink::keeps = true;
  World world(kLong);
  std::vector<std::byte> memory(kBytes), other(kBytes);
  Op* written = world.begin(OpKind::recv, memory);
  world.look();
  world.say([](HandPeer& peer) { peer.host.sink().on_immediate(peer, peer.immediate | kLastChunk, kBytes); });
  CHECK(written->letting_go && !world.has_ended(written));
  Op* waiting = world.begin(OpKind::recv, other);
  world.look();
  CHECK(waiting->registration);
  hand->say([](HandPeer&) { throw std::bad_alloc(); });
  while (world.engine.why_lost(1).empty()) ring_fd(world.engine.engine_fd());
  world.await(written);
  world.await(waiting);
  CHECK(written->code == Code::ok && waiting->code == Code::link_failed);
  HandLink::keeps = false;
}

}  // namespace

int main() {
  a_get_that_is_refused_late();
  a_chunk_that_comes_twice();
  a_chunk_without_room();
  answers_that_make_no_sense();
  a_pair_that_rests_and_carries();
  a_region_that_is_read_at_the_end();
  two_regions_whose_keys_are_kept();
  a_receive_that_both_give_up();
  a_receive_that_is_given_up_as_its_link_fails();
  a_deadline_that_comes_too_late();
  a_deadline_that_comes_while_the_last_is_written();
  a_cancel_that_comes_too_late();
  what_a_spin_leaves_unread();
  what_a_thread_throws();
  what_comes_while_chunks_are_copied();
  what_is_given_back_as_a_thread_throws();
}
