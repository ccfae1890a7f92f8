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
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/device_py.hpp"
#include "bindings/expert_forms.hpp"
#include "bindings/expert_heads.hpp"
#include "bindings/launching.hpp"
#include "core/expert_tables.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

using Self = nb::pointer_and_handle<PyEngine>;
constexpr size_t kFetched = 64 << 10, kLine = 64;

// What another device has just written is in no cache: all of it is asked for at once, as far as it is short.
void fetch(const std::byte* from, size_t nbytes) {
  for (size_t at = 0; at < std::min(nbytes, kFetched); at += kLine) __builtin_prefetch(from + at);
}

using Heads = std::vector<ExpertHead>;                        // by rank
enum Stage : int { kGiving, kRefused, kSwapping, kPulling };  // where a call stopped

// What a combine sums, as its kernels are told of it.
struct Terms {
  Terms(const CombineForm& form, nb::handle outputs, nb::handle ready, nb::handle lists, size_t me, size_t n,
        size_t tokens)
      : given(outputs), tables(ready), held(lists), begins(begins_of(held, n)), count(tokens) {
    require(me < n);
    const SumTables at(given.rows, static_cast<size_t>(begins[n]), count, n);
    order = tables.address + at.order, starts = tables.address + at.first;
    weights = tables.address + at.weights, rows_of = tables.address + at.rows_of;
    first = static_cast<uint32_t>(begins[me]), own = static_cast<uint32_t>(begins[me + 1] - begins[me]);
    rows = static_cast<uint32_t>(begins[n]), hidden = static_cast<uint32_t>(form.hidden);
    straight = hidden % 8 == 0 && given.address % 16 == 0;
  }
  static std::span<const int64_t> begins_of(const SeenBytes& lists, size_t n) {
    require(lists.nbytes() >= sizeof(int64_t) * (n + 1));
    return {reinterpret_cast<const int64_t*>(lists.bytes()), n + 1};
  }
  Described given, tables;
  SeenMemory held;
  std::span<const int64_t> begins;
  size_t count;
  uint64_t order, starts, weights, rows_of;
  uint32_t first, own, rows, hidden;
  bool straight;
};

// A call whose own kernel was launched: what is asked for later.
struct OwnKernel {
  nb::object engine;               // which outlives the launch
  std::unique_ptr<Launch> launch;  // none: this rank gives nothing, or it was taken
  uint64_t deadline_ns = 0;
  // Of a dispatch: where its tokens are, and what it reads of experts and weights once that kernel has ended.
  uint64_t source = 0;
  nb::object ids, weights;
  // Of a combine: what it sums, and what the next kernel follows where there is none before it.
  std::unique_ptr<Terms> terms;
  Followed followed;
};

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

  // Launch what brings this rank's part to where others read it. Nothing: calls are watched one by one.
  std::optional<OwnKernel> give_tokens(Self self, const DispatchForm& form, double deadline,
                                       const Followed& followed, const nb::tuple& tokens, nb::object ids,
                                       nb::object weights, const DispatchKit& kit, uint64_t slab_at);
  std::optional<OwnKernel> give_terms(Self self, const CombineForm& form, double deadline,
                                      const Followed& followed, const nb::tuple& outputs,
                                      const nb::tuple& ready, nb::handle lists, size_t count,
                                      uint64_t slab_at);

  nb::tuple dispatch(Self self, OwnKernel& given, const DispatchForm& form, int64_t tag, uint64_t ended,
                     double seconds, const DispatchKit& kit, uint64_t region, const nb::list& places,
                     nb::object slots, nb::handle whole, nb::handle room, uint64_t into, nb::handle tables,
                     uint64_t tables_at);

  nb::tuple combine(Self self, OwnKernel& given, const CombineForm& form, int64_t tag,
                    const nb::bytes& header, uint64_t ended, double seconds, const std::vector<int64_t>& sent,
                    uint64_t region, const nb::list& places, uint64_t target, nb::object slots,
                    const nb::object& meanwhile);

  // When the last call reached its stages; they are forgotten.
  std::vector<uint64_t> take_marks() { return std::exchange(marks_, {}); }

 private:
  void mark(PyEngine& e) { marks_.push_back(e.engine->now()); }

  // False: calls are watched one by one.
  bool begin(PyEngine& e) {
    marks_.clear();
    mark(e);
    return e.on_submit.empty() && e.on_complete.empty();
  }

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

