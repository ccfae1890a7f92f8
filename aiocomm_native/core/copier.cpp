#include "core/copier.hpp"

#include <pthread.h>

#include <cerrno>
#include <exception>
#include <utility>

#include "core/slice.hpp"

namespace aiocomm {

Copier::Copier(int threads, std::function<void(CopyJob&)> finish, std::function<void()> helpless)
    : threads_(threads), finish_(std::move(finish)), helpless_(std::move(helpless)) {}

Copier::~Copier() { stop(); }

void Copier::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  ++told_;
  told_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Copier::submit(CopyJob job, bool wake) {
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
  }
  if (wake) rouse();
}

void Copier::rouse() {
  {
    std::lock_guard lock(mutex_);
    if (queue_.empty()) return;
    // Threads are started on first use: most processes never move a large message.
    bool any = true;
    if (sleeping_ == 0 && workers_.size() < static_cast<size_t>(threads_) && !stopping_) try {
        workers_.emplace_back([this] { work(); });
      } catch (const std::exception&) {  // the system gives no more: those that there are see to it
        any = !workers_.empty();
      }
    if (!any) helpless_();
    if (sleeping_ == 0) return;
  }
  ++told_;
  told_.notify_one();
}

bool Copier::run_one() {
  CopyJob job;
  {
    std::lock_guard lock(mutex_);
    if (queue_.empty()) return false;
    job = std::move(queue_.front());
    queue_.erase(queue_.begin());
  }
  run(job);
  return true;
}

void Copier::run(CopyJob& job) {
  try {
    job.error = job.rows ? job.peer->pull_rows(job.from, job.into, *job.rows, job.offset, job.nbytes)
                         : job.peer->pull(job.from, job.into, job.nbytes);
  } catch (const std::exception&) {
    job.error = ENOMEM;
  }
  finish_(job);
}

void Copier::work() {
  pthread_setname_np(pthread_self(), "aiocomm-copy");
  // Throughput work: waking it must not take the core from an event loop in the middle of its turn.
  take_short_slices(SCHED_BATCH);
  for (;;) {
    CopyJob job;
    {
      std::unique_lock lock(mutex_);
      while (!stopping_ && queue_.empty()) {
        const uint32_t told = told_;  // whatever comes from now on changes it
        ++sleeping_;
        lock.unlock();
        told_.wait(told);
        lock.lock();
        --sleeping_;
      }
      if (queue_.empty()) return;
      job = std::move(queue_.front());
      queue_.erase(queue_.begin());
    }
    run(job);
  }
}

}  // namespace aiocomm
