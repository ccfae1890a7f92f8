// A link over one Unix socket per pair: about the least that a link can be. Nothing here is fast.

#include "core/link.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace aiocomm {
namespace {

constexpr uint64_t kMostPayload = 1 << 20;  // of a frame

class UdsPeer final : public LinkPeer, public Pollable {
 public:
  UdsPeer(Host& host, int fd) : host_(host), fd_(fd) {}
  ~UdsPeer() override { close(); }

  // Both sides have the link. The engine's thread (`false`) reads: it runs also while the loop is busy.
  void start() override { host_.watch(fd_, EPOLLIN, this, false); }

  Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake) override {
    if (fd_ < 0) return Post::lost;
    if (!unsent_.empty()) return Post::again;  // on_writable follows
    iovec parts[3] = {{const_cast<FrameHeader*>(&header), sizeof header},
                      {const_cast<std::byte*>(meta), header.meta_bytes},
                      {const_cast<std::byte*>(payload), header.payload_bytes}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 3;
    ssize_t sent = ::sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    // A broken socket is readable, too: on_ready tells the loss, since on_lost must not be called from here.
    if (sent < 0 && errno != EAGAIN && errno != EINTR) return Post::lost;
    size_t gone = sent < 0 ? 0 : static_cast<size_t>(sent);
    for (const iovec& part : parts) {
      size_t skip = std::min(gone, part.iov_len);
      gone -= skip;
      auto* bytes = static_cast<const std::byte*>(part.iov_base);
      unsent_.insert(unsent_.end(), bytes + skip, bytes + part.iov_len);  // taken whole: the rest is kept
    }
    if (!unsent_.empty()) host_.rewatch(fd_, EPOLLIN | EPOLLOUT, this, false);
    return Post::ok;
  }

  uint64_t frame_limit() const override { return sizeof(FrameHeader) + kMaxMeta + kMostPayload; }

  // Bytes of a large message, by chunks of at most what chunk_limits() says. They could go by a lane of their own; here they do not.
  Post post_data(const FrameHeader& header, const std::byte* payload, uint8_t) override {
    return post(header, nullptr, payload, Wake::engine);
  }

  void on_ready(uint32_t events) override {
    if (fd_ < 0) return;  // it was on its way when the pair was closed
    try {
      if (events & EPOLLOUT) write();
      if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read();
    } catch (const ProtocolViolation& violation) {
      lose(std::string("protocol violation: ") + violation.what());
    }
  }

  void close() override {
    if (fd_ < 0) return;
    host_.unwatch(fd_, false);
    ::close(fd_);
    fd_ = -1;
  }

 private:
  void write() {
    ssize_t sent = ::send(fd_, unsent_.data(), unsent_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) return;
    unsent_.erase(unsent_.begin(), unsent_.begin() + sent);
    if (!unsent_.empty()) return;
    host_.rewatch(fd_, EPOLLIN, this, false);
    host_.sink().on_writable(*this);
  }

  // A few reads a turn: the token is everybody's. What is left makes the socket ready again. What the sink does with a
  // frame may close the pair.
  void read() {
    for (int turns = 16; turns > 0 && fd_ >= 0; --turns) {
      const size_t done = at_ - std::min(at_, sizeof header_);
      ssize_t n;
      if (at_ < sizeof header_) {
        n = receive(reinterpret_cast<std::byte*>(&header_) + at_, sizeof header_ - at_);
        if (at_ == sizeof header_) begin();
      } else if (header_.kind != FrameKind::data) {
        n = receive(body_.data() + done, body_.size() - done);
      } else {
        // Straight to its place, which is asked for each time, and given back by on_data, also where nothing has come.
        std::byte aside[16 << 10];
        const size_t left = header_.payload_bytes - done;
        std::byte* place = host_.sink().data_target(*this, header_, done);
        n = place ? receive(place, left) : receive(aside, std::min(left, sizeof aside));
        if (place || n > 0)
          host_.sink().on_data(*this, header_, static_cast<uint64_t>(std::max<ssize_t>(n, 0)), place);
      }
      if (n < 0) return lose(why_);
      if (n == 0) return;
      finish();
    }
  }

  // How much has come; 0: nothing now; less: the end.
  ssize_t receive(std::byte* into, size_t room) {
    ssize_t n = ::recv(fd_, into, room, MSG_DONTWAIT);
    if (n > 0) at_ += static_cast<size_t>(n);
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR))) return std::max<ssize_t>(n, 0);
    why_ = n == 0 ? "connection closed by the peer" : std::strerror(errno);
    return -1;
  }

  // Nothing in a header is trusted; what the frames mean the runtime checks by itself.
  void begin() {
    if (header_.kind < FrameKind::eager || header_.kind > FrameKind::last_kind)
      throw ProtocolViolation("unknown frame kind");
    if (header_.meta_bytes > kMaxMeta || header_.payload_bytes > kMostPayload)
      throw ProtocolViolation("frame too long");
    if (header_.kind == FrameKind::data && header_.meta_bytes)
      throw ProtocolViolation("metadata with a payload");
    body_.resize(header_.kind == FrameKind::data ? 0 : header_.meta_bytes + header_.payload_bytes);
  }

  void finish() {
    if (at_ < sizeof header_ || at_ < sizeof header_ + header_.meta_bytes + header_.payload_bytes) return;
    at_ = 0;
    if (header_.kind != FrameKind::data)
      host_.sink().on_frame(*this, header_, body_.data(), body_.data() + header_.meta_bytes);
  }

  void lose(const std::string& reason) {
    if (fd_ < 0) return;
    close();
    host_.sink().on_lost(*this, reason);
  }

  Host& host_;
  int fd_;
  FrameHeader header_{};
  size_t at_ = 0;  // how much of this frame has come
  std::vector<std::byte> body_, unsent_;
  std::string why_;
};

class UdsLink final : public Link {
 public:
  explicit UdsLink(Host& host) : host_(host) {}
  std::string_view name() const override { return "uds"; }
  StreamNeed streams() const override { return {"unix", 1}; }  // connected and authenticated for us
  ChunkLimits chunk_limits() const override { return {64 << 10, kMostPayload, 256 << 10}; }

  std::shared_ptr<LinkPeer> attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                   std::string_view, bool) override {
    if (fds.size() != 1) {
      for (int fd : fds) ::close(fd);  // they are ours in any case
      throw LinkFailure("uds takes one Unix socket per pair", EINVAL);
    }
    auto peer = std::make_shared<UdsPeer>(host_, fds[0]);
    peer->rank = rank;
    peer->generation = generation;
    return peer;
  }

 private:
  Host& host_;
};

// 30: behind shm (10) and tcp (20), so a pair takes it only where these are left out by `links=`.
const LinkRegistration kRegistration{
    "uds", 30, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<UdsLink>(host); }};

}  // namespace
}  // namespace aiocomm
