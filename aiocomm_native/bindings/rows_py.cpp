// Lists of rows for Python: those of a plan, and what the property test drives. The engine uses the class itself.
#include "bindings/rows_py.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

namespace nb = nanobind;

namespace {

using aiocomm::py::Cover;
using aiocomm::py::PlacedRows;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kMost = 1ll << 56;  // of any offset, step or number: no sum overflows

// False: they reach below the memory, or make no sense.
bool add(Cover& cover, bool first, int64_t at, int64_t step, int64_t count, int64_t nbytes) {
  const auto last = static_cast<__int128>(at) + static_cast<__int128>(step) * (count - 1);
  const __int128 low = std::min<__int128>(at, last), high = std::max<__int128>(at, last) + nbytes;
  if (low < 0 || high > kMost) return false;
  cover.low = first ? static_cast<uint64_t>(low) : std::min(cover.low, static_cast<uint64_t>(low));
  cover.high = std::max(cover.high, static_cast<uint64_t>(high));
  return true;
}

std::shared_ptr<PlacedRows> placed_rows(const Integers& from, const Integers& from_step, const Integers& to,
                                        const Integers& to_step, const Integers& nbytes,
                                        const Integers& count) {
  for (const Integers* one : {&from_step, &to, &to_step, &nbytes, &count})
    if (one->size() != from.size()) throw nb::value_error("lists of one length");
  auto made = std::make_shared<PlacedRows>();
  const size_t size = from.size();
  const int64_t *at = from.data(), *at_step = from_step.data(), *into = to.data(),
                *into_step = to_step.data(), *bytes = nbytes.data(), *times = count.data();
  bool good = true;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < size && good; ++i)
      good = bytes[i] > 0 && bytes[i] < kMost && times[i] > 0 && times[i] < kMost &&
             add(made->from, i == 0, at[i], at_step[i], times[i], bytes[i]) &&
             add(made->to, i == 0, into[i], into_step[i], times[i], bytes[i]);
    if (good) {
      made->list.reserve(size);
      for (size_t i = 0; i < size; ++i)
        made->list.add({static_cast<uint64_t>(at[i]) - made->from.low,
                        static_cast<uint64_t>(into[i]) - made->to.low, at_step[i], into_step[i],
                        static_cast<uint64_t>(bytes[i]), static_cast<uint64_t>(times[i])});
    }
  }
  if (!good) throw nb::value_error("rows that reach out of any memory");
  return made;
}

}  // namespace

void bind_rows(nb::module_& m, nb::module_& pure) {
  nb::class_<PlacedRows>(m, "Rows", "Rows of a plan; see core/rows.hpp.")
      .def(nb::new_(&placed_rows), nb::arg("source"), nb::arg("source_stride"), nb::arg("target"),
           nb::arg("target_stride"), nb::arg("nbytes"), nb::arg("rows"))
      .def("__len__", [](const PlacedRows& self) { return self.list.size(); });
  using Tuple = std::tuple<uint64_t, uint64_t, int64_t, int64_t, uint64_t, uint64_t>;
  pure.def(
      "cut_rows",
      [](const std::vector<Tuple>& rows, uint64_t offset, uint64_t nbytes) {
        aiocomm::RowList list;
        for (const auto& [from, to, from_step, to_step, width, count] : rows) {
          if (!width || !count) throw nb::value_error("rows without bytes");
          list.add({from, to, from_step, to_step, width, count});
        }
        if (offset > list.nbytes() || nbytes > list.nbytes() - offset)
          throw nb::value_error("outside the list");
        std::vector<Tuple> found;
        list.cut(offset, nbytes, [&](const aiocomm::Rows& one) {
          found.emplace_back(one.from, one.to, one.from_step, one.to_step, one.nbytes, one.count);
        });
        return found;
      },
      nb::arg("rows"), nb::arg("offset"), nb::arg("nbytes"),
      "Bytes of a list of (from, to, from_step, to_step, nbytes, count), as rows.");
}