std::optional<OwnKernel> ExpertCalls::give_tokens(Self self, const DispatchForm& form, double deadline,
                                                  const Followed& followed, const nb::tuple& tokens,
                                                  nb::object ids, nb::object weights, const DispatchKit& kit,
                                                  uint64_t slab_at) {
  PyEngine& e = *self.p;
  if (!begin(e)) return std::nullopt;
  const auto& [kit_ids, kit_weights, seen_ids, seen_weights, ones, moves, moves_at] = kit;
  OwnKernel own;
  own.engine = nb::borrow(self.h), own.deadline_ns = deadline_of(e, deadline);
  own.source = Described(tokens).address;
  std::vector<uint64_t> numbers{0, 0, 0, form.width, slab_at, own.source, form.nbytes};
  uint64_t given_bytes = form.nbytes;
  auto bring = [&](nb::object array, uint64_t memory, const nb::object& seen) {
    if (!PyTuple_CheckExact(array.ptr())) return array;
    const Described one(array);
    numbers.insert(numbers.end(), {memory, one.address, one.nbytes});
    given_bytes += one.nbytes;
    return seen;
  };
  own.ids = bring(std::move(ids), kit_ids, seen_ids);
  own.weights = weights.is_none() ? ones : bring(std::move(weights), kit_weights, seen_weights);
  const KernelLaunch give{form.function, blocks_of(given_bytes, form.piece, form.sm_budget), form.threads,
                          move_argument(form.argument_bytes, form.most_ranks, me_, 0, numbers), given_bytes};
  own.launch = std::make_unique<Launch>(self, give, followed, home_);
  own.launch->submit(rank(), channel_, own.deadline_ns);
  mark(e);
  return own;
}

nb::tuple ExpertCalls::dispatch(Self self, OwnKernel& given, const DispatchForm& form, int64_t tag,
                                uint64_t ended, double seconds, const DispatchKit& kit, uint64_t region,
                                const nb::list& places, nb::object slots, nb::handle whole, nb::handle room,
                                uint64_t into, nb::handle tables, uint64_t tables_at) {
  PyEngine& e = *self.p;
  mark(e);
  const size_t n = ranks_.size();
  const std::unique_ptr<Launch> own = std::move(given.launch);
  require(own != nullptr);
  const uint64_t deadline_ns = given.deadline_ns;
  auto soon = [&] { return e.engine->now() + static_cast<uint64_t>(seconds * 1e9); };
  const nb::object moves = std::get<5>(kit);
  const uint64_t moves_at = std::get<6>(kit);
  const SeenMemory of_tables(tables), of_moves(moves), of_slots(slots), of_owner(form.owner),
      of_local(form.local), of_ids(given.ids), of_weights(given.weights);
  const RoutedParts routed_into = parts_of(whole, form.choices);
  const nb::bytes pull_argument =
      move_argument(form.argument_bytes, form.most_ranks, me_, given.source, {into, moves_at, 0, form.width});
  if (!own->look(soon())) return nb::make_tuple(int{kGiving}, own->transfer());
  mark(e);
  for (const SeenBytes* one : {&of_ids, &of_weights}) fetch(one->bytes(), one->nbytes());
  auto routed = route_messages(of_ids, of_weights, form.count, of_owner, me_, form.header, ended, region,
                               form.nbytes, places, slot_bytes_, routed_into);
  if (!routed) return nb::make_tuple(int{kRefused});
  auto& [rows, assignments, messages] = *routed;
  if (messages.is_none()) return nb::make_tuple(int{kRefused});
  mark(e);
  Swap swap(self, ranks_, me_, nb::cast<nb::list>(messages), slots, slot_bytes_);
  swap.post(channel_, tag, deadline_ns);
  mark(e);
  swap.look(soon());
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
      {form.function, blocks_of(nbytes, form.piece, form.sm_budget), form.threads, pull_argument, nbytes},
      Followed(), home_);
  const uint64_t entries = total;
  std::memcpy(launch.kernel().argument.data() + sizeof entries * (form.most_ranks + 2), &entries,
              sizeof entries);
  for (size_t peer = 0; peer < n; ++peer)
    if (peer != me_ && heads[peer].rows &&
        !add_far(launch.kernel(), heads[peer], peer, (*extents)[peer] * form.width, 1))
      return swapped;
  launch.submit(rank(), channel_, deadline_ns);
  mark(e);
  const Arranged arranged(n, form.held, total, all, room);
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
  nb::object pending = launch.look(soon()) ? nb::none() : launch.transfer();
  mark(e);
  return nb::make_tuple(int{kPulling}, rows, assignments, left, ended_of(heads), total, all, arranged.memory,
                        pending, fine);
}

