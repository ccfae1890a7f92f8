// The tcp link between two fake runtimes in one process, over TCP on loopback.
// needs: core/link.cpp links/tcp/*.cpp

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <thread>
#include <utility>

#include "fake_host.hpp"

using namespace aiocomm;
using namespace aiocomm::testing;

namespace {

void connect_pair(int& a, int& b, bool apart = false) {  // apart: at two addresses
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{}, caller{};
  address.sin_family = caller.sin_family = AF_INET;
  caller.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (apart ? 1 : 0));
  socklen_t size = sizeof address;
  CHECK(bind(listener, (sockaddr*)&address, size) == 0 && listen(listener, 1) == 0);
  CHECK(getsockname(listener, (sockaddr*)&address, &size) == 0);
  a = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(a, (sockaddr*)&caller, size) == 0);
  CHECK(connect(a, (sockaddr*)&address, size) == 0);
  b = accept(listener, nullptr, nullptr);
  CHECK(b >= 0);
  close(listener);
}

struct Sockets {
  std::vector<int> a, b;
  explicit Sockets(int count, bool apart = false) : a(count), b(count) {
    for (int i = 0; i < count; ++i) connect_pair(a[i], b[i], apart);
  }
};

constexpr uint8_t kNormal = 1, kHigh = 2, kUrgent = 3;  // classes

using Settings = std::map<std::string, double>;
using Texts = std::map<std::string, std::string>;

struct Pair {
  FakeHost ha, hb;
  std::unique_ptr<Link> la, lb;
  std::shared_ptr<LinkPeer> a, b;
  // `apart`: as two hosts.
  explicit Pair(Settings numbers = {}, Texts texts = {}, bool apart = false) {
    ha.numbers = hb.numbers = numbers;
    ha.texts = hb.texts = texts;
    la = make_link("tcp", ha);
    lb = make_link("tcp", hb);
    Sockets sockets(la->streams().count, apart);
    a = la->attach(1, 7, sockets.a, {}, true);
    b = lb->attach(0, 8, sockets.b, {}, false);
    a->start();
    b->start();
    CHECK(a->rank == 1 && a->generation == 7);
  }
  bool until(const std::function<bool()>& done, bool loops = true) {
    return testing::until({&ha, &hb}, done, loops);
  }
};

// One end is the link, the other bare sockets.
struct Bare {
  FakeHost host;
  std::unique_ptr<Link> link = make_link("tcp", host);
  Sockets sockets{5};
  std::shared_ptr<LinkPeer> peer = link->attach(1, 1, sockets.a, {}, true);
  Bare() { peer->start(); }
  ~Bare() {
    for (int fd : sockets.b)
      if (fd >= 0) close(fd);
  }
  void write(int lane, const void* bytes, size_t n) {
    CHECK(send(sockets.b[lane], bytes, n, MSG_NOSIGNAL) == (ssize_t)n);
  }
};

FrameHeader frame(FrameKind kind, uint64_t tag, const std::string& meta = {},
                  const std::string& payload = {}) {
  FrameHeader h{};
  h.kind = kind;
  h.tag = static_cast<int64_t>(tag);
  h.meta_bytes = static_cast<uint16_t>(meta.size());
  h.payload_bytes = static_cast<uint32_t>(payload.size());
  h.nbytes = payload.size();
  return h;
}

const std::byte* bytes(const std::string& s) { return reinterpret_cast<const std::byte*>(s.data()); }

Post post(LinkPeer& peer, FrameKind kind, uint64_t tag, const std::string& meta = {},
          const std::string& payload = {}, Wake wake = Wake::loop) {
  return peer.post(frame(kind, tag, meta, payload), bytes(meta), bytes(payload), wake);
}

