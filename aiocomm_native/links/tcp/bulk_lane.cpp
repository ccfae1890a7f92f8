#include "links/tcp/bulk_lane.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "links/tcp/peer.hpp"

namespace aiocomm::tcp {

namespace {
constexpr uint64_t kIdleNs = 1'000'000;
constexpr uint64_t kAbsorbed = 2 * Pace::kUnsentMost;
}  // namespace

BulkLane::BulkLane(TcpPeer& peer, std::unique_ptr<Stream> stream, Splice splice)
    : Lane(peer, std::move(stream), false), splice_(stream_->plain() ? splice : Splice::never) {}

// ---------------------------------------------------------------- out

Post BulkLane::post(const FrameHeader& header, const std::byte* payload) {
  if (full()) return Post::again;
  if (count_ == 0) {
    const uint64_t now = peer_.host().now();
    if (now - sent_ns_ > kIdleNs) {
      run_ = 0;
      sent_ns_ = now;
    }
  }
  out_[count_++] = {header, payload};
  queued_ += sizeof header + header.payload_bytes;
  if (!open()) return Post::pending;
  if (count_ == 1 && !busy_.load(std::memory_order_acquire) && out_[0].left() <= kPostTurn) {
    while (wrote(write_some(out_[0], kPostTurn)))
      if (out_[0].left() == 0) {
        pop();
        return Post::ok;
      }
  }
  want_write(true);
  return Post::pending;
}

template <typename Call>
Io BulkLane::outside(Call call) {
  busy_.store(true, std::memory_order_relaxed);
  Outside away(peer_.host());
  Io io = call();
  busy_.store(false, std::memory_order_release);
  busy_.notify_all();
  return io;
}

Io BulkLane::write_some(const Outgoing& frame, uint64_t turn) {
  uint64_t paid = frame.done - std::min<uint64_t>(frame.done, sizeof frame.header);  // payload bytes written
  const std::byte* rest = frame.payload + paid;
  size_t want = std::min<uint64_t>(frame.header.payload_bytes - paid, turn);
  bool splices =
      !splice_.refused() && (splice_.holding() || splice_.pays(stream_->fd(), want, frame.header.nbytes));
  if (frame.done >= sizeof frame.header && splices) {
    spliced_ = true;
    return splice_.send(stream_->fd(), rest, want);
  }
  iovec parts[2];
  int count = 0;
  if (frame.done < sizeof frame.header)
    parts[count++] = {const_cast<std::byte*>(reinterpret_cast<const std::byte*>(&frame.header)) + frame.done,
                      sizeof frame.header - frame.done};
  if (want && !splices) parts[count++] = {const_cast<std::byte*>(rest), want};
  return stream_->write(parts, count, splices);
}

bool BulkLane::wrote(const Io& io) {
  out_[0].done += io.n;
  queued_ -= io.n;
  if (io.n) peer_.said();
  if (io.error) fail_soon(io.error);
  return !io.error && !io.wait;
}

BulkLane::Outgoing BulkLane::pop() {
  Outgoing front = std::move(out_[0]);
  out_[0] = std::move(out_[1]);
  --count_;
  measure(sizeof front.header + front.header.payload_bytes);
  return front;
}

void BulkLane::measure(uint64_t nbytes) {
  const uint64_t now = peer_.host().now(), since = std::exchange(sent_ns_, now);
  run_ += nbytes;
  if (run_ <= kAbsorbed) return;  // the kernel's buffers have taken it, at whatever rate the link sends
  Pace& pace = peer_.pace();
  pace.drained(nbytes, now - since);
  if (std::exchange(unsent_, pace.unsent()) == unsent_) return;
  const int unsent = static_cast<int>(unsent_);
  ::setsockopt(stream_->fd(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
}

bool BulkLane::let_go(OpId sop) {
  if (spliced_ || busy_.load(std::memory_order_acquire)) return false;  // the kernel has the pages themselves
  for (int i = 0; i < count_; ++i) {
    Outgoing& frame = out_[i];
    if (frame.header.sop != sop || frame.own) continue;
    frame.own = std::make_unique_for_overwrite<std::byte[]>(frame.header.payload_bytes);
    std::memcpy(frame.own.get(), frame.payload, frame.header.payload_bytes);
    frame.payload = frame.own.get();
  }
  return true;
}

void BulkLane::writable() {
  uint64_t turn = kWriteTurn;
  while (count_ > 0 && turn > 0) {
    Io io = outside([&] { return write_some(out_[0], turn); });
    if (peer_.dead()) return;
    turn -= std::min<uint64_t>(turn, io.n);
    if (!wrote(io)) break;
    if (out_[0].left() > 0) continue;
    Outgoing sent = pop();
    peer_.sink().on_sent(peer_, sent.header.sop, sent.header.payload_bytes);
    if (peer_.dead()) return;
  }
  want_write(count_ > 0);
  if (!full()) peer_.bulk_room();
}

// ---------------------------------------------------------------- in

void BulkLane::readable() {
  size_t turn = kReadTurn;
  for (bool more = true; more || stream_->buffered();) {
    iovec parts[2];
    int count = 0;
    uint64_t left = 0, want = 0;
    std::byte* target = nullptr;
    if (head_ == sizeof in_) {
      left = in_.payload_bytes - done_;
      want = std::min<uint64_t>(left, std::max<size_t>(turn, 16 << 10));
      target = peer_.sink().data_target(peer_, in_, done_);
      if (peer_.dead()) return;
      if (!target) want = std::min<uint64_t>(want, kReadTurn);
      parts[count++] = {target ? target : scrap(), want};
    }
    if (want == left) {  // the next frame's header comes along
      size_t at = count ? 0 : head_;
      parts[count++] = {reinterpret_cast<std::byte*>(&next_) + at, sizeof next_ - at};
    }
    Io io = outside([&] { return stream_->read(parts, count); });
    const uint64_t payload = std::min<uint64_t>(io.n, want);
    const FrameHeader header = in_;
    done_ += payload;
    const bool whole = want > 0 && done_ == header.payload_bytes;
    if (whole) head_ = done_ = 0;
    if (want > 0) peer_.sink().on_data(peer_, header, payload, target);
    if (peer_.dead()) return;
    if (io.error) return peer_.ended(*this, io.error, true);
    if (io.n == 0) {
      if (io.wait & EPOLLOUT) want_write(true);  // TLS has something to answer first
      break;
    }
    peer_.heard();
    turn -= std::min(turn, io.n);
    size_t asked = parts[0].iov_len + (count > 1 ? parts[1].iov_len : 0);
    more = io.n == asked && turn > 0;
    if (payload && !whole) continue;
    head_ += io.n - payload;
    if (head_ < sizeof next_) continue;
    in_ = next_;
    if (const char* wrong = peer_.check_data(in_)) throw ProtocolViolation(wrong);
    if (in_.payload_bytes == 0) head_ = 0;
  }
  wait_for_more();
}

// A wake-up per segment costs more than copying it: sleep until a turn's worth has come, or the rest of the
// frame.
void BulkLane::wait_for_more() {
  if (!stream_->plain()) return;
  uint64_t left = head_ == sizeof in_ ? in_.payload_bytes - done_ : 1;
  int low_water = static_cast<int>(std::min<uint64_t>(left, kReadTurn));
  if (low_water == low_water_) return;
  low_water_ = low_water;
  ::setsockopt(stream_->fd(), SOL_SOCKET, SO_RCVLOWAT, &low_water, sizeof low_water);
}

std::byte* BulkLane::scrap() {
  if (!scrap_) scrap_ = std::make_unique_for_overwrite<std::byte[]>(kReadTurn);
  return scrap_.get();
}

}  // namespace aiocomm::tcp
