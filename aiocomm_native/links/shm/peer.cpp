#include "links/shm/peer.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "core/cma.hpp"
#include "core/copy.hpp"
#include "core/segments.hpp"
#include "core/shared_memory.hpp"

namespace aiocomm::shm {

namespace {
constexpr uint32_t kMagic = 0x61696f63, kVersion = 1;
constexpr uint64_t kControlBytes = 4096;
constexpr uint64_t kPollBytes =
    512 << 10;  // per turn: the token is not held for longer than this takes to copy
constexpr uint64_t kDataRecord =
    64 << 10;                   // streamed chunks are cut so that both sides copy at the same time
constexpr size_t kMostFds = 8;  // in one message
constexpr uint64_t kMinRing = 64 << 10, kMaxRing = 1 << 30;

uint64_t probe_word =
    0x9e3779b97f4a7c15ull;  // what the peer reads to find out whether it may read our memory

void close_all(std::vector<int>& fds) {
  for (int fd : fds) ::close(fd);
  fds.clear();
}

bool send_with_fds(int socket, const void* data, size_t nbytes, const int* fds, int count) {
  iovec iov{const_cast<void*>(data), nbytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMostFds)] = {};
  msghdr message{};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  if (count) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * count);
    std::memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
  }
  ssize_t n;
  do n = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  return n == static_cast<ssize_t>(nbytes);
}
}  // namespace

ShmPeer::ShmPeer(Host& host, int socket, bool initiator)
    : host_(host), socket_(socket), initiator_(initiator) {
  fcntl(socket_, F_SETFL, fcntl(socket_, F_GETFL) | O_NONBLOCK);
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(socket_, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0) pid_ = credentials.pid;
  // Where Yama restricts tracing to descendants, a process can open itself to its user's others; it asks first.
  if (host_.text_setting("cma") == "allow") prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
  try {
    if (initiator_) make_segment();
    greet();
  } catch (...) {
    unmap();
    throw;
  }
}

ShmPeer::~ShmPeer() { unmap(); }

void ShmPeer::start() {
  host_.watch(socket_, EPOLLIN | EPOLLRDHUP, this, false);
  watched_ = true;
}

void ShmPeer::unmap() {
  close();
  if (segment_) munmap(segment_, segment_bytes_);
  if (peer_page_) munmap(peer_page_, 4096);
}

void ShmPeer::make_segment() {
  auto wanted = static_cast<uint64_t>(host_.setting("ring_bytes", 1 << 20));
  auto eager = static_cast<uint64_t>(host_.setting("eager_max", 64 << 10));
  ring_bytes_ = std::bit_ceil(std::clamp(std::max(wanted, 4 * (eager + 2 * kMaxMeta)), kMinRing, kMaxRing));
  segment_fd_ = memfd_create("aiocomm-pair", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (segment_fd_ < 0) throw LinkFailure("cannot make the pair's segment (memfd_create)", errno);
  if (ftruncate(segment_fd_, static_cast<off_t>(kControlBytes + 2 * ring_bytes_)) != 0)
    throw LinkFailure("cannot size the pair's segment", errno);
  fcntl(segment_fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  map_segment(segment_fd_);
}

void ShmPeer::map_segment(int fd) {
  segment_bytes_ = kControlBytes + 2 * ring_bytes_;
  if (!keeps_size(fd, segment_bytes_))
    throw LinkFailure("the pair's segment is too small, or could shrink", EPROTO);
  void* base = mmap(nullptr, segment_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) throw LinkFailure("cannot map the pair's segment", errno);
  // Page by page they would come in the middle of the first messages, some microseconds each.
#ifdef MADV_POPULATE_WRITE
  if (host_.setting("populates", 0)) madvise(base, segment_bytes_, MADV_POPULATE_WRITE);
#endif
  segment_ = static_cast<std::byte*>(base);
  auto* controls = reinterpret_cast<RingControl*>(segment_);
  std::byte* rings = segment_ + kControlBytes;
  int mine = initiator_ ? 0 : 1;
  out_.open(controls + mine, rings + mine * ring_bytes_, ring_bytes_);
  in_.open(controls + (1 - mine), rings + (1 - mine) * ring_bytes_, ring_bytes_);
}

void ShmPeer::greet() {
  Hello hello{kMagic, kVersion, ring_bytes_, reinterpret_cast<uint64_t>(&probe_word), probe_word};
  int fds[4] = {host_.wake_page_fd(), host_.loop_fd(), host_.engine_fd(), segment_fd_};
  if (!send_with_fds(socket_, &hello, sizeof hello, fds, initiator_ ? 4 : 3))
    throw LinkFailure("cannot greet the peer", errno ? errno : EPIPE);
}

void ShmPeer::on_ready(uint32_t events) {
  if (closed_) return;
  read_socket();
  if (!closed_ && (events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR)))
    lost("its process ended, or has given this one up (connection hung up)");
}

void ShmPeer::read_socket() {
  for (;;) {
    char data[sizeof(Hello)];
    static_assert(sizeof(SegmentNote) <= sizeof data);
    size_t want = ready_ ? sizeof(SegmentNote) : sizeof(Hello);
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMostFds)];
    iovec iov{data, want};
    msghdr message{};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t n = recvmsg(socket_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    std::vector<int> fds;
    for (cmsghdr* h = n > 0 ? CMSG_FIRSTHDR(&message) : nullptr; h; h = CMSG_NXTHDR(&message, h))
      if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
        size_t count = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        fds.resize(count);
        std::memcpy(fds.data(), CMSG_DATA(h), count * sizeof(int));
      }
    if (n <= 0) return lost("its process ended, or has given this one up (connection hung up)");
    // Notes are smaller than a socket buffer's atomic unit, so they come whole.
    const bool cut = message.msg_flags & MSG_CTRUNC;  // there were more descriptors
    if (static_cast<size_t>(n) != want || (cut && fds.size() >= kMostFds)) {
      close_all(fds);
      return lost("protocol violation on the pair's socket");
    }
    if (cut) {
      close_all(fds);
      if (!ready_) return give_up(EMFILE, kOutOfFiles);
      continue;  // without its mapping a segment is reached by cross-memory attach, or streamed
    }
    if (!ready_) {
      Hello hello;
      std::memcpy(&hello, data, sizeof hello);
      on_hello(hello, fds);
    } else {
      SegmentNote note;
      std::memcpy(&note, data, sizeof note);
      on_segment(note, fds);
    }
    if (closed_) return;
  }
}

