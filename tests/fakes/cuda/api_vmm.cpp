// Virtual memory management and stream-ordered pools.
#include <unistd.h>

#include <cstring>

#include "api.hpp"

namespace fake {
namespace {

std::shared_ptr<Physical> physical_of(Call& call, CUmemGenericAllocationHandle handle) {
  auto at = sim().physicals.find(handle);
  if (at != sim().physicals.end()) return at->second;
  call.code = CUDA_ERROR_INVALID_VALUE;
  return nullptr;
}

void drop(uint64_t handle) {
  auto at = sim().physicals.find(handle);
  Physical& physical = *at->second;
  if (--physical.references) return;
  if (!physical.imported) {  // an importer that goes on reading sees that it is too late
    physical.trailer->alive.store(0, std::memory_order_release);
    poison(physical.backing->bytes, physical.size, 0xDD);
    sim().memory->discharge(physical.device, physical.size);
  }
  sim().physicals.erase(at);
}

uint64_t keep(std::shared_ptr<Physical> physical) {
  uint64_t handle = sim().fresh_handle();
  physical->id = sim().memory->fresh_id();
  sim().physicals[handle] = std::move(physical);
  return handle;
}

Pool* pool_of(CUmemoryPool handle) {
  for (auto& device : sim().devices)
    if (reinterpret_cast<CUmemoryPool>(device->default_pool.get()) == handle)
      return device->default_pool.get();
  auto at = sim().pools.find(handle);
  return at == sim().pools.end() ? nullptr : at->second.get();
}

CUresult pool_allocate(const char* name, CUdeviceptr* out, size_t nbytes, CUmemoryPool handle, CUstream on) {
  Call call(name, Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, on);
  if (!stream) return call.code;
  Pool* pool = handle ? pool_of(handle) : sim().devices[stream->context->device]->default_pool.get();
  if (!pool || pool->imported) return CUDA_ERROR_INVALID_VALUE;
  return sim().memory->allocate(pool->device, nbytes, Origin::pool, stream->context->handle, pool, out);
}

}  // namespace
}  // namespace fake

using namespace fake;

FAKE_API cuMemGetAllocationGranularity(size_t* out, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  Call call("cuMemGetAllocationGranularity", Needs::init);
  if (!call) *out = kGranularity;
  return call.code;
}

FAKE_API cuMemCreate(CUmemGenericAllocationHandle* out, size_t nbytes, const CUmemAllocationProp* wanted,
                     unsigned long long) {
  Call call("cuMemCreate", Needs::init);
  if (call) return call.code;
  if (!nbytes || nbytes % kGranularity || wanted->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
      !is_device(wanted->location.id))
    return CUDA_ERROR_INVALID_VALUE;
  int device = wanted->location.id;
  if (CUresult code = faults().lost(device)) return code;
  if (!sim().memory->charge(device, nbytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  auto physical = std::make_shared<Physical>();
  physical->backing = Backing::make(nbytes + kPage);
  if (!physical->backing) return sim().memory->discharge(device, nbytes), CUDA_ERROR_OUT_OF_MEMORY;
  physical->size = nbytes;
  physical->device = device;
  physical->exportable = wanted->requestedHandleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  physical->trailer =
      new (physical->backing->bytes + nbytes) Trailer{kMagic, nbytes, sim().devices[device]->physical, 1};
  poison(physical->backing->bytes, nbytes, 0xCD);
  *out = keep(physical);
  return CUDA_SUCCESS;
}

FAKE_API cuMemRelease(CUmemGenericAllocationHandle handle) {
  Call call("cuMemRelease", Needs::init);
  if (call || !physical_of(call, handle)) return call.code;
  drop(handle);
  return CUDA_SUCCESS;
}

FAKE_API cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* out, void* address) {
  Call call("cuMemRetainAllocationHandle", Needs::init);
  if (call) return call.code;
  RangePtr range = sim().memory->find(reinterpret_cast<uint64_t>(address));
  if (!range || range->origin != Origin::vmm) return CUDA_ERROR_INVALID_VALUE;
  ++sim().physicals[range->handle]->references;
  *out = range->handle;
  return CUDA_SUCCESS;
}

FAKE_API cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* out,
                                                CUmemGenericAllocationHandle handle) {
  Call call("cuMemGetAllocationPropertiesFromHandle", Needs::init);
  if (call) return call.code;
  auto physical = physical_of(call, handle);
  if (!physical) return call.code;
  std::memset(out, 0, sizeof *out);
  out->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  out->requestedHandleTypes =
      physical->exportable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
  out->location = {CU_MEM_LOCATION_TYPE_DEVICE, physical->device};
  return CUDA_SUCCESS;
}

