// The CUDA driver, loaded at run time: no CUDA header at build time, no libcuda at import.
//
// The library is AIOCOMM_LIBCUDA where that is set (a simulated driver in tests), else libcuda.so.1. Every entry point
// but the first comes through cuGetProcAddress with the version below, so that a newer driver keeps its old meaning.
//
// Types are the driver's, declared here as far as they are used: handles are opaque pointers, device pointers integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace aiocomm::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUfunction = struct CUfunc_st*;
using CUmemoryPool = struct CUmemPoolHandle_st*;
using CUmemGenericAllocationHandle = unsigned long long;

struct CUuuid {
  char bytes[16];
};
struct CUipcMemHandle {
  char reserved[64];
};

struct CUmemLocation {
  int type;
  int id;
};
struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
};
struct CUmemcpyAttributes {
  int srcAccessOrder;
  CUmemLocation srcLocHint, dstLocHint;
  unsigned flags;
};
struct CUDA_MEMCPY2D {
  size_t srcXInBytes, srcY;
  unsigned srcMemoryType;
  const void* srcHost;
  CUdeviceptr srcDevice;
  void* srcArray;
  size_t srcPitch;
  size_t dstXInBytes, dstY;
  unsigned dstMemoryType;
  void* dstHost;
  CUdeviceptr dstDevice;
  void* dstArray;
  size_t dstPitch;
  size_t WidthInBytes, Height;
};

// Codes that the link treats in a way of their own.
constexpr CUresult CUDA_SUCCESS = 0;
constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
constexpr CUresult CUDA_ERROR_NOT_INITIALIZED = 3;
constexpr CUresult CUDA_ERROR_DEINITIALIZED = 4;
constexpr CUresult CUDA_ERROR_DEVICE_UNAVAILABLE = 46;
constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
constexpr CUresult CUDA_ERROR_INVALID_DEVICE = 101;
constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
constexpr CUresult CUDA_ERROR_MAP_FAILED = 205;
constexpr CUresult CUDA_ERROR_ALREADY_MAPPED = 208;
constexpr CUresult CUDA_ERROR_ECC_UNCORRECTABLE = 214;
constexpr CUresult CUDA_ERROR_PEER_ACCESS_UNSUPPORTED = 217;
constexpr CUresult CUDA_ERROR_NVLINK_UNCORRECTABLE = 220;
constexpr CUresult CUDA_ERROR_CONTAINED = 226;
constexpr CUresult CUDA_ERROR_INVALID_HANDLE = 400;
constexpr CUresult CUDA_ERROR_NOT_READY = 600;
constexpr CUresult CUDA_ERROR_ILLEGAL_ADDRESS = 700;
constexpr CUresult CUDA_ERROR_LAUNCH_TIMEOUT = 702;
constexpr CUresult CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704;
constexpr CUresult CUDA_ERROR_CONTEXT_IS_DESTROYED = 709;
constexpr CUresult CUDA_ERROR_ASSERT = 710;
constexpr CUresult CUDA_ERROR_HARDWARE_STACK_ERROR = 714;
constexpr CUresult CUDA_ERROR_ILLEGAL_INSTRUCTION = 715;
constexpr CUresult CUDA_ERROR_MISALIGNED_ADDRESS = 716;
constexpr CUresult CUDA_ERROR_INVALID_ADDRESS_SPACE = 717;
constexpr CUresult CUDA_ERROR_INVALID_PC = 718;
constexpr CUresult CUDA_ERROR_LAUNCH_FAILED = 719;
constexpr CUresult CUDA_ERROR_TENSOR_MEMORY_LEAK = 721;
constexpr CUresult CUDA_ERROR_NOT_PERMITTED = 800;
constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;
constexpr CUresult CUDA_ERROR_MPS_CLIENT_TERMINATED = 810;
constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906;
constexpr CUresult CUDA_ERROR_EXTERNAL_DEVICE = 911;
constexpr CUresult CUDA_ERROR_UNKNOWN = 999;

// Flags and enumerators, by their names in cuda.h.
constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned CU_EVENT_DISABLE_TIMING = 2;
constexpr unsigned CU_MEMHOSTALLOC_PORTABLE = 1, CU_MEMHOSTALLOC_DEVICEMAP = 2;
constexpr unsigned CU_MEMHOSTREGISTER_PORTABLE = 1, CU_MEMHOSTREGISTER_DEVICEMAP = 2;
constexpr unsigned CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1;
constexpr unsigned CU_STREAM_WRITE_VALUE_DEFAULT = 0;
constexpr int CU_STREAM_CAPTURE_STATUS_NONE = 0, CU_STREAM_CAPTURE_MODE_RELAXED = 2;
constexpr int CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1;
constexpr int CU_MEM_LOCATION_TYPE_DEVICE = 1;
constexpr int CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3;
constexpr int CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1;
constexpr unsigned CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1;
constexpr unsigned CU_MEMORYTYPE_HOST = 1, CU_MEMORYTYPE_DEVICE = 2, CU_MEMORYTYPE_UNIFIED = 4;