void frames_arrive_in_order(Settings numbers, Texts texts) {
  Pair p(numbers, texts);
  std::mt19937 random(1);
  std::vector<std::string> sent;
  size_t next = 0;
  for (int i = 0; i < 300; ++i) {
    size_t n = i % 50 == 7 ? (1 << 20) - i : random() % (i % 5 ? 300 : 70000);
    sent.push_back(std::string(n, static_cast<char>('a' + i % 26)));
  }
  auto more = [&] {
    while (next < sent.size()) {
      std::string meta = next % 3 ? "" : std::string(next % 2 ? 4096 : 24, 'm');
      Post r = post(*p.a, FrameKind::eager, next, meta, sent[next], next % 4 ? Wake::loop : Wake::engine);
      if (r == Post::again) return;
      CHECK(r == Post::ok);
      ++next;
    }
  };
  p.ha.writable_hook = more;
  more();
  CHECK(p.until([&] { return p.hb.frames.size() == sent.size(); }));
  for (size_t i = 0; i < sent.size(); ++i) {
    CHECK(p.hb.frames[i].header.tag == (int64_t)i);
    CHECK(p.hb.frames[i].payload == sent[i]);
    CHECK(p.hb.frames[i].meta.size() == (i % 3 ? 0 : i % 2 ? 4096u : 24u));
  }
  CHECK(p.ha.writable > 0 && p.ha.lost.empty() && p.hb.lost.empty());
  p.a->close();
  CHECK(!p.ha.watches(true) && !p.ha.watches(false));
  CHECK(p.until([&] { return !p.hb.lost.empty(); }));
  CHECK(post(*p.b, FrameKind::eager, 1) == Post::lost);
}

// A refused frame is refused whole, and the backlog is one frame at most.
void backpressure() {
  Pair p;
  std::string big(1 << 20, 'x');
  int taken = 0;
  Post r;
  while ((r = post(*p.a, FrameKind::eager, taken, {}, big)) == Post::ok) CHECK(++taken < 200);
  CHECK(r == Post::again && p.ha.writable == 0);
  CHECK(p.until([&] { return p.ha.writable == 1 && (int)p.hb.frames.size() == taken; }));
  for (auto& f : p.hb.frames) CHECK(f.payload == big);
}

// What the kernel cannot send yet stays with the runtime, but for little of it, so that an urgent frame gets ahead.
void little_waits_in_the_kernel() {
  Bare p;
  const std::string some(64 << 10, 'x');
  for (int refused = 0; refused < 100; p.host.serve(false, 0))
    refused = post(*p.peer, FrameKind::eager, 1, {}, some) == Post::again ? refused + 1 : 0;
  int unsent = 0;
  CHECK(ioctl(p.sockets.a[0], SIOCOUTQNSD, &unsent) == 0);
  CHECK(unsent > 0 && unsent <= (128 << 10) + (64 << 10));
}

// Frames for the engine arrive though nobody serves the loop's set; others wait for it.
void engine_reads_the_express_lane_when_poked() {
  Pair p;
  auto engine_only = [&](auto done) { return p.until(done, false); };
  post(*p.a, FrameKind::eager, 1, {}, "one");
  p.hb.serve(false, 0);
  CHECK(p.hb.frames.empty());
  post(*p.a, FrameKind::rts, 2, "m", {}, Wake::engine);
  CHECK(engine_only([&] { return p.hb.frames.size() == 2; }));
  CHECK(p.hb.frames[0].payload == "one" && p.hb.frames[1].meta == "m");
  // Also when the poke outruns bytes that are still at the sender.
  std::string big(1 << 20, 'y');
  int taken = 2;
  while (post(*p.a, FrameKind::eager, taken, {}, big, Wake::engine) == Post::ok) ++taken;
  CHECK(engine_only([&] { return (int)p.hb.frames.size() == taken; }));
  post(*p.a, FrameKind::eager, 0, {}, "last");
  CHECK(p.until([&] { return (int)p.hb.frames.size() == taken + 1; }));
}

