// Threads that queue the copies of one batch side by side, each on a stream of its own.
//
// A copy in a batch takes the driver 0.45 us on a core that is free and 1 us on one whose other half is busy: blocks of
// 32 KiB move at 60 or 33 GB/s. The driver fills several streams at a time, so four threads reach 75 on either.
//
// Rules
//  * Copies are handed out in small shares: who wakes late, or has a slow core, takes fewer, and is waited for no longer
//    than a share takes.
//  * The caller takes part. Its stream goes on behind what the others have queued, also where that failed.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

// Copies that do not depend on each other.
struct Batch {
  const CUdeviceptr *to = nullptr, *from = nullptr;
  const size_t* nbytes = nullptr;
  size_t count = 0;
  Batch part(size_t first, size_t n) const { return {to + first, from + first, nbytes + first, n}; }
};

CUresult queue_batch(const Driver& driver, const Batch& batch, CUstream stream);

// Used by one thread, in the context in which it was made. Destroyed in it, too.
class RowThreads {
 public:
  static constexpr size_t kShare = 256;  // copies
  static size_t helpers();               // of a process on this machine

  // Fails like the driver: `send` then says why. Threads that the system refuses are done without.
  RowThreads(const Driver& driver, size_t helpers);
  ~RowThreads();
  RowThreads(const RowThreads&) = delete;
  RowThreads& operator=(const RowThreads&) = delete;

  CUresult send(const Batch& batch, CUstream stream);

 private:
  struct Helper {
    CUstream stream = nullptr;
    CUevent behind = nullptr;  // what it has queued
    bool took = false;         // a share of this batch
    std::thread thread;
  };
  void run(Helper& helper);
  void take_shares(std::unique_lock<std::mutex>& lock, CUstream stream, bool* took);
  bool left() const { return next_ < batch_.count; }

  const Driver& driver_;
  CUcontext context_ = nullptr;
  CUresult made_ = CUDA_SUCCESS;
  std::vector<std::unique_ptr<Helper>> helpers_;

  std::mutex mutex_;  // guards what follows, and `took`
  std::condition_variable begun_, over_;
  Batch batch_;
  size_t next_ = 0;  // of its copies that nobody has taken
  size_t busy_ = 0;  // helpers
  CUresult code_ = CUDA_SUCCESS;
  bool stopping_ = false;
};

}  // namespace aiocomm::cuda
