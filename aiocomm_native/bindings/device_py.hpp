// GPU arrays as Python objects.
#pragma once

#include <Python.h>

#include <cstdint>

namespace aiocomm::py {

struct DeviceView {
  uint64_t address = 0, nbytes = 0, stream = 0;
  int device = -1;
  const char* format = "B";
  PyObject* shape = nullptr;  // new reference to a tuple
};

enum class Found : uint8_t { error, nothing, view, ask };

// Reads `__cuda_array_interface__` of a contiguous array. `ask`: it takes aiocomm/_device.py to tell (torch, whose
// interface is slow and names no stream; strides; dtypes without a buffer format).
Found read_interface(PyObject* object, bool writable, DeviceView& out);

}  // namespace aiocomm::py
