// Tells how far a stream is, by another one that waits for it. A write in the stream itself would hold up the copy behind
// it: 3 us each on an H200, where this holds up nothing but is seen some us later.
#pragma once

#include <cstdint>
#include <functional>

#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

class Aside {
 public:
  // `word`: pinned memory that is its own, which the device has at `at`.
  CUresult make(const Driver& driver, volatile uint32_t* word, CUdeviceptr at);

  // Has `number` written once `stream` has done what it was given so far.
  CUresult tell(const Driver& driver, CUstream stream, uint32_t number);

  // The later of `done` and what was written here.
  uint32_t latest(uint32_t done);

  // What gives back what it has, to be called in the context once nothing is under way.
  std::function<void()> give_up(const Driver& driver);

 private:
  volatile uint32_t* word_ = nullptr;
  CUdeviceptr at_ = 0;
  CUstream stream_ = nullptr;
  CUevent event_ = nullptr;
  uint32_t told_ = 0;
  bool awaited_ = false;  // the last of them
};

}  // namespace aiocomm::cuda
