// Weighted sums for Python: rows as bytes, since NumPy has no buffer format for bfloat16.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bindings/unlocked.hpp"
#include "core/routing.hpp"
#include "core/weighting.hpp"

namespace nb = nanobind;

namespace {

using aiocomm::FloatKind;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

FloatKind kind_of(int number) {
  if (number < 0 || number > static_cast<int>(FloatKind::f64)) throw nb::value_error("no kind of float");
  return static_cast<FloatKind>(number);
}

void require(bool condition) {
  if (!condition) throw nb::value_error("arrays of sizes that do not fit");
}

void weigh_rows(const Bytes& terms, int kind, size_t hidden, const Integers& order, const Integers& first,
                const Floats& weights, int64_t begin, int64_t end, const WritableBytes& sums, int sums_kind) {
  const FloatKind from = kind_of(kind), to = kind_of(sums_kind);
  require(terms.size() == weights.size() * hidden * float_bytes(from) && order.size() == weights.size());
  require(0 <= begin && begin <= end && static_cast<size_t>(end) < first.size());
  require(sums.size() == static_cast<size_t>(end - begin) * hidden * float_bytes(to));
  nb::gil_scoped_release release;
  aiocomm::weigh_rows({reinterpret_cast<const std::byte*>(terms.data()), from}, hidden, order.data(),
                      first.data(), weights.data(), begin, end,
                      {reinterpret_cast<std::byte*>(sums.data()), to});
}

void add_rows(const std::vector<std::tuple<Integers, Bytes, int>>& parts, int64_t tokens, size_t hidden,
              bool wide, const WritableBytes& out, int out_kind) {
  std::vector<aiocomm::PartialSums> sums;
  for (const auto& [which, rows, kind] : parts) {
    require(rows.size() == which.size() * hidden * float_bytes(kind_of(kind)));
    sums.push_back(
        {{which.data(), which.size()}, {reinterpret_cast<const std::byte*>(rows.data()), kind_of(kind)}});
  }
  const FloatKind to = kind_of(out_kind);
  require(tokens >= 0 && out.size() == static_cast<size_t>(tokens) * hidden * float_bytes(to));
  nb::gil_scoped_release release;
  aiocomm::add_rows(sums, tokens, hidden, wide, {reinterpret_cast<std::byte*>(out.data()), to});
}

using Tokens = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Experts = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IdWeights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using GivenCounts = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using GivenExperts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::tuple<std::vector<int64_t>, std::vector<int64_t>> route_tokens(
    const Ids& ids, const IdWeights& weights, const Integers& owner, size_t ranks, const Tokens& tokens,
    const Counts& counts, const Experts& experts, const Weights& routed) {
  const size_t most = ids.size();
  require(weights.shape(0) == ids.shape(0) && weights.shape(1) == ids.shape(1));
  require(tokens.size() >= most && counts.size() >= most && experts.size() >= most && routed.size() >= most);
  std::vector<int64_t> rows, assignments;
  bool fine = false;
  {
    const aiocomm::py::Unlocked unlocked(most);
    fine = aiocomm::route_tokens(
        ids.data(), weights.data(), ids.shape(0), ids.shape(1), {owner.data(), owner.size()}, ranks,
        {tokens.data(), counts.data(), experts.data(), routed.data()}, rows, assignments);
  }
  if (!fine) throw nb::value_error("an expert, or its rank, that is not there");
  return {rows, assignments};
}

void arrange_parts(const std::vector<std::tuple<GivenCounts, GivenExperts, Floats>>& parts,
                   const Integers& local, size_t held, const Tokens& starts, const Tokens& rows,
                   const Tokens& offsets, const Weights& weights, const Tokens& order, const Tokens& first) {
  std::vector<aiocomm::CamePart> came;
  size_t all = 0, assignments = 0;
  for (const auto& [counts, experts, given] : parts) {
    require(given.size() == experts.size());
    came.push_back({{counts.data(), counts.size()}, {experts.data(), experts.size()}, given.data()});
    all += counts.size();
    assignments += experts.size();
  }
  require(starts.size() == parts.size() + 1 && offsets.size() == held + 1 && first.size() == all + 1);
  require(rows.size() == assignments && weights.size() == assignments && order.size() == assignments);
  bool fine = false;
  {
    const aiocomm::py::Unlocked unlocked(assignments);
    fine = aiocomm::arrange_parts(
        came, {local.data(), local.size()}, held,
        {starts.data(), rows.data(), offsets.data(), weights.data(), order.data(), first.data()});
  }
  if (!fine) throw nb::value_error("lists that contradict each other");
}

}  // namespace

void bind_experts(nb::module_& m) {
  using namespace nb::literals;
  m.def("weigh_rows", weigh_rows, "terms"_a, "kind"_a, "hidden"_a, "order"_a, "first"_a, "weights"_a,
        "begin"_a, "end"_a, "sums"_a.noconvert(), "sums_kind"_a,
        "Weighted sums of the terms of each row; kinds are those of core/weighting.hpp.");
  m.def("route_tokens", route_tokens, "ids"_a, "weights"_a, "owner"_a, "ranks"_a, "tokens"_a.noconvert(),
        "counts"_a.noconvert(), "experts"_a.noconvert(), "routed"_a.noconvert(),
        "Writes what goes to each rank; returns where each rank's rows begin, and its assignments.");
  m.def("arrange_parts", arrange_parts, "parts"_a, "local"_a, "held"_a, "starts"_a.noconvert(),
        "rows"_a.noconvert(), "offsets"_a.noconvert(), "weights"_a.noconvert(), "order"_a.noconvert(),
        "first"_a.noconvert(), "Writes in what order what came is kept.");
  m.def("add_rows", add_rows, "parts"_a, "tokens"_a, "hidden"_a, "wide"_a, "out"_a.noconvert(), "out_kind"_a,
        "Sums of partial sums by token, in the order of the parts.");
}
