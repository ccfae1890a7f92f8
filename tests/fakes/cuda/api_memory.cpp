// Allocation, host memory, pointer attributes, copies.
#include <algorithm>
#include <cstring>

#include "api.hpp"

namespace fake {
namespace {

RangePtr owned(CUdeviceptr address, Origin origin) {
  RangePtr range = sim().memory->find(address);
  return range && range->start == address && range->origin == origin ? range : nullptr;
}

// The real one waits for everything queued; so does this, after noting what would be a race if it did not.
CUresult free_now(Call& call, const RangePtr& range) {
  if (range->pending)
    faults().violation("memory freed while " + std::to_string(range->pending) + " queued operations use it");
  if (CUresult code = sim().come_to_rest(call.lock, sim().devices[range->device]->context)) return code;
  return sim().memory->release(range);
}

EngineKind direction(const Context& context, CUdeviceptr to, CUdeviceptr from) {
  RangePtr target = sim().memory->find(to), source = sim().memory->find(from);
  bool to_device = target && !target->on_host(), from_device = source && !source->on_host();
  if (!from_device) return EngineKind::to_device;
  if (!to_device) return EngineKind::to_host;
  return target->device == source->device && target->device == context.device ? EngineKind::local
                                                                              : EngineKind::peer;
}

// As NVIDIA's does (580), which takes no copy over the end of a pinned range, be another one right behind it.
bool within_one(uint64_t address, uint64_t extent) {
  std::vector<Piece> pieces;
  if (!sim().memory->pieces(address, extent, pieces)) return true;  // refused elsewhere
  return pieces.size() == 1 || std::none_of(pieces.begin(), pieces.end(), [](const Piece& piece) {
           return piece.range && piece.range->on_host();
         });
}

CUresult queue_copy(Call& call, CUstream on, Op op) {
  StreamPtr stream = stream_of(call, on);
  if (!stream) return call.code;
  if (!op.width || !op.height) return CUDA_SUCCESS;
  if (!within_one(op.to, (op.height - 1) * op.to_pitch + op.width) ||
      !within_one(op.from, (op.height - 1) * op.from_pitch + op.width))
    return CUDA_ERROR_INVALID_VALUE;
  op.engine = direction(*stream->context, op.to, op.from);
  return sim().submit(call.lock, stream, std::move(op));
}

CUresult copy_async(const char* name, CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream on) {
  Call call(name, Needs::context);
  if (call) return call.code;
  Op op(Op::Kind::copy);
  op.to = to, op.from = from, op.width = nbytes;
  return queue_copy(call, on, std::move(op));
}

CUresult copy_now(const char* name, CUdeviceptr to, CUdeviceptr from, size_t nbytes) {
  Call call(name, Needs::context, true);
  if (call) return call.code;
  Op op(Op::Kind::copy);
  op.to = to, op.from = from, op.width = nbytes;
  if (CUresult code = queue_copy(call, nullptr, std::move(op))) return code;
  return sim().wait(call.lock, call.context->legacy, call.context->legacy->submitted);
}

CUresult fill_async(const char* name, CUdeviceptr to, uint64_t value, int nbytes, size_t count, CUstream on) {
  Call call(name, Needs::context);
  if (call) return call.code;
  StreamPtr stream = stream_of(call, on);
  if (!stream) return call.code;
  std::vector<Piece> pieces;
  if (to % nbytes || !sim().memory->pieces(to, count * nbytes, pieces)) return CUDA_ERROR_INVALID_VALUE;
  Op op(Op::Kind::fill);
  op.to = to, op.value = value, op.nbytes = nbytes, op.width = count * nbytes;
  for (auto& piece : pieces)
    if (piece.range) op.uses.push_back(piece.range);
  return count ? sim().submit(call.lock, stream, std::move(op)) : CUDA_SUCCESS;
}

CUdeviceptr as_device(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

struct Plane {
  CUdeviceptr start;
  size_t pitch;
};

bool plane(CUmemorytype type, const void* host, CUdeviceptr device, size_t pitch, size_t x, size_t y,
           Plane& out) {
  if (type == CU_MEMORYTYPE_ARRAY) return false;  // not simulated
  out = {(type == CU_MEMORYTYPE_HOST ? as_device(host) : device) + y * pitch + x, pitch};
  return true;
}

template <typename Value>
CUresult write(void* data, Value value) {
  std::memcpy(data, &value, sizeof value);
  return CUDA_SUCCESS;
}

CUresult attribute(const RangePtr& range, CUpointer_attribute which, CUdeviceptr address, void* data) {
  bool device = !range->on_host(), vmm = range->origin == Origin::vmm;
  auto reserved = vmm ? sim().memory->reservation(address) : std::nullopt;
  auto physical = sim().physicals.find(range->handle);
  bool exportable = vmm ? physical != sim().physicals.end() && physical->second->exportable
                        : range->pool && range->pool->exportable;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return write(data, vmm ? CUcontext{nullptr} : range->context);
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return write<unsigned>(data, device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return write(data, address);
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (device && range->origin != Origin::managed) return CUDA_ERROR_INVALID_VALUE;
      return write(data, address);
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      return write(data, 0u);
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return write<unsigned long long>(data, range->id);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return write<unsigned>(data, range->origin == Origin::managed);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return write<int>(data, range->device);
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return write<unsigned>(data, range->origin == Origin::malloc);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return write<uint64_t>(data, reserved ? reserved->first : range->start);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return write<size_t>(data, reserved ? reserved->second : range->size);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return write(data, 1u);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return write<uint64_t>(data, exportable ? 1 : 0);
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      return write(data, 0u);
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return write<unsigned>(data, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return write<void*>(data, range->pool);
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      return write<size_t>(data, range->size);
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      return write<uint64_t>(data, range->start);
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      return write<unsigned long long>(
          data, vmm && physical != sim().physicals.end() ? physical->second->id : range->id);
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace
}  // namespace fake

using namespace fake;

FAKE_API cuMemAlloc_v2(CUdeviceptr* out, size_t nbytes) {
  Call call("cuMemAlloc", Needs::context, true);
  if (call) return call.code;
  return sim().memory->allocate(call.context->device, nbytes, Origin::malloc, call.context->handle, nullptr,
                                out);
}

FAKE_API cuMemFree_v2(CUdeviceptr address) {
  Call call("cuMemFree", Needs::context, true);
  if (call) return call.code;
  if (!address) return CUDA_SUCCESS;
  for (Origin origin : {Origin::malloc, Origin::managed, Origin::pool})
    if (RangePtr range = owned(address, origin)) return free_now(call, range);
  return CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuMemAllocManaged(CUdeviceptr* out, size_t nbytes, unsigned) {
  Call call("cuMemAllocManaged", Needs::context, true);
  if (call) return call.code;
  return sim().memory->allocate(call.context->device, nbytes, Origin::managed, call.context->handle, nullptr,
                                out);
}

FAKE_API cuMemGetInfo_v2(size_t* free, size_t* total) {
  Call call("cuMemGetInfo", Needs::context);
  if (call) return call.code;
  *total = sim().memory->capacity();
  *free = *total - sim().memory->used(call.context->device);
  return CUDA_SUCCESS;
}

FAKE_API cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* nbytes, CUdeviceptr address) {
  Call call("cuMemGetAddressRange", Needs::context);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  if (!range) return CUDA_ERROR_NOT_FOUND;
  if (start) *start = range->start;
  if (nbytes) *nbytes = range->size;
  return CUDA_SUCCESS;
}

FAKE_API cuMemHostAlloc(void** out, size_t nbytes, unsigned) {
  Call call("cuMemHostAlloc", Needs::context, true);
  if (call) return call.code;
  return sim().memory->host(nbytes, call.context->device, call.context->handle, out);
}

FAKE_API cuMemFreeHost(void* address) {
  Call call("cuMemFreeHost", Needs::context, true);
  if (call) return call.code;
  RangePtr range = owned(as_device(address), Origin::pinned);
  if (!range) return CUDA_ERROR_INVALID_VALUE;
  if (range->pending)
    faults().violation("pinned memory freed while " + std::to_string(range->pending) +
                       " queued operations use it");
  if (CUresult code = sim().come_to_rest(call.lock, *call.context)) return code;
  sim().memory->forget(range);
  return CUDA_SUCCESS;
}

FAKE_API cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* address, unsigned) {
  Call call("cuMemHostGetDevicePointer", Needs::context);
  if (call) return call.code;
  RangePtr range = sim().memory->find(as_device(address));
  if (!range || !range->on_host()) return CUDA_ERROR_INVALID_VALUE;
  *out = as_device(address);
  return CUDA_SUCCESS;
}

FAKE_API cuMemHostRegister_v2(void* address, size_t nbytes, unsigned) {
  Call call("cuMemHostRegister", Needs::context, true);
  if (call) return call.code;
  return sim().memory->pin(address, nbytes, call.context->device, call.context->handle);
}

FAKE_API cuMemHostUnregister(void* address) {
  Call call("cuMemHostUnregister", Needs::context, true);
  if (call) return call.code;
  RangePtr range = owned(as_device(address), Origin::registered);
  if (!range) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  if (range->pending)
    faults().violation("host memory unregistered while " + std::to_string(range->pending) +
                       " queued operations use it");
  if (CUresult code = sim().come_to_rest(call.lock, *call.context)) return code;
  sim().memory->forget(range);
  return CUDA_SUCCESS;
}

FAKE_API cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr address) {
  Call call("cuPointerGetAttribute", Needs::init);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  return range ? attribute(range, which, address, data) : CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** data,
                                CUdeviceptr address) {
  Call call("cuPointerGetAttributes", Needs::init);
  if (call) return call.code;
  RangePtr range = sim().memory->find(address);
  for (unsigned i = 0; i < count; ++i) {
    if (range) {
      attribute(range, which[i], address, data[i]);
      continue;
    }
    // Memory that the driver does not know: zeros, and no error.
    bool wide = false;
    switch (which[i]) {
      case CU_POINTER_ATTRIBUTE_CONTEXT:
      case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
        wide = true;
        break;
      default:
        break;
    }
    int nothing = which[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL ? -2 : 0;  // CU_DEVICE_INVALID
    std::memset(data[i], 0, wide ? 8 : 4);
    if (nothing) std::memcpy(data[i], &nothing, sizeof nothing);
  }
  return CUDA_SUCCESS;
}

FAKE_API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream on) {
  return copy_async("cuMemcpyAsync", to, from, nbytes, on);
}
FAKE_API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t nbytes, CUstream on) {
  return copy_async("cuMemcpyHtoDAsync", to, as_device(from), nbytes, on);
}
FAKE_API cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t nbytes, CUstream on) {
  return copy_async("cuMemcpyDtoHAsync", as_device(to), from, nbytes, on);
}
FAKE_API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes, CUstream on) {
  return copy_async("cuMemcpyDtoDAsync", to, from, nbytes, on);
}
FAKE_API cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t nbytes,
                           CUstream on) {
  return copy_async("cuMemcpyPeerAsync", to, from, nbytes, on);
}
FAKE_API cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t nbytes) {
  return copy_now("cuMemcpy", to, from, nbytes);
}
FAKE_API cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t nbytes) {
  return copy_now("cuMemcpyHtoD", to, as_device(from), nbytes);
}
FAKE_API cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t nbytes) {
  return copy_now("cuMemcpyDtoH", as_device(to), from, nbytes);
}
FAKE_API cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t nbytes) {
  return copy_now("cuMemcpyDtoD", to, from, nbytes);
}

