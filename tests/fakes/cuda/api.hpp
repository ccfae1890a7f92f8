// What every entry point begins with.
#pragma once

#include <string>

#include "sim.hpp"

#define FAKE_API extern "C" __attribute__((visibility("default"))) CUresult CUDAAPI

namespace fake {

enum class Needs {
  nothing,
  init,
  context,  // current on this thread, and in order
};

// Takes the lock, counts the call, and finds out whether it must fail: because a test wants it, or because the driver
// is not initialised, no context is current, its device is lost or its context is broken.
class Call {
 public:
  Call(const char* name, Needs needs, bool unsafe_in_capture = false);
  explicit operator bool() const { return code != CUDA_SUCCESS; }  // must fail
  Lock lock;
  CUresult code = CUDA_SUCCESS;
  Context* context = nullptr;
};

Context*& current_context();  // of this thread
int& capture_mode();          // of this thread

bool is_device(CUdevice device);
// The stream behind a handle; its context need not be the current one. On failure sets `call.code`.
StreamPtr stream_of(Call& call, CUstream handle);
EventPtr event_of(Call& call, CUevent handle);
void capture_broken();  // every capture under way becomes invalid

}  // namespace fake
