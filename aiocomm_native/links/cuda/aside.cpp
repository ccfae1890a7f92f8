#include "links/cuda/aside.hpp"

#include <utility>

namespace aiocomm::cuda {

namespace {
constexpr uint32_t kLongAgo = 1u << 30;  // numbers; they begin anew after four times as many
}

CUresult Aside::make(const Driver& driver, volatile uint32_t* word, CUdeviceptr at) {
  word_ = word, at_ = at;
  const CUresult code = driver.cuStreamCreateWithPriority(&stream_, CU_STREAM_NON_BLOCKING, 0);
  return code == CUDA_SUCCESS ? driver.cuEventCreate(&event_, CU_EVENT_DISABLE_TIMING) : code;
}

CUresult Aside::tell(const Driver& driver, CUstream stream, uint32_t number) {
  if (!awaited_) *word_ = number - kLongAgo;
  CUresult code = driver.cuEventRecord(event_, stream);
  if (code == CUDA_SUCCESS) code = driver.cuStreamWaitEvent(stream_, event_, 0);
  if (code == CUDA_SUCCESS)
    code = driver.cuStreamWriteValue32(stream_, at_, number, CU_STREAM_WRITE_VALUE_DEFAULT);
  if (code == CUDA_SUCCESS) told_ = number, awaited_ = true;
  return code;
}

uint32_t Aside::latest(uint32_t done) {
  if (!awaited_) return done;
  const uint32_t seen = __atomic_load_n(word_, __ATOMIC_ACQUIRE);
  awaited_ = seen != told_;
  return static_cast<int32_t>(seen - done) > 0 ? seen : done;
}

std::function<void()> Aside::give_up(const Driver& driver) {
  return [&driver, stream = std::exchange(stream_, nullptr), event = std::exchange(event_, nullptr)] {
    if (event) driver.cuEventDestroy(event);
    if (stream) driver.cuStreamDestroy(stream);
  };
}

}  // namespace aiocomm::cuda