constexpr int CU_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID = 34;
constexpr int CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41;
constexpr int CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID = 50;
constexpr int CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED = 124;
constexpr int CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD = 1;
constexpr int CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX = 0;
constexpr int CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER = 100;

constexpr int CU_POINTER_ATTRIBUTE_CONTEXT = 1;
constexpr int CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2;
constexpr int CU_POINTER_ATTRIBUTE_BUFFER_ID = 7;
constexpr int CU_POINTER_ATTRIBUTE_IS_MANAGED = 8;
constexpr int CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9;
constexpr int CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10;
constexpr int CU_POINTER_ATTRIBUTE_RANGE_START_ADDR = 11;
constexpr int CU_POINTER_ATTRIBUTE_RANGE_SIZE = 12;
constexpr int CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES = 14;
constexpr int CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE = 17;
constexpr int CU_POINTER_ATTRIBUTE_MAPPING_SIZE = 18, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR = 19;
constexpr int CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID = 20;

// X(name, version for cuGetProcAddress, signature). The symbol of a v2 entry point has the suffix _v2, as in cuda.h.
#define AIOCOMM_CUDA_ENTRY_POINTS(X)                                                                     \
  X(cuInit, 2000, CUresult(unsigned))                                                                    \
  X(cuDriverGetVersion, 2020, CUresult(int*))                                                            \
  X(cuGetErrorName, 6000, CUresult(CUresult, const char**))                                              \
  X(cuGetErrorString, 6000, CUresult(CUresult, const char**))                                            \
  X(cuDeviceGetCount, 2000, CUresult(int*))                                                              \
  X(cuDeviceGet, 2000, CUresult(CUdevice*, int))                                                         \
  X(cuDeviceGetUuid, 11040, CUresult(CUuuid*, CUdevice))                                                 \
  X(cuDeviceGetAttribute, 2000, CUresult(int*, int, CUdevice))                                           \
  X(cuDeviceCanAccessPeer, 4000, CUresult(int*, CUdevice, CUdevice))                                     \
  X(cuDevicePrimaryCtxRetain, 7000, CUresult(CUcontext*, CUdevice))                                      \
  X(cuDevicePrimaryCtxRelease, 11000, CUresult(CUdevice))                                                \
  X(cuCtxSetCurrent, 4000, CUresult(CUcontext))                                                          \
  X(cuCtxGetCurrent, 4000, CUresult(CUcontext*))                                                         \
  X(cuCtxGetDevice, 2000, CUresult(CUdevice*))                                                           \
  X(cuCtxEnablePeerAccess, 4000, CUresult(CUcontext, unsigned))                                          \
  X(cuPointerGetAttribute, 4000, CUresult(void*, int, CUdeviceptr))                                      \
  X(cuPointerGetAttributes, 7000, CUresult(unsigned, int*, void**, CUdeviceptr))                         \
  X(cuIpcGetMemHandle, 4010, CUresult(CUipcMemHandle*, CUdeviceptr))                                     \
  X(cuIpcOpenMemHandle, 11000, CUresult(CUdeviceptr*, CUipcMemHandle, unsigned))                         \
  X(cuIpcCloseMemHandle, 4010, CUresult(CUdeviceptr))                                                    \
  X(cuMemAlloc, 3020, CUresult(CUdeviceptr*, size_t))                                                    \
  X(cuMemFree, 3020, CUresult(CUdeviceptr))                                                              \
  X(cuMemHostAlloc, 2020, CUresult(void**, size_t, unsigned))                                            \
  X(cuMemFreeHost, 2000, CUresult(void*))                                                                \
  X(cuMemHostGetDevicePointer, 3020, CUresult(CUdeviceptr*, void*, unsigned))                            \
  X(cuMemHostRegister, 6050, CUresult(void*, size_t, unsigned))                                          \
  X(cuMemHostUnregister, 4000, CUresult(void*))                                                          \
  X(cuMemcpyAsync, 4000, CUresult(CUdeviceptr, CUdeviceptr, size_t, CUstream))                           \
  X(cuMemcpy2DAsync, 3020, CUresult(const CUDA_MEMCPY2D*, CUstream))                                     \
  X(cuLaunchKernel, 4000,                                                                                \
    CUresult(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, \
             void**, void**))                                                                            \
  X(cuStreamCreateWithPriority, 5050, CUresult(CUstream*, unsigned, int))                                \
  X(cuStreamDestroy, 4000, CUresult(CUstream))                                                           \
  X(cuStreamQuery, 2000, CUresult(CUstream))                                                             \
  X(cuStreamSynchronize, 2000, CUresult(CUstream))                                                       \
  X(cuStreamWaitEvent, 3020, CUresult(CUstream, CUevent, unsigned))                                      \
  X(cuStreamIsCapturing, 10000, CUresult(CUstream, int*))                                                \
  X(cuStreamWriteValue32, 12000, CUresult(CUstream, CUdeviceptr, uint32_t, unsigned))                    \
  X(cuStreamWriteValue64, 12000, CUresult(CUstream, CUdeviceptr, uint64_t, unsigned))                    \
  X(cuThreadExchangeStreamCaptureMode, 10010, CUresult(int*))                                            \
  X(cuEventCreate, 2000, CUresult(CUevent*, unsigned))                                                   \
  X(cuEventDestroy, 4000, CUresult(CUevent))                                                             \
  X(cuEventRecord, 2000, CUresult(CUevent, CUstream))                                                    \
  X(cuEventQuery, 2000, CUresult(CUevent))                                                               \
  X(cuMemRetainAllocationHandle, 11000, CUresult(CUmemGenericAllocationHandle*, void*))                  \
  X(cuMemRelease, 10020, CUresult(CUmemGenericAllocationHandle))                                         \
  X(cuMemExportToShareableHandle, 10020,                                                                 \
    CUresult(void*, CUmemGenericAllocationHandle, int, unsigned long long))                              \
  X(cuMemImportFromShareableHandle, 10020, CUresult(CUmemGenericAllocationHandle*, void*, int))          \
  X(cuMemGetAllocationPropertiesFromHandle, 10020,                                                       \
    CUresult(CUmemAllocationProp*, CUmemGenericAllocationHandle))                                        \
  X(cuMemAddressReserve, 10020, CUresult(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long)) \
  X(cuMemAddressFree, 10020, CUresult(CUdeviceptr, size_t))                                              \
  X(cuMemMap, 10020,                                                                                     \
    CUresult(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long))             \
  X(cuMemUnmap, 10020, CUresult(CUdeviceptr, size_t))                                                    \
  X(cuMemGetAccess, 10020, CUresult(unsigned long long*, const CUmemLocation*, CUdeviceptr))             \
  X(cuMemSetAccess, 10020, CUresult(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t))

