// A dispatch or combine of GPU arrays by one call, as far as it is usual: own kernel, messages, the kernel that reads the
// others' rows, each as soon as what it needs is there.
//
// Whatever is not there soon, has failed or is unusual is handed over as it is; Python goes on from the stage that was
// reached (aiocomm/moe/device_quick.py), and says what is wrong.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/device_py.hpp"
#include "bindings/expert_heads.hpp"
#include "bindings/launching.hpp"
#include "core/expert_tables.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

using Self = nb::pointer_and_handle<PyEngine>;
using Heads = std::vector<ExpertHead>;  // by rank
enum Stage : int { kNotBegun = -1, kGiving, kRefused, kSwapping, kPulling };

// What the calls of one rank in one group have in common.
class ExpertCalls {
 public:
  ExpertCalls(uint32_t channel, size_t me, std::vector<int> ranks, uint64_t slot_bytes, nb::tuple home)
      : channel_(channel),
        me_(me),
        ranks_(std::move(ranks)),
        slot_bytes_(slot_bytes),
        home_(std::move(home)) {
    require(me_ < ranks_.size());
  }

  nb::tuple dispatch(Self self, int64_t tag, const nb::bytes& header, uint64_t ended, double deadline,
                     double seconds, const std::optional<KernelTuple>& give, nb::handle ids,
                     nb::handle weights, size_t count, nb::handle owner, uint64_t region, uint64_t extent,
                     const nb::list& places, nb::object slots, const nb::tuple& whole, KernelTuple pull,
                     size_t count_at, uint32_t piece, uint64_t width, uint64_t room, nb::handle moves,
                     nb::handle local, size_t held, nb::handle tables,
                     const std::tuple<uint64_t, uint64_t, uint64_t>& upload);

  nb::tuple combine(Self self, int64_t tag, const nb::bytes& header, double deadline, double seconds,
                    const std::optional<KernelTuple>& give, const nb::list& messages, nb::object slots,
                    const std::vector<uint64_t>& expected, uint64_t row, uint64_t alignment,
                    const KernelTuple& add);

  // When the last call reached its stages; they are forgotten.
  std::vector<uint64_t> take_marks() { return std::exchange(marks_, {}); }

 private:
  void mark(PyEngine& e) { marks_.push_back(e.engine->now()); }

  int rank() const {
    return ranks_[me_];
  }  // a kernel that is given up is waited for, as what no link can withdraw

  // What came; nothing: headers differ.
  bool read(nb::handle slots, const nb::bytes& header, Heads& heads) const {
    const SeenMemory of_slots(slots);
    heads.resize(ranks_.size());
    for (size_t peer = 0; peer < ranks_.size(); ++peer) {
      if (peer == me_) continue;
      heads[peer] = CameExperts(of_slots, slot_bytes_, peer).head;
      if (std::memcmp(heads[peer].header, header.c_str(), sizeof heads[peer].header) != 0) return false;
    }
    return true;
  }

  // False: kernels do not reach it.
  bool add_far(KernelCall& kernel, const ExpertHead& head, size_t peer, uint64_t extent,
               uint64_t alignment) const {
    static const char nowhere[sizeof head.place] = {};
    KernelCall::Far far;
    static_assert(sizeof far.place == sizeof head.place);
    if (std::memcmp(head.place, nowhere, sizeof nowhere) == 0 || head.extent < extent ||
        head.start % alignment)
      return false;
    std::memcpy(&far.place, head.place, sizeof far.place);
    far.owner = ranks_[peer];
    far.place.address += head.start;
    far.nbytes = extent;
    far.at = sizeof(uint64_t) * peer;
    far.alignment = alignment;
    kernel.far.push_back(std::move(far));
    return true;
  }

  nb::list ended_of(const Heads& heads) const {
    nb::list ended;
    for (const ExpertHead& head : heads) ended.append(head.ended);
    return ended;
  }

  const uint32_t channel_;
  const size_t me_;
  const std::vector<int> ranks_;
  const uint64_t slot_bytes_;
  const nb::tuple home_;
  std::vector<uint64_t> marks_;
};

