#include "links/cuda/aside.hpp"

namespace aiocomm::cuda {

CUresult Aside::tell(const Driver& driver, CUstream stream, uint32_t number) {
  CUevent event = nullptr;
  if (!free_.empty()) {
    event = free_.back();
    free_.pop_back();
  } else if (const CUresult made = driver.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING);
             made != CUDA_SUCCESS) {
    return made;
  }
  const CUresult code = driver.cuEventRecord(event, stream);
  if (code == CUDA_SUCCESS)
    told_.emplace_back(number, event);
  else
    free_.push_back(event);
  return code;
}

uint32_t Aside::latest(const Driver& driver, uint32_t done) {
  while (!told_.empty()) {
    const auto [number, event] = told_.front();
    const bool known = static_cast<int32_t>(done - number) >= 0;
    if (!known && driver.cuEventQuery(event) != CUDA_SUCCESS) break;
    if (!known) done = number;
    free_.push_back(event);
    told_.pop_front();
  }
  return done;
}

std::function<void()> Aside::give_up(const Driver& driver) {
  std::vector<CUevent> events;
  events.swap(free_);
  for (const auto& [number, event] : told_) events.push_back(event);
  told_.clear();
  return [&driver, events] {
    for (CUevent event : events) driver.cuEventDestroy(event);
  };
}

}  // namespace aiocomm::cuda
