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
  if (is_torch(object)) return Found::ask;
  PyObject* interface = PyObject_GetAttr(object, name);
  if (!interface) {
    PyErr_Clear();
    return Found::ask;
  }
  Found found = read(interface, writable, out);
  Py_DECREF(interface);
  return found;
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
