// Calls on GPU arrays through an arena: see device_call_py.hpp.

#include "bindings/device_call_py.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "bindings/held.hpp"
#include "bindings/spinner.hpp"
#include "core/relax.hpp"

using namespace nanobind::literals;

namespace aiocomm::py {

namespace {
// Calls that are made by messages after one that not all could take part in.
constexpr uint64_t kDeclined = 64;
}  // namespace

// Called under the engine's token.
struct DeviceCall::Word final : Company {
  Word(std::shared_ptr<Arena> in, size_t own, uint64_t number)
      : arena(std::move(in)), rank(own), call(number) {}
  void ready(bool able) override { arena->set_ready(rank, call, able); }
  bool able() const override {
    for (size_t other = 0; other < arena->ranks(); ++other)
      if (arena->unable(other, call)) return false;
    return true;
  }
  void moved(uint32_t parts) override { arena->set_parts(rank, call, parts); }
  const std::shared_ptr<Arena> arena;
  const size_t rank;
  const uint64_t call;
};

DeviceCall::DeviceCall(std::shared_ptr<Meeting> meeting, std::vector<int> ranks, uint32_t channel,
                       nb::bytes header, uint64_t in_bytes, uint64_t out_bytes, uint64_t item,
                       std::vector<Part> parts, std::vector<uint32_t> awaits, double stays_s)
    : meeting_(std::move(meeting)),
      ranks_(std::move(ranks)),
      channel_(channel),
      header_(header.c_str(), header.size()),
      needs_{in_bytes, out_bytes},
      item_(item),
      parts_(std::move(parts)),
      awaits_(std::move(awaits)),
      stays_ns_(static_cast<uint64_t>(stays_s * 1e9)) {
  const size_t size = meeting_->arena->ranks();
  if (header_.size() > Arena::kHeader) throw nb::value_error("a header that is too long");
  if (ranks_.size() != size || awaits_.size() != size || parts_.empty() || parts_.size() >= Arena::kParts ||
      !item)
    throw nb::value_error("not a call of this group");
  for (const auto& [moves, after] : parts_) {
    uint64_t moved = 0;
    for (const auto& [rank, span, buffer, start] : moves) {
      const Span source(span);
      if (rank >= size || source.buffer < 0 || source.buffer > kOut || buffer < 0 || buffer > kOut ||
          source.stop < source.start || source.stop > needs_[static_cast<size_t>(source.buffer)])
        throw nb::value_error("a move from or to no buffer");
      moved += source.nbytes();
    }
    for (const auto& [rank, count] : after)
      if (rank >= size || count >= Arena::kParts) throw nb::value_error("a part that waits for none");
    most_moved_ = std::max(most_moved_, moved);
  }
  most_moved_ = std::max({most_moved_, in_bytes, out_bytes});
}

void DeviceCall::combine(uint64_t function, int device, uint32_t blocks, uint32_t threads,
                         uint32_t divide_by) {
  if (!function || !blocks || !threads || ranks_.size() > kMostTogether || parts_.size() != 1)
    throw nb::value_error("nothing that could be launched");
  combining_ = {function, device, blocks, threads, static_cast<uint32_t>(item_), divide_by};
}

bool DeviceCall::bind(Mover& mover, const DeviceLent& lent, Bound& into, uint64_t waited) {
  if (!lent.owner.is_valid()) return true;
  DeviceView view = lent.view;
  if (view.stream == waited) view.stream = Mover::kNoStream;
  if (!(into.gpu = bind_device(mover, view))) {
    PyErr_Clear();  // the call as it is made the first time says what is wrong
    return false;
  }
  into.address = lent.view.address;
  into.nbytes = lent.view.nbytes;
  return true;
}

// False: not with these arrays, or not now.
bool DeviceCall::takes(PyEngine& e, const DeviceLent& given, const DeviceLent& out,
                       std::array<Bound, 2>& arrays) const {
  if (!e.on_submit.empty() || !e.on_complete.empty()) return false;
  Mover* mover = e.engine->mover();
  if (!mover || !bind(*mover, given, arrays[kIn], Mover::kNoStream)) return false;
  // What both are on is asked about, and waited for, once: each time costs the driver a microsecond.
  const uint64_t waited = arrays[kIn].gpu ? given.view.stream : Mover::kNoStream;
  if (!bind(*mover, out, arrays[kOut], waited)) return false;
  for (size_t i = 0; i < arrays.size(); ++i)
    if (arrays[i].nbytes != needs_[i] || arrays[i].address % item_) return false;
  const Bound &in = arrays[kIn], &into = arrays[kOut];
  if ((!in.gpu && !into.gpu) || (in.gpu && into.gpu && in.gpu->device != into.gpu->device) ||
      in.overlaps(into))
    return false;
  for (const auto& [start, nbytes] : e.receiving) {
    const auto first = reinterpret_cast<uint64_t>(start);
    if (first < into.address + into.nbytes && into.address < first + nbytes) return false;
  }
  return !combining_ || (into.gpu ? into : in).gpu->device == combining_.device;
}

int DeviceCall::attempt(PyEngine& e, uint64_t number, const DeviceLent& given, const DeviceLent& out) {
  if (running_) return kNotMet;
  std::array<Bound, 2> arrays;
  if (number < resumes_ || !takes(e, given, out, arrays)) {
    meeting_->not_coming(number);
    return kNotMet;
  }
  arrays_ = std::move(arrays);
  keeps_ = nb::make_tuple(given.owner.is_valid() ? given.owner : nb::none(),
                          out.owner.is_valid() ? out.owner : nb::none());
  number_ = number;
  if (!meeting_->turns) meeting_->turns = e.turns;
  trouble_ = voted_down_ = false;
  const bool waits = loop_has_nothing_else(&e);
  ArenaResult result;
  bool looked;
  {
    LateUnlock unlocked;
    unlocked.now();
    const bool large = most_moved_ / kRate > kLingerNs;
    const auto how = meeting_->meet(number_, header_, waits, false, !large,
                                    (stays_ns_ + most_moved_ / kWaitBytes) >> 2 * misses_, unlocked,
                                    [&] { prepare(*e.engine); });
    result = begun(e, how, waits);
    // A loop that spins says by itself that it is about to sleep; others have done so already, and were taken awake.
    looked = std::exchange(looked_, false) && !e.spinner;
    if (looked) e.engine->loop_sleeps();
  }
  const int found = settle(e, result);
  if (looked) e.after_submit();  // nobody has rung for what came meanwhile
  return found;
}

// With the GIL: ends what others have waited for, who may call back.
int DeviceCall::settle(PyEngine& e, ArenaResult result) {
  running_ = result > kDoneTurn;
  if (!running_) over();
  for (Op* op : std::exchange(others_, {})) {
    end_transfer(static_cast<Transfer*>(op->cookie));
    e.ended_outside = true;
  }
  return result;
}

int DeviceCall::proceed(Self self, bool last) {
  if (!running_) return kNotMet;
  if (last) meeting_->closes_ns = 0;
  PyEngine& e = *self.p;
  ArenaResult result;
  {
    nb::gil_scoped_release release;
    if (open_)
      result = begun(e, meeting_->look(number_, header_, [&] { prepare(*e.engine); }, false, false), false);
    else
      result = run(e, false);
  }
  return settle(e, result);
}

// Where the arrays are, before all have met.
void DeviceCall::prepare(Engine& engine) {
  Arena::Places places;
  bool willing = true;
  places.in = place_of(engine, arrays_[kIn], willing);
  places.out = place_of(engine, arrays_[kOut], willing);
  places.willing = willing;
  meeting_->arena->lend(meeting_->rank, places);
}

DevicePlace DeviceCall::place_of(Engine& engine, const Bound& array, bool& willing) const {
  if (!array.gpu) return {};
  const std::unique_ptr<DeviceBuffer> whole = engine.mover()->part(*array.gpu, 0, array.nbytes);
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    if (rank != meeting_->rank) willing = willing && engine.share(ranks_[rank], *whole);
  return whole->place;
}

ArenaResult DeviceCall::begun(PyEngine& e, Meeting::Begun how, bool lingers) {
  open_ = how == Meeting::Begun::open;
  if (open_) return kOpen;
  if (how == Meeting::Begun::not_met) {
    misses_ = std::min(misses_ + 1, kMostMisses);
    return kNotMet;
  }
  misses_ = 0;
  const ArenaResult result = launch(e);
  return result == kGoingOn ? run(e, lingers) : result;
}

ArenaResult DeviceCall::launch(PyEngine& e) {
  Arena& arena = *meeting_->arena;
  Engine& engine = *e.engine;
  places_.clear();
  for (size_t rank = 0; rank < ranks_.size(); ++rank) places_.push_back(arena.lent(rank));
  if (std::any_of(places_.begin(), places_.end(), [](const auto& one) { return !one.willing; })) {
    arena.set_done(meeting_->rank, number_);
    return kNotMet;
  }
  words_ = ++meeting_->device_calls;
  std::unique_ptr<DeviceBuffer> gpu;
  if (combining_) gpu = kernel(engine);
  if (!gpu) gpu = copies(engine);
  if (!arena.enter(meeting_->rank)) return kBroken;
  entered_ = true;
  const Held held(*engine.mover(), home().device);
  post(engine, std::move(gpu));
  return kGoingOn;
}

std::unique_ptr<DeviceBuffer> DeviceCall::kernel(Engine& engine) const {
  const Bound &out = arrays_[kOut], &in = arrays_[kIn].gpu ? arrays_[kIn] : out;
  return combination(engine, combining_, ranks_, meeting_->rank, in.address, *out.gpu, out.nbytes, places_);
}

std::unique_ptr<DeviceBuffer> DeviceCall::copies(Engine& engine) const {
  auto call = std::make_unique<KernelCall>();
  std::vector<int64_t> found(ranks_.size() * 2, -1);  // of `far`, by rank and buffer
  auto far_of = [&](size_t rank, int buffer, uint64_t stop) {
    int64_t& at = found[rank * 2 + static_cast<size_t>(buffer)];
    if (at < 0) {
      at = static_cast<int64_t>(call->far.size());
      KernelCall::Far far;
      far.owner = ranks_[rank];
      far.place = buffer == kIn ? places_[rank].in : places_[rank].out;
      far.at = call->far.size() * sizeof(uint64_t);
      call->far.push_back(far);
    }
    uint64_t& nbytes = call->far[static_cast<size_t>(at)].nbytes;
    nbytes = std::max(nbytes, stop);
    return at;
  };
  for (const auto& [moves, after] : parts_) {
    KernelCall::Part& part = call->parts.emplace_back();
    for (const auto& [rank, span, buffer, start] : moves) {
      const Span source(span);
      KernelCall::Copy copy;
      copy.from = arrays_[static_cast<size_t>(source.buffer)].address + source.start;
      copy.nbytes = source.nbytes();
      copy.offset = start;
      if (rank == meeting_->rank) {
        copy.offset += arrays_[static_cast<size_t>(buffer)].address;
      } else {
        copy.far = far_of(rank, buffer, start + copy.nbytes);
        part.away += copy.nbytes;
      }
      part.copies.push_back(copy);
    }
    for (const auto& [rank, count] : after) part.words.push_back(meeting_->arena->parts(rank, words_, count));
  }
  call->argument.resize(call->far.size() * sizeof(uint64_t));
  std::unique_ptr<DeviceBuffer> gpu = engine.mover()->part(home(), 0, 0);
  gpu->gate = {};
  gpu->kernel = std::move(call);
  return gpu;
}

void DeviceCall::post(Engine& engine, std::unique_ptr<DeviceBuffer> gpu) {
  const std::shared_ptr<Arena>& arena = meeting_->arena;
  KernelCall& call = *gpu->kernel;
  for (const Bound& array : arrays_)
    if (array.gpu && !array.gpu->gate.open()) call.gates.push_back(array.gpu->gate);
  if (call.parts.empty()) call.parts.emplace_back();
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    if (rank != meeting_->rank) call.parts[0].words.push_back(arena->ready(rank, words_));
  call.company = std::make_shared<Word>(arena, meeting_->rank, words_);
  call.awaited = true;
  Op* op = engine.new_op();
  op->kind = OpKind::get;
  op->peer = call.far.empty() ? ranks_[(meeting_->rank + 1) % ranks_.size()] : call.far[0].owner;
  op->channel = channel_;
  op->link = 0;
  op->nbytes = call.function ? call.far[0].nbytes : 0;
  for (const KernelCall::Part& part : call.parts)
    for (const KernelCall::Copy& copy : part.copies) op->nbytes += copy.nbytes;
  op->capacity = op->nbytes;
  op->gpu = std::move(gpu);
  flight_ = {op, false};
  op->cookie = silent_cookie(&flight_);
  flight_.ended = engine.submit(op);
}

// Takes what has ended. What ends badly is told by its transfer, but for a call that cannot be made so.
void DeviceCall::take_ended(Engine& engine) {
  Op* op;
  while (engine.take_completed(op)) {
    if (SilentOp* silent = silent_of(op))
      silent->ended = true;
    else
      others_.push_back(op);
  }
  if (!flight_.op || !flight_.ended) return;
  voted_down_ = flight_.op->code == Code::unreachable;
  trouble_ = flight_.op->code != Code::ok && !voted_down_;
  if (!trouble_) engine.release(std::exchange(flight_.op, nullptr));
}

ArenaResult DeviceCall::run(PyEngine& e, bool lingers) {
  Engine& engine = *e.engine;
  const Meeting& m = *meeting_;
  const Arena& arena = *m.arena;
  const uint64_t began = now_ns(), takes = most_moved_ / kRate;
  const bool brief = takes <= kLingerNs;
  // To come back here from Python takes as long as to copy 10 MiB: a loop that would spin meanwhile does so here.
  const bool spins = e.spinner && takes <= std::min(e.spinner->spin_ns(), kSpinNs);
  const uint64_t until = began + (spins ? kSpinNs : Turns::kNs);
  uint64_t now = began, last = began;
  for (;;) {
    if (flight_.op) {
      take_ended(engine);
      if (!flight_.op) continue;
      if (trouble_ || !lingers || !(brief || spins) || !others_.empty() || engine.has_events() || now > until)
        return kGoingOn;
      const bool found = engine.linger(now + kLingerNs, !brief);
      looked_ = true;
      now = last = now_ns();
      if (!found && !spins) return kGoingOn;
      continue;
    }
    if (voted_down_) {
      withdraw();
      return kNotMet;
    }
    if (entered_) let_go();
    bool all = true;
    for (size_t rank = 0; rank < ranks_.size() && all; ++rank)
      all = !awaits_[rank] || arena.parts(rank, words_, awaits_[rank]).open();
    if (all) return finish();
    if (arena.broken()) return kBroken;
    if (now > until || (!lingers && now != began)) return kStuck;
    m.wait(now, last, !brief);
    now = now_ns();
  }
}

ArenaResult DeviceCall::finish() {
  meeting_->arena->set_done(meeting_->rank, number_);
  return meeting_->turns->due(now_ns()) ? kDoneTurn : kDone;
}

void DeviceCall::over() {
  arrays_ = {};
  keeps_.reset();
}

nb::object DeviceCall::take(Self self) {
  trouble_ = false;
  nb::object found = flight_.op ? as_transfer(self, flight_, keeps_.ptr()) : nb::none();
  self.p->after_submit();
  return found;
}

void DeviceCall::decline() {
  withdraw();
  over();
}

void DeviceCall::withdraw() {
  let_go();
  meeting_->arena->set_done(meeting_->rank, number_);
  voted_down_ = running_ = false;
  resumes_ = number_ + kDeclined;  // as at the others, who have had the same number
}

void DeviceCall::give_up() {
  if (!running_) return;
  if (!open_ || meeting_->leave(number_)) meeting_->arena->set_broken();
  open_ = running_ = false;
}

void DeviceCall::let_go() {
  if (std::exchange(entered_, false)) meeting_->arena->leave(meeting_->rank);
}

bool DeviceCall::left(Self self) {
  for (size_t rank = 0; rank < ranks_.size(); ++rank)
    if (rank != meeting_->rank && meeting_->arena->entered(rank) &&
        self.p->engine->why_lost(ranks_[rank]).empty())
      return false;
  over();
  return true;
}

void bind_device_call(nb::module_& m) {
  nb::class_<DeviceCall>(m, "DeviceCall",
                         "One rank's part of a collective of GPU arrays of one shape through an arena.")
      .def(nb::init<std::shared_ptr<Meeting>, std::vector<int>, uint32_t, nb::bytes, uint64_t, uint64_t,
                    uint64_t, std::vector<DeviceCall::Part>, std::vector<uint32_t>, double>(),
           "arena"_a, "ranks"_a, "channel"_a, "header"_a, "in_bytes"_a, "out_bytes"_a, "item"_a, "parts"_a,
           "awaits"_a, "stays_s"_a)
      .def("combine", &DeviceCall::combine, "function"_a, "device"_a, "blocks"_a, "threads"_a, "divide_by"_a,
           "Have this rank's part made by a kernel.")
      .def(
          "attempt",
          [](DeviceCall& self, PyEngine& engine, uint64_t number, nb::object given, nb::object out) {
            std::array<DeviceLent, 2> lent;
            for (auto [description, into] : {std::pair{&given, &lent[kIn]}, {&out, &lent[kOut]}}) {
              if (description->is_none()) continue;
              if (!read_description(description->ptr(), into->view)) throw nb::python_error();
              into->owner = *description;
            }
            return self.attempt(engine, number, lent[kIn], lent[kOut]);
          },
          "engine"_a, "number"_a, "given"_a.none(), "out"_a.none(),
          "Do the call, or begin it. 0: it is to be made by messages; 1: done; 2: done, and other tasks "
          "should have a "
          "turn; 3: `take` has what is under way; 4: others are waited for; 5: another rank has given it up; "
          "6: not all "
          "have come yet.")
      .def("proceed", &DeviceCall::proceed, "engine"_a, "last"_a,
           "Go on with it; as `attempt`. `last`: ranks that have not come are not waited for any longer.")
      .def("take", &DeviceCall::take, "engine"_a,
           "The transfer that `proceed` has to wait for, if there is one.")
      .def("decline", &DeviceCall::decline, "It is to be made by messages, as all ranks have found.")
      .def("give_up", &DeviceCall::give_up, "Fail, for all ranks.")
      .def("let_go", &DeviceCall::let_go, "What `take` gave has ended.")
      .def("left", &DeviceCall::left, "engine"_a, "Whether nobody else touches the arrays any more.");
}

}  // namespace aiocomm::py
