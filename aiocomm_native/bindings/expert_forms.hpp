// What the extension is told of dispatches and combines that repeat, once for all of a form, and what it makes of it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/device_py.hpp"
#include "bindings/expert_heads.hpp"
#include "bindings/seen_memory.hpp"

namespace aiocomm::py {

namespace nb = nanobind;

// A description, as far as it is asked for here.
struct Described {
  explicit Described(nb::handle description) {
    DeviceView view;
    if (!PyTuple_CheckExact(description.ptr()) || !read_description(description.ptr(), view))
      throw nb::python_error();
    address = view.address, nbytes = view.nbytes, stream = view.stream;
    require(PyTuple_Check(view.shape) && PyTuple_GET_SIZE(view.shape));
    const Py_ssize_t first = PyLong_AsSsize_t(PyTuple_GET_ITEM(view.shape, 0));
    if (first < 0) throw nb::python_error();
    rows = static_cast<size_t>(first);
  }
  uint64_t address, nbytes, stream;
  size_t rows;
};

// The argument of a kernel, put together from numbers.
class Argument {
 public:
  template <class... T>
  void add(T... numbers) {
    (put(&numbers, sizeof numbers), ...);
  }
  void skip(size_t nbytes) { bytes_.resize(bytes_.size() + nbytes); }
  nb::bytes bytes() const { return nb::bytes(bytes_.data(), bytes_.size()); }

 private:
  void put(const void* from, size_t nbytes) { bytes_.append(static_cast<const char*>(from), nbytes); }
  std::string bytes_;
};

// What is the same for all dispatches that repeat each other.
struct DispatchForm {
  nb::bytes header;
  uint64_t function;  // `move_rows`
  uint32_t sm_budget, threads;
  size_t argument_bytes, most_ranks;  // of it
  uint64_t piece, width, nbytes;      // bytes for a block, of a row, of all tokens
  size_t count, choices;              // of tokens, and of all their experts
  nb::object owner, local;            // the rank of each expert, and its number among this rank's
  size_t held;                        // experts of this rank
  uint64_t room;                      // for what comes
  uint64_t context, stream;           // of the kernels
};

// The same of combines.
struct CombineForm {
  uint64_t weigh, add;  // kernels
  uint32_t sm_budget, threads;
  size_t most_ranks;               // of an argument of the second
  uint64_t piece, row, alignment;  // bytes for a block, of a row that travels; of its address
  size_t hidden, itemsize;         // of the result
};

// Memory for ids and weights, and how it is seen; weights that are all one; the list of rows, and where kernels see it.
using DispatchKit = std::tuple<uint64_t, uint64_t, nb::object, nb::object, nb::object, nb::object, uint64_t>;

// The lists of an arrangement, one after the other.
class Arranged {
 public:
  // In `room`, a bytearray, if that is large enough; else in memory that is new.
  Arranged(size_t ranks, size_t held, size_t rows, size_t assignments, nb::handle room);
  ArrangedParts parts() const { return {part(0), part(1), part(2), part(3), part(4), part(5)}; }
  nb::object memory;

 private:
  static constexpr size_t kWidths[] = {8, 8, 8, 4, 8, 8};
  SeenBytes part(size_t i) const;
  const std::array<size_t, 6> sizes_;
  std::array<size_t, 6> at_{};
};

// As aiocomm/moe/device_quick.py reads it, too: tokens, experts, weights, counts.
RoutedParts parts_of(nb::handle whole, size_t choices);

// The argument of `move_rows`: addresses by rank, of which one may be set, and behind them numbers.
nb::bytes move_argument(size_t nbytes, size_t ranks, size_t rank, uint64_t address,
                        const std::vector<uint64_t>& numbers);

uint32_t blocks_of(uint64_t nbytes, uint64_t piece, uint32_t most);

void bind_expert_forms(nb::module_& m);

}  // namespace aiocomm::py
