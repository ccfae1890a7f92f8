// What a prepared call is made of: steps between named buffers, and the buffers while a call runs.
#pragma once

#include <Python.h>
#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/device_py.hpp"
#include "bindings/transfer.hpp"
#include "core/device.hpp"

namespace aiocomm::py {

enum Kind : int { kSend, kRecv, kCopy, kReduce };
enum Buffer : int { kIn, kOut, kTmp, kBuffers };

using SpanTuple = std::tuple<int, uint64_t, uint64_t>;
using StepTuple =
    std::tuple<int, int, int64_t, SpanTuple, SpanTuple, SpanTuple, uint32_t, std::vector<uint32_t>>;
using Rides = std::vector<std::tuple<int, SpanTuple>>;  // group rank, and what travels with its header

struct Span {
  Span() = default;
  explicit Span(const SpanTuple& from)
      : buffer(std::get<0>(from)), start(std::get<1>(from)), stop(std::get<2>(from)) {}
  uint64_t nbytes() const { return stop - start; }
  int buffer = kIn;
  uint64_t start = 0, stop = 0;
};

struct Step {
  explicit Step(const StepTuple& from)
      : kind(static_cast<Kind>(std::get<0>(from))),
        peer(std::get<1>(from)),
        tag(std::get<2>(from)),
        first(std::get<3>(from)),
        second(std::get<4>(from)),
        third(std::get<5>(from)),
        waits(std::get<6>(from)),
        followers(std::get<7>(from)) {}
  Kind kind;
  int peer;                   // rank of the group
  int64_t tag;                // within the call
  Span first, second, third;  // what is moved; target and source; target and operands
  uint32_t waits;
  std::vector<uint32_t> followers;
};

// A buffer while the call runs.
struct Lent {
  ~Lent() {
    if (held) PyBuffer_Release(&view);
  }
  bool borrow(PyObject* object, bool writable) {
    if (object == Py_None) return true;
    if (PyObject_GetBuffer(object, &view, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) != 0) {
      PyErr_Clear();
      return false;
    }
    held = true;
    data = static_cast<std::byte*>(view.buf);
    nbytes = static_cast<uint64_t>(view.len);
    owner = object;
    return true;
  }

  // A description of device memory, as aiocomm/_device.py makes it: its stream is waited for from now on.
  bool bind(PyObject* description, Mover& mover) {
    if (description == Py_None) return true;
    DeviceView found;
    if (!read_description(description, found) || !(gpu = bind_device(mover, found))) {
      PyErr_Clear();  // the call as it is made the first time says what is wrong
      return false;
    }
    data = reinterpret_cast<std::byte*>(found.address);
    nbytes = found.nbytes;
    owner = description;
    return true;
  }

  bool overlaps(const Lent& other) const {
    return data < other.data + other.nbytes && other.data < data + nbytes;
  }

  Py_buffer view;
  std::unique_ptr<DeviceBuffer> gpu;  // all of it; parts of it are lent to operations
  std::byte* data = nullptr;
  uint64_t nbytes = 0;
  PyObject* owner = Py_None;
  bool held = false;
};

// Of an operation that was posted without one; `keep` lives as long.
nanobind::object as_transfer(nanobind::pointer_and_handle<PyEngine> self, SilentOp& flight, PyObject* keep);

// What operations on GPU arrays keep: their owners, and what was bound.
nanobind::list wholes_of(std::array<Lent, 4>& lent);

}  // namespace aiocomm::py
