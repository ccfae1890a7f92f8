// A connected byte stream without waiting: a plain socket, or TLS over one.
//
// Rules
//  * No call waits. A call that could not move a byte says which readiness to wait for, or why the stream has
//  ended.
//  * A write that was refused is repeated with the same bytes first (TLS has them in a record already).
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>

namespace aiocomm::tcp {

class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  ~UniqueFd() { reset(); }
  int get() const { return fd_; }
  int release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void reset(int fd = -1);

 private:
  int fd_;
};

constexpr int kEndOfStream = -1;  // in Io::error: the peer closed its side
constexpr int kTlsError = -2;     // in Io::error: Stream::reason() has the text

struct Io {
  size_t n = 0;       // bytes moved
  uint32_t wait = 0;  // nothing more now: epoll events to wait for
  int error = 0;      // errno, or one of the values above
};

bool within_host(int fd);  // whether both ends of a connection have one address

class Stream {
 public:
  explicit Stream(UniqueFd fd) : fd_(std::move(fd)) {}
  virtual ~Stream() = default;
  // Advances the handshake; the stream is usable once neither `wait` nor `error` is set.
  virtual Io open() { return {}; }
  virtual Io read(const iovec* to, int count) = 0;
  // `more`: further bytes follow at once, so a short segment need not leave yet.
  virtual Io write(const iovec* from, int count, bool more) = 0;
  virtual bool buffered() const { return false; }  // bytes that readiness does not tell of
  virtual bool plain() const { return false; }     // the descriptor carries the very bytes
  virtual std::string reason(int error) const;
  int fd() const { return fd_.get(); }
  // `abort`: bytes that the peer has not read are dropped, and it sees a reset.
  void close(bool abort);

 protected:
  UniqueFd fd_;
};

std::unique_ptr<Stream> make_plain_stream(UniqueFd fd);

// Keeps a broken pipe an error code on calls that know no MSG_NOSIGNAL.
class NoSigpipe {
 public:
  NoSigpipe();
  ~NoSigpipe();
  NoSigpipe(const NoSigpipe&) = delete;
  NoSigpipe& operator=(const NoSigpipe&) = delete;
  // A call answered EPIPE: the signal is pending and must not outlive the guard.
  void broken() { broken_ = true; }

 private:
  bool was_blocked_, broken_ = false;
};

}  // namespace aiocomm::tcp