void payloads_land_in_place(Settings numbers, Texts texts, size_t chunk) {
  numbers["tcp_streams"] = 3;
  Pair p(numbers, texts);
  const size_t kSize = (24 << 20) + 12345;
  std::vector<std::byte> from(kSize), into(kSize);
  std::mt19937 random(2);
  for (size_t i = 0; i + 4 <= kSize; i += 4) {
    uint32_t v = static_cast<uint32_t>(random());
    std::memcpy(from.data() + i, &v, 4);
  }
  p.hb.buffers[5] = into.data();
  size_t at = 0, kept = 0, unknown = 0;
  auto more = [&] {
    while (at < kSize) {
      FrameHeader h{};
      h.kind = FrameKind::data;
      h.payload_bytes = static_cast<uint32_t>(std::min(chunk, kSize - at));
      h.sop = 3;
      h.rop = 5;
      h.address = at;
      Post r = p.a->post_data(h, from.data() + at, kNormal);
      if (r == Post::again) return;
      CHECK(r == Post::ok || r == Post::pending);
      if (r == Post::pending) kept += h.payload_bytes;
      at += h.payload_bytes;
      if (at % (5 * chunk) == 0) {  // one for an op that the receiver does not know: read and dropped
        h.rop = 99;
        h.sop = 4;
        r = p.a->post_data(h, from.data(), kNormal);
        if (r != Post::again) ++unknown;
        if (r == Post::pending) kept += h.payload_bytes;
      }
    }
  };
  p.ha.writable_hook = more;
  p.ha.sent_hook = more;
  more();
  CHECK(
      p.until([&] { return p.hb.data_bytes[5] == kSize && p.hb.data_bytes[99] == unknown * chunk; }, false));
  CHECK(p.until([&] { return p.ha.sent_bytes[3] + p.ha.sent_bytes[4] == kept; }, false));
  CHECK(from == into && unknown > 0 && p.hb.lost.empty());
}

FrameHeader chunk(const std::vector<std::byte>& payload) {
  FrameHeader h{};
  h.kind = FrameKind::data;
  h.payload_bytes = static_cast<uint32_t>(payload.size());
  return h;
}

// A peer that reads nothing has all lanes of the lower classes full, in the link and in the kernel.
void urgent_payloads_have_a_lane_of_their_own() {
  Bare p;
  const std::vector<std::byte> payload(100 << 10);
  FrameHeader h = chunk(payload);
  auto send = [&](uint8_t cls) {
    h.rop = cls;
    return p.peer->post_data(h, payload.data(), cls);
  };
  // The engine's thread takes its turns: what is accepted goes into the kernel as long as that has room.
  auto fill = [&](uint8_t cls) {
    for (int refused = 0;;) {
      refused = send(cls) == Post::again ? refused + 1 : 0;
      if (refused == 100) return;  // with no turn after that
      p.host.serve(false, 0);
    }
  };
  fill(kNormal);
  CHECK(send(0) == Post::again && send(kUrgent) != Post::again);
  p.host.serve(false, 0);
  FrameHeader came{};
  CHECK(recv(p.sockets.b[4], &came, sizeof came, MSG_WAITALL) == sizeof came);
  CHECK(came.kind == FrameKind::data && came.rop == kUrgent && came.payload_bytes == payload.size());
  fill(kHigh);
  CHECK(send(kUrgent) == Post::again);
  for (int lane : {2, 3}) {
    CHECK(recv(p.sockets.b[lane], &came, sizeof came, MSG_WAITALL) == sizeof came);
    CHECK(came.rop == kNormal);
  }
}

void urgent_payloads_take_all_lanes_while_there_is_nothing_else() {
  Bare p;
  const std::vector<std::byte> payload(100 << 10);
  for (int turns = 0; turns < 100; p.host.serve(false, 0))
    turns = p.peer->post_data(chunk(payload), payload.data(), kHigh) == Post::again ? turns + 1 : 0;
  for (int lane : {2, 3, 4}) {
    FrameHeader came{};
    CHECK(recv(p.sockets.b[lane], &came, sizeof came, MSG_WAITALL) == sizeof came);
  }
}

