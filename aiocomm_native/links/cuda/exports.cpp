#include "links/cuda/exports.hpp"

#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

namespace aiocomm::cuda {

namespace {

constexpr size_t kMostDescriptors = 512;  // of a limit that usually is 1,024, and the program's

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

bool Exports::blocks_of(DevicePlace& place, uint64_t nbytes) {
  std::vector<Block> found;
  if (!find_blocks(place.address, nbytes, found)) return false;
  std::unique_lock lock(mutex_);
  const auto known = std::find_if(tables_.rbegin(), tables_.rend(), [&](const Table& table) {
    return std::search(table.blocks.begin(), table.blocks.end(), found.begin(), found.end()) !=
           table.blocks.end();
  });
  const bool fresh = known == tables_.rend();
  if (!fresh) {
    tables_.splice(tables_.end(), tables_, std::prev(known.base()));
  } else if (!fill(tables_.emplace_back(), std::move(found))) {
    tables_.pop_back();
    return false;
  }
  make_room();
  const Table& table = tables_.back();
  place.base = table.blocks.front().base;
  place.extent = table.blocks.back().base + table.blocks.back().nbytes - place.base;
  place.buffer_id = table.number;  // exported anew, it is to be mapped anew
  BlockHandle handle{table.number, table.fd};
  std::memcpy(place.handle.data(), &handle, sizeof handle);
  lock.unlock();
  if (fresh) made_();
  return true;
}

bool Exports::fill(Table& made, std::vector<Block> blocks) {
  made.fd = memfd_create("aiocomm-blocks", MFD_CLOEXEC);
  if (made.fd < 0 || ftruncate(made.fd, sizeof(BlockTable)) != 0) return false;
  void* at = mmap(nullptr, sizeof(BlockTable), PROT_READ | PROT_WRITE, MAP_SHARED, made.fd, 0);
  if (at == MAP_FAILED) return false;
  made.shared = new (at) BlockTable;
  for (Block& block : blocks) {
    if (!export_block(block)) return false;
    made.shared->sizes[made.shared->count] = block.nbytes;
    made.shared->descriptors[made.shared->count++] = block.descriptor->fd;
  }
  made.blocks = std::move(blocks);
  if (getrandom(&made.number, sizeof made.number, 0) != sizeof made.number || !made.number) return false;
  __atomic_store_n(&made.shared->number, made.number, __ATOMIC_RELEASE);
  return true;
}

bool Exports::export_block(Block& block) {
  for (const Table& table : tables_)
    if (auto known = std::find(table.blocks.begin(), table.blocks.end(), block);
        known != table.blocks.end()) {
      block.descriptor = known->descriptor;
      return true;
    }
  auto made = std::make_shared<Descriptor>(descriptors_);
  CUmemGenericAllocationHandle handle = 0;
  if (driver_.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(block.base)) != CUDA_SUCCESS)
    return false;
  const CUresult code =
      driver_.cuMemExportToShareableHandle(&made->fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  driver_.cuMemRelease(handle);
  block.descriptor = std::move(made);
  return code == CUDA_SUCCESS;
}

Exports::Descriptor::~Descriptor() {
  if (fd >= 0) ::close(fd);
  --live;
}

Exports::Table::~Table() {
  if (shared) {
    __atomic_store_n(&shared->number, uint64_t{0}, __ATOMIC_SEQ_CST);
    munmap(shared, sizeof(BlockTable));
  }
  blocks.clear();  // not before: nobody is to take a descriptor that means something else by now
  if (fd >= 0) ::close(fd);
}

bool Exports::empty() {
  std::lock_guard lock(mutex_);
  return exported_.empty() && tables_.empty() && given_up_.empty();
}

// Asked without the lock, for which messages wait.
std::vector<Gone> Exports::gone() {
  std::unique_lock lock(mutex_);
  std::vector<Gone> gone = std::exchange(given_up_, {});
  drop_unmapped(lock, gone);
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

void Exports::drop_unmapped(std::unique_lock<std::mutex>& lock, std::vector<Gone>& gone) {
  std::set<std::pair<uint64_t, uint64_t>> missing;  // bases and ids
  for (const Table& table : tables_)
    for (const Block& block : table.blocks) missing.emplace(block.base, block.id);
  lock.unlock();
  std::erase_if(missing, [this](const auto& block) {
    unsigned long long id = 0;
    return driver_.cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, block.first) ==
               CUDA_SUCCESS &&
           id == block.second;
  });
  lock.lock();
  std::erase_if(tables_, [&](const Table& table) {
    const bool dropped = std::any_of(table.blocks.begin(), table.blocks.end(), [&](const Block& block) {
      return missing.contains({block.base, block.id});
    });
    if (dropped) gone.push_back(table.memory());
    return dropped;
  });
}

void Exports::make_room() {
  while (tables_.size() > 1 && descriptors_ + tables_.size() > kMostDescriptors) {
    given_up_.push_back(tables_.front().memory());
    tables_.pop_front();
  }
}

void Exports::clear() {
  std::lock_guard lock(mutex_);
  tables_.clear();
  given_up_.clear();
}

}  // namespace aiocomm::cuda