// Launches, and waits for the end. None: it has come.
nb::object given(Self self, const std::optional<KernelTuple>& kernel, const nb::tuple& home, int peer,
                 uint32_t channel, uint64_t deadline_ns, uint64_t until) {
  if (!kernel) return nb::none();
  Launch launch(self, *kernel, home);
  launch.submit(peer, channel, deadline_ns);
  return launch.look(until) ? nb::none() : launch.transfer();
}

// The lists of an arrangement, one after the other.
class Arranged {
 public:
  Arranged(size_t ranks, size_t held, size_t rows, size_t assignments) {
    const size_t sizes[] = {ranks + 1, assignments, held + 1, assignments, assignments, rows + 1};
    const size_t widths[] = {8, 8, 8, 4, 8, 8};
    size_t nbytes = 0;
    for (size_t i = 0; i < 6; ++i) nbytes += (sizes[i] * widths[i] + 7) & ~size_t{7};
    memory = nb::steal(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes)));
    if (!memory.is_valid()) throw nb::python_error();
    nb::object whole = nb::steal(PyMemoryView_FromObject(memory.ptr()));
    size_t at = 0;
    for (size_t i = 0; i < 6; ++i) {
      nb::object bytes =
          whole[nb::slice(static_cast<Py_ssize_t>(at), static_cast<Py_ssize_t>(at + sizes[i] * widths[i]))];
      parts.push_back(bytes.attr("cast")(i == 3 ? "f" : "q"));
      at += (sizes[i] * widths[i] + 7) & ~size_t{7};
    }
  }
  nb::object memory;
  std::vector<nb::object> parts;
};

nb::object part_of(const nb::handle array, size_t first, size_t last) {
  return array[nb::slice(static_cast<Py_ssize_t>(first), static_cast<Py_ssize_t>(last))];
}