FAKE_API cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D* copy, CUstream on) {
  Call call("cuMemcpy2DAsync", Needs::context);
  if (call) return call.code;
  Plane to{}, from{};
  if (!plane(copy->dstMemoryType, copy->dstHost, copy->dstDevice, copy->dstPitch, copy->dstXInBytes,
             copy->dstY, to) ||
      !plane(copy->srcMemoryType, copy->srcHost, copy->srcDevice, copy->srcPitch, copy->srcXInBytes,
             copy->srcY, from))
    return CUDA_ERROR_NOT_SUPPORTED;
  if (copy->Height > 1 && (copy->dstPitch < copy->WidthInBytes || copy->srcPitch < copy->WidthInBytes))
    return CUDA_ERROR_INVALID_VALUE;
  Op op(Op::Kind::copy);
  op.to = to.start, op.to_pitch = to.pitch, op.from = from.start, op.from_pitch = from.pitch;
  op.width = copy->WidthInBytes, op.height = copy->Height;
  return queue_copy(call, on, std::move(op));
}

#ifndef FAKE_CUDA_REAL_HEADER  // whose form of it depends on its version: this is CUDA 12.8's
FAKE_API cuMemcpyBatchAsync(const CUdeviceptr* to, const CUdeviceptr* from, const size_t* nbytes,
                            size_t count, const CUmemcpyAttributes* attributes, const size_t* first,
                            size_t kinds, size_t* failed, CUstream on) {
  Call call("cuMemcpyBatchAsync", Needs::context);
  if (call) return call.code;
  *failed = SIZE_MAX;
  if (!count || kinds != 1 || first[0] != 0 || attributes[0].srcAccessOrder < 1 ||
      attributes[0].srcAccessOrder > 3 || !on || on == CU_STREAM_LEGACY)
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) {
    Op op(Op::Kind::copy);
    op.to = to[i], op.from = from[i], op.width = nbytes[i];
    if (CUresult code = queue_copy(call, on, std::move(op))) return *failed = i, code;
  }
  return CUDA_SUCCESS;
}
#endif

FAKE_API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream on) {
  return fill_async("cuMemsetD8Async", to, value, 1, count, on);
}
FAKE_API cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream on) {
  return fill_async("cuMemsetD32Async", to, value, 4, count, on);
}
