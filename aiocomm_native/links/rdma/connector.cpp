#include "links/rdma/connector.hpp"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/guarded.hpp"

namespace aiocomm::rdma {

Connector::~Connector() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Connector::submit(std::shared_ptr<Connecting> job) {
  std::lock_guard lock(mutex_);
  wanted_.push_back(std::move(job));
  if (idle_ < wanted_.size() && threads_.size() < kMostThreads)
    threads_.emplace_back([this] { guarded([this] { work(); }, failed_); });
  wake_.notify_one();
}

bool Connector::give_up(const std::shared_ptr<Connecting>& job) {
  std::lock_guard lock(mutex_);
  std::erase(wanted_, job);
  std::erase(done_, job);
  job->given_up.store(true, std::memory_order_relaxed);
  return std::find(running_.begin(), running_.end(), job) == running_.end();
}

std::shared_ptr<Connecting> Connector::next() {
  std::lock_guard lock(mutex_);
  if (done_.empty()) return nullptr;
  auto job = std::move(done_.front());
  done_.pop_front();
  return job;
}

bool Connector::uses(const Rail& rail) {
  std::lock_guard lock(mutex_);
  return std::any_of(running_.begin(), running_.end(), [&](auto& job) { return &job->rail == &rail; });
}

void Connector::work() {
  pthread_setname_np(pthread_self(), "aiocomm-connect");
  std::unique_lock lock(mutex_);
  for (;;) {
    ++idle_;
    wake_.wait(lock, [this] { return stopping_ || !wanted_.empty(); });
    --idle_;
    if (stopping_) return;
    auto job = std::move(wanted_.front());
    wanted_.pop_front();
    running_.push_back(job);
    lock.unlock();
    try {
      job->rail.connect(job->pairs, job->theirs, job->numbers, job->given_up);
    } catch (const std::exception& failure) {
      job->failure = failure.what();
    }
    lock.lock();
    if (job->given_up.load(std::memory_order_relaxed)) {
      lock.unlock();
      job->rail.discard(job->pairs);
      lock.lock();
    } else {
      done_.push_back(job);
    }
    std::erase(running_, job);
    lock.unlock();
    ring_();
    lock.lock();
  }
}

}  // namespace aiocomm::rdma
