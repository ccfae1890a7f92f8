// A mutex that the loop's thread gets before all others.
//
// std::mutex is handed to nobody: a thread that gives it back and asks again at once, as one that empties a socket turn by
// turn does, wins again and again over one that sleeps for it. Here the others stand back while the first one waits; and so
// does who asks again and again without waiting (`try_lock_last`) while anyone waits.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "core/relax.hpp"

namespace aiocomm {

class PriorityMutex {
 public:
  // `tries`: so often it is asked for before the thread sleeps. A loop that spins gives it back and takes it again within
  // fractions of a microsecond: a thread that is woken by the one finds it taken by the other, for as long as the spin is.
  void lock(int tries = 0) {
    if (waiting_.load(std::memory_order_relaxed) == 0 && mutex_.try_lock()) return;
    asking_.fetch_add(1, std::memory_order_relaxed);
    wait(tries > kTries ? tries : kTries);
    asking_.fetch_sub(1, std::memory_order_relaxed);
  }
  void lock_first() {
    for (int tries = 0; tries < kTries; ++tries) {  // it is held for microseconds, and sleeping takes as long
      if (mutex_.try_lock()) return;
      relax();
    }
    waiting_.fetch_add(1, std::memory_order_release);
    mutex_.lock();
    if (waiting_.fetch_sub(1, std::memory_order_release) == 1) waiting_.notify_all();
  }
  bool try_lock() { return mutex_.try_lock(); }
  bool try_lock_last() { return asked() == 0 && mutex_.try_lock(); }
  uint32_t asked() const { return asking_.load(std::memory_order_acquire); }  // how many wait in lock()
  void unlock() { mutex_.unlock(); }

 private:
  void wait(int tries) {
    for (; tries > 0 && waiting_.load(std::memory_order_relaxed) == 0; --tries) {
      if (mutex_.try_lock()) return;
      relax();
    }
    for (uint32_t n; (n = waiting_.load(std::memory_order_acquire)) != 0;)
      waiting_.wait(n, std::memory_order_acquire);
    mutex_.lock();
  }

  static constexpr int kTries = 50;
  std::mutex mutex_;
  std::atomic<uint32_t> asking_{0};   // in lock()
  std::atomic<uint32_t> waiting_{0};  // of lock_first()
};

}  // namespace aiocomm
