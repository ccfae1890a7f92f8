// What threads wait for under a lock. glibc's own, before 2.41, can lose a wake-up where several threads wait, and then
// stands still for ever (its bug 25847).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <mutex>

namespace fake {

class Condition {
 public:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;

  void notify_all() {
    told_.fetch_add(1);
    ::syscall(SYS_futex, &told_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // The condition changes under the lock alone, so that whoever finds it unmet sleeps, or has missed nothing.
  template <class F>
  void wait(Lock& lock, F&& met) {
    while (!met()) sleep(lock, nullptr);
  }
  template <class F>
  bool wait_for(Lock& lock, Clock::duration limit, F&& met) {
    const auto until = Clock::now() + limit;
    while (!met()) {
      const auto left = until - Clock::now();
      if (left <= Clock::duration::zero()) return false;
      wait_for(lock, left);
    }
    return true;
  }
  void wait_for(Lock& lock, Clock::duration limit) {
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(limit).count();
    const timespec left{ns / 1'000'000'000, ns % 1'000'000'000};
    sleep(lock, &left);
  }

 private:
  void sleep(Lock& lock, const timespec* limit) {
    const uint32_t seen = told_.load();
    lock.unlock();
    ::syscall(SYS_futex, &told_, FUTEX_WAIT_PRIVATE, seen, limit, nullptr, 0);
    lock.lock();
  }

  std::atomic<uint32_t> told_{0};
};

}  // namespace fake
