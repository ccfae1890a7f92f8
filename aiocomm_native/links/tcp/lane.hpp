// One stream of a pair in the engine's epoll sets: its handshake, what it waits for, and how it ends.
//
// A lane of the loop is always watched for input there. What only the engine can wait for (a handshake, room
// to write, input that the peer asked the engine to read) is watched in the engine's set besides, and only
// while it is needed.
#pragma once

#include <cstdint>
#include <memory>

#include "core/link.hpp"
#include "links/tcp/stream.hpp"

namespace aiocomm::tcp {

class TcpPeer;

// Whether it says only that the peer has gone.
bool is_end(int error);

// What one readiness may move before others get their turn.
constexpr size_t kReadTurn = 512 << 10;
constexpr size_t kWriteTurn = 1 << 20;
// What is written within a post, under the token and perhaps by the event loop.
constexpr size_t kPostTurn = 128 << 10;

class Lane : public Pollable {
 public:
  Lane(TcpPeer& peer, std::unique_ptr<Stream> stream, bool loop);
  void start();
  void on_ready(uint32_t events) final;
  void close();
  void stop();  // the stream has ended, the pair not yet: look at it no more
  bool open() const { return open_; }
  std::string reason(int error) const { return stream_->reason(error); }
  // Why the handshake has failed, if that is more than an end; only of a pair that is about to end.
  std::string refusal();
  void read();  // what has arrived, at most a turn's worth

 protected:
  virtual void readable() = 0;
  virtual void writable() = 0;
  virtual bool aborts() const { return false; }  // whether what is on the way is dropped at the end
  virtual void quiesce() {}                      // returns once no thread is in a call on the stream
  // Tells the engine's set what this lane waits for; returns early where nothing changes.
  void want_write(bool yes);
  void want_chase(bool yes);
  // A write failed: the pair ends from the epoll set, not from within the caller's post.
  void fail_soon(int error);

  TcpPeer& peer_;
  const std::unique_ptr<Stream> stream_;

 private:
  void update();
  void advance_handshake();

  const bool loop_;
  bool open_ = false, stopped_ = false, in_loop_ = false;
  bool write_ = false, chase_ = false;
  uint32_t handshake_wait_ = 0;
  uint32_t watched_ = 0;  // events in the engine's set; 0: not in it
  int failed_ = 0;
};

}  // namespace aiocomm::tcp
