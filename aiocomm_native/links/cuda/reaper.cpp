#include "links/cuda/reaper.hpp"

#include <pthread.h>

#include <system_error>
#include <thread>
#include <utility>

#include "core/relax.hpp"

namespace aiocomm::cuda {

namespace {
constexpr std::chrono::milliseconds kLingers{100};  // the thread, for the next task
}  // namespace

Reaper& Reaper::of_process() {
  static Reaper* reaper = new Reaper(Driver::of_process());
  return *reaper;
}

uint64_t Reaper::submit(CUcontext context, std::function<void()> task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back({context, std::move(task)});
  ++submitted_;
  if (!started_) try {
      std::thread([this] { run(); }).detach();
      started_ = true;
    } catch (const std::system_error&) {  // no thread now: with the next task
    }
  wake_.notify_one();
  return submitted_;
}

bool Reaper::wait(uint64_t number, std::chrono::milliseconds longest) {
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, longest, [&] { return done_ >= number; });
}

bool Reaper::wait(std::chrono::milliseconds longest) {
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, longest, [this, all = submitted_] { return done_ >= all; });
}

void Reaper::run() {
  pthread_setname_np(pthread_self(), "aiocomm-gpuend");
  int capture_mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver_.cuThreadExchangeStreamCaptureMode(&capture_mode);  // as in Device::Current
  std::unique_lock lock(mutex_);
  while (wake_.wait_for(lock, kLingers, [this] { return !tasks_.empty(); })) {
    std::deque<Task> batch;
    batch.swap(tasks_);
    lock.unlock();
    for (Task& task : batch) {
      driver_.cuCtxSetCurrent(task.context);
      begin_long_call();
      while (undisturbed_.load()) relax();
      try {
        task.run();
      } catch (...) {  // it is of no engine, and nobody hears of it: what it was to give back is kept
      }
      end_long_call();
      task.run = nullptr;  // with what it holds
    }
    lock.lock();
    done_ += batch.size();
    ended_.notify_all();
  }
  started_ = false;
}

bool given_back(double seconds) {
  return Reaper::of_process().wait(std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3)));
}

void free_later(int device, uint64_t address, bool pinned) {
  const Driver& driver = Driver::of_process();
  CUcontext context = nullptr;
  if (!driver.usable() || driver.cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS) return;
  Reaper::of_process().submit(context, [&driver, device, address, pinned] {
    if (pinned)
      driver.cuMemFreeHost(reinterpret_cast<void*>(address));
    else
      driver.cuMemFree(address);
    driver.cuDevicePrimaryCtxRelease(device);
  });
}

}  // namespace aiocomm::cuda