// The same for what older drivers lack: null there.
#define AIOCOMM_CUDA_OPTIONAL_ENTRY_POINTS(X)                                                            \
  X(cuMemGetHandleForAddressRange, 11070, CUresult(void*, CUdeviceptr, size_t, int, unsigned long long)) \
  X(cuFlushGPUDirectRDMAWrites, 11030, CUresult(int, int))                                               \
  X(cuMemcpyBatchAsync, 12080,                                                                           \
    CUresult(const CUdeviceptr*, const CUdeviceptr*, const size_t*, size_t, const CUmemcpyAttributes*,   \
             const size_t*, size_t, size_t*, CUstream))

// After these nothing on the device works any more, for this process: the driver gives them for every call.
bool is_lost(CUresult code);

constexpr int kOldestDriver = 12000;  // CUDA 12: cuGetProcAddress_v2 and cuStreamWriteValue's second form

struct Driver {
#define AIOCOMM_CUDA_MEMBER(name, version, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
  AIOCOMM_CUDA_ENTRY_POINTS(AIOCOMM_CUDA_MEMBER)
  AIOCOMM_CUDA_OPTIONAL_ENTRY_POINTS(AIOCOMM_CUDA_MEMBER)
#undef AIOCOMM_CUDA_MEMBER

  int version = 0;      // e.g. 13000
  int devices = 0;      // at least 1 where `usable`
  std::string library;  // that was loaded, or tried
  std::string refusal;  // why there is no usable driver; empty: it is usable
  int error = 0;        // the driver's code behind `refusal`, where it gave one

  bool usable() const { return refusal.empty(); }
  std::string describe(CUresult code) const;  // "CUDA_ERROR_X (n): text"

  // The driver of this process, loaded and initialised by the first call and never unloaded. A child that was forked after
  // that has one that refuses. Any thread.
  static const Driver& of_process();
};

}  // namespace aiocomm::cuda
