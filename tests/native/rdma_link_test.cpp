// The rdma link between two fake runtimes in one process, over simulated adapters.
// needs: core/link.cpp core/segments.cpp links/rdma/*.cpp
// adapters: simulated

#include <sys/socket.h>

#include <cstdlib>

#include "fake_host.hpp"

using namespace aiocomm;
using namespace aiocomm::testing;

namespace {

struct Pair {
  FakeHost ha, hb;
  std::unique_ptr<Link> la, lb;
  std::shared_ptr<LinkPeer> a, b;
  Pair() {
    const char* adapters = std::getenv("AIOCOMM_LIBIBVERBS");
    CHECK(adapters);
    ha.texts = hb.texts = {{"libibverbs", adapters}, {"rdma_devices", " fake0 ,"}};
    la = make_link("rdma", ha);
    lb = make_link("rdma", hb);
    int sockets[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
    a = la->attach(1, 1, {sockets[0]}, lb->card(), true);
    b = lb->attach(0, 1, {sockets[1]}, la->card(), false);
    a->start();
    b->start();
  }
};

FrameHeader message(uint64_t tag) {
  FrameHeader header{};
  header.kind = FrameKind::eager;
  header.tag = static_cast<int64_t>(tag);
  return header;
}

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
  pair.a->close();
  pair.b->close();
}

}  // namespace

int main() { a_peer_that_hears_late_gives_credits_back(); }
