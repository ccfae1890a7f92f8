#include "links/tcp/lane.hpp"

#include <sys/epoll.h>

#include <cerrno>
#include <utility>

#include "links/tcp/peer.hpp"

namespace aiocomm::tcp {

Lane::Lane(TcpPeer& peer, std::unique_ptr<Stream> stream, bool loop)
    : peer_(peer), stream_(std::move(stream)), loop_(loop) {}

bool is_end(int error) { return error == kEndOfStream || error == ECONNRESET || error == EPIPE; }

std::string Lane::refusal() {
  if (open_ || stopped_) return {};
  const int error = failed_ ? failed_ : stream_->open().error;
  return error && !is_end(error) ? reason(error) : std::string();
}

void Lane::start() { advance_handshake(); }

void Lane::advance_handshake() {
  Io io = stream_->open();
  if (io.error) return fail_soon(io.error);
  handshake_wait_ = io.wait;
  if (!io.wait) {
    open_ = true;
    if (loop_) {
      peer_.host().watch(stream_->fd(), EPOLLIN, this, true);
      in_loop_ = true;
    }
  }
  update();
}

void Lane::on_ready(uint32_t events) {
  std::shared_ptr<TcpPeer> alive = peer_.shared_from_this();
  if (peer_.dead() || stopped_) return;
  if (failed_) {
    write_ = false;
    return peer_.ended(*this, std::exchange(failed_, 0), false);
  }
  if (!open_) {
    advance_handshake();
    if (!open_) return;
    events = EPOLLIN | EPOLLOUT;
  }
  if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read();
  if (!peer_.dead() && !stopped_ && !failed_ && (events & EPOLLOUT)) writable();
}

void Lane::read() {
  if (!open_ || stopped_) return;
  try {
    readable();
  } catch (const ProtocolViolation& violation) {
    peer_.lose(std::string("protocol violation: ") + violation.what());
  }
}

void Lane::update() {
  uint32_t events = 0;
  if (failed_)
    events = EPOLLOUT;  // fires at once
  else if (!open_)
    events = handshake_wait_;
  else if (!stopped_)
    events = (!loop_ || chase_ ? uint32_t{EPOLLIN} : 0) | (write_ ? uint32_t{EPOLLOUT} : 0);
  if (events == watched_) return;
  Host& host = peer_.host();
  if (!watched_)
    host.watch(stream_->fd(), events, this, false);
  else if (!events)
    host.unwatch(stream_->fd(), false);
  else
    host.rewatch(stream_->fd(), events, this, false);
  watched_ = events;
}

void Lane::want_write(bool yes) {
  if (write_ == yes) return;
  write_ = yes;
  update();
}

void Lane::want_chase(bool yes) {
  if (chase_ == yes) return;
  chase_ = yes;
  update();
}

void Lane::fail_soon(int error) {
  if (failed_ || stopped_) return;
  failed_ = error;
  update();
}

void Lane::stop() {
  if (stopped_) return;
  stopped_ = true;
  failed_ = 0;
  update();
  if (in_loop_) peer_.host().unwatch(stream_->fd(), true);
  in_loop_ = false;
}

void Lane::close() {
  stop();
  if (watched_) peer_.host().unwatch(stream_->fd(), false);  // stopped within its handshake
  watched_ = 0;
  quiesce();
  stream_->close(aborts());
}

}  // namespace aiocomm::tcp
