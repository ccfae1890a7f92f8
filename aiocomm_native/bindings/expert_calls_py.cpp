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
#include <array>
#include <cstring>
#include <exception>
#include <new>
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

// A description, as far as it is asked for here.
struct Described {
  explicit Described(nb::handle description) {
    DeviceView view;
    if (!PyTuple_CheckExact(description.ptr()) || !read_description(description.ptr(), view))
      throw nb::python_error();
    address = view.address, nbytes = view.nbytes, stream = view.stream;
  }
  uint64_t address, nbytes, stream;
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

// Memory for ids and weights, and how it is seen; weights that are all one; the list of rows, and where kernels see it.
using DispatchKit = std::tuple<uint64_t, uint64_t, nb::object, nb::object, nb::object, nb::object, uint64_t>;
// Its address and region, and what each rank needs in order to read it.
using Slab = std::tuple<uint64_t, uint64_t, nb::object>;

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

  nb::tuple dispatch(Self self, const DispatchForm& form, int64_t tag, uint64_t ended, double deadline,
                     double seconds, const nb::tuple& tokens, nb::handle ids, nb::handle weights,
                     const DispatchKit& kit, const Slab& slab, nb::object slots, nb::handle whole,
                     uint64_t into, nb::handle tables, uint64_t tables_at);

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
  bool read(const SeenBytes& of_slots, const nb::bytes& header, Heads& heads) const {
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
  Arranged(size_t ranks, size_t held, size_t rows, size_t assignments)
      : sizes_{ranks + 1, assignments, held + 1, assignments, assignments, rows + 1} {
    size_t nbytes = 0;
    for (size_t i = 0; i < 6; ++i) at_[i] = nbytes, nbytes += (sizes_[i] * kWidths[i] + 7) & ~size_t{7};
    memory = nb::steal(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(nbytes)));
    if (!memory.is_valid()) throw nb::python_error();
  }
  ArrangedParts parts() const { return {part(0), part(1), part(2), part(3), part(4), part(5)}; }
  nb::object memory;

 private:
  static constexpr size_t kWidths[] = {8, 8, 8, 4, 8, 8};
  SeenBytes part(size_t i) const {
    auto* bytes = reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(memory.ptr()));
    return {bytes + at_[i], sizes_[i] * kWidths[i], kWidths[i]};
  }
  const std::array<size_t, 6> sizes_;
  std::array<size_t, 6> at_{};
};

// As aiocomm/moe/device_quick.py reads it, too: tokens, experts, weights, counts.
RoutedParts parts_of(nb::handle whole, size_t choices) {
  require(PyByteArray_Check(whole.ptr()) &&
          static_cast<size_t>(PyByteArray_GET_SIZE(whole.ptr())) == 18 * choices);
  auto* bytes = reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(whole.ptr()));
  return {{bytes, 8 * choices, 8},
          {bytes + 16 * choices, 2 * choices, 2},
          {bytes + 8 * choices, 4 * choices, 4},
          {bytes + 12 * choices, 4 * choices, 4}};
}

// The argument of `move_rows`: addresses by rank, of which one may be set, and behind them numbers.
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

// Those whose streams' work is waited for: one of each stream.
std::vector<nb::tuple> behind(const std::vector<nb::tuple>& arrays) {
  std::vector<nb::tuple> found;
  std::vector<uint64_t> streams;
  for (const nb::tuple& array : arrays) {
    const Described one(array);
    if (!one.nbytes || std::find(streams.begin(), streams.end(), one.stream) != streams.end()) continue;
    streams.push_back(one.stream);
    found.push_back(array);
  }
  return found;
}

uint32_t blocks_of(uint64_t nbytes, uint64_t piece, uint32_t most) {
  return static_cast<uint32_t>(std::clamp<uint64_t>((nbytes + piece - 1) / piece, 1, std::max(1u, most)));
}

