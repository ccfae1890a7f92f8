// GPU arrays as Python objects.
#pragma once

#include <Python.h>

#include <cstdint>
#include <memory>

#include "core/device.hpp"

namespace aiocomm::py {

struct DeviceView {
  uint64_t address = 0, nbytes = 0, stream = 0;
  int device = -1;
  const char* format = "B";
  PyObject* shape = nullptr;  // a tuple; of read_interface a new reference
};

enum class Found : uint8_t { error, view, ask };

// Reads `__cuda_array_interface__` of a contiguous array, or a contiguous tensor of torch, whose interface is slow and
// names no stream. `ask`: it takes aiocomm/_device.py to tell (strides, dtypes without a buffer format, the first tensor
// of a dtype).
Found read_interface(PyObject* object, bool writable, DeviceView& out);

// What one of torch's dtypes is called in descriptions; a Python error may be set.
void note_torch_format(PyObject* dtype, PyObject* format);

// Whether it has that interface; an error that is set stays.
bool describes_device_memory(PyObject* object);

// Reads a description, whose shape is borrowed; false: a Python error is set.
bool read_description(PyObject* description, DeviceView& out);

// Has the driver describe the memory, without the GIL; null: a Python error is set.
std::unique_ptr<DeviceBuffer> bind_device(Mover& mover, const DeviceView& view);

}  // namespace aiocomm::py
