#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "faults.hpp"

namespace fake {

namespace {

constexpr uint64_t kSpan = 1ull << 39, kArena = 1ull << 35;
constexpr size_t kPoisonLimit = 1 << 20;  // of each end: filling gigabytes would only cost memory
constexpr int kFreed = 0xDD, kFresh = 0xCD;

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

std::byte* map_shared(int fd, uint64_t offset, size_t size) {
  void* at =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, static_cast<off_t>(offset));
  return at == MAP_FAILED ? nullptr : static_cast<std::byte*>(at);
}

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::abort();
}

}  // namespace

std::optional<uint64_t> FirstFit::take(uint64_t size, uint64_t align) {
  for (auto [at, room] : free_) {
    uint64_t start = round_up(at, align), skipped = start - at;
    if (skipped > room || room - skipped < size) continue;
    free_.erase(at);
    if (skipped) free_[at] = skipped;
    if (uint64_t rest = room - skipped - size) free_[start + size] = rest;
    return start;
  }
  return std::nullopt;
}

void FirstFit::give(uint64_t at, uint64_t size) {
  auto next = free_.lower_bound(at);
  if (next != free_.end() && at + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == at) {
      before->second += size;
      return;
    }
  }
  free_[at] = size;
}

Backing::~Backing() {
  if (bytes) munmap(bytes, size);
  if (fd >= 0) close(fd);
}

std::shared_ptr<Backing> Backing::make(size_t size) {
  auto one = std::make_shared<Backing>();
  one->fd = memfd_create("simulated-gpu", MFD_CLOEXEC);
  if (one->fd < 0 || ftruncate(one->fd, static_cast<off_t>(size))) return nullptr;
  one->size = size;
  one->bytes = map_shared(one->fd, 0, size);
  return one->bytes ? one : nullptr;
}

std::shared_ptr<Backing> Backing::open(int fd, uint64_t offset, size_t size) {
  auto one = std::make_shared<Backing>();
  one->size = size;
  one->bytes = map_shared(fd, offset, size);
  close(fd);  // the mapping keeps the bytes
  return one->bytes ? one : nullptr;
}

void poison(std::byte* bytes, size_t size, int value) {
  std::memset(bytes, value, std::min(size, kPoisonLimit));
  if (size > kPoisonLimit) {
    size_t tail = std::min(size - kPoisonLimit, kPoisonLimit);
    std::memset(bytes + size - tail, value, tail);
  }
}

Memory::Memory(int devices, size_t capacity)
    : span_(kSpan), capacity_(capacity), used_(devices), reservations_free_(kSpan - devices * kArena) {
  void* at = mmap(nullptr, kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) die("simulated driver: address space");
  base_ = reinterpret_cast<uint64_t>(at);
  base_ = round_up(base_, kGranularity);
  span_ -= kGranularity;
  arenas_.resize(devices);
  for (int i = 0; i < devices; ++i) {
    arenas_[i].backing = Backing::make(kArena);
    if (!arenas_[i].backing) die("simulated driver: device memory");
    arenas_[i].address = base_ + i * kArena;
    arenas_[i].free = std::make_unique<FirstFit>(kArena - kGranularity);
  }
  reserved_from_ = base_ + devices * kArena;
  control_backing_ = Backing::make(round_up(sizeof(Control), kPage));
  if (!control_backing_) die("simulated driver: control page");
  control_ = new (control_backing_->bytes) Control{};
  control_->magic = kMagic;
  for (int32_t i = kSlots; i-- > 0;) slots_.push_back(i);
}

bool Memory::charge(int device, size_t nbytes) {
  if (used_[device] + nbytes > capacity_) return false;
  used_[device] += nbytes;
  return true;
}

