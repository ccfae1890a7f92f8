// Rows that lie apart, copied by the copy engine: equally spaced ones as one 2-D copy, the rest as batches, or where the
// job allows it by a kernel that reads them from a table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/device.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/row_threads.hpp"

namespace aiocomm::cuda {

// Belongs to one thread.
class RowCopies {
 public:
  // Queues a job's copies, and estimates `slow_ns`. Where it fails, those before are queued.
  CUresult queue(const Driver& driver, MoveJob& job, CUstream stream);
  // Collects a job that is no rows, and has what was collected begin.
  CUresult join(const Driver& driver, const MoveJob& job, CUstream stream) {
    return one(driver, job.to, job.from, job.nbytes, stream);
  }
  CUresult send(const Driver& driver, CUstream stream) { return flush(driver, stream); }
  void forget() { to_.clear(), from_.clear(), nbytes_.clear(), listed_.clear(); }  // what was collected
  void ended(const MoveJob& job);    // and nothing reads its table any more
  void clear(const Driver& driver);  // in a current context

 private:
  struct Row {  // as in aiocomm/pages/gather.py
    uint64_t to, from, nbytes;
  };
  struct Table {
    void* host = nullptr;  // pinned: warps ask for their next row while they copy one
    CUdeviceptr seen = 0;  // where the device sees it
    size_t room = 0;       // rows
    bool used = false;
  };
  CUresult gather(const Driver& driver, MoveJob& job, CUstream stream);
  CUresult take_table(const Driver& driver, size_t rows, Table*& table);
  CUresult one(const Driver& driver, CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream stream);
  CUresult flush(const Driver& driver, CUstream stream);
  RowThreads& threads(const Driver& driver);

  std::vector<CUdeviceptr> to_, from_;  // of the batch that is being collected
  std::vector<size_t> nbytes_;
  bool no_batches_ = false;  // the driver has refused one
  size_t helpers_ = RowThreads::helpers();
  std::unique_ptr<RowThreads> threads_;  // once there were many copies
  std::vector<Row> listed_;              // for the kernel
  std::vector<std::unique_ptr<Table>> tables_;
};

}  // namespace aiocomm::cuda
