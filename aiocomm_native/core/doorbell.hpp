// How one thread wakes another, in this process or in a peer on the same host.
//
// A sleeper owns a word in a page that its peers map, and an eventfd. Protocol, both sides sequentially consistent:
//   sleeper:  word = asleep; fence; look once more for work; sleep on the eventfd; word = awake
//   waker:    publish work; fence; if word == asleep and exchange(word, awake) == asleep: write the eventfd
// One of the two always sees the other, so no wake-up is lost; and of many wakers only the first makes a system call.
#pragma once

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace aiocomm {

struct alignas(64) WakeWord {
  static constexpr uint32_t kAwake = 0, kAsleep = 1;
  std::atomic<uint32_t> word{kAsleep};
};

// The page that a process shares with its peers on one host.
struct WakePage {
  static constexpr int kDevices = 32;
  WakeWord loop;
  WakeWord engine;
  // By device: bytes that its copy engine has to move. Whoever sends or receives looks whose engine has less to do.
  std::atomic<uint64_t> load[kDevices] = {};
  std::atomic<uint32_t> loop_spins{
      0};  // the loop may spin before it sleeps: it is told early of what is to come
};

struct UnmapPage {
  void operator()(WakePage* page) const { munmap(page, 4096); }
};

// A descriptor that is closed with its owner.
class Descriptor {
 public:
  Descriptor() = default;
  ~Descriptor() { close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  Descriptor& operator=(int fd) {
    close();
    fd_ = fd;
    return *this;
  }
  operator int() const { return fd_; }
  void close() {
    if (int open = std::exchange(fd_, -1); open >= 0) ::close(open);
  }

 private:
  int fd_ = -1;
};

enum class Wake : uint8_t { none, loop, engine };

inline void ring_fd(int fd) {
  uint64_t one = 1;
  [[maybe_unused]] ssize_t n =
      ::write(fd, &one, sizeof one);  // EAGAIN: the counter is full, so a wake is pending
}

inline void clear_fd(int fd) {
  uint64_t n;
  [[maybe_unused]] ssize_t r = ::read(fd, &n, sizeof n);
}

// Rings if the owner of `word` may be asleep. The fence pairs with the one in `prepare_sleep`.
inline void ring(WakeWord& word, int fd) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (word.word.load(std::memory_order_relaxed) == WakeWord::kAsleep &&
      word.word.exchange(WakeWord::kAwake, std::memory_order_acq_rel) == WakeWord::kAsleep)
    ring_fd(fd);
}

inline void prepare_sleep(WakeWord& word) {
  word.word.store(WakeWord::kAsleep, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

// A store would take the line from all who look whether they must ring.
inline void awake(WakeWord& word) {
  if (word.word.load(std::memory_order_relaxed) != WakeWord::kAwake)
    word.word.store(WakeWord::kAwake, std::memory_order_relaxed);
}

// How threads of this process wake one whose word tells the peers only that they need not: its descriptor is readable until
// it has gone round once more, even if it is awake, has looked already, and is about to sleep.
class OwnBell {
 public:
  OwnBell& operator=(int fd) {
    fd_ = fd;
    return *this;
  }
  operator int() const { return fd_; }
  void close() { fd_.close(); }
  // After what the thread is to see.
  void ring() {
    if (!rung_.exchange(true, std::memory_order_acq_rel)) ring_fd(fd_);
  }
  // The thread looks from now on.
  void answer() {
    if (rung_.load(std::memory_order_relaxed)) rung_.exchange(false, std::memory_order_acq_rel);
  }

 private:
  Descriptor fd_;
  std::atomic<bool> rung_{false};
};

}  // namespace aiocomm
