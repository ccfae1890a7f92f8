// The tcp link: any host, host memory, over sockets that the control plane has connected and authenticated.

#include "core/link.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "links/tcp/peer.hpp"
#include "links/tcp/tls.hpp"

namespace aiocomm::tcp {
namespace {

static_assert(std::endian::native == std::endian::little, "frames travel in little-endian order");

constexpr int kBulkBuffer = 4 << 20;
// What the kernel takes and cannot send yet. The rest waits in the scheduler, where what is more urgent goes first.
constexpr int kUnsentFrames = 128 << 10, kUnsentBulk = Pace::kUnsentMost;

void set(int fd, int level, int option, int value) { ::setsockopt(fd, level, option, &value, sizeof value); }

// A fixed buffer ends the kernel's own tuning, so it is set only where it can be as large as wanted.
bool allowed(const char* limit) {
  // Not by a C++ stream: where two copies of libstdc++ are in one process (a static one here, another library's
  // there), its locale is of the other copy, and reading a number crashes.
  std::FILE* file = std::fopen(limit, "re");
  if (!file) return false;
  long bytes = 0;
  bool read = std::fscanf(file, "%ld", &bytes) == 1;
  std::fclose(file);
  return read && bytes >= kBulkBuffer;
}

// Between two addresses of one host nothing needs to be paced, and pacing (BBR's) halves the rate there.
void spare_pacing(int fd) {
  if (within_host(fd)) ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

class TcpLink final : public Link {
 public:
  explicit TcpLink(Host& host)
      : host_(host), streams_(std::clamp(static_cast<int>(host.setting("tcp_streams", 2)), 1, 16)) {}

  std::string_view name() const override { return "tcp"; }
  StreamNeed streams() const override { return {"tcp", 3 + streams_}; }

  std::shared_ptr<LinkPeer> attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                   std::string_view, bool initiator) override {
    std::vector<UniqueFd> owned;
    for (int fd : fds) owned.emplace_back(fd);
    if (owned.size() < 4 || owned.size() > 19)
      throw LinkFailure("tcp needs an express, an engine, an urgent and 1 to 16 bulk connections, got " +
                            std::to_string(owned.size()),
                        EINVAL);
    TlsContext* tls = secure();
    std::vector<std::unique_ptr<Stream>> streams;
    for (size_t i = 0; i < owned.size(); ++i) {
      prepare(owned[i].get(), i);
      streams.push_back(tls ? tls->wrap(std::move(owned[i]), initiator)
                            : make_plain_stream(std::move(owned[i])));
    }
    return std::make_shared<TcpPeer>(host_, rank, generation, std::move(streams));
  }

 private:
  // Files are read when the first pair needs them: whoever never uses tcp may have none.
  TlsContext* secure() {
    TlsFiles files{host_.text_setting("tls_cert"), host_.text_setting("tls_key"),
                   host_.text_setting("tls_ca")};
    if (files.certificate.empty() && files.key.empty() && files.authorities.empty()) return nullptr;
    if (!tls_) tls_ = TlsContext::load(files);
    return tls_.get();
  }

  void prepare(int fd, size_t lane) {
    int type = 0;
    socklen_t size = sizeof type;
    if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM)
      throw LinkFailure("not a connected stream socket", ENOTSOCK);
    ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
    set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    spare_pacing(fd);
    if (lane != 1) set(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, lane == 0 ? kUnsentFrames : kUnsentBulk);
    if (lane >= 2) {
      if (allowed("/proc/sys/net/core/wmem_max")) set(fd, SOL_SOCKET, SO_SNDBUF, kBulkBuffer);
      if (allowed("/proc/sys/net/core/rmem_max")) set(fd, SOL_SOCKET, SO_RCVBUF, kBulkBuffer);
    }
    double heartbeat_s = host_.setting("heartbeat_s", 1.0);
    if (lane != 1) return;
    // Only the engine's lane is read whatever happens: on another, a busy reader would look like a dead one.
    if (heartbeat_s > 0)
      set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(std::max(3000.0, 3e3 * heartbeat_s)));
    else
      set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  }

  Host& host_;
  const int streams_;
  std::shared_ptr<TlsContext> tls_;
};

const LinkRegistration registration{
    "tcp", 20, [](Host& host) -> std::unique_ptr<Link> { return std::make_unique<TcpLink>(host); }};

}  // namespace
}  // namespace aiocomm::tcp
