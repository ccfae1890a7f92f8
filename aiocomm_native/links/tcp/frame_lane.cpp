#include "links/tcp/frame_lane.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "links/tcp/peer.hpp"

namespace aiocomm::tcp {

bool FrameLane::send(const FrameHeader& header, const std::byte* meta, const std::byte* payload) {
  iovec parts[3] = {{const_cast<FrameHeader*>(&header), sizeof header},
                    {const_cast<std::byte*>(meta), header.meta_bytes},
                    {const_cast<std::byte*>(payload), header.payload_bytes}};
  if (!header.meta_bytes) parts[1] = parts[2];
  int count = 1 + (header.meta_bytes != 0) + (header.payload_bytes != 0);
  Io io = stream_->write(parts, count, false);
  if (io.error) {
    fail_soon(io.error);
    return false;
  }
  size_t skip = io.n;
  for (int i = 0; i < count; ++i) {
    sent_ += parts[i].iov_len;
    size_t gone = std::min(skip, parts[i].iov_len);
    skip -= gone;
    auto* bytes = static_cast<const std::byte*>(parts[i].iov_base);
    backlog_.insert(backlog_.end(), bytes + gone, bytes + parts[i].iov_len);
  }
  if (!backlog_.empty()) want_write(true);
  return true;
}

void FrameLane::writable() {
  if (backlog_at_ < backlog_.size()) {
    iovec rest{backlog_.data() + backlog_at_, backlog_.size() - backlog_at_};
    Io io = stream_->write(&rest, 1, false);
    if (io.error) return fail_soon(io.error);
    backlog_at_ += io.n;
    if (backlog_at_ < backlog_.size()) return want_write(true);
  }
  if (backlog_.capacity() > kBuffer)
    std::vector<std::byte>().swap(backlog_);
  else
    backlog_.clear();
  backlog_at_ = 0;
  want_write(false);
  peer_.drained(*this);
}

void FrameLane::chase(uint64_t position) {
  if (position <= chase_until_) return;
  chase_until_ = position;
  if (chasing()) read();
}

void FrameLane::part() {
  if (!open()) return;
  if (backlog_at_ < backlog_.size()) {
    int room = static_cast<int>(2 * (backlog_.size() - backlog_at_)) + (1 << 20);
    ::setsockopt(stream_->fd(), SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    const int unsent = 0;  // as much as there is room for
    ::setsockopt(stream_->fd(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    iovec rest{backlog_.data() + backlog_at_, backlog_.size() - backlog_at_};
    stream_->write(&rest, 1, false);
  }
  // Closed with input unread, the kernel would reset the connection and drop what it has not sent yet.
  std::byte unread[4096];
  iovec space{unread, sizeof unread};
  for (int turns = 256; turns > 0 && stream_->read(&space, 1).n > 0;) --turns;
}

void FrameLane::chase_end() { chase(UINT64_MAX); }

void FrameLane::reserve(size_t nbytes) {
  if (begin_ && end_ > begin_) std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
  end_ -= begin_;
  begin_ = 0;
  if (nbytes <= capacity_) return;
  auto larger = std::make_unique_for_overwrite<std::byte[]>(nbytes);
  if (end_) std::memcpy(larger.get(), buffer_.get(), end_);
  buffer_ = std::move(larger);
  capacity_ = nbytes;
}

void FrameLane::readable() {
  size_t turn = kReadTurn;
  for (bool more = true; more || stream_->buffered();) {
    if (!capacity_) reserve(kBuffer);
    iovec space{buffer_.get() + end_, capacity_ - end_};
    Io io = stream_->read(&space, 1);
    if (io.error) return peer_.ended(*this, io.error, true);
    if (io.n == 0) {
      if (io.wait & EPOLLOUT) want_write(true);  // TLS has something to answer first
      break;
    }
    received_ += io.n;
    end_ += io.n;
    turn -= std::min(turn, io.n);
    more = io.n == space.iov_len && turn > 0;
    peer_.heard();
    if (!parse()) return;
  }
  want_chase(chasing());
}

bool FrameLane::parse() {
  while (end_ - begin_ >= sizeof(FrameHeader)) {
    FrameHeader header;
    std::memcpy(&header, buffer_.get() + begin_, sizeof header);
    if (const char* wrong = peer_.check(*this, header)) throw ProtocolViolation(wrong);
    size_t whole = sizeof header + header.meta_bytes + header.payload_bytes;
    if (end_ - begin_ < whole) {
      if (begin_ + whole > capacity_) reserve(whole);
      return true;
    }
    const std::byte* meta = buffer_.get() + begin_ + sizeof header;
    begin_ += whole;
    peer_.frame(*this, header, meta, meta + header.meta_bytes);
    if (peer_.dead()) return false;
  }
  if (begin_ == end_) {
    begin_ = end_ = 0;
    if (capacity_ > kBuffer) {
      buffer_.reset();
      capacity_ = 0;
    }
  } else if (begin_ + sizeof(FrameHeader) > capacity_ / 2) {
    reserve(kBuffer);
  }
  return true;
}

}  // namespace aiocomm::tcp
