// Arrays as the buffer protocol shows them, which is the shortest way to see them.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace aiocomm::py {

inline void require(bool condition) {
  if (!condition) throw nanobind::value_error("arrays of sizes that do not fit");
}

// An array of Python's, while a call uses it.
class SeenMemory {
 public:
  explicit SeenMemory(nanobind::handle array, bool writable = false) {
    if (PyObject_GetBuffer(array.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw nanobind::python_error();
  }
  SeenMemory(const SeenMemory&) = delete;
  SeenMemory& operator=(const SeenMemory&) = delete;
  ~SeenMemory() { PyBuffer_Release(&view_); }

  size_t nbytes() const { return static_cast<size_t>(view_.len); }
  size_t itemsize() const { return static_cast<size_t>(view_.itemsize); }
  std::byte* bytes() const { return static_cast<std::byte*>(view_.buf); }

  template <class T>
  std::span<const T> of() const {
    require(itemsize() == sizeof(T) && reinterpret_cast<uintptr_t>(view_.buf) % alignof(T) == 0);
    return {static_cast<const T*>(view_.buf), nbytes() / sizeof(T)};
  }

 private:
  Py_buffer view_{};
};

}  // namespace aiocomm::py