// What is handed over at a time is what a lane drains in a few milliseconds: here a reader takes turns, `apart_ns` apart.
void chunks_are_of_the_rate_at_which_a_peer_drains() {
  CHECK(Pair().a->best_chunk() > 4 << 20);  // within a host
  Pair p({{"heartbeat_s", 1e6}}, {{"tcp_splice", "off"}}, true);
  const std::vector<std::byte> from(8 << 20);
  std::vector<std::byte> into(8 << 20);
  p.hb.buffers[5] = into.data();
  p.ha.frozen_now = p.hb.frozen_now = 1;
  auto drain = [&](uint64_t nbytes, uint64_t apart_ns) {
    CHECK(p.until(
        [&] {
          for (;;) {
            FrameHeader h = chunk(from);
            h.sop = 3;
            h.rop = 5;
            h.payload_bytes = static_cast<uint32_t>(std::min<uint64_t>(p.a->best_chunk(), from.size()));
            if (p.a->post_data(h, from.data(), kNormal) == Post::again) break;
          }
          p.ha.frozen_now = p.hb.frozen_now += apart_ns;
          return p.hb.data_bytes[5] >= nbytes;
        },
        false));
    p.hb.data_bytes[5] = 0;
  };
  CHECK(p.a->best_chunk() > 64 << 10 && p.a->best_chunk() < 1 << 20);  // nothing is known yet
  drain(64 << 20, 1'000'000'000);
  CHECK(p.a->best_chunk() == 64 << 10);
  CHECK(p.a->unsent() <= 4 * (sizeof(FrameHeader) + (64 << 10)));
  drain(128 << 20, 10'000);
  CHECK(p.a->best_chunk() > 4 << 20);
  // What the kernel takes at once says nothing of the rate.
  CHECK(p.until([&] { return p.a->unsent() == 0; }, false));
  const uint64_t known = p.a->best_chunk();
  for (int i = 0; i < 50; ++i) {
    p.ha.frozen_now += 100'000'000;
    FrameHeader h = chunk(from);
    h.rop = 5;
    h.payload_bytes = 1000;
    CHECK(p.a->post_data(h, from.data(), kNormal) == Post::ok);
  }
  CHECK(p.a->best_chunk() == known);
}

// Engine and loop threads on both sides at once, under the token.
void two_threads_per_side(Texts texts) {
  Pair p({}, texts);
  constexpr int kCount = 3000;
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (FakeHost* host : {&p.ha, &p.hb})
    for (bool loop : {false, true})
      threads.emplace_back([&stop, host, loop] {
        while (!stop) host->serve(loop, 1);
      });
  std::vector<std::byte> from(1 << 20, std::byte{9}), into(1 << 20);
  {
    std::lock_guard lock(p.hb.token);
    p.hb.buffers[5] = into.data();
  }
  int next = 0, chunks = 0;
  while (next < kCount || chunks < 40) {
    {
      std::lock_guard lock(p.ha.token);
      if (next < kCount &&
          post(*p.a, FrameKind::eager, next, {}, "hello", next % 7 ? Wake::loop : Wake::engine) == Post::ok)
        ++next;
      FrameHeader h = chunk(from);
      h.rop = 5;
      if (chunks < 40 && p.a->post_data(h, from.data(), kNormal) != Post::again) ++chunks;
    }
    std::this_thread::yield();
  }
  for (bool done = false; !done; std::this_thread::yield()) {
    std::lock_guard lock(p.hb.token);
    done = p.hb.frames.size() == kCount && p.hb.data_bytes[5] == 40u << 20;
  }
  stop = true;
  for (auto& t : threads) t.join();
  for (int i = 0; i < kCount; ++i) CHECK(p.hb.frames[i].header.tag == i);
  CHECK(from == into);
}

void what_was_said_before_the_end_arrives(Texts texts) {
  for (bool reply : {false, true}) {
    Pair p({}, texts);
    CHECK(p.until([&] { return post(*p.a, FrameKind::credit, 0) == Post::ok; }));
    CHECK(p.until([&] { return post(*p.b, FrameKind::credit, 0) == Post::ok; }));  // stays unread
    CHECK(p.until([&] { return p.hb.frames.size() == 1; }));
    size_t taken = 1;  // the last of them not by the kernel
    while (post(*p.a, FrameKind::eager, taken, {}, std::string(20000, 'z')) == Post::ok) ++taken;
    p.a->close();
    if (reply) {  // the writer meets the reset first
      p.hb.frame_hook = [&](LinkPeer& peer, const FrameHeader&) {
        post(peer, FrameKind::credit, 0, {}, {}, Wake::engine);
        return false;
      };
    }
    CHECK(p.until([&] { return !p.hb.lost.empty(); }));
    CHECK(p.hb.frames.size() == taken);
    CHECK(p.ha.lost.empty());
  }
}

// A loop that closes the pair while the engine's thread is about to read into a buffer, or write from one, gets the buffer
// back only after that.
void closing_waits_for_the_call_under_way(bool reader, Texts texts) {
  Pair p({{"tcp_streams", 1}}, texts);
  CHECK(p.until([&] { return post(*p.a, FrameKind::credit, 0) == Post::ok; }));
  CHECK(p.until([&] { return p.hb.frames.size() == 1; }));
  FakeHost& host = reader ? p.hb : p.ha;
  LinkPeer& peer = reader ? *p.b : *p.a;
  constexpr std::byte kMine{0xee};
  std::vector<std::byte> from(1 << 20, std::byte{9}), into(1 << 20);
  p.hb.buffers[5] = into.data();
  std::vector<std::byte>& used = reader ? into : from;
  std::atomic<bool> closed{false};
  std::thread closer;
  host.left_hook = [&] {
    if (closer.joinable()) return;
    const int lanes = host.unwatched + 3;
    closer = std::thread([&] {
      std::lock_guard lock(host.token);
      peer.close();
      closed = true;
      std::fill(used.begin(), used.end(), kMine);
    });
    while (host.unwatched < lanes) std::this_thread::yield();
    for (int turn = 0; turn < 2000; ++turn) std::this_thread::yield();  // it has every chance to go wrong
    CHECK(!closed);
  };
  FrameHeader h = chunk(from);
  h.rop = 5;
  CHECK(p.a->post_data(h, from.data(), kNormal) == Post::pending);
  CHECK(p.until([&] { return closed.load(); }, false));
  closer.join();
  CHECK(std::all_of(used.begin(), used.end(), [&](std::byte b) { return b == kMine; }));
  CHECK(p.until([&] { return !(reader ? p.ha : p.hb).lost.empty(); }));
}

void one_dead_lane_ends_the_pair() {
  for (int lane = 0; lane < 5; ++lane) {
    Bare p;
    p.host.frozen_now = 5000000000;
    close(std::exchange(p.sockets.b[lane], -1));
    if (lane > 0) {
      CHECK(until({&p.host}, [&] { return post(*p.peer, FrameKind::eager, 0) == Post::lost; }));
      CHECK(p.host.lost.empty());  // the express lane may still have something to say
      p.peer->tick(p.host.frozen_now + 1000000000);
    }
    CHECK(until({&p.host}, [&] { return !p.host.lost.empty(); }));
  }
}

void silence_ends_the_pair_and_a_heartbeat_does_not() {
  Pair p({{"heartbeat_s", 1.0}});
  uint64_t t = p.ha.now();
  p.ha.frozen_now = p.hb.frozen_now = t;
  for (int i = 0; i < 8; ++i) {
    p.ha.frozen_now = p.hb.frozen_now = t += 1000000000;
    p.a->tick(t);
    p.b->tick(t);
    p.until([n = 0]() mutable { return ++n > 3; }, false);
    CHECK(p.ha.lost.empty() && p.hb.lost.empty());
  }
  for (int i = 0; i < 4; ++i) p.b->tick(p.hb.frozen_now = t += 1000000000);
  CHECK(p.hb.lost.find("no sign of life") == 0);
}

void hostile_bytes() {
  auto ends = [](int lane, auto header, const char* reason) {
    Bare p;
    p.write(lane, &header, sizeof header);
    CHECK(until({&p.host}, [&] { return !p.host.lost.empty(); }));
    CHECK(p.host.lost.find("protocol violation: ") == 0 && p.host.lost.find(reason) != std::string::npos);
    CHECK(!p.host.watches(true) && !p.host.watches(false));
  };
  ends(0, frame(FrameKind{0}, 0), "unknown");
  ends(0, frame(FrameKind{200}, 0), "unknown");
  ends(0, frame(FrameKind::data, 0), "off its lane");
  ends(0, frame(FrameKind::heartbeat, 0), "wrong lane");
  ends(1, frame(FrameKind::eager, 0), "wrong lane");
  ends(2, frame(FrameKind::eager, 0), "not a payload");
  FrameHeader h = frame(FrameKind::eager, 0);
  h.meta_bytes = kMaxMeta + 1;
  ends(0, h, "metadata too long");
  h.meta_bytes = 0;
  h.payload_bytes = 0x7fffffff;
  ends(0, h, "frame too long");
  h.kind = FrameKind::heartbeat;
  h.payload_bytes = 1;
  ends(1, h, "frame too long");
  h.kind = FrameKind::data;
  h.payload_bytes = 0xffffffff;
  ends(2, h, "payload too long");
  {  // a poke to nowhere does no harm
    Bare p;
    h = frame(FrameKind::link_private, 0);
    h.address = UINT64_MAX;
    p.write(1, &h, sizeof h);
    h = frame(FrameKind::eager, 4);
    p.write(0, &h, sizeof h);
    CHECK(until({&p.host}, [&] { return p.host.frames.size() == 1; }, false));
  }
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {  // noise, with a plausible first byte more often than not
    Bare p;
    std::string noise(1 + random() % 5000, 0);
    for (char& c : noise) c = static_cast<char>(random());
    if (round % 4) noise[0] = static_cast<char>(1 + random() % 17);
    if (round % 3 && noise.size() > 8) noise[3] = 0, noise[6] = 0, noise[7] = 0;
    p.write(static_cast<int>(random() % 5), noise.data(), noise.size());
    for (int& fd : p.sockets.b) close(std::exchange(fd, -1));
    CHECK(until({&p.host}, [&] { return !p.host.lost.empty(); }));
  }
}

void a_violation_that_the_runtime_finds() {
  Pair p;
  p.hb.frame_hook = [](LinkPeer&, const FrameHeader&) -> bool { throw ProtocolViolation("no such channel"); };
  post(*p.a, FrameKind::eager, 1, {}, "x", Wake::engine);
  CHECK(p.until([&] { return !p.hb.lost.empty() && !p.ha.lost.empty(); }, false) ||
        p.until([&] { return !p.ha.lost.empty(); }));
  CHECK(p.hb.lost == "protocol violation: no such channel");
}

void closing_from_within_a_callback() {
  Pair p;
  p.hb.frame_hook = [&](LinkPeer& peer, const FrameHeader&) {
    peer.close();
    p.b.reset();
    return false;
  };
  for (int i = 0; i < 5; ++i) post(*p.a, FrameKind::eager, i, {}, "x", Wake::engine);
  CHECK(p.until([&] { return !p.ha.lost.empty(); }));
  CHECK(p.hb.frames.size() == 1 && p.hb.lost.empty());
}

void bad_attachments() {
  FakeHost host;
  auto link = make_link("tcp", host);
  auto refused = [&](std::vector<int> fds) {
    try {
      link->attach(1, 1, fds, {}, true);
    } catch (const LinkFailure&) {
      for (int fd : fds) CHECK(fcntl(fd, F_GETFD) == -1);
      return true;
    }
    return false;
  };
  int ends[2];
  CHECK(pipe(ends) == 0);
  CHECK(refused({ends[0], ends[1]}));
  int a[2], b[2];
  for (int i : {0, 1}) connect_pair(a[i], b[i]);
  CHECK(pipe(ends) == 0);
  CHECK(refused({ends[0], ends[1], a[0], a[1]}));
  for (int fd : b) close(fd);
}

// Certificates of two authorities in the working folder; none where there is no openssl command.
Texts make_certificates() {
  const char* commands =
      "set -e; n='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2'; "
      "for ca in ca other; do "
      "openssl req -x509 $n -subj /CN=$ca -keyout $ca.key -out $ca.pem; "
      "openssl req $n -subj /CN=peer -keyout $ca.peer.key -out $ca.csr; "
      "openssl x509 -req -in $ca.csr -CA $ca.pem -CAkey $ca.key -CAcreateserial -days 2 -out $ca.peer.pem; "
      "done";
  char folder[] = "/tmp/tls-aiocomm-XXXXXX";
  CHECK(mkdtemp(folder) && chdir(folder) == 0);
  const bool made = std::system(("exec 2>/dev/null >/dev/null; " + std::string(commands)).c_str()) == 0;
  std::atexit([] { std::filesystem::remove_all(std::filesystem::current_path()); });
  if (!made) return {};
  return {{"tls_cert", "ca.peer.pem"}, {"tls_key", "ca.peer.key"}, {"tls_ca", "ca.pem"}};
}

void tls_refuses(const Texts& texts) {
  auto reason = [&](const char* name, const char* file) {
    FakeHost host;
    host.texts = texts;
    host.texts[name] = file;
    auto link = make_link("tcp", host);
    Sockets sockets(4);
    for (int fd : sockets.b) close(fd);
    try {
      link->attach(1, 1, sockets.a, {}, true);
    } catch (const LinkFailure& failure) {
      return std::string(failure.what());
    }
    return std::string();
  };
  CHECK(reason("tls_cert", "missing.pem").find("tls_cert: no certificate can be read from 'missing.pem'") ==
        0);
  CHECK(reason("tls_key", "missing.key").find("tls_key: ") == 0);
  CHECK(reason("tls_key", "other.peer.key").find("tls_key: ") == 0);
  CHECK(reason("tls_ca", "ca.key").find("tls_ca: ") == 0);
  CHECK(reason("tls_ca", "").find("TLS needs") == 0);

  auto lost = [&](Texts a, Texts b) {
    FakeHost ha, hb;
    ha.texts = a;
    hb.texts = b;
    auto la = make_link("tcp", ha), lb = make_link("tcp", hb);
    Sockets sockets(4);
    auto pa = la->attach(1, 1, sockets.a, {}, true), pb = lb->attach(0, 1, sockets.b, {}, false);
    pa->start();
    pb->start();
    post(*pa, FrameKind::eager, 1, {}, "secret");
    post(*pb, FrameKind::eager, 1, {}, "secret");
    CHECK(until({&ha, &hb}, [&] { return !ha.lost.empty() && !hb.lost.empty(); }));
    CHECK(ha.frames.empty() && hb.frames.empty());
    return ha.lost + " / " + hb.lost;
  };
  Texts stranger{{"tls_cert", "other.peer.pem"}, {"tls_key", "other.peer.key"}, {"tls_ca", "ca.pem"}};
  CHECK(lost(texts, stranger).find("certificate") != std::string::npos);
  CHECK(lost(stranger, texts).find("certificate") != std::string::npos);
  CHECK(lost({}, texts).find("TLS failed") != std::string::npos);
}

#define RUN(call)               \
  do {                          \
    std::printf("%s\n", #call); \
    std::fflush(stdout);        \
    call;                       \
  } while (0)

}  // namespace

int main() {
  Texts copy{{"tcp_splice", "off"}}, splice{{"tcp_splice", "on"}};
  RUN(frames_arrive_in_order({}, {}));
  RUN(backpressure());
  RUN(little_waits_in_the_kernel());
  RUN(engine_reads_the_express_lane_when_poked());
  RUN(payloads_land_in_place({}, {}, 1 << 20));
  RUN(payloads_land_in_place({}, {}, 40000));
  RUN(payloads_land_in_place({}, splice, 3 << 20));
  RUN(payloads_land_in_place({}, splice, 40000));
  RUN(payloads_land_in_place({}, copy, 1 << 20));
  RUN(payloads_land_in_place({}, copy, 3 << 20));
  RUN(urgent_payloads_have_a_lane_of_their_own());
  RUN(urgent_payloads_take_all_lanes_while_there_is_nothing_else());
  RUN(chunks_are_of_the_rate_at_which_a_peer_drains());
  RUN(two_threads_per_side({}));
  RUN(what_was_said_before_the_end_arrives({}));
  for (bool reader : {false, true}) {
    RUN(closing_waits_for_the_call_under_way(reader, copy));
    RUN(closing_waits_for_the_call_under_way(reader, splice));
  }
  RUN(one_dead_lane_ends_the_pair());
  RUN(silence_ends_the_pair_and_a_heartbeat_does_not());
  RUN(hostile_bytes());
  RUN(a_violation_that_the_runtime_finds());
  RUN(closing_from_within_a_callback());
  RUN(bad_attachments());
  Texts tls = make_certificates();
  if (tls.empty()) {
    std::printf("no openssl command: TLS is not tested\n");
  } else {
    RUN(frames_arrive_in_order({}, tls));
    RUN(payloads_land_in_place({}, tls, 1 << 20));
    RUN(payloads_land_in_place({}, tls, 40000));
    RUN(two_threads_per_side(tls));
    RUN(what_was_said_before_the_end_arrives(tls));
    RUN(tls_refuses(tls));
  }
  std::printf("ok\n");
}
