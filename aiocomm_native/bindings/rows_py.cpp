// Lists of rows for Python: what the property test drives. The engine uses the class itself.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "core/rows.hpp"

namespace nb = nanobind;

void bind_rows(nb::module_& m) {
  using Tuple = std::tuple<uint64_t, uint64_t, int64_t, int64_t, uint64_t, uint64_t>;
  m.def(
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
