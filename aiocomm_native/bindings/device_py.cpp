#include "bindings/device_py.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "bindings/transfer.hpp"
#include "core/link.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// The library's own types, and classes that users derive from torch's. The last type that is neither is kept, since asking
// costs as much as the rest.
bool is_torch(PyObject* object) {
  static PyObject* name = interned("__torch_function__");
  static std::atomic<PyTypeObject*> other{nullptr};
  PyTypeObject* type = Py_TYPE(object);
  if (type == other.load(std::memory_order_acquire)) return false;
  if (PyObject_HasAttr(reinterpret_cast<PyObject*>(type), name)) return true;
  Py_INCREF(type);  // for ever: else another type could come to lie there
  other.store(type, std::memory_order_release);
  return false;
}

const char* format_of(const char* typestr) {
  struct Pair {
    const char *from, *to;
  };
  static constexpr Pair kFormats[] = {{"u1", "B"}, {"f4", "f"}, {"f2", "e"},  {"f8", "d"},  {"i1", "b"},
                                      {"i2", "h"}, {"i4", "i"}, {"i8", "q"},  {"u2", "H"},  {"u4", "I"},
                                      {"u8", "Q"}, {"b1", "?"}, {"c8", "Zf"}, {"c16", "Zd"}};
  if (*typestr == '\0') return nullptr;
  for (const Pair& pair : kFormats)
    if (std::strcmp(typestr + 1, pair.from) == 0) return pair.to;
  return nullptr;
}

// What torch's dtypes are called in descriptions, as aiocomm/_device.py has told; for ever.
PyObject* torch_formats() {
  static PyObject* formats = PyDict_New();
  return formats;
}

bool read_number(PyObject* found, unsigned long long& out) {  // takes the reference
  if (!found) return false;
  out = PyLong_AsUnsignedLongLong(found);
  Py_DECREF(found);
  return !PyErr_Occurred();
}

bool is_true(PyObject* found) {  // takes the reference
  const bool yes = found && PyObject_IsTrue(found) == 1;
  Py_XDECREF(found);
  return yes;
}

// The handle of torch's current stream of a device; it has been imported, since it has made an array.
bool read_current_stream(PyObject* index, uint64_t& out) {
  static std::atomic<PyObject*> asked{nullptr};
  PyObject* ask = asked.load(std::memory_order_acquire);
  if (!ask) {
    PyObject* torch = PyImport_ImportModule("torch._C");
    ask = torch ? PyObject_GetAttrString(torch, "_cuda_getCurrentRawStream") : nullptr;
    Py_XDECREF(torch);
    if (!ask) return false;
    asked.store(ask, std::memory_order_release);
  }
  PyObject* handle = PyObject_CallOneArg(ask, index);
  if (!handle) return false;
  out = PyLong_AsUnsignedLongLong(handle);
  Py_DECREF(handle);
  return !PyErr_Occurred();
}

// By attributes that are native: each takes torch some tens of ns.
bool read_tensor(PyObject* tensor, DeviceView& out) {
  static PyObject *dtype = interned("dtype"), *device = interned("device"), *index = interned("index"),
                  *shape = interned("shape"), *is_cuda = interned("is_cuda"), *size = interned("nbytes"),
                  *is_contiguous = interned("is_contiguous"), *data_ptr = interned("data_ptr");
  unsigned long long address = 0, nbytes = 0;
  if (!is_true(PyObject_GetAttr(tensor, is_cuda)) ||
      !is_true(PyObject_CallMethodNoArgs(tensor, is_contiguous)) ||
      !read_number(PyObject_CallMethodNoArgs(tensor, data_ptr), address) ||
      !read_number(PyObject_GetAttr(tensor, size), nbytes))
    return false;
  PyObject* type = PyObject_GetAttr(tensor, dtype);
  PyObject* format = type ? PyDict_GetItemWithError(torch_formats(), type) : nullptr;
  Py_XDECREF(type);
  if (!format || !(out.format = PyUnicode_AsUTF8(format))) return false;
  PyObject* where = PyObject_GetAttr(tensor, device);
  PyObject* number = where ? PyObject_GetAttr(where, index) : nullptr;
  Py_XDECREF(where);
  bool fine = number && PyLong_Check(number) && read_current_stream(number, out.stream);
  if (fine) out.device = static_cast<int>(PyLong_AsLong(number));
  Py_XDECREF(number);
  PyObject* dims = fine ? PyObject_GetAttr(tensor, shape) : nullptr;
  if (!dims || !PyTuple_Check(dims)) {
    Py_XDECREF(dims);
    return false;
  }
  out.address = address, out.nbytes = nbytes;
  out.shape = PyTuple_GetSlice(dims, 0, PyTuple_GET_SIZE(dims));  // torch's own is a class of its own
  Py_DECREF(dims);
  return out.shape != nullptr;
}

