// Lists of rows for Python: those of a plan, and what the property test drives. The engine uses the class itself.
#include "bindings/rows_py.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "links/rdma/requests.hpp"

namespace nb = nanobind;

namespace {

using aiocomm::Cover;
using aiocomm::py::PlacedRows;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kMost = 1ll << 56;  // of any number: no sum overflows

// `at(i)` is (from, from_step, to, to_step, nbytes, count).
template <class At>
std::shared_ptr<PlacedRows> placed(size_t size, At at) {
  auto made = std::make_shared<PlacedRows>();
  bool good = true;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < size && good; ++i) {
      const auto [from, from_step, to, to_step, nbytes, count] = at(i);
      const auto times = static_cast<uint64_t>(count), width = static_cast<uint64_t>(nbytes);
      good = made->from.take_in(from, from_step, times, width) && made->to.take_in(to, to_step, times, width);
    }
    if (good) made->list.reserve(size);
    for (size_t i = 0; i < size && good; ++i) {
      const auto [from, from_step, to, to_step, nbytes, count] = at(i);
      made->list.add({static_cast<uint64_t>(from) - made->from.low, static_cast<uint64_t>(to) - made->to.low,
                      from_step, to_step, static_cast<uint64_t>(nbytes), static_cast<uint64_t>(count)});
    }
  }
  if (!good) throw nb::value_error("rows that reach out of any memory");
  return made;
}

std::shared_ptr<PlacedRows> placed_rows(const Integers& from, const Integers& from_step, const Integers& to,
                                        const Integers& to_step, const Integers& nbytes,
                                        const Integers& count) {
  for (const Integers* one : {&from_step, &to, &to_step, &nbytes, &count})
    if (one->size() != from.size()) throw nb::value_error("lists of one length");
  return placed(from.size(),
                [at = from.data(), at_step = from_step.data(), into = to.data(), into_step = to_step.data(),
                 bytes = nbytes.data(), times = count.data()](size_t i) {
                  return std::tuple(at[i], at_step[i], into[i], into_step[i], bytes[i], times[i]);
                });
}

// Of ranges that are contiguous on the far side: where each begins there, its first row, and where these are here.
std::shared_ptr<PlacedRows> rows_of_ranges(const Integers& far, const Integers& first, const Integers& near,
                                           const Integers& nbytes, bool at_target) {
  const size_t size = near.size();
  if (nbytes.size() != size || first.size() != far.size() + 1)
    throw nb::value_error("lists that do not fit together");
  std::vector<int64_t> there(size);
  size_t row = 0;
  for (size_t range = 0; range < far.size(); ++range) {
    if (first.data()[range] != static_cast<int64_t>(row) || first.data()[range + 1] < first.data()[range] ||
        static_cast<size_t>(first.data()[range + 1]) > size)
      throw nb::value_error("lists that do not fit together");
    for (int64_t at = far.data()[range]; row < static_cast<size_t>(first.data()[range + 1]); ++row) {
      there[row] = at;
      at += std::clamp(nbytes.data()[row], int64_t{0}, kMost);
    }
  }
  if (row != size) throw nb::value_error("lists that do not fit together");
  const int64_t *from = at_target ? near.data() : there.data(), *to = at_target ? there.data() : near.data();
  return placed(size, [=, bytes = nbytes.data()](size_t i) {
    return std::tuple(from[i], int64_t{0}, to[i], int64_t{0}, bytes[i], int64_t{1});
  });
}

// As many lists of at most so many groups of rows, in their order.
std::vector<std::shared_ptr<PlacedRows>> parts_of(const std::shared_ptr<PlacedRows>& rows, size_t most) {
  if (!most) throw nb::value_error("parts of nothing");
  const auto all = rows->list.rows();
  if (all.size() <= most) return {rows};
  std::vector<std::shared_ptr<PlacedRows>> parts;
  for (size_t first = 0; first < all.size(); first += most) {
    const auto some = all.subspan(first, std::min(most, all.size() - first));
    auto& part = *parts.emplace_back(std::make_shared<PlacedRows>());
    part.from = rows->from, part.to = rows->to;
    part.list.reserve(some.size());
    for (const aiocomm::Rows& one : some) part.list.add(one);
  }
  return parts;
}

using Tuple = std::tuple<uint64_t, uint64_t, int64_t, int64_t, uint64_t, uint64_t>;

aiocomm::RowList list_of(const std::vector<Tuple>& rows, uint64_t offset, uint64_t nbytes) {
  aiocomm::RowList list;
  for (const auto& [from, to, from_step, to_step, width, count] : rows) {
    if (!width || !count) throw nb::value_error("rows without bytes");
    list.add({from, to, from_step, to_step, width, count});
  }
  if (offset > list.nbytes() || nbytes > list.nbytes() - offset) throw nb::value_error("outside the list");
  return list;
}

}  // namespace

void bind_rows(nb::module_& m, nb::module_& pure) {
  nb::class_<PlacedRows>(m, "Rows", "Rows of a plan; see core/rows.hpp.")
      .def(nb::new_(&placed_rows), nb::arg("source"), nb::arg("source_stride"), nb::arg("target"),
           nb::arg("target_stride"), nb::arg("nbytes"), nb::arg("rows"))
      .def_static("of_ranges", &rows_of_ranges, nb::arg("far"), nb::arg("first"), nb::arg("near"),
                  nb::arg("rows"), nb::arg("at_target"), "Rows in the order in which they lie at the peer.")
      .def("parts", &parts_of, nb::arg("most"), "As many lists of at most so many groups of equal rows.")
      .def("__len__", [](const PlacedRows& self) { return self.list.size(); });
  pure.def(
      "cut_rows",
      [](const std::vector<Tuple>& rows, uint64_t offset, uint64_t nbytes) {
        const aiocomm::RowList list = list_of(rows, offset, nbytes);
        std::vector<Tuple> found;
        list.cut(offset, nbytes, [&](const aiocomm::Rows& one) {
          found.emplace_back(one.from, one.to, one.from_step, one.to_step, one.nbytes, one.count);
        });
        return found;
      },
      nb::arg("rows"), nb::arg("offset"), nb::arg("nbytes"),
      "Bytes of a list of (from, to, from_step, to_step, nbytes, count), as rows.");
  pure.def(
      "rdma_requests",
      [](const std::vector<Tuple>& rows, bool read, uint64_t offset, uint64_t nbytes, size_t most,
         size_t most_pieces) {
        const aiocomm::RowList list = list_of(rows, offset, nbytes);
        const auto made = aiocomm::rdma::requests_of(list, read, offset, nbytes, 0, 0, most, most_pieces);
        std::vector<std::pair<uint64_t, std::vector<std::pair<uint64_t, uint32_t>>>> found;
        const aiocomm::rdma::Piece* piece = made.pieces.data();
        for (const auto& request : made.requests) {
          auto& [remote, pieces] = found.emplace_back(request.remote, 0);
          for (size_t i = 0; i < request.pieces; ++i, ++piece)
            pieces.emplace_back(piece->local, piece->nbytes);
        }
        return std::pair(found, made.nbytes);
      },
      nb::arg("rows"), nb::arg("read"), nb::arg("offset"), nb::arg("nbytes"), nb::arg("most"),
      nb::arg("most_pieces"),
      "The same as requests of an adapter: where each begins at the peer, and its pieces (where, bytes) "
      "here; and their bytes.");
}