nb::tuple ExpertCalls::dispatch(Self self, int64_t tag, const nb::bytes& header, uint64_t ended,
                                double deadline, double seconds, const std::optional<KernelTuple>& give,
                                nb::handle ids, nb::handle weights, size_t count, nb::handle owner,
                                uint64_t region, uint64_t extent, const nb::list& places, nb::object slots,
                                const nb::tuple& whole, KernelTuple pull, size_t count_at, uint32_t piece,
                                uint64_t width, uint64_t room, nb::handle moves, nb::handle local,
                                size_t held, nb::handle tables,
                                const std::tuple<uint64_t, uint64_t, uint64_t>& upload) {
  PyEngine& e = *self.p;
  marks_.clear();
  mark(e);
  const size_t n = ranks_.size();
  if (!e.on_submit.empty() || !e.on_complete.empty()) return nb::make_tuple(int{kNotBegun});
  require(header.size() == sizeof ExpertHead::header && nb::len(whole) == 4 &&
          std::get<3>(pull).size() >= count_at + sizeof(uint64_t) && piece);
  const uint64_t deadline_ns = deadline_of(e, deadline);
  const uint64_t until = e.engine->now() + static_cast<uint64_t>(seconds * 1e9);
  nb::object pending = given(self, give, home_, rank(), channel_, deadline_ns, until);
  if (!pending.is_none()) return nb::make_tuple(int{kGiving}, pending);
  mark(e);
  auto routed = route_messages(ids, weights, count, owner, me_, header, ended, region, extent, places,
                               slot_bytes_, whole[0], whole[1], whole[2], whole[3]);
  if (!routed) return nb::make_tuple(int{kRefused});
  auto& [rows, assignments, messages] = *routed;
  if (messages.is_none()) return nb::make_tuple(int{kRefused});
  Swap swap(self, ranks_, me_, nb::cast<nb::list>(messages), slots, slot_bytes_);
  swap.post(channel_, tag, deadline_ns);
  mark(e);
  swap.look(until);
  mark(e);
  nb::list left = swap.left();
  const nb::tuple swapped = nb::make_tuple(int{kSwapping}, rows, assignments, left);
  Heads heads;
  if (nb::len(left) || !read(slots, header, heads)) return swapped;
  size_t total = 0, all = 0;
  heads[me_].rows = static_cast<uint64_t>(rows[me_ + 1] - rows[me_]);
  heads[me_].assignments = static_cast<uint64_t>(assignments[me_ + 1] - assignments[me_]);
  for (const ExpertHead& head : heads) {
    if (head.rows > slot_bytes_ || head.assignments > slot_bytes_) return swapped;
    total += head.rows;
    all += head.assignments;
  }
  const SumTables at(all, total, count, n);
  const SeenMemory of_tables(tables), of_moves(moves);
  if (!total || total * width > room || at.nbytes > of_tables.nbytes() ||
      total * sizeof(MoveEntry) > of_moves.nbytes())
    return swapped;
  const auto first = static_cast<size_t>(rows[me_]), last = static_cast<size_t>(rows[me_ + 1]);
  const auto from = static_cast<size_t>(assignments[me_]), to = static_cast<size_t>(assignments[me_ + 1]);
  const std::vector<nb::object> own{part_of(whole[1], first, last), part_of(whole[2], from, to),
                                    part_of(whole[3], from, to)};
  auto extents = list_came(slots, slot_bytes_, me_, n, part_of(whole[0], first, last), moves);
  if (!extents) return swapped;
  const Arranged arranged(n, held, total, all);
  std::get<5>(pull) = total * width;
  std::get<1>(pull) = static_cast<uint32_t>(
      std::clamp<uint64_t>((total * width + piece - 1) / piece, 1, std::max(1u, std::get<1>(pull))));
  Launch launch(self, pull, home_);
  const uint64_t entries = total;
  std::memcpy(launch.kernel().argument.data() + count_at, &entries, sizeof entries);
  for (size_t peer = 0; peer < n; ++peer)
    if (peer != me_ && heads[peer].rows &&
        !add_far(launch.kernel(), heads[peer], peer, (*extents)[peer] * width, 1))
      return swapped;
  launch.submit(rank(), channel_, deadline_ns);
  mark(e);
  bool fine = false;
  try {  // while it runs
    fine = arrange_came(slots, slot_bytes_, me_, own, local, held, arranged.parts, whole[0], rows, count,
                        tables);
    if (fine) {
      const auto [context, stream, into] = upload;
      nb::gil_scoped_release release;
      copy_on(context, stream, into, reinterpret_cast<uint64_t>(of_tables.bytes()), at.nbytes);
    }
  } catch (const std::exception&) {
    fine = false;
  }
  mark(e);
  pending = launch.look(until) ? nb::none() : launch.transfer();
  mark(e);
  return nb::make_tuple(int{kPulling}, rows, assignments, left, ended_of(heads), total, all, arranged.memory,
                        pending, fine);
}

nb::tuple ExpertCalls::combine(Self self, int64_t tag, const nb::bytes& header, double deadline,
                               double seconds, const std::optional<KernelTuple>& give,
                               const nb::list& messages, nb::object slots,
                               const std::vector<uint64_t>& expected, uint64_t row, uint64_t alignment,
                               const KernelTuple& add) {
  PyEngine& e = *self.p;
  marks_.clear();
  mark(e);
  if (!e.on_submit.empty() || !e.on_complete.empty()) return nb::make_tuple(int{kNotBegun});
  require(header.size() == sizeof ExpertHead::header && expected.size() == ranks_.size() && alignment);
  const uint64_t deadline_ns = deadline_of(e, deadline);
  const uint64_t until = e.engine->now() + static_cast<uint64_t>(seconds * 1e9);
  Launch launch(self, add, home_);  // throws before anything is sent
  Swap swap(self, ranks_, me_, messages, slots, slot_bytes_);
  nb::object pending = given(self, give, home_, rank(), channel_, deadline_ns, until);
  if (!pending.is_none()) return nb::make_tuple(int{kGiving}, pending);
  mark(e);
  swap.post(channel_, tag, deadline_ns);
  mark(e);
  swap.look(until);
  mark(e);
  nb::list left = swap.left();
  const nb::tuple swapped = nb::make_tuple(int{kSwapping}, left);
  Heads heads;
  if (nb::len(left) || !read(slots, header, heads)) return swapped;
  for (size_t peer = 0; peer < ranks_.size(); ++peer) {
    const ExpertHead& head = heads[peer];
    if (peer == me_) continue;
    if (head.flags || head.rows != expected[peer]) return swapped;
    if (head.rows &&
        (head.extent != head.rows * row || !add_far(launch.kernel(), head, peer, head.rows * row, alignment)))
      return swapped;
  }
  launch.submit(rank(), channel_, deadline_ns);
  mark(e);
  pending = launch.look(until) ? nb::none() : launch.transfer();
  mark(e);
  return nb::make_tuple(int{kPulling}, left, ended_of(heads), pending);
}

