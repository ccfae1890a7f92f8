#include "links/cuda/exports.hpp"

#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace aiocomm::cuda {

namespace {

constexpr size_t kMostDescriptors = 512;  // of a limit that usually is 1,024, and the program's

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
  return hash ^ hash >> 29;
}

}  // namespace

bool Exports::handle_of(const DevicePlace& place, const Device& owner, std::array<std::byte, 64>& handle) {
  std::unique_lock lock(mutex_);
  auto it = exported_.find(place.base);
  const bool fresh = it == exported_.end() || it->second.buffer_id != place.buffer_id;
  if (fresh) {
    Exported fresh{place.buffer_id, false, {}};
    CUipcMemHandle made;
    Device::Current current(owner);
    fresh.possible = driver_.cuIpcGetMemHandle(&made, place.base) == CUDA_SUCCESS;
    std::memcpy(fresh.handle.data(), made.reserved, sizeof made.reserved);
    if (exported_.size() > 65536) exported_.clear();
    it = exported_.insert_or_assign(place.base, fresh).first;
  }
  handle = it->second.handle;
  const bool possible = it->second.possible;
  lock.unlock();
  if (fresh) made_();
  return possible;
}

bool Exports::find_blocks(uint64_t address, uint64_t nbytes, std::vector<Block>& out) const {
  const uint64_t end = address + nbytes;
  while (address < end) {
    uint64_t kinds = 0;
    CUdeviceptr base = 0;
    size_t size = 0;
    unsigned long long id = 0;
    int attributes[] = {CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR,
                        CU_POINTER_ATTRIBUTE_MAPPING_SIZE, CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID};
    void* values[] = {&kinds, &base, &size, &id};
    if (driver_.cuPointerGetAttributes(4, attributes, values, address) != CUDA_SUCCESS) return false;
    const bool exportable = kinds & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    if (!exportable || !id || base > address || size == 0 || base + size <= address) return false;
    if (!out.empty() && out.back().base + out.back().nbytes != base) return false;
    if (out.size() == kMostBlocks) return false;
    out.push_back({base, size, id});
    address = base + size;
  }
  return !out.empty();
}

bool Exports::is_there(const Block& block) const {
  unsigned long long id = 0;
  return driver_.cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, block.base) ==
             CUDA_SUCCESS &&
         id == block.id;
}

bool Exports::blocks_of(DevicePlace& place, uint64_t nbytes) {
  std::vector<Block> found;
  if (!find_blocks(place.address, nbytes, found)) return false;
  uint64_t id = found.size();
  for (const Block& block : found) id = mixed(mixed(id, block.id), block.nbytes);
  std::unique_lock lock(mutex_);
  auto it = by_base_.find(found.front().base);
  const bool fresh = it == by_base_.end() || it->second->id != id;
  if (fresh) {
    if (it != by_base_.end()) drop(it->first);
    make_room(found.size() + 1);
    auto made = make(std::move(found), id);
    if (!made) return false;
    const uint64_t base = made->blocks.front().base;
    made->age = ages_.insert(ages_.end(), base);
    descriptors_ += made->blocks.size() + 1;
    it = by_base_.insert_or_assign(base, std::move(made)).first;
  }
  Blocks& blocks = *it->second;
  ages_.splice(ages_.end(), ages_, blocks.age);
  place.base = blocks.blocks.front().base;
  place.extent = blocks.blocks.back().base + blocks.blocks.back().nbytes - place.base;
  place.buffer_id = mixed(blocks.id, blocks.number);  // exported anew, it is to be mapped anew
  BlockHandle handle{blocks.number, blocks.table};
  std::memcpy(place.handle.data(), &handle, sizeof handle);
  lock.unlock();
  if (fresh) made_();
  return true;
}

