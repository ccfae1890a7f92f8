#include "links/tcp/splice.hpp"

#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace aiocomm::tcp {

bool SpliceSender::pays(int socket, size_t nbytes, uint64_t message_bytes) const {
  if (nbytes < kLeast) return false;
  if (mode_ == Splice::always) return true;
  if (message_bytes > kGreatestMessage) return false;
  int core = -1;  // that handled the last acknowledgement: over loopback, the receiver's
  socklen_t size = sizeof core;
  return ::getsockopt(socket, SOL_SOCKET, SO_INCOMING_CPU, &core, &size) != 0 || core != ::sched_getcpu();
}

bool SpliceSender::open() {
  int ends[2];
  if (::pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) return false;
  out_.reset(ends[0]);
  in_.reset(ends[1]);
  int size = ::fcntl(in_.get(), F_SETPIPE_SZ, static_cast<int>(kPipeBytes));
  if (size < 0)
    size = ::fcntl(in_.get(), F_GETPIPE_SZ);  // over the user's allowance: the small one does, too
  capacity_ = size > 0 ? static_cast<size_t>(size) : 65536;
  return true;
}

void SpliceSender::refuse() {
  refused_ = true;
  in_.reset();
  out_.reset();
  held_ = 0;
}

Io SpliceSender::send(int socket, const std::byte* data, size_t nbytes) {
  NoSigpipe guard;
  size_t done = 0;
  if (in_.get() < 0 && !open()) refuse();
  while (!refused_ && done < nbytes) {
    if (held_ == 0) {
      iovec pages{const_cast<std::byte*>(data + done), std::min(nbytes - done, capacity_)};
      ssize_t n = ::vmsplice(in_.get(), &pages, 1, SPLICE_F_NONBLOCK);
      if (n <= 0) {
        refuse();
        break;
      }
      held_ = static_cast<size_t>(n);
    }
    ssize_t n = ::splice(out_.get(), nullptr, socket, nullptr, held_, SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
    if (n > 0) {
      held_ -= static_cast<size_t>(n);
      done += static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
      return {done, EPOLLOUT, 0};
    } else if (n < 0 && (errno == EINVAL || errno == ENOSYS || errno == EPERM)) {
      refuse();
    } else {
      int error = n == 0 ? EPIPE : errno;
      if (error == EPIPE) guard.broken();
      return {done, 0, error};
    }
  }
  return {done, 0, 0};
}

}  // namespace aiocomm::tcp
