// The rdma link between two fake runtimes in one process, over simulated adapters.
// needs: core/link.cpp core/segments.cpp links/rdma/*.cpp
// adapters: simulated

#include <dlfcn.h>
#include <sys/socket.h>

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
  pair.hb.serve(false, 10000);  // b greets, and is ready; the same word of a waits in its socket from here on
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

}  // namespace

int main() {
  a_peer_that_hears_late_gives_credits_back();
  adapters_of_different_make_read_from_each_other();
}
