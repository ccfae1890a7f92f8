#include "links/tcp/stream.hpp"

#include <netinet/in.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <ctime>

namespace aiocomm::tcp {

void UniqueFd::reset(int fd) {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

bool within_host(int fd) {
  sockaddr_storage here{}, there{};
  socklen_t size = sizeof here, other = sizeof there;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&here), &size) != 0 ||
      ::getpeername(fd, reinterpret_cast<sockaddr*>(&there), &other) != 0 ||
      here.ss_family != there.ss_family)
    return false;
  if (here.ss_family == AF_INET)
    return reinterpret_cast<sockaddr_in&>(here).sin_addr.s_addr ==
           reinterpret_cast<sockaddr_in&>(there).sin_addr.s_addr;
  return here.ss_family == AF_INET6 &&
         std::memcmp(&reinterpret_cast<sockaddr_in6&>(here).sin6_addr,
                     &reinterpret_cast<sockaddr_in6&>(there).sin6_addr, sizeof(in6_addr)) == 0;
}

std::string Stream::reason(int error) const {
  if (error == kEndOfStream) return "connection closed by the peer";
  return std::string("connection failed: ") + std::strerror(error);
}

void Stream::close(bool abort) {
  if (abort && fd_.get() >= 0) {
    linger hard{1, 0};
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
  }
  fd_.reset();
}

namespace {

Io failed(int error, uint32_t wait) {
  if (error == EAGAIN || error == EINTR) return {0, wait, 0};
  return {0, 0, error};
}

class PlainStream final : public Stream {
 public:
  using Stream::Stream;

  Io read(const iovec* to, int count) override {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(to);
    message.msg_iovlen = static_cast<size_t>(count);
    ssize_t n = count == 1 ? ::recv(fd(), to->iov_base, to->iov_len, MSG_DONTWAIT)
                           : ::recvmsg(fd(), &message, MSG_DONTWAIT);
    if (n > 0) return {static_cast<size_t>(n), 0, 0};
    if (n == 0) return {0, 0, kEndOfStream};
    return failed(errno, EPOLLIN);
  }

  Io write(const iovec* from, int count, bool more) override {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(from);
    message.msg_iovlen = static_cast<size_t>(count);
    ssize_t n = ::sendmsg(fd(), &message, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0));
    if (n >= 0) return {static_cast<size_t>(n), 0, 0};
    return failed(errno, EPOLLOUT);
  }

  bool plain() const override { return true; }
};

}  // namespace

std::unique_ptr<Stream> make_plain_stream(UniqueFd fd) {
  return std::make_unique<PlainStream>(std::move(fd));
}

NoSigpipe::NoSigpipe() {
  sigset_t pipe, before;
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  pthread_sigmask(SIG_BLOCK, &pipe, &before);
  was_blocked_ = sigismember(&before, SIGPIPE) == 1;
}

NoSigpipe::~NoSigpipe() {
  if (was_blocked_) return;
  sigset_t pipe;
  sigemptyset(&pipe);
  sigaddset(&pipe, SIGPIPE);
  if (broken_) {
    timespec now{};
    sigtimedwait(&pipe, nullptr, &now);
  }
  pthread_sigmask(SIG_UNBLOCK, &pipe, nullptr);
}

}  // namespace aiocomm::tcp
