// Sending without copying: the caller's pages go into a pipe and from there into the socket.
//
// On one host the receiver then copies straight from the sender's memory, one copy in all. MSG_ZEROCOPY does not do
// that: over loopback the kernel copies after all. The pages belong to the socket until the peer has read them, so
// the bytes must stay as they are until the peer says so (the operation's `fin`).
//
// It pays while the two ends run on different cores: on one core the copy that is saved was a warm one, which the receiver
// finds in its cache, and spliced bytes in memory. And it pays while the message fits a cache: of larger ones the
// receiver's core alone would wait for the memory, where two cores that copy share the waiting (1 GiB at 0.55 of the rate).
#pragma once

#include <cstddef>
#include <cstdint>

#include "links/tcp/stream.hpp"

namespace aiocomm::tcp {

enum class Splice : uint8_t { never, where_it_pays, always };

class SpliceSender {
 public:
  static constexpr size_t kPipeBytes = 1 << 20;
  static constexpr size_t kLeast = 32 << 10;  // below, a copy costs less than two system calls
  static constexpr uint64_t kGreatestMessage = 128 << 20;

  explicit SpliceSender(Splice mode) : mode_(mode), refused_(mode == Splice::never) {}
  // Bytes that entered the socket. Where the kernel cannot do this, refused() turns true: copy the rest.
  Io send(int socket, const std::byte* data, size_t nbytes);
  bool refused() const { return refused_; }
  bool pays(int socket, size_t nbytes, uint64_t message_bytes) const;
  // The next bytes are in the pipe: send them before anything else.
  bool holding() const { return held_ > 0; }

 private:
  void refuse();
  bool open();

  UniqueFd in_, out_;
  size_t capacity_ = 0;
  size_t held_ = 0;  // bytes in the pipe: the first of the next call's
  const Splice mode_;
  bool refused_;
};

}  // namespace aiocomm::tcp
