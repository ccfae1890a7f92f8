// Tells how far a stream is, by events that the host asks for. A write in the stream would hold up the copy behind it: 3 us
// each on an H200, where these hold up nothing; a write by another stream that waits for them is seen 10 us later.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

class Aside {
 public:
  // `number` is what `latest` gives once `stream` has done what it was given so far.
  CUresult tell(const Driver& driver, CUstream stream, uint32_t number);

  bool empty() const { return told_.empty(); }
  // The later of `done` and what was told and has been reached. A stream that has failed reaches nothing.
  uint32_t latest(const Driver& driver, uint32_t done);

  // What gives back what it has, to be called in the context once nothing is under way.
  std::function<void()> give_up(const Driver& driver);

 private:
  std::deque<std::pair<uint32_t, CUevent>> told_;
  std::vector<CUevent> free_;
};

}  // namespace aiocomm::cuda