nb::tuple ExpertCalls::dispatch(Self self, const DispatchForm& form, int64_t tag, uint64_t ended,
                                double deadline, double seconds, const nb::tuple& tokens, nb::handle ids,
                                nb::handle weights, const DispatchKit& kit, const Slab& slab,
                                nb::object slots, nb::handle whole, uint64_t into, nb::handle tables,
                                uint64_t tables_at) {
  PyEngine& e = *self.p;
  marks_.clear();
  mark(e);
  const size_t n = ranks_.size();
  if (!e.on_submit.empty() || !e.on_complete.empty()) return nb::make_tuple(int{kNotBegun});
  const uint64_t deadline_ns = deadline_of(e, deadline);
  const uint64_t until = e.engine->now() + static_cast<uint64_t>(seconds * 1e9);
  const auto& [kit_ids, kit_weights, seen_ids, seen_weights, ones, moves, moves_at] = kit;
  const auto& [slab_at, region, places] = slab;
  const uint64_t source = Described(tokens).address;
  std::vector<nb::tuple> after{tokens};
  std::vector<uint64_t> numbers{0, 0, 0, form.width, slab_at, source, form.nbytes};
  uint64_t given_bytes = form.nbytes;
  auto bring = [&](nb::handle array, uint64_t memory, const nb::object& seen) {
    if (!PyTuple_CheckExact(array.ptr())) return array;
    const Described one(array);
    numbers.insert(numbers.end(), {memory, one.address, one.nbytes});
    given_bytes += one.nbytes;
    after.push_back(nb::borrow<nb::tuple>(array));
    return nb::handle(seen);
  };
  const nb::handle shown = bring(ids, kit_ids, seen_ids);
  const nb::handle factors = weights.is_none() ? nb::handle(ones) : bring(weights, kit_weights, seen_weights);
  const KernelTuple give{form.function, blocks_of(given_bytes, form.piece, form.sm_budget),
                         form.threads,  move_argument(form.argument_bytes, form.most_ranks, me_, 0, numbers),
                         behind(after), given_bytes};
  Launch own(self, give, home_);
  own.submit(rank(), channel_, deadline_ns);
  // While it runs, all that does not need it.
  const SeenMemory of_tables(tables), of_moves(moves), of_slots(slots), of_owner(form.owner),
      of_local(form.local);
  const RoutedParts routed_into = parts_of(whole, form.choices);
  const nb::bytes pull_argument =
      move_argument(form.argument_bytes, form.most_ranks, me_, source, {into, moves_at, 0, form.width});
  if (!own.look(until)) return nb::make_tuple(int{kGiving}, own.transfer());
  mark(e);
  auto routed =
      route_messages(SeenMemory(shown), SeenMemory(factors), form.count, of_owner, me_, form.header, ended,
                     region, form.nbytes, nb::cast<nb::list>(places), slot_bytes_, routed_into);
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
  if (nb::len(left) || !read(of_slots, form.header, heads)) return swapped;
  size_t total = 0, all = 0;
  heads[me_].rows = static_cast<uint64_t>(rows[me_ + 1] - rows[me_]);
  heads[me_].assignments = static_cast<uint64_t>(assignments[me_ + 1] - assignments[me_]);
  for (const ExpertHead& head : heads) {
    if (head.rows > slot_bytes_ || head.assignments > slot_bytes_) return swapped;
    total += head.rows;
    all += head.assignments;
  }
  const SumTables at(all, total, form.count, n);
  const uint64_t nbytes = total * form.width;
  if (!total || nbytes > form.room || at.nbytes > of_tables.nbytes() ||
      total * sizeof(MoveEntry) > of_moves.nbytes())
    return swapped;
  const auto first = static_cast<size_t>(rows[me_]), last = static_cast<size_t>(rows[me_ + 1]);
  const auto from = static_cast<size_t>(assignments[me_]), to = static_cast<size_t>(assignments[me_ + 1]);
  const SeenBytes own_tokens = routed_into.tokens.part(first, last);
  auto extents = list_came(of_slots, slot_bytes_, me_, n, own_tokens, of_moves);
  if (!extents) return swapped;
  Launch launch(
      self,
      {form.function, blocks_of(nbytes, form.piece, form.sm_budget), form.threads, pull_argument, {}, nbytes},
      home_);
  const uint64_t entries = total;
  std::memcpy(launch.kernel().argument.data() + sizeof entries * (form.most_ranks + 2), &entries,
              sizeof entries);
  for (size_t peer = 0; peer < n; ++peer)
    if (peer != me_ && heads[peer].rows &&
        !add_far(launch.kernel(), heads[peer], peer, (*extents)[peer] * form.width, 1))
      return swapped;
  launch.submit(rank(), channel_, deadline_ns);
  mark(e);
  const Arranged arranged(n, form.held, total, all);
  bool fine = false;
  try {  // while it runs
    const RoutedParts mine{own_tokens, routed_into.counts.part(first, last),
                           routed_into.experts.part(from, to), routed_into.weights.part(from, to)};
    fine = arrange_came(of_slots, slot_bytes_, me_, mine, of_local, form.held, arranged.parts(),
                        routed_into.tokens, rows, form.count, of_tables);
    if (fine) {
      nb::gil_scoped_release release;
      copy_on(form.context, form.stream, tables_at, reinterpret_cast<uint64_t>(of_tables.bytes()), at.nbytes);
    }
  } catch (const std::exception&) {
    fine = false;
  }
  mark(e);
  nb::object pending = launch.look(until) ? nb::none() : launch.transfer();
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
  if (nb::len(left) || !read(SeenMemory(slots), header, heads)) return swapped;
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
  nb::class_<ExpertCalls>(m, "ExpertCalls", "Usual dispatches and combines of GPU arrays of one kind.")
      .def(nb::init<uint32_t, size_t, std::vector<int>, uint64_t, nb::tuple>(), "channel"_a, "me"_a,
           "ranks"_a, "slot_bytes"_a, "home"_a)
      .def("dispatch", &ExpertCalls::dispatch, "engine"_a, "form"_a, "tag"_a, "ended"_a, "deadline"_a,
           "seconds"_a, "tokens"_a, "ids"_a, "weights"_a.none(), "kit"_a, "slab"_a, "slots"_a, "whole"_a,
           "into"_a, "tables"_a, "tables_at"_a,
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
