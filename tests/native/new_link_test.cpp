// The link that the documentation shows how to add, between two fake runtimes in one process.
// needs: core/link.cpp

#include <fcntl.h>
#include <sys/socket.h>

#include "../../examples/new_link/link.cpp"
#include "fake_host.hpp"

using namespace aiocomm;
using namespace aiocomm::testing;

namespace {

struct Sockets {
  int fd[2];
  Sockets() { CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0); }
};

struct Pair {
  FakeHost ha, hb;
  std::unique_ptr<Link> la = make_link("uds", ha), lb = make_link("uds", hb);
  Sockets sockets;
  std::shared_ptr<LinkPeer> a = la->attach(1, 7, {sockets.fd[0]}, {}, true);
  std::shared_ptr<LinkPeer> b = lb->attach(0, 8, {sockets.fd[1]}, {}, false);
  Pair() {
    a->start();
    b->start();
    CHECK(la->streams().kind == "unix" && la->streams().count == 1);
    CHECK(a->rank == 1 && a->generation == 7);
  }
  bool until(const std::function<bool()>& done) { return testing::until({&ha, &hb}, done); }
};

FrameHeader frame(FrameKind kind, int64_t tag, size_t meta, size_t payload) {
  FrameHeader h{};
  h.kind = kind;
  h.tag = tag;
  h.meta_bytes = static_cast<uint16_t>(meta);
  h.payload_bytes = static_cast<uint32_t>(payload);
  return h;
}

const std::byte* bytes(const std::string& s) { return reinterpret_cast<const std::byte*>(s.data()); }

// More than the socket has room for: a frame that is refused is refused whole, and taken later.
void frames_arrive_whole_and_in_order() {
  Pair p;
  int next = 0, refused = 0;
  auto size = [](int i) { return i % 7 == 3 ? size_t{1} << 20 : static_cast<size_t>(i % 5 * 100); };
  auto more = [&] {
    for (; next < 100; ++next) {
      std::string meta(next % 3 * 50, 'm'), payload(size(next), static_cast<char>('a' + next % 26));
      Post r = p.a->post(frame(FrameKind::eager, next, meta.size(), payload.size()), bytes(meta),
                         bytes(payload), Wake::loop);
      if (r == Post::again) return void(++refused);
      CHECK(r == Post::ok);
    }
  };
  p.ha.writable_hook = more;
  more();
  CHECK(p.until([&] { return p.hb.frames.size() == 100; }));
  for (int i = 0; i < 100; ++i) {
    CHECK(p.hb.frames[i].header.tag == i && p.hb.frames[i].meta == std::string(i % 3 * 50, 'm'));
    CHECK(p.hb.frames[i].payload == std::string(size(i), static_cast<char>('a' + i % 26)));
  }
  CHECK(refused > 0 && p.ha.writable >= refused);
}

// `data` goes straight to where the sink says, or nowhere; what is behind it arrives all the same.
void payloads_land_in_place() {
  Pair p;
  std::string sent(300'000, 'x'), into(300'000, '-');
  p.hb.buffers[5] = reinterpret_cast<std::byte*>(into.data());
  int next = 0;
  auto more = [&] {
    for (; next < 3; ++next) {
      FrameHeader h = frame(next == 2 ? FrameKind::fin : FrameKind::data, 0, 0, next == 2 ? 0 : sent.size());
      h.rop = next == 0 ? 5 : 6;
      Post r = next == 2 ? p.a->post(h, nullptr, nullptr, Wake::engine) : p.a->post_data(h, bytes(sent), 0);
      if (r == Post::again) return;
      CHECK(r == Post::ok);
    }
  };
  p.ha.writable_hook = more;
  more();
  CHECK(p.until([&] { return p.hb.frames.size() == 1; }));
  CHECK(into == sent && p.hb.data_bytes[5] == sent.size() && p.hb.data_bytes[6] == sent.size());
  CHECK(p.hb.places == 0);
}

void a_peer_that_is_gone_is_told_once() {
  Pair p;
  p.a->close();
  CHECK(!p.ha.watches(false));
  CHECK(p.until([&] { return !p.hb.lost.empty(); }));
  CHECK(!p.hb.watches(false));
  CHECK(p.b->post(frame(FrameKind::eager, 0, 0, 0), nullptr, nullptr, Wake::loop) == Post::lost);
}

void nonsense_ends_the_pair() {
  for (int wrong = 0; wrong < 4; ++wrong) {
    FakeHost host;
    Sockets sockets;
    auto link = make_link("uds", host);
    auto peer = link->attach(1, 1, {sockets.fd[0]}, {}, true);
    peer->start();
    FrameHeader h = frame(FrameKind::eager, 0, 0, 0);
    if (wrong == 0) h.kind = static_cast<FrameKind>(0);
    if (wrong == 1) h.payload_bytes = ~0u;
    if (wrong == 2) h.meta_bytes = kMaxMeta + 1;
    if (wrong == 3) h.kind = FrameKind::data, h.meta_bytes = 1;
    CHECK(write(sockets.fd[1], &h, sizeof h) == sizeof h);
    CHECK(until({&host}, [&] { return !host.lost.empty(); }));
    CHECK(host.lost.starts_with("protocol violation: ") && host.frames.empty());
    close(sockets.fd[1]);
  }
}

void a_frame_may_close_its_pair() {
  Pair p;
  p.hb.frame_hook = [&](LinkPeer& from, const FrameHeader&) {
    from.close();
    return true;
  };
  for (int i = 0; i < 2; ++i)
    CHECK(p.a->post(frame(FrameKind::eager, i, 0, 0), nullptr, nullptr, Wake::loop) == Post::ok);
  CHECK(p.until([&] { return !p.ha.lost.empty(); }));
  CHECK(p.hb.lost.empty());
  dynamic_cast<Pollable&>(*p.b).on_ready(EPOLLIN | EPOLLOUT);  // that was on its way
  CHECK(p.hb.lost.empty());
}

void descriptors_are_taken_over_in_any_case() {
  FakeHost host;
  Sockets sockets;
  auto link = make_link("uds", host);
  try {
    link->attach(1, 1, {sockets.fd[0], sockets.fd[1]}, {}, true);
    CHECK(!"two are one too many");
  } catch (const LinkFailure&) {
  }
  CHECK(fcntl(sockets.fd[0], F_GETFD) == -1 && fcntl(sockets.fd[1], F_GETFD) == -1);
}

}  // namespace

int main() {
  frames_arrive_whole_and_in_order();
  payloads_land_in_place();
  a_peer_that_is_gone_is_told_once();
  nonsense_ends_the_pair();
  a_frame_may_close_its_pair();
  descriptors_are_taken_over_in_any_case();
}