Found read(PyObject* interface, bool writable, DeviceView& out) {
  static PyObject *data = interned("data"), *shape = interned("shape"), *typestr = interned("typestr"),
                  *strides = interned("strides"), *stream = interned("stream");
  if (!PyDict_Check(interface)) return Found::ask;
  PyObject* where = PyDict_GetItem(interface, data);
  PyObject* dims = PyDict_GetItem(interface, shape);
  PyObject* type = PyDict_GetItem(interface, typestr);
  PyObject* steps = PyDict_GetItem(interface, strides);
  PyObject* queue = PyDict_GetItem(interface, stream);
  if (!where || !PyTuple_Check(where) || PyTuple_GET_SIZE(where) != 2 || !dims || !PyTuple_Check(dims) ||
      !type || !PyUnicode_Check(type) || (steps && steps != Py_None))
    return Found::ask;
  if (writable && PyObject_IsTrue(PyTuple_GET_ITEM(where, 1)) != 0) return Found::ask;
  const char* text = PyUnicode_AsUTF8(type);
  if (!text) return Found::error;
  out.format = format_of(text);
  if (!out.format) return Found::ask;
  out.address = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(where, 0));
  if (queue)  // its exporter says which stream, or that nothing is queued
    out.stream = queue == Py_None ? Mover::kNoStream : PyLong_AsUnsignedLongLong(queue);
  out.nbytes = static_cast<uint64_t>(std::atoi(text + 2));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dims); ++i) {
    Py_ssize_t dim = PyLong_AsSsize_t(PyTuple_GET_ITEM(dims, i));
    if (dim < 0) break;
    out.nbytes *= static_cast<uint64_t>(dim);
  }
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return Found::ask;
  }
  out.shape = Py_NewRef(dims);
  return Found::view;
}

}  // namespace

Found read_interface(PyObject* object, bool writable, DeviceView& out) {
  static PyObject* name = interned("__cuda_array_interface__");
  if (is_torch(object)) {
    if (read_tensor(object, out)) return Found::view;
    PyErr_Clear();
    return Found::ask;
  }
  PyObject* interface = PyObject_GetAttr(object, name);
  if (!interface) {
    PyErr_Clear();
    return Found::ask;
  }
  Found found = read(interface, writable, out);
  Py_DECREF(interface);
  return found;
}

// The first that is told stays: others may be reading it.
void note_torch_format(PyObject* dtype, PyObject* format) {
  PyDict_SetDefault(torch_formats(), dtype, format);
}

bool describes_device_memory(PyObject* object) {
  static PyObject* name = interned("__cuda_array_interface__");
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* interface = PyObject_GetAttr(object, name);
  if (!interface) PyErr_Clear();
  Py_XDECREF(interface);
  PyErr_Restore(type, value, trace);
  return interface != nullptr;
}

bool read_description(PyObject* description, DeviceView& out) {
  PyObject* array;
  unsigned long long address, nbytes, stream;
  if (!PyArg_ParseTuple(description, "OKKiKsO", &array, &address, &nbytes, &out.device, &stream, &out.format,
                        &out.shape))
    return false;
  out.address = address, out.nbytes = nbytes, out.stream = stream;
  return true;
}

std::unique_ptr<DeviceBuffer> bind_device(Mover& mover, const DeviceView& view) {
  std::unique_ptr<DeviceBuffer> made;
  PyObject* refusal = nullptr;
  std::string reason;
  int code = 0;
  Py_BEGIN_ALLOW_THREADS  // the driver may have to wait for a thread that wants the GIL
      try {
    made = mover.bind(view.address, view.nbytes, view.device, view.stream);
  } catch (const LinkFailure& failure) {
    refusal = hooks.link_error, reason = failure.what(), code = failure.code;
  } catch (const std::exception& usage) {
    refusal = hooks.usage_error, reason = usage.what();
  }
  Py_END_ALLOW_THREADS if (refusal) {
    nb::object args = refusal == hooks.link_error ? nb::object(nb::make_tuple(reason, code))
                                                  : nb::object(nb::make_tuple(reason));
    PyErr_SetObject(refusal, args.ptr());
  }
  return made;
}

}  // namespace aiocomm::py
