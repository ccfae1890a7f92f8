#include "links/cuda/driver.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>

namespace aiocomm::cuda {

namespace {

using GetProcAddress = CUresult(const char*, void**, int, uint64_t, int*);
constexpr uint64_t kDefaultFlags = 0;  // CU_GET_PROC_ADDRESS_DEFAULT
constexpr const char* kForked =
    "this process was forked from one that had started CUDA, which does not work in such a child: start "
    "processes by "
    "'spawn' or 'forkserver' (multiprocessing.set_start_method), or fork before anything uses a GPU";

void load(Driver& driver) {
  const char* named = std::getenv("AIOCOMM_LIBCUDA");
  driver.library = named && *named ? named : "libcuda.so.1";
  void* library = dlopen(driver.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* why = dlerror();
    driver.refusal = "no CUDA driver: " + std::string(why ? why : "cannot load " + driver.library) +
                     ". Install NVIDIA's driver; in a container, start it with the GPUs (--gpus all)";
    return;
  }
  auto resolve = reinterpret_cast<GetProcAddress*>(dlsym(library, "cuGetProcAddress_v2"));
  auto version = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (version) version(&driver.version);
  if (!resolve || driver.version < kOldestDriver) {
    driver.refusal = "the CUDA driver is too old (" + std::to_string(driver.version / 1000) + "." +
                     std::to_string(driver.version % 1000 / 10) + "): 12.0 or newer (driver 525) is needed";
    return;
  }
  auto find = [&](const char* name, int since, bool needed) {
    void* function = nullptr;
    if (resolve(name, &function, since, kDefaultFlags, nullptr) != CUDA_SUCCESS || !function) {
      function = nullptr;
      if (needed && driver.refusal.empty())
        driver.refusal = "the CUDA driver lacks " + std::string(name) + ": update it (12.0 or newer)";
    }
    return function;
  };
#define AIOCOMM_CUDA_LOAD(name, since, ...) \
  driver.name = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(find(#name, since, true));
  AIOCOMM_CUDA_ENTRY_POINTS(AIOCOMM_CUDA_LOAD)
#undef AIOCOMM_CUDA_LOAD
#define AIOCOMM_CUDA_LOAD(name, since, ...) \
  driver.name = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(find(#name, since, false));
  AIOCOMM_CUDA_OPTIONAL_ENTRY_POINTS(AIOCOMM_CUDA_LOAD)
#undef AIOCOMM_CUDA_LOAD
  if (!driver.usable()) return;
  if (CUresult code = driver.cuInit(0); code != CUDA_SUCCESS) {
    driver.error = code;
    driver.refusal = "the CUDA driver does not start: " + driver.describe(code);
    if (code == CUDA_ERROR_NO_DEVICE)
      driver.refusal += ". No GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES";
    else if (code == CUDA_ERROR_NOT_INITIALIZED)  // by another library of the parent's
      driver.refusal += std::string("; ") + kForked;
    return;
  }
  if (CUresult code = driver.cuDeviceGetCount(&driver.devices); code != CUDA_SUCCESS || driver.devices == 0) {
    driver.error = code;
    driver.refusal = "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES";
  }
}

}  // namespace

// Others of their numbers concern one call only: a kernel that asks for too much (701), memory that is registered (712).
bool is_lost(CUresult code) {
  switch (code) {
    case CUDA_ERROR_DEINITIALIZED:
    case CUDA_ERROR_DEVICE_UNAVAILABLE:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTAINED:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_TENSOR_MEMORY_LEAK:
    case CUDA_ERROR_MPS_CLIENT_TERMINATED:
    case CUDA_ERROR_EXTERNAL_DEVICE:
      return true;
    default:
      return false;
  }
}

std::string Driver::describe(CUresult code) const {
  const char *name = nullptr, *text = nullptr;
  if (cuGetErrorName) cuGetErrorName(code, &name);
  if (cuGetErrorString) cuGetErrorString(code, &text);
  std::string out = name ? name : "CUDA error";
  out += " (" + std::to_string(code) + ")";
  if (text) out += std::string(": ") + text;
  return out;
}

const Driver& Driver::of_process() {
  static const Driver* driver = [] {
    auto fresh = new Driver;  // never freed: threads may use it until the process ends
    load(*fresh);
    return fresh;
  }();
  static const pid_t loader = ::getpid();
  if (::getpid() == loader || !driver->usable()) return *driver;
  static const Driver* forked = [] {
    auto refusing = new Driver(*driver);
    refusing->error = CUDA_ERROR_NOT_INITIALIZED;
    refusing->refusal = kForked;
    return refusing;
  }();
  return *forked;
}

}  // namespace aiocomm::cuda
