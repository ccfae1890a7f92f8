// Devices, contexts, errors, and how entry points are found.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "api.hpp"

namespace fake {

Context*& current_context() {
  thread_local Context* current = nullptr;
  return current;
}

int& capture_mode() {
  thread_local int mode = 0;  // global
  return mode;
}

bool is_device(CUdevice device) { return device >= 0 && static_cast<size_t>(device) < sim().devices.size(); }

Call::Call(const char* name, Needs needs, bool unsafe_in_capture) {
  if (sim().forked()) {  // whoever had a lock when it was forked is not here
    const bool works = needs == Needs::nothing && std::strcmp(name, "cuInit") != 0;
    code = works ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  faults().hold_up(name);
  lock = Lock(sim().mutex);
  code = faults().on_call(name);
  if (code || needs == Needs::nothing) return;
  if (!sim().initialised) {
    code = CUDA_ERROR_NOT_INITIALIZED;
    return;
  }
  context = current_context();
  if (needs == Needs::context) {
    if (!context)
      code = CUDA_ERROR_INVALID_CONTEXT;
    else if (!context->references)
      code = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    else
      code = sim().health(*context);
  }
  // A capture in global mode forbids such calls to every thread that has not said otherwise, and breaks by them.
  if (!code && unsafe_in_capture && capture_mode() == 0) {
    for (auto& [handle, stream] : sim().streams) {
      if (stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE && stream->capture_mode == 0) {
        capture_broken();
        code = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
      }
    }
  }
}

void capture_broken() {
  for (auto& [handle, stream] : sim().streams)
    if (stream->capture == CU_STREAM_CAPTURE_STATUS_ACTIVE)
      stream->capture = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
}

}  // namespace fake

using namespace fake;

FAKE_API cuInit(unsigned flags) {
  Call call("cuInit", Needs::nothing);
  if (call) return call.code;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (sim().devices.empty()) return CUDA_ERROR_NO_DEVICE;
  sim().initialised = getpid();
  return CUDA_SUCCESS;
}

FAKE_API cuDriverGetVersion(int* version) {
  Call call("cuDriverGetVersion", Needs::nothing);
  if (call) return call.code;
  *version = sim().version;
  return CUDA_SUCCESS;
}

FAKE_API cuGetErrorName(CUresult error, const char** text) {
  *text = error_name(error);
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuGetErrorString(CUresult error, const char** text) {
  *text = error_name(error) ? "as simulated" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

FAKE_API cuDeviceGetCount(int* count) {
  Call call("cuDeviceGetCount", Needs::init);
  if (!call) *count = static_cast<int>(sim().devices.size());
  return call.code;
}

FAKE_API cuDeviceGet(CUdevice* device, int ordinal) {
  Call call("cuDeviceGet", Needs::init);
  if (call) return call.code;
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetName(char* name, int length, CUdevice device) {
  Call call("cuDeviceGetName", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(name, static_cast<size_t>(length), "Simulated GPU %d", sim().devices[device]->physical);
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  Call call("cuDeviceGetUuid", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::memcpy(uuid->bytes, "simulated gpu  ", 15);
  uuid->bytes[15] = static_cast<char>(sim().devices[device]->physical);
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceTotalMem_v2(size_t* nbytes, CUdevice device) {
  Call call("cuDeviceTotalMem", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *nbytes = sim().memory->capacity();
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetPCIBusId(char* text, int length, CUdevice device) {
  Call call("cuDeviceGetPCIBusId", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::snprintf(text, static_cast<size_t>(length), "0000:%02X:00.0", 0x10 + sim().devices[device]->physical);
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  Call call("cuDeviceGetAttribute", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
      *value = 3;
      break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
      *value = 0x10 + sim().devices[device]->physical;
      break;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_MEMPOOL_SUPPORTED_HANDLE_TYPES:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
    case CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED:
      *value = 1;
      break;
    default:
      *value = 0;
      break;
  }
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceCanAccessPeer(int* yes, CUdevice device, CUdevice peer) {
  Call call("cuDeviceCanAccessPeer", Needs::init);
  if (call) return call.code;
  if (!is_device(device) || !is_device(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *yes = device != peer && sim().peers_allowed;
  return CUDA_SUCCESS;
}

FAKE_API cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute attribute, CUdevice from, CUdevice to) {
  Call call("cuDeviceGetP2PAttribute", Needs::init);
  if (call) return call.code;
  if (!is_device(from) || !is_device(to) || from == to) return CUDA_ERROR_INVALID_DEVICE;
  // NVLink tells itself by atomics over the link; the simulated devices are on NVLink where they are peers at all.
  *value = attribute == CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK ? 0 : sim().peers_allowed;
  return CUDA_SUCCESS;
}

FAKE_API cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
  Call call("cuDevicePrimaryCtxRetain", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (CUresult code = faults().lost(device)) return code;
  Context& context = sim().devices[device]->context;
  ++context.references;
  *out = context.handle;
  return CUDA_SUCCESS;
}

FAKE_API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  Call call("cuDevicePrimaryCtxRelease", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Context& context = sim().devices[device]->context;
  if (!context.references) return CUDA_ERROR_INVALID_CONTEXT;
  --context.references;
  return CUDA_SUCCESS;
}

FAKE_API cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  Call call("cuDevicePrimaryCtxGetState", Needs::init);
  if (call) return call.code;
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = sim().devices[device]->context.references > 0;
  return CUDA_SUCCESS;
}

FAKE_API cuCtxSetCurrent(CUcontext handle) {
  Call call("cuCtxSetCurrent", Needs::init);
  if (call) return call.code;
  Context* context = handle ? sim().context_of(handle) : nullptr;
  if (handle && !context) return CUDA_ERROR_INVALID_CONTEXT;
  current_context() = context;
  return CUDA_SUCCESS;
}

FAKE_API cuCtxGetCurrent(CUcontext* out) {
  Call call("cuCtxGetCurrent", Needs::init);
  if (!call) *out = call.context ? call.context->handle : nullptr;
  return call.code;
}

namespace {
std::vector<Context*>& pushed() {
  thread_local std::vector<Context*> stack;
  return stack;
}
}  // namespace

FAKE_API cuCtxPushCurrent_v2(CUcontext handle) {
  Call call("cuCtxPushCurrent", Needs::init);
  if (call) return call.code;
  Context* context = sim().context_of(handle);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  pushed().push_back(current_context());
  current_context() = context;
  return CUDA_SUCCESS;
}

FAKE_API cuCtxPopCurrent_v2(CUcontext* out) {
  Call call("cuCtxPopCurrent", Needs::init);
  if (call) return call.code;
  if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
  if (out) *out = current_context()->handle;
  current_context() = nullptr;
  if (!pushed().empty()) {
    current_context() = pushed().back();
    pushed().pop_back();
  }
  return CUDA_SUCCESS;
}

FAKE_API cuCtxGetDevice(CUdevice* device) {
  Call call("cuCtxGetDevice", Needs::context);
  if (!call) *device = call.context->device;
  return call.code;
}

FAKE_API cuCtxSynchronize(void) {
  Call call("cuCtxSynchronize", Needs::context, true);
  if (call) return call.code;
  for (auto& [handle, stream] : sim().streams)
    if (stream->context == call.context && stream->capture != CU_STREAM_CAPTURE_STATUS_NONE) {
      capture_broken();  // whatever the thread's mode
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  return sim().wait_all(call.lock, *call.context);
}

FAKE_API cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
  Call call("cuCtxEnablePeerAccess", Needs::context);
  if (call) return call.code;
  Context* other = sim().context_of(peer);
  if (!other || other == call.context) return CUDA_ERROR_INVALID_CONTEXT;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (!sim().peers_allowed) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  bool fresh = call.context->peers.insert(other->device).second;
  return fresh ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

FAKE_API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  Call call("cuCtxGetStreamPriorityRange", Needs::context);
  if (call) return call.code;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}

// FAKE_CUDA_HIDE: entry points, by comma, that this driver does not have.
FAKE_API cuGetProcAddress_v2(const char* symbol, void** function, int version, cuuint64_t,
                             CUdriverProcAddressQueryResult* status) {
  Call call("cuGetProcAddress", Needs::nothing);
  if (call) return call.code;
  auto answer = [&](CUdriverProcAddressQueryResult result) {
    if (status) *status = result;
    return result == CU_GET_PROC_ADDRESS_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
  };
  *function = nullptr;
  const char* hidden = std::getenv("FAKE_CUDA_HIDE");
  std::string name(symbol);
  if (hidden && ("," + std::string(hidden) + ",").find("," + name + ",") != std::string::npos)
    return answer(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  if (version > sim().version) return answer(CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  static void* self = [] {
    Dl_info info{};
    return dladdr(reinterpret_cast<void*>(&cuInit), &info) ? dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD)
                                                           : nullptr;
  }();
  for (const char* suffix : {"_v3", "_v2", ""})
    if ((*function = dlsym(self, (name + suffix).c_str()))) return answer(CU_GET_PROC_ADDRESS_SUCCESS);
  return answer(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
}
