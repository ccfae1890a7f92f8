// Handles that another process opens. A handle names its owner's memfds, which are opened by /proc/<pid>/fd.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "api.hpp"

namespace fake {
namespace {

struct Handle {
  uint64_t magic;
  int32_t pid, memory_fd, control_fd, slot;
  uint64_t offset, size, generation;
  int32_t device, unused;
};
static_assert(sizeof(Handle) <= CU_IPC_HANDLE_SIZE);

int open_of(int pid, int fd) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  return open(path, O_RDWR | O_CLOEXEC);
}

std::shared_ptr<Backing> control_of(const Handle& handle) {
  int fd = open_of(handle.pid, handle.control_fd);
  auto page = fd < 0 ? nullptr : Backing::open(fd, 0, (sizeof(Control) + kPage - 1) / kPage * kPage);
  if (page && reinterpret_cast<Control*>(page->bytes)->magic == kMagic) return page;
  return nullptr;
}

// An import keeps two mappings: the bytes, and its owner's control page, by which it learns that it is stale.
struct Import : Backing {
  std::shared_ptr<Backing> control, memory;
};

CUresult import(Call& call, const Handle& handle, const std::string& key, unsigned flags, CUdeviceptr* out) {
  auto control = control_of(handle);
  if (!control) return CUDA_ERROR_INVALID_VALUE;  // its owner is gone
  auto& alive = reinterpret_cast<Control*>(control->bytes)->alive[handle.slot];
  if (alive.load(std::memory_order_acquire) != handle.generation) return CUDA_ERROR_INVALID_VALUE;
  int device = -1;
  for (auto& one : sim().devices)
    if (one->physical == handle.device) device = one->context.device;
  if (device < 0) return CUDA_ERROR_INVALID_DEVICE;
  if (device != call.context->device && !sim().peers_allowed) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  uint64_t skipped = handle.offset % kPage;
  size_t mapped = (handle.size + skipped + kPage - 1) / kPage * kPage;
  int fd = open_of(handle.pid, handle.memory_fd);
  auto memory = fd < 0 ? nullptr : Backing::open(fd, handle.offset - skipped, mapped);
  auto address = memory ? sim().memory->reserve(
                              (handle.size + kGranularity - 1) / kGranularity * kGranularity, kGranularity)
                        : std::nullopt;
  if (!address) return CUDA_ERROR_MAP_FAILED;
  auto both = std::make_shared<Import>();
  both->control = control;
  both->memory = memory;
  auto range = std::make_shared<Range>();
  range->start = *address;
  range->size = handle.size;
  range->bytes = memory->bytes + skipped;
  range->backing = both;
  range->origin = Origin::imported;
  range->device = device;
  range->id = sim().memory->fresh_id();
  range->context = call.context->handle;
  range->opener = call.context->device;
  range->lazy_peer = flags & CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS;
  range->opened = 1;
  range->key = key;
  range->alive = &alive;
  range->expected = handle.generation;
  sim().memory->add(range);
  *out = range->start;
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake

using namespace fake;

FAKE_API cuIpcGetMemHandle(CUipcMemHandle* out, CUdeviceptr address) {
  Call call("cuIpcGetMemHandle", Needs::context);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  if (!range || range->start != address || range->origin != Origin::malloc) return CUDA_ERROR_INVALID_VALUE;
  Handle handle{kMagic,
                getpid(),
                range->backing->fd,
                sim().memory->control_fd(),
                range->slot,
                range->offset,
                range->size,
                range->id,
                sim().devices[range->device]->physical,
                0};
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &handle, sizeof handle);
  return CUDA_SUCCESS;
}

FAKE_API cuIpcOpenMemHandle_v2(CUdeviceptr* out, CUipcMemHandle given, unsigned flags) {
  Call call("cuIpcOpenMemHandle", Needs::context, true);
  if (call) return call.code;
  Handle handle;
  std::memcpy(&handle, &given, sizeof handle);
  if (handle.magic != kMagic || handle.slot < 0 || static_cast<size_t>(handle.slot) >= kSlots)
    return CUDA_ERROR_INVALID_VALUE;
  if (handle.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;  // not in the process that made it
  std::string key(reinterpret_cast<const char*>(&given), sizeof given);
  if (RangePtr known = sim().memory->find_import(key)) {
    ++known->opened;
    *out = known->start;
    return CUDA_SUCCESS;
  }
  return import(call, handle, key, flags, out);
}

FAKE_API cuIpcCloseMemHandle(CUdeviceptr address) {
  Call call("cuIpcCloseMemHandle", Needs::context, true);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  if (!range || range->start != address || range->origin != Origin::imported) return CUDA_ERROR_INVALID_VALUE;
  if (--range->opened) return CUDA_SUCCESS;
  if (range->pending)
    faults().violation("mapping closed while " + std::to_string(range->pending) +
                       " queued operations use it");
  if (CUresult code = sim().come_to_rest(call.lock, *call.context)) return code;
  sim().memory->forget(range);
  sim().memory->unreserve(address, (range->size + kGranularity - 1) / kGranularity * kGranularity);
  return CUDA_SUCCESS;
}

FAKE_API cuIpcGetEventHandle(CUipcEventHandle* out, CUevent wanted) {
  Call call("cuIpcGetEventHandle", Needs::context);
  if (call) return call.code;
  EventPtr event = event_of(call, wanted);
  if (!event) return call.code;
  if (event->slot < 0 || event->peer) return CUDA_ERROR_INVALID_HANDLE;
  Handle handle{kMagic, getpid(), -1, sim().memory->control_fd(), event->slot, 0, 0, event->generation, 0, 0};
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &handle, sizeof handle);
  return CUDA_SUCCESS;
}

FAKE_API cuIpcOpenEventHandle(CUevent* out, CUipcEventHandle given) {
  Call call("cuIpcOpenEventHandle", Needs::context);
  if (call) return call.code;
  Handle handle;
  std::memcpy(&handle, &given, sizeof handle);
  if (handle.magic != kMagic || handle.slot < 0 || static_cast<size_t>(handle.slot) >= kEvents)
    return CUDA_ERROR_INVALID_VALUE;
  if (handle.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
  auto control = control_of(handle);
  if (!control) return CUDA_ERROR_INVALID_VALUE;
  auto& cell = reinterpret_cast<Control*>(control->bytes)->events[handle.slot];
  if (cell.generation.load() != handle.generation) return CUDA_ERROR_INVALID_VALUE;
  auto event = std::make_shared<Event>();
  event->handle = reinterpret_cast<CUevent>(sim().fresh_handle());
  event->context = call.context;
  event->flags = CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING;
  event->cell = &cell;
  event->peer = control;
  event->generation = handle.generation;
  sim().events[event->handle] = event;
  *out = event->handle;
  return CUDA_SUCCESS;
}

// ---------------------------------------------------------------- for network adapters

// In a dma-buf's place: the memory's own memfd, opened anew and standing where the pages begin.
FAKE_API cuMemGetHandleForAddressRange(void* out, CUdeviceptr address, size_t nbytes,
                                       CUmemRangeHandleType type, unsigned long long) {
  Call call("cuMemGetHandleForAddressRange", Needs::context);
  if (call) return call.code;
  if (type != CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD || address % kPage || nbytes % kPage || !nbytes)
    return CUDA_ERROR_INVALID_VALUE;
  RangePtr range;
  for (CUdeviceptr at = address; at < address + nbytes && !range; at += 512) range = sim().memory->find(at);
  if (!range || range->on_host() || !range->backing || range->backing->fd < 0)
    return CUDA_ERROR_INVALID_VALUE;
  // Allocations by cudaMalloc share pages with their neighbours, and are exported with what these have of them (driver
  // 13.0, measured); others one at a time.
  uint64_t end = (range->start + range->size + kPage - 1) / kPage * kPage;
  if (range->origin == Origin::malloc)
    end = range->start + (range->backing->bytes + range->backing->size - range->bytes);
  if (address + nbytes > end) return CUDA_ERROR_INVALID_VALUE;
  int fd = open_of(getpid(), range->backing->fd);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  auto start = static_cast<off_t>(range->bytes - range->backing->bytes);
  lseek(fd, start - static_cast<off_t>(range->start - address), SEEK_SET);
  std::memcpy(out, &fd, sizeof fd);
  return CUDA_SUCCESS;
}

FAKE_API cuFlushGPUDirectRDMAWrites(CUflushGPUDirectRDMAWritesTarget, CUflushGPUDirectRDMAWritesScope) {
  Call call("cuFlushGPUDirectRDMAWrites", Needs::context);
  return call.code;
}
