// Gives back what the driver gives back only when a device has come to rest: device memory, pinned memory, mappings.
//
// Such a call waits for all that is queued on its device, also for a kernel that runs for long, or that itself waits for a
// transfer; and it holds meanwhile the lock without which no thread can queue a copy there. So no loop makes it, but one
// thread of the process; and loops that spin leave their copies to the copy threads until it is over. (To wait for the device
// first, in a way that holds nothing, cuCtxSynchronize would be the call: it breaks graphs that other threads capture.)
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

class Reaper {
 public:
  explicit Reaper(const Driver& driver) : driver_(driver) {}  // lives as long as the process
  // What it still waits for when the process ends, ends with that. Its thread lives while it has something to do.
  static Reaper& of_process();

  // Calls `task` in this context; in the order of submission. Returns its number. Any thread. What it throws ends it, and
  // nothing else.
  uint64_t submit(CUcontext context, std::function<void()> task);
  // Until the task with this number, or all so far, have ended; false: it takes longer.
  bool wait(uint64_t number, std::chrono::milliseconds longest);
  bool wait(std::chrono::milliseconds longest);

  // Some thread calls what may hold the driver's locks for long, as loading a module does. Any thread.
  void begin_long_call() { calls_.fetch_add(1); }
  void end_long_call() { calls_.fetch_sub(1); }

  // While one of these exists that is true, no task is called: a copy is queued without waiting for one.
  class Undisturbed {
   public:
    explicit Undisturbed(Reaper& reaper) : reaper_(reaper) {
      reaper_.undisturbed_.fetch_add(1);
      if (reaper_.calls_.load()) release();
    }
    ~Undisturbed() {
      if (held_) release();
    }
    Undisturbed(const Undisturbed&) = delete;
    Undisturbed& operator=(const Undisturbed&) = delete;
    explicit operator bool() const { return held_; }

   private:
    void release() {
      reaper_.undisturbed_.fetch_sub(1);
      held_ = false;
    }
    Reaper& reaper_;
    bool held_ = true;
  };

 private:
  struct Task {
    CUcontext context;
    std::function<void()> run;
  };
  void run();

  const Driver& driver_;
  std::mutex mutex_;
  std::condition_variable wake_, ended_;
  std::deque<Task> tasks_;
  uint64_t submitted_ = 0, done_ = 0;
  bool started_ = false;
  std::atomic<uint32_t> calls_{0};  // long ones, under way or about to be
  std::atomic<uint32_t> undisturbed_{0};
};

// Has the reaper free what cuMemAlloc or (`pinned`) cuMemHostAlloc has made in the device's primary context. Any thread.
void free_later(int device, uint64_t address, bool pinned);
// Waits for all that is to be given back; false: it takes longer.
bool given_back(double seconds);

}  // namespace aiocomm::cuda
