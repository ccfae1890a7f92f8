// Threads that move bytes which some CPU has to move: chunks pulled from a peer's memory.
//
// Jobs are chosen by the scheduler, one at a time, so that at most one chunk per thread is ever committed; what is
// urgent waits for no queue here. The threads sleep while there is nothing to do.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/link.hpp"

namespace aiocomm {

struct CopyJob {
  OpId op = 0;
  std::shared_ptr<LinkPeer> peer;
  Location from;
  std::byte* into = nullptr;
  uint64_t nbytes = 0;
  const RowList* rows =
      nullptr;  // of the op: its bytes from `offset` on; `from` and `into` are where the rows begin
  uint64_t offset = 0;
  uint64_t posted_ns = 0;
  uint8_t cls = 0;
  int error = 0;
};

class Copier {
 public:
  // `finish` is called by the thread that ran a job, without any lock of the copier's held; it does not throw. `helpless`:
  // no thread can be started, so that somebody is to call run_one().
  Copier(int threads, std::function<void(CopyJob&)> finish, std::function<void()> helpless);
  ~Copier();
  void stop();  // waits for running jobs; drops none: the queue must be empty or its jobs are run
  // `wake` false: the caller is about to call run_one(), or rouse() where it will not.
  void submit(CopyJob job, bool wake = true);
  void rouse();
  bool run_one();  // the calling thread helps; false: nothing queued
  int threads() const { return threads_; }

 private:
  void work();
  void run(CopyJob& job);

  const int threads_;
  const std::function<void(CopyJob&)> finish_;
  const std::function<void()> helpless_;
  std::mutex mutex_;
  // Not a condition variable: glibc's, before 2.41, may lose a wake-up where several threads wait (its bug 25847).
  std::atomic<uint32_t> told_{0};
  std::vector<CopyJob> queue_;
  bool stopping_ = false;
  int sleeping_ = 0;
  std::vector<std::thread> workers_;
};

}  // namespace aiocomm