void ShmPeer::on_hello(const Hello& hello, std::vector<int>& fds) {
  size_t expected = initiator_ ? 3 : 4;
  bool sane = hello.magic == kMagic && hello.version == kVersion && fds.size() == expected;
  if (sane && !initiator_)
    sane =
        std::has_single_bit(hello.ring_bytes) && hello.ring_bytes >= kMinRing && hello.ring_bytes <= kMaxRing;
  if (!sane) {
    close_all(fds);
    return lost("protocol violation: not a greeting");
  }
  try {
    if (!initiator_) {
      ring_bytes_ = hello.ring_bytes;
      map_segment(fds[3]);
      ::close(fds[3]);
      fds.pop_back();
    }
    if (!keeps_size(fds[0], 4096))
      throw LinkFailure("the peer's wake page is too small, or could shrink", EPROTO);
    void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    if (page == MAP_FAILED) throw LinkFailure("cannot map the peer's wake page", errno);
    peer_page_ = static_cast<WakePage*>(page);
  } catch (const LinkFailure& failure) {
    close_all(fds);
    return failure.code == EPROTO ? lost(failure.what()) : give_up(failure.code, failure.what());
  }
  ::close(fds[0]);
  peer_loop_fd_ = fds[1];
  peer_engine_fd_ = fds[2];
  ready_ = true;

  int error = 0;
  if (host_.text_setting("cma") == "off") {
    error = ECANCELED;
  } else {
    uint64_t value = 0;
    error = read_process(pid_, hello.probe_address, reinterpret_cast<std::byte*>(&value), sizeof value);
    cma_ = !error && value == hello.probe_value;
    if (!cma_ && !error) error = EFAULT;
  }
  if (!cma_ && error != ESRCH)  // that one has ended already, which its socket tells
    host_.fallback(rank, "stream",
                   error == ECANCELED
                       ? "cross-memory attach is switched off"
                       : std::string("cross-memory attach is refused: ") + std::strerror(error));
  blocked_ = false;
  host_.sink().on_writable(*this);
}