std::optional<OwnKernel> ExpertCalls::give_terms(Self self, const CombineForm& form, double deadline,
                                                 const Followed& followed, const nb::tuple& outputs,
                                                 const nb::tuple& ready, nb::handle lists, size_t count,
                                                 uint64_t slab_at) {
  PyEngine& e = *self.p;
  if (!begin(e)) return std::nullopt;
  OwnKernel own;
  own.engine = nb::borrow(self.h), own.deadline_ns = deadline_of(e, deadline);
  own.terms = std::make_unique<Terms>(form, outputs, ready, lists, me_, ranks_.size(), count);
  const Terms& all = *own.terms;
  if (!slab_at) {
    own.followed = followed;
    mark(e);
    return own;
  }
  Argument argument;
  argument.add(all.given.address, all.order, all.starts, all.weights, slab_at);
  argument.add(all.first, all.own, all.rows, all.hidden, uint32_t{all.straight}, uint32_t{0});
  const KernelLaunch weigh{form.weigh, blocks_of(all.given.nbytes, form.piece, form.sm_budget), form.threads,
                           argument.bytes(), all.given.nbytes};
  own.launch = std::make_unique<Launch>(self, weigh, followed, home_);
  own.launch->submit(rank(), channel_, own.deadline_ns);
  mark(e);
  return own;
}