// The description of a GPU array whose interface is read here; else as aiocomm/_device.py gives it. None: there is none.
nb::object describe_array(nb::handle array, bool writable) {
  if (array.is_none()) return nb::none();
  DeviceView view;
  const Found found = read_interface(array.ptr(), writable, view);
  if (found == Found::view)
    return nb::steal(Py_BuildValue("OKKiKsN", array.ptr(), static_cast<unsigned long long>(view.address),
                                   static_cast<unsigned long long>(view.nbytes), view.device,
                                   static_cast<unsigned long long>(view.stream), view.format, view.shape));
  if (found == Found::error) throw nb::python_error();
  nb::object asked =
      nb::steal(PyObject_CallFunction(hooks.describe_device, "Oi", array.ptr(), static_cast<int>(writable)));
  if (!asked.is_valid()) throw nb::python_error();
  return asked;
}

}  // namespace

void bind_expert_calls(nb::module_& m) {
  using namespace nb::literals;
  m.def("describe_array", describe_array, "array"_a.none(), "writable"_a,
        "The description of a GPU array on its library's current stream. None: it is not one.");
  m.def(
      "note_torch_format",
      [](nb::handle dtype, const nb::str& format) {
        note_torch_format(dtype.ptr(), format.ptr());
        if (PyErr_Occurred()) throw nb::python_error();
      },
      "dtype"_a, "format"_a, "What one of torch's dtypes is called in descriptions, from now on.");
  nb::class_<ExpertCalls>(m, "ExpertCalls", "Usual dispatches and combines of GPU arrays of one kind.")
      .def(nb::init<uint32_t, size_t, std::vector<int>, uint64_t, nb::tuple>(), "channel"_a, "me"_a,
           "ranks"_a, "slot_bytes"_a, "home"_a)
      .def("dispatch", &ExpertCalls::dispatch, "engine"_a, "tag"_a, "header"_a, "ended"_a, "deadline"_a,
           "seconds"_a, "give"_a.none(), "ids"_a, "weights"_a, "count"_a, "owner"_a, "region"_a, "extent"_a,
           "places"_a, "slots"_a, "whole"_a, "pull"_a, "count_at"_a, "piece"_a, "width"_a, "room"_a,
           "moves"_a, "local"_a, "held"_a, "tables"_a, "upload"_a,
           "As far as it is usual, looking for ends for that long. Returns the stage that was reached (-1: "
           "none, 0: the "
           "own kernel, 1: routing, which is refused, 2: messages, 3: the kernel that reads rows) and what "
           "is known "
           "and under way by then.")
      .def("combine", &ExpertCalls::combine, "engine"_a, "tag"_a, "header"_a, "deadline"_a, "seconds"_a,
           "give"_a.none(), "messages"_a, "slots"_a, "expected"_a, "row"_a, "alignment"_a, "add"_a,
           "The same of a combine, which has no stage 1.")
      .def("take_marks", &ExpertCalls::take_marks,
           "When the last call was begun, its own kernel had ended, messages were sent, all had come, the "
           "kernel "
           "that reads rows was launched, lists were made (of a dispatch), and it had ended, as far as it "
           "came; "
           "nanoseconds of the monotonic clock. They are forgotten.");
}

}  // namespace aiocomm::py