void ShmPeer::on_segment(const SegmentNote& note, std::vector<int>& fds) {
  if (note.error && !note.id && !note.nbytes && !note.base && fds.empty())
    return refused(static_cast<int>(note.error));
  if (note.nbytes == 0 && fds.empty()) {
    std::lock_guard lock(mappings_mutex_);
    mappings_.erase(note.id);
    return;
  }
  if (fds.size() != 1) {
    close_all(fds);
    return lost("protocol violation: a segment without its descriptor");
  }
  bool sane = note.nbytes > 0 && keeps_size(fds[0], note.nbytes);
  // Copy threads only read it; devices write it, too.
  void* base = sane ? mmap(nullptr, note.nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0) : MAP_FAILED;
  close_all(fds);
  if (base == MAP_FAILED) return;  // its bytes are reached by cross-memory attach, or streamed
  std::lock_guard lock(mappings_mutex_);
  mappings_.try_emplace(note.id, std::make_shared<PeerMemory>(base, note.nbytes));
}

void ShmPeer::tell_freed_segments() {
  uint64_t releases = Segments::of_process().releases();
  if (releases == releases_seen_ || closed_) return;
  for (auto it = announced_.begin(); it != announced_.end();) {
    if (Segments::of_process().alive(*it)) {
      ++it;
      continue;
    }
    SegmentNote note{*it, 0, 0, 0};
    if (!send_with_fds(socket_, &note, sizeof note, nullptr, 0)) return;  // again at the next turn
    it = announced_.erase(it);
  }
  releases_seen_ = releases;
}

Location ShmPeer::locate(const std::byte* data, uint64_t nbytes) {
  auto address = reinterpret_cast<uint64_t>(data);
  auto segment = Segments::of_process().find(data, nbytes);
  if (!segment) return {address, 0};
  if (!announced_.contains(segment->id)) {
    SegmentNote note{segment->id, 0, segment->nbytes, reinterpret_cast<uint64_t>(segment->base)};
    if (!ready_ || !send_with_fds(socket_, &note, sizeof note, &segment->fd, 1)) return {address, 0};
    announced_.insert(segment->id);
  }
  return {static_cast<uint64_t>(data - segment->base), segment->id};
}

Path ShmPeer::pull_path(const Location& where) {
  if (where.segment == 0) return cma_ ? Path::cma : Path::none;
  return shared(where.segment) ? Path::mapped : Path::none;
}

std::shared_ptr<PeerMemory> ShmPeer::shared(uint32_t segment) {
  if (auto known = mapped(segment)) return known;
  read_socket();  // the note was sent before the frame that names the segment
  return mapped(segment);
}

std::shared_ptr<PeerMemory> ShmPeer::mapped(uint32_t segment) {
  std::lock_guard lock(mappings_mutex_);
  auto it = mappings_.find(segment);
  return it == mappings_.end() ? nullptr : it->second;
}

int ShmPeer::pull(const Location& where, std::byte* into, size_t nbytes) {
  if (where.segment != 0) {
    const std::shared_ptr<PeerMemory> mapping = mapped(where.segment);
    if (!mapping) return ENXIO;
    if (!mapping->holds(where.address, nbytes)) return EFAULT;
    copy_large(into, mapping->base + where.address, nbytes);
    return 0;
  }
  return read_process(pid_, where.address, into, nbytes);
}

int ShmPeer::pull_rows(const Location& where, std::byte* into, const RowList& rows, uint64_t offset,
                       uint64_t nbytes) {
  if (where.segment != 0) return LinkPeer::pull_rows(where, into, rows, offset, nbytes);
  return read_rows(pid_, where.address, into, rows, offset, nbytes);
}

// ---------------------------------------------------------------- frames

void ShmPeer::wake_peer(Wake wake) {
  if (wake == Wake::loop)
    ring(peer_page_->loop, peer_loop_fd_);
  else if (wake == Wake::engine)
    ring(peer_page_->engine, peer_engine_fd_);
}

bool ShmPeer::copy_record(const FrameHeader& header, const std::byte* meta, const std::byte* payload,
                          Wake wake) {
  uint64_t extent = sizeof header + header.meta_bytes + uint64_t{header.payload_bytes};
  std::byte* at = out_.reserve(extent);
  if (!at) {
    wake_peer(Wake::engine);  // a full ring must drain even while the peer's loop is busy
    if (!out_.wait_for_room() || !(at = out_.reserve(extent))) {
      blocked_ = true;  // only poll() clears it: an unfinished chunk may wait, too
      return false;
    }
  }
  std::memcpy(at, &header, sizeof header);
  if (header.meta_bytes) std::memcpy(at + sizeof header, meta, header.meta_bytes);
  if (header.payload_bytes)
    std::memcpy(at + sizeof header + header.meta_bytes, payload, header.payload_bytes);
  out_.commit();
  wake_peer(wake);
  return true;
}

