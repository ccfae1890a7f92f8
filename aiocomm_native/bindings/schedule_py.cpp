// Prepared calls for Python: how they are made, begun, and handed over. What happens in between is in prepared_call.hpp.

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/prepared_call.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

PreparedCall::PreparedCall(uint32_t channel, nb::bytes header, int rank, std::vector<int> ranks,
                           uint64_t width, int64_t header_tag, const Rides& sends, const Rides& receives,
                           bool eager, bool writes, const std::vector<StepTuple>& steps, uint64_t item,
                           const std::string& format, const std::string& op, bool on_gpu)
    : channel_(channel),
      header_(header.c_str(), header.size()),
      rank_(rank),
      ranks_(std::move(ranks)),
      width_(width),
      header_tag_(header_tag),
      eager_(eager),
      writes_(writes),
      item_(item),
      reduction_(find_reduction(format, op)),
      on_gpu_(on_gpu) {
  for (const StepTuple& step : steps) steps_.emplace_back(step);
  const size_t n = ranks_.size();
  gives_.resize(n);
  takes_.resize(n);
  for (const auto& [peer, span] : sends) gives_.at(peer) = Span(span);
  for (const auto& [peer, span] : receives) takes_.at(peer) = Span(span);
  if (on_gpu && (eager || !sends.empty())) throw nb::value_error("GPU memory does not ride with headers");
  flights_.resize(2 * n + steps_.size() * (on_gpu ? 2 : 1));
  uint64_t incoming = 0;
  for (const Step& step : steps_) {
    for (const Span* span : {&step.first, &step.second, &step.third}) need(*span);
    if (step.kind == kReduce && (!reduction_ || on_gpu))
      throw nb::value_error("a reduction that is not done here");
    if (step.kind == kRecv) incoming += step.first.nbytes();
    for (uint32_t follower : step.followers)
      if (follower >= steps_.size()) throw nb::value_error("a step that follows is not there");
  }
  large_ = on_gpu && incoming > kLargeBytes;
  for (const auto* spans : {&gives_, &takes_})
    for (const Span& span : *spans) need(span);
  most_ = 0;
  for (const Span& span : gives_) most_ = std::max(most_, header_.size() + span.nbytes());
}

nb::object PreparedCall::attempt(nb::pointer_and_handle<PyEngine> self, int64_t tag, nb::handle given,
                                 nb::handle out, nb::handle slots, nb::handle scratch, double deadline) {
  PyEngine& e = *self.p;
  if (running_ || !e.on_submit.empty() || !e.on_complete.empty()) return nb::bool_(false);
  std::array<Lent, 4> lent;  // by Buffer, then the slots
  const std::array<std::pair<nb::handle, bool>, 4> objects{
      {{given, false}, {out, writes_}, {scratch, true}, {slots, true}}};
  if (on_gpu_ && !e.engine->mover()) return nb::bool_(false);
  for (size_t i = 0; i < lent.size(); ++i) {
    PyObject* object = objects[i].first.ptr();
    const bool device = on_gpu_ && i < kTmp;
    if (!(device ? lent[i].bind(object, *e.engine->mover()) : lent[i].borrow(object, objects[i].second)))
      return nb::bool_(false);
    data_[i] = lent[i].data;
    if (i < kBuffers) gpu_[i] = lent[i].gpu.get();
  }
  for (int i = 0; i < kBuffers; ++i)
    if (lent[i].nbytes < needs_[i] || reinterpret_cast<uintptr_t>(data_[i]) % item_) return nb::bool_(false);
  const Lent &from = lent[kIn], &into = lent[kOut];
  if (lent[kBuffers].nbytes < slot_bytes() || from.overlaps(into) || in_use(e, into)) return nb::bool_(false);
  tag_ = tag;
  deadline_ns_ = deadline >= 0 ? e.engine->now() + static_cast<uint64_t>(deadline * 1e9) + 1 : 0;
  running_ = true;
  run(e);
  running_ = false;
  e.after_submit();
  sweep(*e.engine);
  if (done()) return nb::none();
  return hand_over(self, lent);
}

nb::object PreparedCall::hand_over(nb::pointer_and_handle<PyEngine> self, std::array<Lent, 4>& lent) {
  nb::list heads, steps, waits, ready, wholes = wholes_of(lent);
  for (size_t key = 0; key < flights_.size(); ++key) {
    SilentOp& flight = flights_[key];
    if (!flight.op) continue;
    const bool is_twin = key >= twin_key(0), is_step = key >= step_key(0) && !is_twin;
    const PyObject* keep = lent[kBuffers].owner;
    if (on_gpu_ && (is_step || is_twin))
      keep = wholes.ptr();
    else if (is_step)
      keep = lent[steps_[key - step_key(0)].first.buffer].owner;
    nb::object transfer = as_transfer(self, flight, const_cast<PyObject*>(keep));
    if (is_twin)
      steps.append(nb::make_tuple(~static_cast<int64_t>(key - twin_key(0)), transfer));
    else if (is_step)
      steps.append(nb::make_tuple(key - step_key(0), transfer));
    else
      heads.append(nb::make_tuple(key, transfer));
  }
  if (!eager_) {
    for (uint32_t one : waits_) waits.append(one);
    for (uint32_t one : ready_) ready.append(one);
  }
  return nb::make_tuple(heads, steps, waits, ready, left_);
}

void bind_schedule(nb::module_& m) {
  m.def(
      "reduces",
      [](const std::string& format, const std::string& op) { return find_reduction(format, op) != nullptr; },
      nb::arg("format"), nb::arg("op"), "Whether the extension reduces elements of this format by itself.");
  nb::class_<PreparedCall>(
      m, "PreparedCall",
      "One rank's part of a collective call of one shape, run without the event loop as far as "
      "that goes.")
      .def(nb::init<uint32_t, nb::bytes, int, std::vector<int>, uint64_t, int64_t, const Rides&, const Rides&,
                    bool, bool, const std::vector<StepTuple>&, uint64_t, const std::string&,
                    const std::string&, bool>(),
           nb::arg("channel"), nb::arg("header"), nb::arg("rank"), nb::arg("ranks"), nb::arg("width"),
           nb::arg("header_tag"), nb::arg("sends"), nb::arg("receives"), nb::arg("eager"), nb::arg("writes"),
           nb::arg("steps"), nb::arg("item"), nb::arg("format"), nb::arg("op"), nb::arg("on_gpu") = false)
      .def_prop_ro("slot_bytes", &PreparedCall::slot_bytes)
      .def("attempt", &PreparedCall::attempt, nb::arg("engine"), nb::arg("tag"), nb::arg("given").none(),
           nb::arg("out").none(), nb::arg("slots"), nb::arg("scratch").none(), nb::arg("deadline"),
           "Do the call. None: it is done; False: nothing was begun; else what is under way.");
}

}  // namespace aiocomm::py
