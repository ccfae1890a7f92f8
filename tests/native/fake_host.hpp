// What a link needs of the runtime, for tests of one link by itself: two epoll sets under one token, and a
// sink that writes down what it is told. Nothing here waits on time except `until`, which gives up.
#pragma once

#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/link.hpp"

namespace aiocomm::testing {

struct Frame {
  FrameHeader header;
  std::string meta, payload;
};

class FakeHost final : public Host, public FrameSink {
 public:
  FakeHost() : epoll_{epoll_create1(EPOLL_CLOEXEC), epoll_create1(EPOLL_CLOEXEC)} {}
  ~FakeHost() {
    for (int fd : epoll_) ::close(fd);
  }

  // Host
  void watch(int fd, uint32_t events, Pollable* target, bool loop) override {
    control(EPOLL_CTL_ADD, fd, events, target, loop);
  }
  void rewatch(int fd, uint32_t events, Pollable* target, bool loop) override {
    control(EPOLL_CTL_MOD, fd, events, target, loop);
  }
  void unwatch(int fd, bool loop) override {
    if (watched_[loop].contains(fd)) control(EPOLL_CTL_DEL, fd, 0, nullptr, loop);
    ++unwatched;
  }
  uint64_t now() const override {
    if (frozen_now) return frozen_now;
    auto t = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(t).count());
  }
  double setting(std::string_view name, double fallback) const override {
    auto it = numbers.find(std::string(name));
    return it == numbers.end() ? fallback : it->second;
  }
  std::string text_setting(std::string_view name) const override {
    auto it = texts.find(std::string(name));
    return it == texts.end() ? std::string() : it->second;
  }
  WakePage& wake_page() override { return page_; }
  int wake_page_fd() const override { return -1; }
  int loop_fd() const override { return -1; }
  int engine_fd() const override { return -1; }
  void ring_engine() override {}
  FrameSink& sink() override { return *this; }
  void leave_token() override {
    token.unlock();
    if (left_hook) left_hook();
  }
  void enter_token() override { token.lock(); }
  MoverHost& mover_host() override { std::abort(); }  // links that move device memory are not tested here
  void fallback(Rank, const std::string&, const std::string&) override { ++fallbacks; }
  void part_down(Rank, const std::string&, const std::string&) override { ++parts_down; }
  void part_up(Rank, const std::string&) override { --parts_down; }

  // FrameSink
  void on_frame(LinkPeer& from, const FrameHeader& header, const std::byte* meta,
                const std::byte* payload) override {
    if (frame_hook && frame_hook(from, header)) return;
    frames.push_back({header, text(meta, header.meta_bytes), text(payload, header.payload_bytes)});
  }
  std::byte* data_target(LinkPeer&, const FrameHeader& header, uint64_t done) override {
    auto it = buffers.find(header.rop);
    if (it == buffers.end()) return nullptr;
    ++places;
    return it->second + header.address + done;
  }
  void on_data(LinkPeer&, const FrameHeader& header, uint64_t nbytes, const std::byte* into) override {
    places -= into != nullptr;
    data_bytes[header.rop] += nbytes;
  }
  void on_sent(LinkPeer&, OpId sop, uint64_t nbytes) override {
    sent_bytes[sop] += nbytes;
    if (sent_hook) sent_hook();
  }
  void on_writable(LinkPeer&) override {
    ++writable;
    if (writable_hook) writable_hook();
  }
  void on_remote(LinkPeer&, OpId, uint64_t, int error, uint64_t) override {
    CHECK(!error);
    ++moved;
  }
  void on_lost(LinkPeer&, const std::string& reason) override {
    CHECK(lost.empty());
    lost = reason.empty() ? "?" : reason;
  }

  // Serves one of the two sets once; `engine` and `loop` threads may call it at the same time.
  int serve(bool loop, int timeout_ms) {
    epoll_event events[16];
    int n = epoll_wait(epoll_[loop], events, 16, timeout_ms);
    std::lock_guard lock(token);
    for (int i = 0; i < n; ++i) {
      // Looked up again: what ran before may have unwatched it.
      auto it = watched_[loop].find(events[i].data.fd);
      if (it != watched_[loop].end()) it->second->on_ready(events[i].events);
    }
    return n;
  }
  bool watches(bool loop) const { return !watched_[loop].empty(); }
  int epoll(bool loop) const { return epoll_[loop]; }

  std::mutex token;
  std::map<std::string, double> numbers;
  std::map<std::string, std::string> texts;
  std::vector<Frame> frames;
  std::map<uint64_t, std::byte*> buffers;
  std::map<uint64_t, uint64_t> data_bytes, sent_bytes;
  std::function<bool(LinkPeer&, const FrameHeader&)> frame_hook;
  std::function<void()> writable_hook, sent_hook;
  std::function<void()> left_hook;  // a thread has left the token, and its call comes next
  std::atomic<int> unwatched{0};
  std::string lost;
  int writable = 0, fallbacks = 0, parts_down = 0, moved = 0;
  int places = 0;  // that were given, and not given back
  uint64_t frozen_now = 0;

 private:
  static std::string text(const std::byte* bytes, size_t n) {
    return n ? std::string((const char*)bytes, n) : "";
  }
  void control(int action, int fd, uint32_t events, Pollable* target, bool loop) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    CHECK(epoll_ctl(epoll_[loop], action, fd, &event) == 0);
    if (action == EPOLL_CTL_DEL)
      watched_[loop].erase(fd);
    else
      watched_[loop][fd] = target;
  }

  int epoll_[2];
  std::map<int, Pollable*> watched_[2];
  WakePage page_;
};

// Serves all sets until `done`; false after a minute: something hangs.
inline bool until(std::vector<FakeHost*> hosts, const std::function<bool()>& done, bool loops = true) {
  auto end = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    for (FakeHost* host : hosts) {
      host->serve(false, 0);
      if (loops) host->serve(true, 0);
    }
  }
  return true;
}

inline std::unique_ptr<Link> make_link(const std::string& name, Host& host) {
  for (const LinkEntry& entry : link_registry())
    if (entry.name == name) return entry.factory(host);
  CHECK(!"link is registered");
  return nullptr;
}

}  // namespace aiocomm::testing