Post ShmPeer::post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) {
  if (closed_) return Post::lost;
  if (!ready_) return Post::again;
  tell_freed_segments();
  return copy_record(header, meta, payload, wake) ? Post::ok : Post::again;
}

Post ShmPeer::post_data(const FrameHeader& header, const std::byte* payload, uint8_t) {
  if (closed_) return Post::lost;
  if (!ready_ || data_) return Post::again;
  data_ = header;
  data_payload_ = payload;
  data_done_ = 0;
  continue_data();
  if (data_) return Post::pending;
  return Post::ok;
}

void ShmPeer::continue_data() {
  while (data_ && data_done_ < data_->payload_bytes) {
    FrameHeader piece = *data_;
    piece.address += data_done_;
    piece.payload_bytes = static_cast<uint32_t>(std::min(kDataRecord, data_->payload_bytes - data_done_));
    if (!copy_record(piece, data_payload_, data_payload_ + data_done_, Wake::engine)) return;
    data_done_ += piece.payload_bytes;
  }
  data_.reset();
}

int ShmPeer::poll(int budget) {
  if (!ready_ || closed_ || polling_) return 0;
  tell_freed_segments();
  polling_ = true;
  int did = 0;
  uint64_t nbytes = 0;
  FrameSink& sink = host_.sink();
  FrameHeader header;
  const std::byte* body;
  bool broken = false;
  while (did < budget && nbytes < kPollBytes && !closed_ && in_.peek(header, body, broken)) {
    if (broken) {
      lost("protocol violation: a broken record");
      break;
    }
    ++did;
    nbytes += header.payload_bytes;
    const std::byte* payload = body + header.meta_bytes;
    if (header.kind == FrameKind::data) {
      std::byte* target = sink.data_target(*this, header, 0);
      if (target) std::memcpy(target, payload, header.payload_bytes);
      sink.on_data(*this, header, header.payload_bytes, target);
    } else {
      sink.on_frame(*this, header, body, header.payload_bytes ? payload : nullptr);
    }
    in_.pop();
  }
  if (!closed_ && in_.release()) wake_peer(Wake::engine);
  // Asking again: frames posted since the last time may have taken the room that the wake-up was for.
  if (!closed_ && blocked_ && (out_.roomy() || out_.wait_for_room())) {
    ++did;
    blocked_ = false;
    if (data_) {
      OpId sop = data_->sop;
      uint64_t whole = data_->payload_bytes;
      continue_data();
      if (!data_) sink.on_sent(*this, sop, whole);
    }
    if (!closed_ && !blocked_) sink.on_writable(*this);
  }
  polling_ = false;
  return nbytes >= kPollBytes ? std::max(did, budget) : did;
}

void ShmPeer::lost(const std::string& reason) {
  if (!closed_) host_.sink().on_lost(*this, reason);
}

// The peer lives, but this end cannot take what it has sent: the pair is to be made anew.
void ShmPeer::give_up(int error, const std::string& reason) {
  SegmentNote note{0, static_cast<uint32_t>(error), 0, 0};
  send_with_fds(socket_, &note, sizeof note, nullptr, 0);  // else the other end sees a hang-up: a loss
  failure = error;
  lost(reason);
}

void ShmPeer::refused(int error) {
  // What was posted lies in the ring from its beginning, and nobody takes it in.
  const int mine = initiator_ ? 0 : 1;
  Consumer sent;
  sent.open(reinterpret_cast<RingControl*>(segment_) + mine, segment_ + kControlBytes + mine * ring_bytes_,
            ring_bytes_);
  failure = error;
  FrameHeader header;
  const std::byte* body;
  for (bool broken = false; sent.peek(header, body, broken) && !broken; sent.pop())
    host_.sink().on_unsure(*this, header);
  lost(std::string("the other end cannot take the pair: ") +
       (error == EMFILE ? kOutOfFiles : std::strerror(error)));
}

void ShmPeer::close() {
  if (closed_) return;
  closed_ = true;
  data_.reset();
  if (socket_ >= 0) {
    if (watched_) host_.unwatch(socket_, false);
    ::close(socket_);
  }
  for (int fd : {segment_fd_, peer_loop_fd_, peer_engine_fd_})
    if (fd >= 0) ::close(fd);
  socket_ = segment_fd_ = peer_loop_fd_ = peer_engine_fd_ = -1;
}

}  // namespace aiocomm::shm
