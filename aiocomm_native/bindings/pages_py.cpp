// The loops of the planner of paged copies, on NumPy arrays. All release the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "core/listed.hpp"
#include "core/page_plan.hpp"

namespace nb = nanobind;

namespace {

using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;
using Side = std::tuple<Integers, int64_t, int64_t, int64_t, int64_t>;

std::span<const int64_t> span_of(const Integers& array) { return {array.data(), array.size()}; }

Result array_of(std::vector<int64_t>&& values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  int64_t* data = owned->data();
  const size_t size = owned->size();
  nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  owned.release();
  return Result(data, {size}, owner);
}

aiocomm::PageSide side_of(const Side& side) {
  const auto& [pages, count, stride, parts, step] = side;
  return {span_of(pages), count, stride, parts, step};
}

std::tuple<Result, Result, Result, bool, int, int64_t> merge_pages(const Side& source, const Side& target,
                                                                   int64_t nbytes) {
  const aiocomm::PageSide from = side_of(source), to = side_of(target);
  if (from.parts < 1 || to.parts < 1 ||
      from.pages.size() * static_cast<size_t>(from.parts) != to.pages.size() * static_cast<size_t>(to.parts))
    throw nb::value_error("as many parts on both sides");
  aiocomm::PageRuns runs;
  {
    nb::gil_scoped_release release;
    runs = aiocomm::merge_pages(from, to, nbytes);
  }
  return {array_of(std::move(runs.source)), array_of(std::move(runs.target)),
          array_of(std::move(runs.nbytes)), runs.equal,
          static_cast<int>(runs.error),     runs.page};
}

std::tuple<Result, Result, Result, Result, Result, Result> equal_steps(const Integers& a, const Integers& b) {
  if (a.size() != b.size()) throw nb::value_error("lists of one length");
  aiocomm::EqualSteps found;
  {
    nb::gil_scoped_release release;
    found = aiocomm::equal_steps(span_of(a), span_of(b));
  }
  return {array_of(std::move(found.begin)), array_of(std::move(found.length)),
          array_of(std::move(found.a)),     array_of(std::move(found.step_a)),
          array_of(std::move(found.b)),     array_of(std::move(found.step_b))};
}

std::tuple<Result, Result, Result, Result, Result> far_ranges(const Integers& near,
                                                              const Integers& near_stride,
                                                              const Integers& far, const Integers& far_stride,
                                                              const Integers& nbytes, const Integers& rows,
                                                              int64_t most) {
  for (const Integers* one : {&near_stride, &far, &far_stride, &nbytes, &rows})
    if (one->size() != near.size()) throw nb::value_error("lists of one length");
  aiocomm::FarRanges found;
  {
    nb::gil_scoped_release release;
    found = aiocomm::far_ranges({span_of(near), span_of(near_stride), span_of(far), span_of(far_stride),
                                 span_of(nbytes), span_of(rows)},
                                most);
  }
  return {array_of(std::move(found.far)), array_of(std::move(found.nbytes)), array_of(std::move(found.first)),
          array_of(std::move(found.near)), array_of(std::move(found.row))};
}

// None: the list holds something else than integers of 64 bits.
nb::object integers(const nb::list& list) {
  const nb::ft_object_guard guard(list);
  const Py_ssize_t size = PyList_GET_SIZE(list.ptr());
  std::vector<int64_t> values(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* one = PyList_GET_ITEM(list.ptr(), i);
    int overflow = 0;
    if (!PyLong_CheckExact(one)) return nb::none();
    values[static_cast<size_t>(i)] = PyLong_AsLongLongAndOverflow(one, &overflow);
    if (overflow) return nb::none();
  }
  return nb::cast(array_of(std::move(values)));
}

void require_inside(const Integers& at, const Integers& nbytes, size_t array, size_t packed) {
  if (at.size() != nbytes.size()) throw nb::value_error("lists of one length");
  size_t total = 0;
  for (size_t i = 0; i < at.size(); ++i) {
    const int64_t start = at.data()[i], length = nbytes.data()[i];
    if (start < 0 || length < 0 || static_cast<size_t>(start) + static_cast<size_t>(length) > array)
      throw nb::value_error("a row outside the array");
    total += static_cast<size_t>(length);
  }
  if (total != packed) throw nb::value_error("rows of another size than the packed memory");
}

void pack_rows(const Integers& at, const Integers& nbytes, const Bytes& array, const WritableBytes& packed) {
  require_inside(at, nbytes, array.size(), packed.size());
  nb::gil_scoped_release release;
  aiocomm::pack_rows(span_of(at), span_of(nbytes), reinterpret_cast<const std::byte*>(array.data()),
                     reinterpret_cast<std::byte*>(packed.data()));
}

void unpack_rows(const Integers& at, const Integers& nbytes, const WritableBytes& array,
                 const Bytes& packed) {
  require_inside(at, nbytes, array.size(), packed.size());
  nb::gil_scoped_release release;
  aiocomm::unpack_rows(span_of(at), span_of(nbytes), reinterpret_cast<std::byte*>(array.data()),
                       reinterpret_cast<const std::byte*>(packed.data()));
}

}  // namespace

void bind_pages(nb::module_& m) {
  using namespace nb::literals;
  m.attr("MOST_IN_GET") = aiocomm::kMostInGet;
  m.def("integers", integers, "values"_a,
        nb::sig(
            "def integers(values: list[int]) -> Annotated[NDArray[numpy.int64], dict(shape=(None,))] | None"),
        "A list of integers as an array; None: it holds something else.");
  m.def("merge_pages", merge_pages, "source"_a, "target"_a, "nbytes"_a,
        "Runs of parts in the order of the target; see core/page_plan.hpp.");
  m.def("equal_steps", equal_steps, "a"_a, "b"_a, "Stretches in which both lists grow by constant steps.");
  m.def("far_ranges", far_ranges, "near"_a, "near_stride"_a, "far"_a, "far_stride"_a, "nbytes"_a, "rows"_a,
        "most"_a, "Ranges that are contiguous on the far side, with their rows on the near one.");
  m.def("pack_rows", pack_rows, "at"_a, "nbytes"_a, "array"_a, "packed"_a.noconvert(),
        "Copy rows of an array close together.");
  m.def("unpack_rows", unpack_rows, "at"_a, "nbytes"_a, "array"_a.noconvert(), "packed"_a,
        "Copy rows that lie close together to their places in an array.");
}
