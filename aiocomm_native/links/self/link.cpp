// The link to one's own rank: messages to oneself are queued here and copied once.

#include "core/link.hpp"

#include <unistd.h>

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "core/copy.hpp"

namespace aiocomm {
namespace {

class SelfPeer final : public LinkPeer {
 public:
  explicit SelfPeer(Host& host) : host_(host) {}

  Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) override {
    Held held{header, {meta, meta + header.meta_bytes}, {}};
    if (payload) held.payload.assign(payload, payload + header.payload_bytes);
    queue_.push_back(std::move(held));
    // Posting happens inside a turn of some thread; the next turn delivers.
    if (wake == Wake::engine)
      ring(host_.wake_page().engine, host_.engine_fd());
    else
      ring(host_.wake_page().loop, host_.loop_fd());
    return Post::ok;
  }

  // Always pulled.
  Post post_data(const FrameHeader&, const std::byte*, uint8_t) override { return Post::lost; }

  int poll(int budget) override {
    if (polling_) return 0;
    polling_ = true;
    int did = 0;
    for (; did < budget && !queue_.empty() && !closed_; ++did) {
      Held held = std::move(queue_.front());
      queue_.pop_front();
      host_.sink().on_frame(*this, held.header, held.meta.data(), held.payload.data());
    }
    polling_ = false;
    return did;
  }

  Path pull_path(const Location&) override { return Path::mapped; }
  int process() const override { return pid_; }
  WakePage* page() override { return &host_.wake_page(); }

  int pull(const Location& where, std::byte* into, size_t nbytes) override {
    const auto* from = reinterpret_cast<const std::byte*>(where.address);
    if (into < from + nbytes && from < into + nbytes)
      std::memmove(into, from, nbytes);
    else
      copy_large(into, from, nbytes);
    return 0;
  }

  void close() override { closed_ = true; }

 private:
  struct Held {
    FrameHeader header;
    std::vector<std::byte> meta, payload;
  };
  Host& host_;
  const int pid_ = getpid();
  std::deque<Held> queue_;
  bool polling_ = false, closed_ = false;
};

class SelfLink final : public Link {
 public:
  explicit SelfLink(Host& host) : host_(host) {}
  std::string_view name() const override { return "self"; }
  StreamNeed streams() const override { return {}; }
  bool polled() const override { return true; }
  std::shared_ptr<LinkPeer> attach(Rank, uint64_t, const std::vector<int>&, std::string_view, bool) override {
    return std::make_shared<SelfPeer>(host_);
  }

 private:
  Host& host_;
};

const LinkRegistration kRegistration{
    "self", 0, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<SelfLink>(host); }};

}  // namespace
}  // namespace aiocomm