nb::tuple ExpertCalls::combine(Self self, OwnKernel& given, const CombineForm& form, int64_t tag,
                               const nb::bytes& header, uint64_t ended, double seconds,
                               const std::vector<int64_t>& sent, uint64_t region, const nb::list& places,
                               uint64_t target, nb::object slots, const nb::object& meanwhile) {
  PyEngine& e = *self.p;
  mark(e);
  const size_t n = ranks_.size();
  const std::unique_ptr<Launch> own = std::move(given.launch);
  require(header.size() == sizeof ExpertHead::header && sent.size() == n + 1 && given.terms);
  const uint64_t deadline_ns = given.deadline_ns;
  auto soon = [&] { return e.engine->now() + static_cast<uint64_t>(seconds * 1e9); };
  const Terms& all = *given.terms;
  const uint64_t moved = all.count * form.hidden * form.itemsize * n;
  Argument argument;
  argument.skip(sizeof(uint64_t) * form.most_ranks);
  argument.add(target, all.rows_of, all.given.address, all.order, all.starts, all.weights);
  argument.add(all.first, static_cast<uint32_t>(n), static_cast<uint32_t>(me_),
               static_cast<uint32_t>(all.count), all.hidden, uint32_t{all.straight && target % 16 == 0});
  const KernelLaunch sums{form.add, blocks_of(moved, form.piece, form.sm_budget), form.threads,
                          argument.bytes(), moved};
  Launch launch(self, sums, given.followed, home_);
  Swap swap(self, ranks_, me_, sum_messages(all.begins, form.row, me_, header, ended, region, places), slots,
            slot_bytes_);
  if (own && !own->look(soon())) return nb::make_tuple(int{kGiving}, own->transfer());
  mark(e);
  swap.post(channel_, tag, deadline_ns);
  mark(e);
  swap.look(soon());
  mark(e);
  nb::list left = swap.left();
  const nb::tuple swapped = nb::make_tuple(int{kSwapping}, left);
  Heads heads;
  if (nb::len(left) || !read(SeenMemory(slots), header, heads)) return swapped;
  for (size_t peer = 0; peer < n; ++peer) {
    const ExpertHead& head = heads[peer];
    if (peer == me_) continue;
    if (head.flags || head.rows != static_cast<uint64_t>(sent[peer + 1] - sent[peer])) return swapped;
    if (head.rows && (head.extent != head.rows * form.row ||
                      !add_far(launch.kernel(), head, peer, head.rows * form.row, form.alignment)))
      return swapped;
  }
  launch.submit(rank(), channel_, deadline_ns);
  mark(e);
  const nb::list ended_there = ended_of(heads);
  try {
    meanwhile(ended_there);
  } catch (nb::python_error& error) {  // what was launched goes on
    error.discard_as_unraisable(meanwhile);
  }
  nb::object pending = launch.look(soon()) ? nb::none() : launch.transfer();
  mark(e);
  return nb::make_tuple(int{kPulling}, left, pending);
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
  m.attr("GIVING") = int{kGiving};
  m.attr("REFUSED") = int{kRefused};
  m.attr("SWAPPING") = int{kSwapping};
  m.attr("PULLING") = int{kPulling};
  m.def("describe_array", describe_array, "array"_a.none(), "writable"_a,
        "The description of a GPU array on its library's current stream. None: it is not one.");
  m.def(
      "note_torch_format",
      [](nb::handle dtype, const nb::str& format) {
        note_torch_format(dtype.ptr(), format.ptr());
        if (PyErr_Occurred()) throw nb::python_error();
      },
      "dtype"_a, "format"_a, "What one of torch's dtypes is called in descriptions, from now on.");
  bind_expert_forms(m);
  nb::class_<Followed>(m, "Followed", "Memory behind the work that its streams have at that time.")
      .def(
          "__init__",
          [](Followed* followed, PyEngine& engine, const std::vector<nb::tuple>& arrays) {
            new (followed) Followed(engine, arrays);
          },
          "engine"_a, "arrays"_a);
  nb::class_<OwnKernel>(m, "OwnKernel", "The first kernel of a call, which is under way.")
      .def(
          "transfer",
          [](OwnKernel& own) {
            return own.launch ? std::exchange(own.launch, nullptr)->transfer() : nb::none();
          },
          "Has a transfer tell its end, if it was launched, and nothing else has been told of it.");
  nb::class_<ExpertCalls>(m, "ExpertCalls", "Usual dispatches and combines of GPU arrays of one kind.")
      .def(nb::init<uint32_t, size_t, std::vector<int>, uint64_t, nb::tuple>(), "channel"_a, "me"_a,
           "ranks"_a, "slot_bytes"_a, "home"_a)
      .def(
          "give_tokens", &ExpertCalls::give_tokens, "engine"_a, "form"_a, "deadline"_a, "followed"_a,
          "tokens"_a, "ids"_a, "weights"_a.none(), "kit"_a, "slab_at"_a,
          "Launches what brings tokens, and experts and weights, to where they are read. None: not one call.")
      .def("give_terms", &ExpertCalls::give_terms, "engine"_a, "form"_a, "deadline"_a, "followed"_a,
           "outputs"_a, "ready"_a, "lists"_a, "count"_a, "slab_at"_a,
           "The same of the sums of a combine; `slab_at` 0: others get none.")
      .def(
          "dispatch", &ExpertCalls::dispatch, "engine"_a, "own"_a, "form"_a, "tag"_a, "ended"_a, "seconds"_a,
          "kit"_a, "region"_a, "places"_a, "slots"_a, "whole"_a, "room"_a.none(), "into"_a, "tables"_a,
          "tables_at"_a,
          "As far as it is usual, looking for each end for that long. Returns the stage that was reached (0: "
          "the own kernel, 1: routing, which is refused, 2: messages, 3: the kernel that reads rows) and "
          "what is known and under way by then.")
      .def("combine", &ExpertCalls::combine, "engine"_a, "own"_a, "form"_a, "tag"_a, "header"_a, "ended"_a,
           "seconds"_a, "sent"_a, "region"_a, "places"_a, "target"_a, "slots"_a, "meanwhile"_a,
           "The same of a combine, which has no stage 1. `meanwhile` is called while the last kernel runs, "
           "with "
           "the calls that the others had ended.")
      .def("take_marks", &ExpertCalls::take_marks,
           "When the last call was begun, its own kernel was launched, the rest was asked for, that kernel "
           "had ended, tokens were routed (of a dispatch), messages were sent, all had come, the "
           "kernel "
           "that reads rows was launched, lists were made (of a dispatch), and it had ended, as far as it "
           "came; "
           "nanoseconds of the monotonic clock. They are forgotten.");
}

}  // namespace aiocomm::py
