#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "bindings/expert_forms.hpp"

namespace aiocomm::py {

namespace {

nb::object uncleared(size_t nbytes) {
  nb::object memory = nb::steal(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes)));
  if (!memory.is_valid()) throw nb::python_error();
  return memory;
}

}  // namespace

Arranged::Arranged(size_t ranks, size_t held, size_t rows, size_t assignments, nb::handle room)
    : sizes_{ranks + 1, assignments, held + 1, assignments, assignments, rows + 1} {
  size_t nbytes = 0;
  for (size_t i = 0; i < 6; ++i) at_[i] = nbytes, nbytes += (sizes_[i] * kWidths[i] + 7) & ~size_t{7};
  const bool fits =
      PyByteArray_CheckExact(room.ptr()) && static_cast<size_t>(PyByteArray_GET_SIZE(room.ptr())) >= nbytes;
  memory = fits ? nb::borrow(room) : uncleared(nbytes);
}

SeenBytes Arranged::part(size_t i) const {
  auto* bytes = reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(memory.ptr()));
  return {bytes + at_[i], sizes_[i] * kWidths[i], kWidths[i]};
}

RoutedParts parts_of(nb::handle whole, size_t choices) {
  require(PyByteArray_Check(whole.ptr()) &&
          static_cast<size_t>(PyByteArray_GET_SIZE(whole.ptr())) == 18 * choices);
  auto* bytes = reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(whole.ptr()));
  return {{bytes, 8 * choices, 8},
          {bytes + 16 * choices, 2 * choices, 2},
          {bytes + 8 * choices, 4 * choices, 4},
          {bytes + 12 * choices, 4 * choices, 4}};
}

nb::bytes move_argument(size_t nbytes, size_t ranks, size_t rank, uint64_t address,
                        const std::vector<uint64_t>& numbers) {
  require(rank < ranks && sizeof(uint64_t) * (ranks + numbers.size()) <= nbytes);
  nb::bytes argument =
      nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes)));
  if (!argument.is_valid()) throw nb::python_error();
  char* at = PyBytes_AS_STRING(argument.ptr());
  std::memset(at, 0, nbytes);
  std::memcpy(at + sizeof address * rank, &address, sizeof address);
  std::memcpy(at + sizeof address * ranks, numbers.data(), sizeof(uint64_t) * numbers.size());
  return argument;
}

uint32_t blocks_of(uint64_t nbytes, uint64_t piece, uint32_t most) {
  return static_cast<uint32_t>(std::clamp<uint64_t>((nbytes + piece - 1) / piece, 1, std::max(1u, most)));
}

void bind_expert_forms(nb::module_& m) {
  using namespace nb::literals;
  m.def("uncleared", uncleared, "nbytes"_a, nb::sig("def uncleared(nbytes: int) -> bytearray"),
        "A bytearray with whatever its memory had.");
  nb::class_<DispatchForm>(m, "DispatchForm", "What is the same for all dispatches that repeat each other.")
      .def(
          "__init__",
          [](DispatchForm* form, nb::bytes header, uint64_t function, uint32_t sm_budget, uint32_t threads,
             size_t argument_bytes, size_t most_ranks, uint64_t piece, uint64_t width, uint64_t nbytes,
             size_t count, size_t choices, nb::object owner, nb::object local, size_t held, uint64_t room,
             uint64_t context, uint64_t stream) {
            require(header.size() == sizeof ExpertHead::header && piece && count);
            new (form) DispatchForm{std::move(header),
                                    function,
                                    sm_budget,
                                    threads,
                                    argument_bytes,
                                    most_ranks,
                                    piece,
                                    width,
                                    nbytes,
                                    count,
                                    choices,
                                    std::move(owner),
                                    std::move(local),
                                    held,
                                    room,
                                    context,
                                    stream};
          },
          "header"_a, "function"_a, "sm_budget"_a, "threads"_a, "argument_bytes"_a, "most_ranks"_a, "piece"_a,
          "width"_a, "nbytes"_a, "count"_a, "choices"_a, "owner"_a, "local"_a, "held"_a, "room"_a,
          "context"_a, "stream"_a);
  nb::class_<CombineForm>(m, "CombineForm", "What is the same for all combines that repeat each other.")
      .def(
          "__init__",
          [](CombineForm* form, uint64_t weigh, uint64_t add, uint32_t sm_budget, uint32_t threads,
             size_t most_ranks, uint64_t piece, uint64_t row, uint64_t alignment, size_t hidden,
             size_t itemsize) {
            require(piece && alignment);
            new (form) CombineForm{weigh, add, sm_budget, threads, most_ranks,
                                   piece, row, alignment, hidden,  itemsize};
          },
          "weigh"_a, "add"_a, "sm_budget"_a, "threads"_a, "most_ranks"_a, "piece"_a, "row"_a, "alignment"_a,
          "hidden"_a, "itemsize"_a);
}

}  // namespace aiocomm::py
