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

// Bytes that somebody keeps.
class SeenBytes {
 public:
  SeenBytes(std::byte* bytes, size_t nbytes, size_t itemsize = 1)
      : bytes_(bytes), nbytes_(nbytes), itemsize_(itemsize) {}

  size_t nbytes() const { return nbytes_; }
  size_t itemsize() const { return itemsize_; }
  std::byte* bytes() const { return bytes_; }

  template <class T>
  std::span<const T> of() const {
    require(itemsize() == sizeof(T) && reinterpret_cast<uintptr_t>(bytes_) % alignof(T) == 0);
    return {reinterpret_cast<const T*>(bytes_), nbytes() / sizeof(T)};
  }

  // Elements from one to before another.
  SeenBytes part(size_t first, size_t last) const {
    require(first <= last && last * itemsize_ <= nbytes_);
    return {bytes_ + first * itemsize_, (last - first) * itemsize_, itemsize_};
  }

 protected:
  SeenBytes() = default;
  std::byte* bytes_ = nullptr;
  size_t nbytes_ = 0, itemsize_ = 1;
};

// An array of Python's, while a call uses it.
class SeenMemory : public SeenBytes {
 public:
  explicit SeenMemory(nanobind::handle array, bool writable = false) {
    if (PyObject_GetBuffer(array.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw nanobind::python_error();
    bytes_ = static_cast<std::byte*>(view_.buf);
    nbytes_ = static_cast<size_t>(view_.len);
    itemsize_ = static_cast<size_t>(view_.itemsize);
  }
  SeenMemory(const SeenMemory&) = delete;
  SeenMemory& operator=(const SeenMemory&) = delete;
  ~SeenMemory() { PyBuffer_Release(&view_); }

 private:
  Py_buffer view_{};
};

}  // namespace aiocomm::py
