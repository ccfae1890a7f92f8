#include "links/cuda/memory.hpp"

#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <string>
#include <utility>

#include "core/link.hpp"

namespace aiocomm::cuda {

namespace {
constexpr uint64_t kSmallest = 64 << 10;
constexpr uint64_t kHuge = 2 << 20;
constexpr uint64_t kSmallestRelay = 2 << 20;  // the driver shares no less
}  // namespace

Allocation look_up(const Driver& driver, uint64_t address, uint64_t nbytes) {
  unsigned type = 0, managed = 0, ipc = 0;
  int device = -1;
  CUdeviceptr base = 0;
  size_t extent = 0;
  unsigned long long buffer_id = 0;
  int attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                      CU_POINTER_ATTRIBUTE_IS_MANAGED,
                      CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                      CU_POINTER_ATTRIBUTE_BUFFER_ID,
                      CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                      CU_POINTER_ATTRIBUTE_RANGE_SIZE,
                      CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE};
  void* values[] = {&type, &managed, &device, &buffer_id, &base, &extent, &ipc};
  CUresult code = driver.cuPointerGetAttributes(7, attributes, values, address);
  if (code != CUDA_SUCCESS && code != CUDA_ERROR_INVALID_VALUE)
    throw LinkFailure("the driver does not describe the array's memory: " + driver.describe(code), code);
  if (code == CUDA_ERROR_INVALID_VALUE || type == 0)
    throw DeviceUsage("the array's address is not device memory of this process (was it freed?)");
  if (managed)
    throw DeviceUsage(
        "the array is managed memory, which migrates while it is copied: copy it to memory of one device "
        "first");
  if (type != CU_MEMORYTYPE_DEVICE)
    throw DeviceUsage("the array lies in host memory: pass it as a host array (NumPy, or memoryview)");
  Allocation found;
  found.device = device;
  found.base = base;
  found.extent = extent;
  found.buffer_id = buffer_id;
  found.ipc = ipc != 0;  // a range that spans several mappings (VMM) has no one handle
  if (ipc && nbytes > base + extent - address)
    throw DeviceUsage("the array reaches " + std::to_string(nbytes - (base + extent - address)) +
                      " bytes past the end of its memory, which has " + std::to_string(extent) +
                      " (was it freed, and allocated anew?)");
  return found;
}

std::function<void()> Bounces::give_up() {
  std::lock_guard lock(mutex_);
  std::map<std::byte*, Block> blocks;
  blocks.swap(blocks_);
  free_.clear();
  for (auto it = blocks.begin(); it != blocks.end();)  // ordinary memory is somebody's
    if (auto next = std::next(it); it->second.kind == Kind::plain)
      blocks_.insert(blocks.extract(std::exchange(it, next)));
    else
      it = next;
  return [&driver = driver_, blocks = std::move(blocks)] {
    for (auto& [memory, block] : blocks)
      if (block.kind == Kind::pinned) {
        driver.cuMemFreeHost(memory);
      } else {
        driver.cuMemHostUnregister(memory);
        std::free(memory);
      }
  };
}

std::byte* Bounces::take(uint64_t nbytes) {
  std::lock_guard lock(mutex_);
  auto it = free_.find(std::bit_ceil(std::max(nbytes, kSmallest)));
  if (it == free_.end() || it->second.empty()) return nullptr;
  std::byte* memory = it->second.back();
  it->second.pop_back();
  return memory;
}

std::byte* Bounces::plain(uint64_t nbytes) {
  auto memory = static_cast<std::byte*>(std::aligned_alloc(4096, (nbytes + 4095) / 4096 * 4096));
  if (!memory) return nullptr;
  std::lock_guard lock(mutex_);
  blocks_[memory] = {nbytes, Kind::plain};
  return memory;
}

bool Bounces::may_pin(uint64_t nbytes) {
  std::lock_guard lock(mutex_);
  return !refusal_.holds() && pinned_ + std::bit_ceil(std::max(nbytes, kSmallest)) <= limit_;
}

// Huge pages: another process reads large pieces of it (cross-memory attach), which costs a look at every page.
void* Bounces::make_huge(uint64_t size) {
  void* memory = std::aligned_alloc(kHuge, size);
  if (!memory) return nullptr;
  madvise(memory, size, MADV_HUGEPAGE);
  for (uint64_t at = 0; at < size; at += 4096) static_cast<volatile std::byte*>(memory)[at] = std::byte{};
  if (driver_.cuMemHostRegister(memory, size, CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS) return memory;
  std::free(memory);
  return nullptr;
}

std::byte* Bounces::make(uint64_t nbytes) {
  uint64_t size = std::bit_ceil(std::max(nbytes, kSmallest));
  {
    std::lock_guard lock(mutex_);
    if (pinned_ + size > limit_) size = 0;
    pinned_ += size;
  }
  void* memory = size >= kHuge ? make_huge(size) : nullptr;
  Kind kind = Kind::registered;
  if (!memory && size && driver_.cuMemHostAlloc(&memory, size, CU_MEMHOSTALLOC_PORTABLE) == CUDA_SUCCESS)
    kind = Kind::pinned;
  std::lock_guard lock(mutex_);
  if (memory) {
    refusal_.granted();
    blocks_[static_cast<std::byte*>(memory)] = {size, kind};
    return static_cast<std::byte*>(memory);
  }
  pinned_ -= size;
  if (size) refusal_.refused();
  return nullptr;
}

void Bounces::give_back(std::byte* memory) {
  std::lock_guard lock(mutex_);
  auto it = blocks_.find(memory);
  if (it == blocks_.end()) return;  // given up
  if (it->second.kind != Kind::plain) {
    free_[it->second.nbytes].push_back(memory);
  } else {
    blocks_.erase(it);
    std::free(memory);
  }
}

std::function<void()> Relays::give_up() {
  std::lock_guard lock(mutex_);
  return [&driver = driver_, pools = std::exchange(pools_, {})] {
    for (auto& [device, pool] : pools)
      for (auto& [size, list] : pool.free)
        for (uint64_t memory : list) driver.cuMemFree(memory);
  };
}

uint64_t Relays::take(int device, uint64_t nbytes, uint64_t& size) {
  std::lock_guard lock(mutex_);
  size = std::bit_ceil(std::max(nbytes, kSmallestRelay));
  auto& free = pools_[device].free[size];
  if (free.empty()) return 0;
  uint64_t memory = free.back();
  free.pop_back();
  return memory;
}

bool Relays::may_make(int device, uint64_t nbytes) {
  std::lock_guard lock(mutex_);
  const Pool& pool = pools_[device];
  return !pool.refusal.holds() && pool.made + std::bit_ceil(std::max(nbytes, kSmallestRelay)) <= limit_;
}

void Relays::make(int device, uint64_t nbytes) {
  uint64_t size = std::bit_ceil(std::max(nbytes, kSmallestRelay));
  CUdeviceptr memory = 0;
  bool made = driver_.cuMemAlloc(&memory, size) == CUDA_SUCCESS;
  std::lock_guard lock(mutex_);
  Pool& pool = pools_[device];
  if (!made) return pool.refusal.refused();
  pool.refusal.granted();
  pool.made += size;
  pool.free[size].push_back(memory);
}

void Relays::give_back(int device, uint64_t memory, uint64_t size) {
  std::lock_guard lock(mutex_);
  pools_[device].free[size].push_back(memory);
}

}  // namespace aiocomm::cuda