FAKE_API cuMemExportToShareableHandle(void* out, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long) {
  Call call("cuMemExportToShareableHandle", Needs::init);
  if (call) return call.code;
  auto physical = physical_of(call, handle);
  if (!physical) return call.code;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  if (!physical->exportable || physical->imported) return CUDA_ERROR_INVALID_VALUE;
  int fd = dup(physical->backing->fd);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  std::memcpy(out, &fd, sizeof fd);
  return CUDA_SUCCESS;
}

FAKE_API cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* out, void* os_handle,
                                        CUmemAllocationHandleType type) {
  Call call("cuMemImportFromShareableHandle", Needs::init);
  if (call) return call.code;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  int fd = dup(static_cast<int>(reinterpret_cast<intptr_t>(os_handle)));
  off_t end = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
  auto backing = end > static_cast<off_t>(kPage) ? Backing::open(fd, 0, static_cast<size_t>(end)) : nullptr;
  if (!backing) return CUDA_ERROR_INVALID_VALUE;
  auto* trailer = reinterpret_cast<Trailer*>(backing->bytes + end - kPage);
  if (trailer->magic != kMagic || trailer->size != static_cast<size_t>(end) - kPage)
    return CUDA_ERROR_INVALID_VALUE;
  for (auto& device : sim().devices) {
    if (device->physical != trailer->device) continue;
    auto physical = std::make_shared<Physical>();
    physical->backing = backing;
    physical->size = trailer->size;
    physical->device = device->context.device;
    physical->exportable = true;
    physical->imported = true;
    physical->trailer = trailer;
    *out = keep(physical);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_DEVICE;  // hidden from this process by CUDA_VISIBLE_DEVICES
}

FAKE_API cuMemAddressReserve(CUdeviceptr* out, size_t nbytes, size_t align, CUdeviceptr, unsigned long long) {
  Call call("cuMemAddressReserve", Needs::init);
  if (call) return call.code;
  if (!nbytes || nbytes % kGranularity || (align & (align - 1))) return CUDA_ERROR_INVALID_VALUE;
  auto address = sim().memory->reserve(nbytes, align);
  if (!address) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = *address;
  return CUDA_SUCCESS;
}

FAKE_API cuMemAddressFree(CUdeviceptr address, size_t nbytes) {
  Call call("cuMemAddressFree", Needs::init);
  return call ? call.code : sim().memory->unreserve(address, nbytes);
}

FAKE_API cuMemMap(CUdeviceptr address, size_t nbytes, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long) {
  Call call("cuMemMap", Needs::init);
  if (call) return call.code;
  auto physical = physical_of(call, handle);
  if (!physical) return call.code;
  if (offset || nbytes != physical->size || address % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  return sim().memory->map(address, handle, physical, nullptr);
}

FAKE_API cuMemUnmap(CUdeviceptr address, size_t nbytes) {
  Call call("cuMemUnmap", Needs::init);
  if (call) return call.code;
  std::vector<RangePtr> found;
  for (uint64_t at = address; at < address + nbytes;) {
    RangePtr range = sim().memory->find(at);
    if (!range || range->origin != Origin::vmm || range->start != at) return CUDA_ERROR_INVALID_VALUE;
    found.push_back(range);
    at += range->size;
  }
  for (auto& range : found) {
    if (range->pending)
      faults().violation("memory unmapped while " + std::to_string(range->pending) +
                         " queued operations use it");
    sim().memory->forget(range);
    drop(range->handle);
  }
  return CUDA_SUCCESS;
}

FAKE_API cuMemGetAccess(unsigned long long* flags, const CUmemLocation* where, CUdeviceptr address) {
  Call call("cuMemGetAccess", Needs::init);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  if (!range || range->origin != Origin::vmm || !is_device(where->id)) return CUDA_ERROR_INVALID_VALUE;
  *flags =
      range->access >> where->id & 1 ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE;
  return CUDA_SUCCESS;
}

FAKE_API cuMemSetAccess(CUdeviceptr address, size_t nbytes, const CUmemAccessDesc* wanted, size_t count) {
  Call call("cuMemSetAccess", Needs::init);
  if (call) return call.code;
  std::vector<RangePtr> found;
  for (uint64_t at = address; at < address + nbytes;) {
    RangePtr range = sim().memory->find(at);
    if (!range || range->origin != Origin::vmm) return CUDA_ERROR_INVALID_VALUE;
    found.push_back(range);
    at = range->start + range->size;
  }
  for (size_t i = 0; i < count; ++i) {
    if (wanted[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || !is_device(wanted[i].location.id))
      return CUDA_ERROR_INVALID_VALUE;
    for (auto& range : found) {
      if (wanted[i].location.id != range->device && !sim().peers_allowed)
        return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
      uint64_t bit = 1ull << wanted[i].location.id;
      range->access = wanted[i].flags ? range->access | bit : range->access & ~bit;
    }
  }
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetDefaultMemPool(CUmemoryPool* out, CUdevice device) {
  Call call("cuDeviceGetDefaultMemPool", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *out = reinterpret_cast<CUmemoryPool>(sim().devices[device]->default_pool.get());
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetMemPool(CUmemoryPool* out, CUdevice device) {
  return cuDeviceGetDefaultMemPool(out, device);
}

FAKE_API cuMemPoolCreate(CUmemoryPool* out, const CUmemPoolProps* wanted) {
  Call call("cuMemPoolCreate", Needs::init);
  if (call) return call.code;
  if (wanted->location.type != CU_MEM_LOCATION_TYPE_DEVICE || !is_device(wanted->location.id))
    return CUDA_ERROR_INVALID_VALUE;
  auto pool = std::make_unique<Pool>();
  pool->device = wanted->location.id;
  pool->exportable = wanted->handleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  pool->is_default = false;
  pool->own = sim().memory->make_arena(1ull << 32);
  if (!pool->own) return CUDA_ERROR_OUT_OF_MEMORY;
  pool->arena = pool->own.get();
  *out = reinterpret_cast<CUmemoryPool>(pool.get());
  sim().pools[*out] = std::move(pool);
  return CUDA_SUCCESS;
}

FAKE_API cuMemPoolDestroy(CUmemoryPool handle) {
  Call call("cuMemPoolDestroy", Needs::init);
  if (call) return call.code;
  auto at = sim().pools.find(handle);
  if (at == sim().pools.end()) return CUDA_ERROR_INVALID_VALUE;
  if (at->second->used) return CUDA_ERROR_NOT_SUPPORTED;  // the real one would keep it until then
  sim().memory->unreserve(at->second->own->address, at->second->own->backing->size);
  sim().pools.erase(at);
  return CUDA_SUCCESS;
}

FAKE_API cuMemPoolTrimTo(CUmemoryPool handle, size_t) {
  Call call("cuMemPoolTrimTo", Needs::init);
  return call ? call.code : pool_of(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuMemPoolSetAttribute(CUmemoryPool handle, CUmemPool_attribute which, void* value) {
  Call call("cuMemPoolSetAttribute", Needs::init);
  if (call) return call.code;
  Pool* pool = pool_of(handle);
  if (!pool) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD)
    std::memcpy(&pool->threshold, value, sizeof pool->threshold);
  return CUDA_SUCCESS;
}

FAKE_API cuMemPoolSetAccess(CUmemoryPool handle, const CUmemAccessDesc*, size_t) {
  Call call("cuMemPoolSetAccess", Needs::init);
  return call ? call.code : pool_of(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuMemAllocAsync(CUdeviceptr* out, size_t nbytes, CUstream on) {
  return pool_allocate("cuMemAllocAsync", out, nbytes, nullptr, on);
}

FAKE_API cuMemAllocFromPoolAsync(CUdeviceptr* out, size_t nbytes, CUmemoryPool pool, CUstream on) {
  return pool_allocate("cuMemAllocFromPoolAsync", out, nbytes, pool, on);
}

FAKE_API cuMemFreeAsync(CUdeviceptr address, CUstream on) {
  Call call("cuMemFreeAsync", Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, on);
  RangePtr range = sim().memory->find(address);
  if (!stream) return call.code;
  if (!range || range->start != address || (range->origin != Origin::pool && range->origin != Origin::malloc))
    return CUDA_ERROR_INVALID_VALUE;
  Op op(Op::Kind::free_memory);
  op.uses.push_back(range);
  return sim().submit(call.lock, stream, std::move(op));
}
