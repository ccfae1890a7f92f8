#include "links/cuda/row_copies.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "links/cuda/pins.hpp"

namespace aiocomm::cuda {

namespace {
constexpr size_t kBatch = 1024;  // copies per thread: about what the driver queues without waiting
constexpr size_t kShared = 2 * RowThreads::kShare;  // from which threads share them
constexpr int64_t kMostPitch = 0x7fffffff;          // CU_DEVICE_ATTRIBUTE_MAX_PITCH of every device there is
// A 2-D copy costs 2.6 us and 0.1 us a row, a copy in a batch 0.6 us, one by itself 2.6 us.
constexpr uint64_t kFewRows = 6;
constexpr uint64_t kCopyNs = 500, kRowNs = 50;  // that a copy, or a row of a 2-D one, takes beside its bytes
// Rows are cut for the kernel, so that its warps have about as much to do; bytes per ns of one block, and of an engine.
constexpr uint64_t kPiece = 32 << 10, kBlockRate = 31, kEngineRate = 400;
constexpr uint64_t kGatherNs = 6000;  // that the launch takes, and the first rows of the table
constexpr size_t kLeastRoom = 4096;

bool is_pitch(int64_t step, uint64_t width) {
  return step >= static_cast<int64_t>(width) && step <= kMostPitch;
}
}  // namespace

CUresult RowCopies::queue(const Driver& driver, MoveJob& job, CUstream stream) {
  CUresult code = CUDA_SUCCESS;
  const uint64_t few = driver.cuMemcpyBatchAsync && !no_batches_ ? kFewRows : 1;
  auto take = [&](const Rows& rows) {
    if (code != CUDA_SUCCESS) return;
    if (rows.count > few && is_pitch(rows.from_step, rows.nbytes) && is_pitch(rows.to_step, rows.nbytes)) {
      CUDA_MEMCPY2D plane{};
      plane.srcMemoryType = plane.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
      plane.srcDevice = job.from + rows.from;
      plane.srcPitch = static_cast<size_t>(rows.from_step);
      plane.dstDevice = job.to + rows.to;
      plane.dstPitch = static_cast<size_t>(rows.to_step);
      plane.WidthInBytes = rows.nbytes;
      plane.Height = rows.count;
      code = driver.cuMemcpy2DAsync(&plane, stream);
      job.slow_ns += kRowNs * rows.count;
      return;
    }
    for (uint64_t i = 0; i < rows.count && job.gather; ++i)
      for (uint64_t done = 0; done < rows.nbytes; done += kPiece)
        listed_.push_back({job.to + rows.to + i * static_cast<uint64_t>(rows.to_step) + done,
                           job.from + rows.from + i * static_cast<uint64_t>(rows.from_step) + done,
                           std::min(kPiece, rows.nbytes - done)});
    if (job.gather) return;
    for (uint64_t i = 0; i < rows.count && code == CUDA_SUCCESS; ++i)
      code = one(driver, job.to + rows.to + i * static_cast<uint64_t>(rows.to_step),
                 job.from + rows.from + i * static_cast<uint64_t>(rows.from_step), rows.nbytes, stream);
    job.slow_ns += kCopyNs * rows.count;
  };
  job.rows->cut(job.offset, job.nbytes,
                [&](const Rows& rows) { job.pinned_from ? cut_by_block(job, rows, take) : take(rows); });
  if (code == CUDA_SUCCESS) code = flush(driver, stream);
  if (code == CUDA_SUCCESS && !listed_.empty()) code = gather(driver, job, stream);
  to_.clear(), from_.clear(), nbytes_.clear(), listed_.clear();
  return code;
}

CUresult RowCopies::gather(const Driver& driver, MoveJob& job, CUstream stream) {
  Table* table = nullptr;
  if (CUresult code = take_table(driver, listed_.size(), table); code != CUDA_SUCCESS) return code;
  job.table = table;
  std::memcpy(table->host, listed_.data(), listed_.size() * sizeof(Row));
  const auto warps = static_cast<uint64_t>(job.gather->threads / 32);
  const auto blocks = std::min<uint64_t>(job.gather->blocks, (listed_.size() + warps - 1) / warps);
  uint64_t count = listed_.size(), moved = 0;
  for (const Row& row : listed_) moved += row.nbytes;
  job.slow_ns += kGatherNs + moved / (kBlockRate * std::min<uint64_t>(blocks, 12)) - moved / kEngineRate;
  void* arguments[] = {&table->seen, &count};
  return driver.cuLaunchKernel(reinterpret_cast<CUfunction>(job.gather->function),
                               static_cast<unsigned>(blocks), 1, 1, job.gather->threads, 1, 1, 0, stream,
                               arguments, nullptr);
}

// A new one takes the driver a while; it is kept for the next.
CUresult RowCopies::take_table(const Driver& driver, size_t rows, Table*& table) {
  for (auto& one : tables_)
    if (!one->used && one->room >= rows) {
      one->used = true;
      table = one.get();
      return CUDA_SUCCESS;
    }
  tables_.reserve(tables_.size() + 1);  // what may throw does so before there is memory of the driver's
  auto made = std::make_unique<Table>();
  made->room = std::max(kLeastRoom, std::bit_ceil(rows));
  CUresult code = driver.cuMemHostAlloc(&made->host, made->room * sizeof(Row),
                                        CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
  if (code != CUDA_SUCCESS) return code;
  code = driver.cuMemHostGetDevicePointer(&made->seen, made->host, 0);
  if (code != CUDA_SUCCESS) {
    driver.cuMemFreeHost(made->host);
    return code;
  }
  made->used = true;
  table = made.get();
  tables_.push_back(std::move(made));
  return CUDA_SUCCESS;
}

void RowCopies::ended(const MoveJob& job) {
  if (job.table) static_cast<Table*>(job.table)->used = false;
}

void RowCopies::clear(const Driver& driver) {
  threads_.reset();
  for (auto& table : tables_) driver.cuMemFreeHost(table->host);
  tables_.clear();
}

CUresult RowCopies::one(const Driver& driver, CUdeviceptr to, CUdeviceptr from, size_t nbytes,
                        CUstream stream) {
  to_.push_back(to);
  from_.push_back(from);
  nbytes_.push_back(nbytes);
  return to_.size() < kBatch * (1 + helpers_) ? CUDA_SUCCESS : flush(driver, stream);
}

CUresult RowCopies::flush(const Driver& driver, CUstream stream) {
  Batch all{to_.data(), from_.data(), nbytes_.data(), to_.size()};
  CUresult code = CUDA_SUCCESS;
  const bool batches = all.count > 1 && driver.cuMemcpyBatchAsync && !no_batches_;
  if (batches) {
    const bool shared = helpers_ && all.count >= kShared;
    code = shared ? threads(driver).send(all, stream) : queue_batch(driver, all, stream);
    // Its arguments are not to this driver's taste: one by one from now on, also those that it may have taken.
    if (code == CUDA_ERROR_INVALID_VALUE || code == CUDA_ERROR_NOT_SUPPORTED) {
      no_batches_ = true;
      code = CUDA_SUCCESS;
    }
  }
  for (size_t i = 0; (!batches || no_batches_) && i < all.count && code == CUDA_SUCCESS; ++i)
    code = driver.cuMemcpyAsync(all.to[i], all.from[i], all.nbytes[i], stream);
  to_.clear(), from_.clear(), nbytes_.clear();
  return code;
}

RowThreads& RowCopies::threads(const Driver& driver) {
  if (!threads_) threads_ = std::make_unique<RowThreads>(driver, helpers_);
  return *threads_;
}

}  // namespace aiocomm::cuda