CUresult Memory::allocate(int device, size_t nbytes, Origin origin, CUcontext context, Pool* pool,
                          CUdeviceptr* out) {
  if (!nbytes) return CUDA_ERROR_INVALID_VALUE;
  if (slots_.empty() || !charge(device, nbytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  Arena& arena = pool ? *pool->arena : arenas_[device];
  bool managed = origin == Origin::managed;
  uint64_t align = managed ? kPage : 512;
  auto offset = arena.free->take(round_up(nbytes, align), align);
  if (!offset) return discharge(device, nbytes), CUDA_ERROR_OUT_OF_MEMORY;
  auto range = std::make_shared<Range>();
  range->start = arena.address + *offset;
  range->size = nbytes;
  range->backing = arena.backing;
  range->bytes = arena.backing->bytes + *offset;
  range->origin = origin;
  range->device = device;
  range->id = fresh_id();
  range->context = context;
  range->offset = *offset;
  range->pool = pool;
  range->slot = slots_.back();
  slots_.pop_back();
  control_->alive[range->slot].store(range->id, std::memory_order_release);
  if (managed) {  // both views show the same bytes
    void* at = mmap(reinterpret_cast<void*>(range->start), round_up(nbytes, kPage), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, arena.backing->fd, static_cast<off_t>(*offset));
    if (at == MAP_FAILED) die("simulated driver: managed memory");
  }
  poison(range->bytes, nbytes, kFresh);
  if (pool) pool->used += nbytes;
  add(range);
  *out = range->start;
  return CUDA_SUCCESS;
}

CUresult Memory::release(const RangePtr& range) {
  control_->alive[range->slot].store(0, std::memory_order_release);
  slots_.push_back(range->slot);
  poison(range->bytes, range->size, kFreed);
  bool managed = range->origin == Origin::managed;
  if (managed) {
    void* at = mmap(reinterpret_cast<void*>(range->start), round_up(range->size, kPage), PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (at == MAP_FAILED) die("simulated driver: managed memory");
  }
  Arena& arena = range->pool ? *range->pool->arena : arenas_[range->device];
  arena.free->give(range->offset, round_up(range->size, managed ? kPage : 512));
  if (range->pool) range->pool->used -= range->size;
  discharge(range->device, range->size);
  ranges_.erase(range->start);
  return CUDA_SUCCESS;
}

CUresult Memory::host(size_t nbytes, int device, CUcontext context, void** out) {
  auto backing = nbytes ? Backing::make(round_up(nbytes, kPage)) : nullptr;
  if (!backing) return nbytes ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
  close(std::exchange(backing->fd, -1));
  auto range = std::make_shared<Range>();
  range->start = reinterpret_cast<uint64_t>(backing->bytes);
  range->size = nbytes;
  range->bytes = backing->bytes;
  range->backing = backing;
  range->origin = Origin::pinned;
  range->device = device;
  range->id = fresh_id();
  range->context = context;
  add(range);
  *out = backing->bytes;
  return CUDA_SUCCESS;
}

CUresult Memory::pin(void* at, size_t nbytes, int device, CUcontext context) {
  uint64_t start = reinterpret_cast<uint64_t>(at);
  if (!nbytes || !at || in_device_space(start)) return CUDA_ERROR_INVALID_VALUE;
  auto next = ranges_.lower_bound(start);
  if ((next != ranges_.end() && next->first < start + nbytes) || find(start))
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  auto range = std::make_shared<Range>();
  range->start = start;
  range->size = nbytes;
  range->bytes = static_cast<std::byte*>(at);
  range->origin = Origin::registered;
  range->device = device;
  range->id = fresh_id();
  range->context = context;
  add(range);
  return CUDA_SUCCESS;
}

void Memory::forget(const RangePtr& range) { ranges_.erase(range->start); }

RangePtr Memory::find(uint64_t address) const {
  auto after = ranges_.upper_bound(address);
  if (after == ranges_.begin()) return nullptr;
  const RangePtr& found = std::prev(after)->second;
  return address - found->start < found->size ? found : nullptr;
}

RangePtr Memory::find_import(const std::string& key) const {
  for (const auto& [start, range] : ranges_)
    if (range->origin == Origin::imported && range->key == key) return range;
  return nullptr;
}

bool Memory::pieces(uint64_t address, size_t nbytes, std::vector<Piece>& out) const {
  while (nbytes) {
    RangePtr range = find(address);
    if (!range) {
      if (in_device_space(address)) return false;
      // Pageable up to the next pinned range, if one lies inside.
      auto next = ranges_.upper_bound(address);
      size_t size = next == ranges_.end() ? nbytes : std::min<uint64_t>(nbytes, next->first - address);
      out.push_back({reinterpret_cast<std::byte*>(address), size, nullptr});
      address += size, nbytes -= size;
      continue;
    }
    uint64_t skipped = address - range->start;
    size_t size = std::min(nbytes, range->size - skipped);
    out.push_back({range->bytes + skipped, size, range});
    address += size, nbytes -= size;
  }
  return true;
}

std::optional<uint64_t> Memory::reserve(size_t nbytes, size_t align) {
  auto offset = reservations_free_.take(nbytes, std::max(align, kGranularity));
  if (!offset) return std::nullopt;
  reservations_[reserved_from_ + *offset] = nbytes;
  return reserved_from_ + *offset;
}

CUresult Memory::unreserve(uint64_t address, size_t nbytes) {
  auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second != nbytes) return CUDA_ERROR_INVALID_VALUE;
  auto next = ranges_.lower_bound(address);
  if (next != ranges_.end() && next->first < address + nbytes) return CUDA_ERROR_INVALID_VALUE;
  reservations_.erase(found);
  reservations_free_.give(address - reserved_from_, nbytes);
  return CUDA_SUCCESS;
}

std::optional<std::pair<uint64_t, size_t>> Memory::reservation(uint64_t address) const {
  auto after = reservations_.upper_bound(address);
  if (after == reservations_.begin()) return std::nullopt;
  auto found = std::prev(after);
  if (address - found->first >= found->second) return std::nullopt;
  return *found;
}

CUresult Memory::map(uint64_t address, uint64_t handle, const std::shared_ptr<Physical>& physical,
                     CUcontext context) {
  auto whole = reservation(address);
  if (!whole || address + physical->size > whole->first + whole->second) return CUDA_ERROR_INVALID_VALUE;
  auto next = ranges_.lower_bound(address);
  if (find(address) || (next != ranges_.end() && next->first < address + physical->size))
    return CUDA_ERROR_ALREADY_MAPPED;
  auto range = std::make_shared<Range>();
  range->start = address;
  range->size = physical->size;
  range->bytes = physical->backing->bytes;
  range->backing = physical->backing;
  range->origin = Origin::vmm;
  range->device = physical->device;
  range->id = fresh_id();
  range->context = context;
  range->handle = handle;
  range->alive = &physical->trailer->alive;
  ++physical->references;
  add(range);
  return CUDA_SUCCESS;
}

std::unique_ptr<Arena> Memory::make_arena(size_t size) {
  auto arena = std::make_unique<Arena>();
  arena->backing = Backing::make(size);
  auto address = reserve(size, kGranularity);
  if (!arena->backing || !address) return nullptr;
  arena->address = *address;
  arena->free = std::make_unique<FirstFit>(size);
  return arena;
}

size_t Memory::count(Origin origin) const {
  size_t n = 0;
  for (const auto& [start, range] : ranges_) n += range->origin == origin;
  return n;
}

}  // namespace fake
