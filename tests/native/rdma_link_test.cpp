// The rdma link between two fake runtimes in one process, over simulated adapters.
// needs: core/link.cpp core/segments.cpp links/rdma/*.cpp
// adapters: simulated

#include <dlfcn.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "fake_host.hpp"

using namespace aiocomm;
using namespace aiocomm::testing;

namespace {

const char* library() {
  const char* adapters = std::getenv("AIOCOMM_LIBIBVERBS");
  CHECK(adapters);
  return adapters;
}

// What a test does to the adapters.
template <class F>
F* adapters(const char* call) {
  static void* loaded = dlopen(library(), RTLD_NOW | RTLD_LOCAL);
  CHECK(loaded);
  void* found = dlsym(loaded, call);
  CHECK(found);
  return reinterpret_cast<F*>(found);
}

FrameHeader message(uint64_t tag) {
  FrameHeader header{};
  header.kind = FrameKind::eager;
  header.tag = static_cast<int64_t>(tag);
  return header;
}

struct Pair {
  FakeHost ha, hb;
  std::unique_ptr<Link> la, lb;
  std::shared_ptr<LinkPeer> a, b;
  explicit Pair(const char* device = " fake0 ,", const char* other = " fake0 ,") {
    ha.texts = {{"libibverbs", library()}, {"rdma_devices", device}};
    hb.texts = {{"libibverbs", library()}, {"rdma_devices", other}};
    la = make_link("rdma", ha);
    lb = make_link("rdma", hb);
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    a = la->attach(1, 1, {sockets[0]}, lb->card(), true);
    b = lb->attach(0, 1, {sockets[1]}, la->card(), false);
    a->start();
    b->start();
  }
  ~Pair() {
    for (auto* end : {a.get(), b.get()}) end->close();
  }
  bool wait(const std::function<bool()>& done) {
    return until({&ha, &hb}, [&] {
      for (auto [host, peer] : {std::pair{&ha, a.get()}, {&hb, b.get()}}) {
        std::lock_guard lock(host->token);
        peer->poll(100);
      }
      return done();
    });
  }
  void connect() {
    for (auto* end : {a.get(), b.get()})
      CHECK(end->post(message(0), nullptr, nullptr, Wake::loop) == Post::again);
    CHECK(wait([&] { return ha.writable && hb.writable; }));
  }
  bool lost() const { return !ha.lost.empty() || !hb.lost.empty(); }
};

// Either side sends as soon as it has heard that the other is ready; the other may hear it later.
void a_peer_that_hears_late_gives_credits_back() {
  Pair pair;
  auto send = [&](uint64_t tag) { return pair.a->post(message(tag), nullptr, nullptr, Wake::loop); };
  CHECK(send(0) == Post::again);  // no word of the other one yet
  // b greets, connects, and is ready; the same word of a waits in its socket from here on.
  for (int i = 0; i < 2; ++i) pair.hb.serve(false, 10000);
  CHECK(until({&pair.ha}, [&] { return pair.ha.writable > 0; }));
  uint64_t sent = 0;
  while (send(sent) == Post::ok) ++sent;
  CHECK(sent > 16);
  CHECK(until({}, [&] {
    std::lock_guard lock(pair.hb.token);
    pair.b->poll(100);
    return pair.hb.frames.size() == sent;
  }));
  CHECK(pair.ha.writable == 1);
  CHECK(until({&pair.hb}, [&] {
    std::lock_guard lock(pair.ha.token);
    pair.a->poll(100);
    return pair.ha.writable == 2;
  }));
  CHECK(send(sent) == Post::ok);
}

// A device whose queue pairs are all taken gets the next pair when it has some again, and that sends as any other.
void a_device_that_has_no_more_queue_pairs() {
  auto most = adapters<void(size_t)>("fake_verbs_pairs");
  CHECK(adapters<int()>("fake_verbs_fork_safe")());  // before anything was registered
  CHECK(adapters<int()>("fake_verbs_vectors")() >= 3);
  FakeHost host;
  host.texts = {{"libibverbs", library()}, {"rdma_devices", "fake0"}};
  auto link = make_link("rdma", host);
  int sockets[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
  std::string said;
  most(0);
  try {
    link->attach(1, 1, {sockets[0]}, link->card(), true);
  } catch (const LinkFailure& failure) {
    said = failure.what();
  }
  ::close(sockets[1]);
  CHECK(said.find("device fake0") != std::string::npos &&
        said.find("has no more of them") != std::string::npos);
  most(~size_t{0});
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
  std::shared_ptr<LinkPeer> ends[2];
  for (int side : {0, 1}) ends[side] = link->attach(1 - side, 1, {sockets[side]}, link->card(), side == 0);
  for (auto& end : ends) end->start();
  CHECK(until({&host}, [&] { return ends[0]->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok; }));
  CHECK(link->counters()["inline_sends"] == link->counters()["sends"]);
  for (auto& end : ends) end->close();
}

// A process that does not see the kernel's list of devices (a container's /sys) does not take them for removed.
void devices_that_the_kernel_never_listed() {
  Pair pair;
  pair.connect();
  {
    std::lock_guard lock(pair.ha.token);
    pair.a->tick(pair.ha.now() + 2'000'000'000);
  }
  CHECK(pair.a->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok);
  CHECK(pair.wait([&] { return pair.lost() || pair.hb.frames.size() == 1; }));
  CHECK(!pair.lost());
}

constexpr int kDeviceFatal = 8;  // IBV_EVENT_DEVICE_FATAL

// A device that breaks takes its rail with it, of pairs that are made later as well; the others go on.
void a_pair_that_is_made_without_one_of_the_rails() {
  Pair pair("fake0,fake1", "fake0,fake1");
  pair.connect();
  adapters<void(int, int)>("fake_verbs_tell")(0, kDeviceFatal);
  CHECK(pair.wait([&] { return pair.ha.parts_down == 1 && pair.hb.parts_down == 1; }));
  int sockets[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
  for (auto* end : {pair.a.get(), pair.b.get()}) end->close();
  pair.a = pair.la->attach(1, 2, {sockets[0]}, pair.lb->card(), true);
  pair.b = pair.lb->attach(0, 2, {sockets[1]}, pair.la->card(), false);
  pair.a->start();
  pair.b->start();
  CHECK(pair.wait([&] { return pair.a->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok; }));
  CHECK(pair.wait([&] { return pair.hb.frames.size() == 1; }));
  CHECK(!pair.lost());
}

// It may break before the two have greeted each other, or one of them may hear of it before.
void a_rail_that_breaks_while_the_pair_connects() {
  for (bool one_greets : {false, true}) {
    Pair pair("fake0,fake1", "fake0,fake1");
    if (one_greets) pair.hb.serve(false, 10000);
    adapters<void(int, int)>("fake_verbs_tell")(0, kDeviceFatal);
    int heard = 0;
    CHECK(until({}, [&] {
      for (auto [host, peer] : {std::pair{&pair.ha, pair.a.get()}, {&pair.hb, pair.b.get()}}) {
        std::lock_guard lock(host->token);
        heard += peer->poll(100) > 0;
      }
      return heard == 2;
    }));
    CHECK(!pair.lost());
    CHECK(pair.wait(
        [&] { return pair.lost() || pair.a->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok; }));
    CHECK(pair.wait([&] { return pair.lost() || pair.hb.frames.size() == 1; }));
    CHECK(!pair.lost());
  }
}

// Adapters differ in how many reads they have under way, or answer; and what shares its LID is found by its GID only.
void adapters_of_different_make_read_from_each_other() {
  auto limit = adapters<void(int, int, int, int)>("fake_verbs_limit");
  struct Sides {
    int initiates[2], answers[2], routed[2];
  };
  for (const Sides& sides : {Sides{{16, 2}, {4, 1}, {0, 0}}, Sides{{1, 128}, {128, 16}, {0, 0}},
                             Sides{{16, 16}, {16, 16}, {1, 0}}, Sides{{16, 16}, {16, 16}, {1, 1}}}) {
    for (int side : {0, 1}) limit(side, sides.initiates[side], sides.answers[side], sides.routed[side]);
    Pair pair("fake0", "fake1");
    struct End {
      FakeHost* host;
      Link* link;
      LinkPeer* peer;
    };
    const End ends[2] = {{&pair.ha, pair.la.get(), pair.a.get()}, {&pair.hb, pair.lb.get(), pair.b.get()}};
    pair.connect();
    for (int side : {0, 1}) {
      const End &from = ends[side], &reader = ends[1 - side];
      std::byte data[64]{std::byte{7}}, into[64]{};
      FrameHeader key = message(1);
      key.segment = from.link->hold(data, sizeof data, Access::peer_reads);
      CHECK(from.peer->post(key, nullptr, nullptr, Wake::loop) == Post::ok);
      CHECK(pair.wait([&] { return !reader.host->frames.empty(); }));
      RemoteChunk chunk{};
      chunk.read = true;
      chunk.nbytes = sizeof data;
      chunk.local = into;
      chunk.registration = reader.link->hold(into, sizeof into, Access::local);
      chunk.remote = {reinterpret_cast<uint64_t>(data), key.segment};
      CHECK(reader.peer->post_remote(chunk) == Post::pending);
      CHECK(pair.wait([&] { return reader.host->moved || pair.lost(); }));
      CHECK(!pair.lost() && into[0] == std::byte{7});
      from.link->release(key.segment);
      reader.link->release(chunk.registration);
    }
  }
  for (int side : {0, 1}) limit(side, 16, 16, 0);
}

// They are posted in parts, of which the last one tells the peer, who then has them all.
void rows_tell_of_themselves_once() {
  Pair pair;
  pair.connect();
  std::vector<std::byte> data(100 * 64, std::byte{7}), there(100 * 128);
  FrameHeader key = message(1);
  key.segment = pair.lb->hold(there.data(), there.size(), Access::peer_writes);
  CHECK(pair.b->post(key, nullptr, nullptr, Wake::loop) == Post::ok);
  CHECK(pair.wait([&] { return !pair.ha.frames.empty(); }));
  RowList rows;
  rows.add({0, 0, 64, 128, 32, 100});
  RemoteChunk chunk{};
  chunk.rows = &rows;
  chunk.nbytes = rows.nbytes();
  chunk.local = data.data();
  chunk.registration = pair.la->hold(data.data(), data.size(), Access::local);
  chunk.remote = {reinterpret_cast<uint64_t>(there.data()), key.segment};
  chunk.has_immediate = true;
  chunk.immediate = 5;
  CHECK(pair.a->post_remote(chunk) == Post::pending);
  CHECK(pair.wait([&] { return pair.ha.moved || pair.lost(); }));
  {
    std::lock_guard lock(pair.hb.token);
    pair.b->poll_last(1);  // by now all have come
  }
  CHECK(!pair.lost() && pair.lb->counters()["immediates_received"] == 1);
  for (size_t at = 0; at < there.size(); ++at) CHECK(there[at] == std::byte(at % 128 < 32 ? 7 : 0));
  pair.la->release(chunk.registration);
  pair.lb->release(key.segment);
}

// While the network is asked where a peer is, which it may not answer, no call of a link's waits.
struct Network {
  static void answers(bool does) { adapters<void(int)>("fake_verbs_hold")(does ? -1 : 0); }
  static int asked() { return adapters<int()>("fake_verbs_connecting")(); }
  static int queue_pairs() { return adapters<int()>("fake_verbs_pair_count")(); }
};

void a_pair_that_is_closed_while_it_is_connected() {
  Network::answers(false);
  {
    Pair pair;
    CHECK(pair.wait([] { return Network::asked() == 2; }));
    pair.a->close();
    CHECK(pair.wait([&] { return !pair.hb.lost.empty(); }));
    CHECK(Network::queue_pairs() == 6);  // those are the threads' that connect them
    Network::answers(true);
  }
  CHECK(Network::queue_pairs() == 0);
}

// Many are given up before a thread has come to them.
void pairs_that_are_closed_before_they_are_connected() {
  FakeHost host;
  host.texts = {{"libibverbs", library()}, {"rdma_devices", "fake0"}};
  auto link = make_link("rdma", host);
  std::vector<std::shared_ptr<LinkPeer>> ends;
  Network::answers(false);
  for (int i = 0; i < 12; ++i) {
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    for (int side : {0, 1}) {
      ends.push_back(link->attach(1 - side, 1, {sockets[side]}, link->card(), side == 0));
      ends.back()->start();
    }
  }
  CHECK(until({&host}, [] { return Network::asked() == 4; }));
  CHECK(Network::queue_pairs() == 72);
  for (auto& end : ends) end->close();
  CHECK(Network::queue_pairs() <= 12);
  Network::answers(true);
  CHECK(until({&host}, [] { return Network::queue_pairs() == 0; }));
}

void a_device_that_breaks_while_its_queue_pairs_are_connected() {
  Network::answers(false);
  {
    Pair pair("fake0,fake1", "fake0,fake1");
    CHECK(pair.wait([] { return Network::asked() == 2; }));
    adapters<void(int, int)>("fake_verbs_tell")(0, kDeviceFatal);
    CHECK(pair.wait(
        [&] { return pair.lost() || pair.a->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok; }));
    CHECK(pair.wait([&] { return pair.lost() || pair.hb.frames.size() == 1; }));
    CHECK(!pair.lost() && Network::queue_pairs() == 12);
    CHECK(pair.ha.parts_down == 1 && pair.hb.parts_down == 1);
    Network::answers(true);
    CHECK(pair.wait([] { return Network::queue_pairs() == 6; }));
  }
  CHECK(Network::queue_pairs() == 0);
}

constexpr int kPortActive = 9, kPortError = 10;  // IBV_EVENT_…

void a_rail_that_comes_back_while_the_network_is_silent() {
  auto tell = adapters<void(int, int)>("fake_verbs_tell");
  Pair pair("fake0,fake1", "fake0,fake1");
  pair.connect();
  auto tick = [&] {
    std::lock_guard lock(pair.ha.token);
    pair.a->tick(pair.ha.now());
  };
  tell(0, kPortError);
  CHECK(pair.wait([&] { return pair.ha.parts_down == 1 && pair.hb.parts_down == 1; }));
  Network::answers(false);
  tell(0, kPortActive);
  CHECK(pair.wait([&] { return tick(), Network::asked() == 1; }));  // of the end that answers
  CHECK(pair.a->post(message(1), nullptr, nullptr, Wake::loop) == Post::ok);
  CHECK(pair.wait([&] { return pair.lost() || pair.hb.frames.size() == 1; }));
  tell(0, kPortError);  // once more: that try is given up
  Network::answers(true);
  tell(0, kPortActive);
  CHECK(
      pair.wait([&] { return tick(), pair.lost() || (pair.ha.parts_down == 0 && pair.hb.parts_down == 0); }));
  CHECK(pair.wait([] { return Network::queue_pairs() == 12; }));  // a thread closes those given up
  CHECK(!pair.lost());
}

// A queue pair that fails may be at a receive, of which its device tells late, or never.
void receives_of_queue_pairs_that_fail_are_not_lost() {
  for (int last : {1, 2}) {
    adapters<void(int)>("fake_verbs_last")(last);
    Pair pair;
    for (uint64_t generation = 2; generation < (last == 1 ? 40 : 4); ++generation) {
      pair.connect();
      for (auto* end : {pair.a.get(), pair.b.get()}) end->close();
      pair.ha.writable = pair.hb.writable = 0;
      int sockets[2];
      CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
      pair.a = pair.la->attach(1, generation, {sockets[0]}, pair.lb->card(), true);
      pair.b = pair.lb->attach(0, generation, {sockets[1]}, pair.la->card(), false);
      pair.a->start();
      pair.b->start();
    }
    pair.connect();
    for (uint64_t tag = 1; tag <= 8; ++tag)
      CHECK(pair.a->post(message(tag), nullptr, nullptr, Wake::loop) == Post::ok);
    CHECK(pair.wait([&] { return pair.lost() || pair.hb.frames.size() == 8; }));
    CHECK(!pair.lost());
  }
  adapters<void(int)>("fake_verbs_last")(0);
}

// What is told of one rail says from where to where; the other one goes on.
void a_rail_that_has_no_way() {
  adapters<void(int, int)>("fake_verbs_unreach")(0, ETIMEDOUT);
  {
    Pair pair("fake0,fake1", "fake0,fake1");
    pair.connect();
    CHECK(!pair.lost() && pair.ha.parts_down == 1 && pair.hb.parts_down == 1);
  }
  {
    Pair pair;
    CHECK(pair.wait([&] { return !pair.ha.lost.empty() && !pair.hb.lost.empty(); }));
    for (const FakeHost* host : {&pair.ha, &pair.hb})
      CHECK(host->lost.find("no rail is left") != std::string::npos);
    CHECK((pair.ha.lost + pair.hb.lost)
              .find("device fake0 port 1: no way from fe80::1 (GID index 0) to fe80::1 (Connection timed") !=
          std::string::npos);
  }
  adapters<void(int, int)>("fake_verbs_unreach")(0, 0);
  CHECK(Network::queue_pairs() == 0);
}

}  // namespace

int main() {
  a_peer_that_hears_late_gives_credits_back();
  a_device_that_has_no_more_queue_pairs();
  devices_that_the_kernel_never_listed();
  a_pair_that_is_made_without_one_of_the_rails();
  a_rail_that_breaks_while_the_pair_connects();
  adapters_of_different_make_read_from_each_other();
  rows_tell_of_themselves_once();
  a_pair_that_is_closed_while_it_is_connected();
  pairs_that_are_closed_before_they_are_connected();
  a_device_that_breaks_while_its_queue_pairs_are_connected();
  a_rail_that_comes_back_while_the_network_is_silent();
  a_rail_that_has_no_way();
  receives_of_queue_pairs_that_fail_are_not_lost();
}
