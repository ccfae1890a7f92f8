// Rows that lie apart, copied by the copy engine: equally spaced ones as one 2-D copy, the rest as batches.
#pragma once

#include <cstddef>
#include <vector>

#include "core/device.hpp"
#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

// Belongs to one thread.
class RowCopies {
 public:
  // Queues a job's copies, and estimates `slow_ns`. Where it fails, those before are queued.
  CUresult queue(const Driver& driver, MoveJob& job, CUstream stream);

 private:
  CUresult one(const Driver& driver, CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream);
  CUresult flush(const Driver& driver, CUstream stream);

  std::vector<CUdeviceptr> to_, from_;  // of the batch that is being collected
  std::vector<size_t> nbytes_;
  bool no_batches_ = false;  // the driver has refused one
};

}  // namespace aiocomm::cuda
