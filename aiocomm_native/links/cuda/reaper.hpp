// Gives back what the driver gives back only when a device has come to rest: device memory, pinned memory, mappings.
//
// Such a call waits for all that is queued on its device, also for a kernel that runs for long, or that itself waits for a
// transfer; and it holds meanwhile the lock without which no thread can queue a copy. So no loop and no copy thread makes
// it, but one thread of the process, which waits first for the device in a way that holds nothing.
#pragma once

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
  // Never ends: what is still waited for when the process ends, ends with it.
  static Reaper& of_process();

  // Calls `task` in this context once the device is at rest; in the order of submission. Returns its number. Any thread.
  uint64_t submit(CUcontext context, std::function<void()> task);
  // Until the task with this number, or all so far, have ended; false: it takes longer.
  bool wait(uint64_t number, std::chrono::milliseconds longest);
  bool wait(std::chrono::milliseconds longest);

 private:
  struct Task {
    CUcontext context;
    std::function<void()> run;
  };
  explicit Reaper(const Driver& driver) : driver_(driver) {}
  void run();

  const Driver& driver_;
  std::mutex mutex_;
  std::condition_variable wake_, ended_;
  std::deque<Task> tasks_;
  uint64_t submitted_ = 0, done_ = 0;
  bool started_ = false;
};

}  // namespace aiocomm::cuda
