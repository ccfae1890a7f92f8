// Messages and tables of experts on GPUs for Python. Arrays come by the dozen per call, so they are seen by the buffer
// protocol, which is the shortest way.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "bindings/seen_memory.hpp"
#include "bindings/unlocked.hpp"
#include "core/expert_tables.hpp"

namespace nb = nanobind;

namespace {

using aiocomm::MoveEntry;
using aiocomm::SumTables;
using aiocomm::py::require;
using Memory = aiocomm::py::SeenMemory;

// head | indices as uint32 | counts, experts, weights as in aiocomm/moe/wire.py
nb::bytes pack_message(const nb::bytes& head, nb::handle tokens, nb::handle counts, nb::handle experts,
                       nb::handle weights, bool indices, bool lists) {
  const Memory of_tokens(tokens), of_counts(counts), of_experts(experts), of_weights(weights);
  const auto rows = of_tokens.of<int64_t>();
  const size_t padded = (of_counts.of<uint16_t>().size_bytes() + 3) & ~size_t{3};
  const size_t listed = padded + of_experts.of<int32_t>().size_bytes() + of_weights.of<float>().size_bytes();
  const size_t nbytes = head.size() + (indices ? rows.size() * sizeof(uint32_t) : 0) + (lists ? listed : 0);
  PyObject* message = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes));
  if (!message) throw nb::python_error();
  char* at = PyBytes_AS_STRING(message);
  auto write = [&at](const void* from, size_t size) {
    if (size) std::memcpy(at, from, size);
    at += size;
  };
  write(head.c_str(), head.size());
  if (indices)
    for (const int64_t token : rows) {
      const auto index = static_cast<uint32_t>(token);
      write(&index, sizeof index);
    }
  if (lists) {
    write(of_counts.bytes(), of_counts.nbytes());
    const uint32_t zeros = 0;
    write(&zeros, padded - of_counts.nbytes());
    write(of_experts.bytes(), of_experts.nbytes());
    write(of_weights.bytes(), of_weights.nbytes());
  }
  return nb::steal<nb::bytes>(message);
}

std::vector<uint64_t> list_moves(nb::handle into,
                                 const std::vector<std::tuple<uint32_t, nb::object, uint32_t>>& parts) {
  const Memory table(into, true);
  auto* next = reinterpret_cast<MoveEntry*>(table.bytes());
  size_t left = table.nbytes() / sizeof(MoveEntry);
  std::vector<uint64_t> extents;
  for (const auto& [source, indices, place] : parts) {
    const Memory given(indices);
    const size_t count = given.nbytes() / given.itemsize();
    require(count <= left);
    extents.push_back(given.itemsize() == sizeof(uint32_t)
                          ? aiocomm::list_moves(source, given.of<uint32_t>(), place, next)
                          : aiocomm::list_moves(source, given.of<int64_t>(), place, next));
    next += count;
    left -= count;
  }
  return extents;
}

std::tuple<size_t, size_t, size_t, size_t, size_t> sum_tables(size_t assignments, size_t rows, size_t tokens,
                                                              size_t ranks) {
  const SumTables at(assignments, rows, tokens, ranks);
  return {at.order, at.first, at.weights, at.rows_of, at.nbytes};
}

void write_sum_tables(nb::handle order, nb::handle first, nb::handle weights,
                      const std::vector<nb::object>& sent, size_t tokens, nb::handle into) {
  const Memory of_order(order), of_first(first), of_weights(weights), tables(into, true);
  std::vector<std::unique_ptr<Memory>> held;
  std::vector<std::span<const int64_t>> rows;
  for (const nb::object& part : sent) {
    held.push_back(std::make_unique<Memory>(part));
    rows.push_back(held.back()->of<int64_t>());
  }
  const auto begins = of_first.of<int64_t>();
  require(!begins.empty() && of_order.of<int64_t>().size() == of_weights.of<float>().size());
  const SumTables at(of_order.of<int64_t>().size(), begins.size() - 1, tokens, sent.size());
  require(tables.nbytes() >= at.nbytes && reinterpret_cast<uintptr_t>(tables.bytes()) % 16 == 0);
  const auto orders = of_order.of<int64_t>();
  const auto weighs = of_weights.of<float>();
  bool fine = false;
  {
    const aiocomm::py::Unlocked unlocked(orders.size() + tokens);
    fine = aiocomm::write_sum_tables(at, orders, begins, weighs, rows, tokens, tables.bytes());
  }
  require(fine);
}

}  // namespace

void bind_expert_tables(nb::module_& m) {
  using namespace nb::literals;
  m.def("pack_message", pack_message, "head"_a, "tokens"_a, "counts"_a, "experts"_a, "weights"_a, "indices"_a,
        "lists"_a, "A head, and behind it, where they are wanted, indices of tokens and lists of experts.");
  m.def("list_moves", list_moves, "into"_a, "parts"_a,
        "Writes where rows are brought; a part is a rank, its rows' indices, and the place of the first. "
        "Returns each part's greatest index + 1.");
  m.def(
      "sum_tables", sum_tables, "assignments"_a, "rows"_a, "tokens"_a, "ranks"_a,
      "Where `order`, `first`, `weights` and the tokens' rows begin among a combine's tables, and the end.");
  m.def("write_sum_tables", write_sum_tables, "order"_a, "first"_a, "weights"_a, "sent"_a, "tokens"_a,
        "into"_a, "Writes them, the weights by row; `sent` are the tokens that went to each rank.");
}
