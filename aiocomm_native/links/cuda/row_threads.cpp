#include "links/cuda/row_threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <system_error>

namespace aiocomm::cuda {

namespace {
constexpr size_t kMostHelpers = 3;  // more do not add to the rate: the driver lets so many in
}  // namespace

CUresult queue_batch(const Driver& driver, const Batch& batch, CUstream stream) {
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
  size_t first = 0, failed = 0;
  return driver.cuMemcpyBatchAsync(batch.to, batch.from, batch.nbytes, batch.count, &attributes, &first, 1,
                                   &failed, stream);
}

size_t RowThreads::helpers() {
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return 0;
  return std::min(kMostHelpers, static_cast<size_t>(std::max(CPU_COUNT(&usable), 1) - 1));
}

RowThreads::RowThreads(const Driver& driver, size_t helpers) : driver_(driver) {
  made_ = driver.cuCtxGetCurrent(&context_);
  for (size_t i = 0; i < helpers && made_ == CUDA_SUCCESS; ++i) {
    Helper& helper = *helpers_.emplace_back(std::make_unique<Helper>());
    made_ = driver.cuStreamCreateWithPriority(&helper.stream, CU_STREAM_NON_BLOCKING, 0);
    if (made_ == CUDA_SUCCESS) made_ = driver.cuEventCreate(&helper.behind, CU_EVENT_DISABLE_TIMING);
  }
  if (made_ != CUDA_SUCCESS) return;
  try {
    for (auto& helper : helpers_) helper->thread = std::thread([this, &helper = *helper] { run(helper); });
  } catch (const std::system_error&) {  // the caller does what they would have done
  }
}

RowThreads::~RowThreads() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  begun_.notify_all();
  for (auto& helper : helpers_) {
    if (helper->thread.joinable()) helper->thread.join();
    if (helper->behind) driver_.cuEventDestroy(helper->behind);
    if (helper->stream) driver_.cuStreamDestroy(helper->stream);
  }
}

void RowThreads::take_shares(std::unique_lock<std::mutex>& lock, CUstream stream, bool* took) {
  while (left()) {
    const Batch share = batch_.part(next_, std::min(kShare, batch_.count - next_));
    next_ += share.count;
    if (took) *took = true;
    lock.unlock();
    const CUresult code = queue_batch(driver_, share, stream);
    lock.lock();
    if (code == CUDA_SUCCESS) continue;
    code_ = code;
    next_ = batch_.count;
  }
}

void RowThreads::run(Helper& helper) {
  pthread_setname_np(pthread_self(), "aiocomm-rows");
  driver_.cuCtxSetCurrent(context_);
  int capture_mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  driver_.cuThreadExchangeStreamCaptureMode(&capture_mode);  // graphs that others capture stay whole
  std::unique_lock lock(mutex_);
  for (;;) {
    begun_.wait(lock, [this] { return stopping_ || left(); });
    if (stopping_) return;
    ++busy_;
    take_shares(lock, helper.stream, &helper.took);
    lock.unlock();
    const CUresult code = driver_.cuEventRecord(helper.behind, helper.stream);
    lock.lock();
    if (code != CUDA_SUCCESS) code_ = code;
    if (--busy_ == 0) over_.notify_one();
  }
}

CUresult RowThreads::send(const Batch& batch, CUstream stream) {
  if (made_ != CUDA_SUCCESS) return made_;
  std::unique_lock lock(mutex_);
  batch_ = batch;
  next_ = 0;
  code_ = CUDA_SUCCESS;
  for (auto& helper : helpers_) helper->took = false;
  begun_.notify_all();
  take_shares(lock, stream, nullptr);
  over_.wait(lock, [this] { return busy_ == 0; });
  for (auto& helper : helpers_) {
    if (!helper->took) continue;
    const CUresult code =
        code_ == CUDA_SUCCESS ? driver_.cuStreamWaitEvent(stream, helper->behind, 0) : code_;
    if (code == CUDA_SUCCESS) continue;
    code_ = code;
    driver_.cuStreamSynchronize(helper->stream);
  }
  return code_;
}

}  // namespace aiocomm::cuda
