#include "core/copier.hpp"

#include <pthread.h>
#include <sched.h>

#include <utility>

namespace aiocomm {

Copier::Copier(int threads, std::function<void(CopyJob&)> finish)
    : threads_(threads), finish_(std::move(finish)) {}

Copier::~Copier() { stop(); }

void Copier::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Copier::submit(CopyJob job) {
  bool wake;
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
    // Threads are started on first use: most processes never move a large message.
    if (workers_.size() < static_cast<size_t>(threads_) && sleeping_ == 0 && !stopping_)
      workers_.emplace_back([this] { work(); });
    wake = sleeping_ > 0;
  }
  if (wake) wake_.notify_one();
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
  job.error = job.peer->pull(job.from, job.into, job.nbytes);
  finish_(job);
}

void Copier::work() {
  pthread_setname_np(pthread_self(), "aiocomm-copy");
  // Throughput work: waking it must not take the core from an event loop in the middle of its turn.
  sched_param plain{};
  pthread_setschedparam(pthread_self(), SCHED_BATCH, &plain);
  for (;;) {
    CopyJob job;
    {
      std::unique_lock lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      --sleeping_;
      if (queue_.empty()) return;
      job = std::move(queue_.front());
      queue_.erase(queue_.begin());
    }
    run(job);
  }
}

}  // namespace aiocomm