std::unique_ptr<Exports::Blocks> Exports::make(std::vector<Block> blocks, uint64_t id) {
  auto made = std::make_unique<Blocks>();
  made->id = id;
  made->table = memfd_create("aiocomm-blocks", MFD_CLOEXEC);
  if (made->table < 0 || ftruncate(made->table, sizeof(BlockTable)) != 0) return nullptr;
  void* at = mmap(nullptr, sizeof(BlockTable), PROT_READ | PROT_WRITE, MAP_SHARED, made->table, 0);
  if (at == MAP_FAILED) return nullptr;
  made->shared = new (at) BlockTable;
  for (const Block& block : blocks) {
    CUmemGenericAllocationHandle handle = 0;
    int descriptor = -1;
    if (driver_.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(block.base)) != CUDA_SUCCESS)
      return nullptr;
    CUresult code = driver_.cuMemExportToShareableHandle(&descriptor, handle,
                                                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    driver_.cuMemRelease(handle);
    if (code != CUDA_SUCCESS) return nullptr;
    made->shared->sizes[made->shared->count] = block.nbytes;
    made->shared->descriptors[made->shared->count++] = descriptor;
  }
  made->blocks = std::move(blocks);
  if (getrandom(&made->number, sizeof made->number, 0) != sizeof made->number || !made->number)
    return nullptr;
  __atomic_store_n(&made->shared->number, made->number, __ATOMIC_RELEASE);
  return made;
}

Exports::Blocks::~Blocks() {
  if (shared) {
    __atomic_store_n(&shared->number, uint64_t{0}, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < shared->count; ++i) ::close(shared->descriptors[i]);
    munmap(shared, sizeof(BlockTable));
  }
  if (table >= 0) ::close(table);
}

void Exports::drop(uint64_t base) {
  auto it = by_base_.find(base);
  descriptors_ -= it->second->blocks.size() + 1;
  ages_.erase(it->second->age);
  by_base_.erase(it);
}

bool Exports::empty() {
  std::lock_guard lock(mutex_);
  return exported_.empty() && by_base_.empty();
}

// Asked without the lock, for which messages wait.
std::vector<Gone> Exports::gone() {
  std::unique_lock lock(mutex_);
  std::vector<Gone> gone = drop_unmapped(lock);
  std::vector<Gone> all;
  all.reserve(exported_.size());
  for (const auto& [base, exported] : exported_) all.push_back({base, exported.buffer_id});
  lock.unlock();
  std::erase_if(all, [this](const Gone& one) {
    unsigned long long id = 0;
    return driver_.cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, one.base) == CUDA_SUCCESS &&
           id == one.buffer_id;
  });
  lock.lock();
  for (const Gone& one : all) {
    auto it = exported_.find(one.base);
    if (it == exported_.end() || it->second.buffer_id != one.buffer_id) continue;  // exported anew meanwhile
    if (it->second.possible) gone.push_back(one);
    exported_.erase(it);
  }
  return gone;
}

std::vector<Gone> Exports::drop_unmapped(std::unique_lock<std::mutex>& lock) {
  std::vector<std::pair<Gone, std::vector<Block>>> all;
  for (const auto& [base, blocks] : by_base_)
    all.push_back({{base, mixed(blocks->id, blocks->number)}, blocks->blocks});
  lock.unlock();
  std::erase_if(all, [this](const auto& one) {
    return std::all_of(one.second.begin(), one.second.end(),
                       [this](const Block& block) { return is_there(block); });
  });
  lock.lock();
  std::vector<Gone> gone;
  for (const auto& [one, blocks] : all) {
    auto it = by_base_.find(one.base);
    if (it == by_base_.end() || mixed(it->second->id, it->second->number) != one.buffer_id) continue;
    gone.push_back(one);
    drop(one.base);
  }
  return gone;
}

void Exports::make_room(size_t count) {
  while (!ages_.empty() && descriptors_ + count > kMostDescriptors) drop(ages_.front());
}

void Exports::clear() {
  std::lock_guard lock(mutex_);
  by_base_.clear();
  ages_.clear();
  descriptors_ = 0;
}

}  // namespace aiocomm::cuda
