// Sending without copying: the caller's pages go into a pipe and from there into the socket.
//
// On one host the receiver then copies straight from the sender's memory, one copy in all. MSG_ZEROCOPY does
// not do that: over loopback the kernel copies after all. The pages belong to the socket until the peer has
// read them, so the bytes must stay as they are until the peer says so (the operation's `fin`).
#pragma once

#include <cstddef>

#include "links/tcp/stream.hpp"

namespace aiocomm::tcp {

class SpliceSender {
 public:
  static constexpr size_t kPipeBytes = 1 << 20;
  static constexpr size_t kLeast = 32 << 10;  // below, a copy costs less than two system calls

  // Bytes that entered the socket. `refused()` turns true where the kernel cannot do this: go on with `data +
  // n`, copied.
  Io send(int socket, const std::byte* data, size_t nbytes);
  bool refused() const { return refused_; }
  bool holding() const {
    return held_ > 0;
  }  // the next bytes are in the pipe: send them before anything else
  void refuse() {
    refused_ = true;
    drop();
  }

 private:
  bool open();
  void drop();

  UniqueFd in_, out_;
  size_t capacity_ = 0;
  size_t held_ = 0;  // bytes in the pipe: the first of the next call's
  bool refused_ = false;
};

}  // namespace aiocomm::tcp
