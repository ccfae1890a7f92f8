// Memory objects: buffers for arrays that the runtime allocates.

#include <cstdlib>
#include <cstring>

#include "bindings/transfer.hpp"
#include "core/segments.hpp"

namespace aiocomm::py {

namespace {

struct Memory {
  PyObject_HEAD std::byte* data;
  uint64_t nbytes;
  bool segment;
};

PyTypeObject* MemoryType = nullptr;

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  auto memory = reinterpret_cast<Memory*>(self);
  return PyBuffer_FillInfo(view, self, memory->data, static_cast<Py_ssize_t>(memory->nbytes), 0, flags);
}

void dealloc(PyObject* self) {
  auto memory = reinterpret_cast<Memory*>(self);
  PyTypeObject* type = Py_TYPE(self);
  if (memory->segment)
    Segments::of_process().release(memory->data);
  else
    std::free(memory->data);
  type->tp_free(self);
  Py_DECREF(type);
}

PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
                       {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
                       {Py_tp_doc, const_cast<char*>("Memory that the runtime allocated; a buffer.")},
                       {0, nullptr}};
PyType_Spec spec = {"aiocomm_native._core.Memory", sizeof(Memory), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

PyObject* make(std::byte* data, uint64_t nbytes, bool segment) {
  auto memory = reinterpret_cast<Memory*>(MemoryType->tp_alloc(MemoryType, 0));
  if (!memory) return nullptr;
  memory->data = data;
  memory->nbytes = nbytes;
  memory->segment = segment;
  return reinterpret_cast<PyObject*>(memory);
}

constexpr size_t kFormatBytes = 8;

}  // namespace

PyObject* new_memory(std::byte* data, uint64_t nbytes) { return make(data, nbytes, false); }
PyObject* new_segment_memory(std::byte* base, uint64_t nbytes) { return make(base, nbytes, true); }

int init_memory(PyObject* module) {
  MemoryType = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  return MemoryType ? PyModule_AddObjectRef(module, "Memory", reinterpret_cast<PyObject*>(MemoryType)) : -1;
}

// Layout: dimensions (1 byte), length of the format (1), padding (6), format (8), then 8 bytes a dimension. What has a
// longer format travels as rows of bytes, and what has more dimensions as plain bytes.
void encode_meta(Op& op, const Py_buffer& view) {
  const char* format = view.format ? view.format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  size_t length = std::strlen(format);
  int ndim = view.ndim;
  uint64_t last = ndim > 0 && view.shape ? static_cast<uint64_t>(view.shape[ndim - 1]) : 0;
  if (length == 0 || length > kFormatBytes || ndim > static_cast<int>(kMaxDims) || (ndim && !view.shape)) {
    const bool has_rows = ndim > 0 && ndim <= static_cast<int>(kMaxDims) && view.shape && view.itemsize > 0;
    last = has_rows ? last * static_cast<uint64_t>(view.itemsize) : op.nbytes;
    ndim = has_rows ? ndim : 1;
    format = "B";
    length = 1;
  }
  auto meta = op.meta.data();
  std::memset(meta, 0, 16);
  meta[0] = static_cast<std::byte>(ndim);
  meta[1] = static_cast<std::byte>(length);
  std::memcpy(meta + 8, format, length);
  for (int i = 0; i < ndim; ++i) {
    const uint64_t dim = i == ndim - 1 ? last : static_cast<uint64_t>(view.shape[i]);
    std::memcpy(meta + 16 + 8 * i, &dim, 8);
  }
  op.meta_bytes = static_cast<uint16_t>(16 + 8 * ndim);
}

bool encode_meta(Op& op, const char* format, PyObject* shape) {
  Py_ssize_t dims[kMaxDims];
  Py_ssize_t count = PyTuple_Check(shape) ? PyTuple_GET_SIZE(shape) : 0;
  Py_buffer view{};
  view.format = const_cast<char*>(format);
  view.ndim = static_cast<int>(count);
  view.shape = dims;
  for (Py_ssize_t i = 0; i < count && i < static_cast<Py_ssize_t>(kMaxDims); ++i) {
    dims[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i));
    if (dims[i] < 0)
      return PyErr_Occurred() != nullptr ? false : (PyErr_SetString(PyExc_ValueError, "shape"), false);
  }
  encode_meta(op, view);
  return true;
}

namespace {

// Format and shape as new references; a null one: a Python error is set.
void read_meta(const Op& op, PyObject*& format, PyObject*& shape) {
  auto meta = op.meta.data();
  size_t dims = op.meta_bytes >= 16 ? static_cast<size_t>(meta[0]) : 0;
  size_t length = op.meta_bytes >= 16 ? static_cast<size_t>(meta[1]) : 0;
  bool plain = op.meta_bytes < 16 || dims > kMaxDims || length == 0 || length > kFormatBytes ||
               op.meta_bytes != 16 + 8 * dims;
  if (plain) {
    format = PyUnicode_FromString("B");
    shape = Py_BuildValue("(K)", static_cast<unsigned long long>(op.nbytes));
  } else {
    format = PyUnicode_DecodeLatin1(reinterpret_cast<const char*>(meta + 8), static_cast<Py_ssize_t>(length),
                                    nullptr);
    shape = PyTuple_New(static_cast<Py_ssize_t>(dims));
    for (size_t i = 0; shape && i < dims; ++i) {
      uint64_t dim;
      std::memcpy(&dim, meta + 16 + 8 * i, 8);
      PyTuple_SET_ITEM(shape, static_cast<Py_ssize_t>(i), PyLong_FromUnsignedLongLong(dim));
    }
  }
}

}  // namespace

PyObject* decode_meta(const Op& op, PyObject* memory) {
  PyObject *format, *shape;
  read_meta(op, format, shape);
  PyObject* array = format && shape
                        ? PyObject_CallFunctionObjArgs(hooks.make_array, memory, format, shape, nullptr)
                        : nullptr;
  Py_XDECREF(format);
  Py_XDECREF(shape);
  return array;
}

PyObject* decode_device_meta(const Op& op, PyObject* memory, int device) {
  PyObject *format, *shape;
  read_meta(op, format, shape);
  PyObject* array = nullptr;
  if (format && shape)
    array = PyObject_CallFunction(hooks.make_device_array, "OKKiOO", memory,
                                  static_cast<unsigned long long>(reinterpret_cast<uint64_t>(op.data)),
                                  static_cast<unsigned long long>(op.nbytes), device, format, shape);
  Py_XDECREF(format);
  Py_XDECREF(shape);
  return array;
}

PyObject* new_device_memory(std::unique_ptr<DeviceBuffer> buffer) {
  static constexpr char kName[] = "aiocomm device memory";
  PyObject* capsule = PyCapsule_New(buffer.get(), kName, [](PyObject* self) {
    delete static_cast<DeviceBuffer*>(PyCapsule_GetPointer(self, kName));
  });
  if (capsule) (void)buffer.release();
  return capsule;
}

}  // namespace aiocomm::py
