// One rank's part of a collective, run by one call into the extension as far as it goes without its event loop.
//
// Rules
//   - `attempt` posts the headers and every step that may begin, then looks for news while the loop has nothing else to
//     do, and begins what may begin next. No transfer is made for an operation that ends meanwhile.
//   - It decides nothing that is not plain success. Whatever has failed, differs or is still under way is handed over
//     as transfers, with the counts of what each step waits for; Python goes on from there (aiocomm/collectives/call.py).
//   - What is being copied for its receives is copied by the calling thread, which has nothing better to do.
//   - GPU arrays are described and bound once per call, so their streams are waited for once; a message is about a part
//     of what was bound. A copy between two of them is a message to oneself.
//   - The arrays and the frame (`slots`, `scratch`) belong to the caller; transfers that are handed over keep them.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/schedule.hpp"
#include "bindings/transfer.hpp"
#include "core/reduce.hpp"
#include "links/shm/copy.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

constexpr uint64_t kLingerNs = 100000;     // that is looked for news before the loop gets its turn, at most
constexpr uint64_t kTurnNs = 1000000;      // of one call, after which other tasks get a turn
constexpr uint64_t kLargeBytes = 8 << 20;  // to be received by GPUs: takes longer than a wake-up
constexpr uint64_t kAnswerNs =
    15000;  // after which a large message that both sides have called for is under way

class PreparedCall {
 public:
  PreparedCall(uint32_t channel, nb::bytes header, int rank, std::vector<int> ranks, uint64_t width,
               int64_t header_tag, const Rides& sends, const Rides& receives, bool eager, bool writes,
               const std::vector<StepTuple>& steps, uint64_t item, const std::string& format,
               const std::string& op, bool on_gpu)
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

  // Bytes of `slots`: what comes from each rank, then what is sent to each.
  uint64_t slot_bytes() const { return ranks_.size() * (width_ + most_); }
  uint64_t scratch_bytes() const { return needs_[kTmp]; }

  nb::object attempt(nb::pointer_and_handle<PyEngine> self, int64_t tag, nb::handle given, nb::handle out,
                     nb::handle slots, nb::handle scratch, double deadline) {
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
      if (lent[i].nbytes < needs_[i] || reinterpret_cast<uintptr_t>(data_[i]) % item_)
        return nb::bool_(false);
    const Lent &from = lent[kIn], &into = lent[kOut];
    if (lent[kBuffers].nbytes < slot_bytes() || from.overlaps(into) || in_use(e, into))
      return nb::bool_(false);
    tag_ = tag;
    deadline_ns_ = deadline >= 0 ? e.engine->now() + static_cast<uint64_t>(deadline * 1e9) + 1 : 0;
    running_ = true;
    run(e);
    running_ = false;
    if (e.engine->has_completed() || e.engine->has_events()) {
      e.ended_outside = true;
      if (e.drain(256) < 0) PyErr_WriteUnraisable(self.h.ptr());
    }
    sweep(*e.engine);
    if (done()) return nb::none();
    return hand_over(self, lent);
  }

 private:
  size_t size() const { return ranks_.size(); }
  size_t step_key(size_t step) const { return 2 * size() + step; }
  // Of the message of a step that copies within a GPU: what is sent to oneself.
  size_t twin_key(size_t step) const { return step_key(steps_.size() + step); }
  bool done() const { return !trouble_ && judged_ && !missing_ && !sending_ && !left_ && !twins_; }
  std::byte* at(const Span& span) const { return data_[span.buffer] + span.start; }
  std::byte* slot(size_t peer) const { return data_[kBuffers] + peer * width_; }

  void need(const Span& span) {
    if (span.buffer < 0 || span.buffer >= kBuffers || span.stop < span.start)
      throw nb::value_error("a span of no buffer");
    if (span.nbytes()) needs_[span.buffer] = std::max(needs_[span.buffer], span.stop);
  }

  // Whether a receive that is under way writes there: then posting tells the caller so, in its own words.
  static bool in_use(const PyEngine& e, const Lent& memory) {
    return std::any_of(e.receiving.begin(), e.receiving.end(), [&](const auto& busy) {
      return busy.first < memory.data + memory.nbytes && memory.data < busy.first + busy.second;
    });
  }

  void run(PyEngine& e) {
    Engine& engine = *e.engine;
    bool lingers = loop_has_nothing_else(&e), looked = false;
    std::vector<Op*> others;  // ended meanwhile, of transfers
    {
      nb::gil_scoped_release release;
      const uint64_t turn_ends = engine.now() + kTurnNs;
      engine.host_copies(lingers);
      begin(engine);
      while (!trouble_ && !done()) {
        if (take_ended(engine, others)) continue;
        if (!others.empty() || engine.has_events()) {
          nb::gil_scoped_acquire acquire;
          for (Op* op : std::exchange(others, {})) end_transfer(static_cast<Transfer*>(op->cookie));
          e.ended_outside = true;
          if (!e.deliver_events()) PyErr_WriteUnraisable(nullptr);
          lingers = lingers && loop_has_nothing_else(&e);
          sweep(engine);
          continue;
        }
        const uint64_t now = engine.now();
        if (!lingers || now > turn_ends) break;
        looked = true;
        const bool moves = large_ && judged_;
        // Also where the loop may spin: with fewer cores than processes, who spins keeps its peer from running.
        const bool found = engine.linger(now + (moves ? kAnswerNs : kLingerNs));
        if (!found || moves) break;
      }
      engine.host_copies(false);
      // A loop that spins says by itself that it is about to sleep; others have done so already, and were taken awake.
      if (looked && !e.spinner) engine.loop_sleeps();
    }
    for (Op* op : others) end_transfer(static_cast<Transfer*>(op->cookie));
  }

  void begin(Engine& engine) {
    const size_t n = size();
    std::fill(flights_.begin(), flights_.end(), SilentOp{});
    trouble_ = judged_ = false;
    missing_ = sending_ = n - 1;
    left_ = eager_ ? 0 : steps_.size();
    twins_ = 0;
    ready_.clear();
    waits_.resize(steps_.size());
    // Sent first: the peers wait for it.
    std::byte* messages = slot(n);
    for (size_t away = 1; away < n; ++away) {
      const size_t peer = (rank_ + away) % n;
      std::byte* message = messages + peer * most_;
      std::memcpy(message, header_.data(), header_.size());
      const Span& rides = gives_[peer];
      if (rides.nbytes()) std::memcpy(message + header_.size(), at(rides), rides.nbytes());
      post(engine, OpKind::send, n + peer, peer, message, header_.size() + rides.nbytes(), header_tag_,
           nullptr);
    }
    if (!eager_)
      for (size_t i = 0; i < steps_.size(); ++i) {
        waits_[i] = steps_[i].waits;
        if (!waits_[i]) enqueue(static_cast<uint32_t>(i));
      }
    advance(engine, true);
    for (size_t away = 1; away < n; ++away) {
      const size_t peer = (rank_ + n - away) % n;
      post(engine, OpKind::recv, peer, peer, slot(peer), width_, header_tag_, nullptr);
    }
    advance(engine);
    judge_if_all_came();
  }

  void post(Engine& engine, OpKind kind, size_t key, size_t peer, const Span& span, int64_t tag) {
    std::unique_ptr<DeviceBuffer> gpu;
    if (gpu_[span.buffer]) gpu = engine.mover()->part(*gpu_[span.buffer], span.start, span.nbytes());
    post(engine, kind, key, peer, at(span), span.nbytes(), tag, std::move(gpu));
  }

  void post(Engine& engine, OpKind kind, size_t key, size_t peer, std::byte* data, uint64_t nbytes,
            int64_t tag, std::unique_ptr<DeviceBuffer> gpu) {
    Op* op = engine.new_op();
    op->gpu = std::move(gpu);
    op->kind = kind;
    op->peer = ranks_[peer];
    op->channel = channel_;
    op->tag = tag_ | tag;
    op->link = 0;
    op->data = data;
    op->nbytes = op->capacity = nbytes;
    op->deadline_ns = deadline_ns_;
    flights_[key] = {op, false};
    op->cookie = silent_cookie(&flights_[key]);
    if (engine.submit(op)) ended(engine, key);
  }

  void enqueue(uint32_t step) {
    ready_.push_back(step);
    std::push_heap(ready_.begin(), ready_.end(), std::greater<>());
  }

  // Begins what may begin; `messages_only`: up to the first step that takes this thread's time.
  void advance(Engine& engine, bool messages_only = false) {
    while (!ready_.empty() && !trouble_) {
      const uint32_t index = ready_.front();
      const Step& step = steps_[index];
      if (messages_only && !on_gpu_ && (step.kind == kCopy || step.kind == kReduce)) return;
      std::pop_heap(ready_.begin(), ready_.end(), std::greater<>());
      ready_.pop_back();
      if (step.kind == kSend || step.kind == kRecv) {
        post(engine, step.kind == kSend ? OpKind::send : OpKind::recv, step_key(index),
             static_cast<size_t>(step.peer), step.first, step.tag);
        continue;
      }
      if (on_gpu_) {
        ++twins_;
        post(engine, OpKind::recv, step_key(index), rank_, step.first, 1 + index);
        post(engine, OpKind::send, twin_key(index), rank_, step.second, 1 + index);
        continue;
      }
      do_local(step);
      step_ended(index);
    }
  }

  void do_local(const Step& step) const {
    if (step.kind == kCopy)
      shm::copy_large(at(step.first), at(step.second), step.first.nbytes());
    else
      reduction_(at(step.first), at(step.second), at(step.third), step.first.nbytes() / item_);
  }

  void step_ended(uint32_t index) {
    --left_;
    for (uint32_t follower : steps_[index].followers)
      if (!--waits_[follower]) enqueue(follower);
  }

  // False: nothing of this call has ended, and nothing of others.
  bool take_ended(Engine& engine, std::vector<Op*>& others) {
    bool any = false;
    Op* op;
    while (engine.take_completed(op)) {
      SilentOp* silent = silent_of(op);
      if (!silent) {
        others.push_back(op);
        continue;
      }
      silent->ended = true;
      const auto key = silent - flights_.data();
      if (key < 0 || static_cast<size_t>(key) >= flights_.size()) continue;  // of another call
      ended(engine, static_cast<size_t>(key));
      any = true;
    }
    if (any) go_on(engine);
    return any;
  }

  // Takes what has been marked by a drain in between.
  void sweep(Engine& engine) {
    for (size_t key = 0; key < flights_.size(); ++key)
      if (flights_[key].op && flights_[key].ended && flights_[key].op->code == Code::ok) ended(engine, key);
    go_on(engine);
  }

  void go_on(Engine& engine) {
    advance(engine);
    judge_if_all_came();
  }

  void ended(Engine& engine, size_t key) {
    SilentOp& flight = flights_[key];
    Op* op = flight.op;
    flight.ended = true;
    const bool is_twin = key >= twin_key(0), is_step = key >= step_key(0) && !is_twin;
    const size_t index = key - step_key(0);
    if (op->code != Code::ok ||
        (is_step && op->kind == OpKind::recv && op->moved != steps_[index].first.nbytes())) {
      trouble_ = true;
      return;
    }
    engine.release(op);
    flight.op = nullptr;
    if (is_twin)
      --twins_;
    else if (is_step)
      step_ended(static_cast<uint32_t>(index));
    else if (key < size())
      --missing_;
    else
      --sending_;
  }

  // Where all headers agree, so do the sizes of what came with them. What came is used once, so not before all that
  // could be left to Python has ended.
  void judge_if_all_came() {
    if (missing_ || judged_ || trouble_ || (eager_ && sending_)) return;
    for (size_t peer = 0; peer < size(); ++peer)
      if (peer != rank_ && std::memcmp(slot(peer), header_.data(), header_.size()) != 0) {
        trouble_ = true;
        return;
      }
    judged_ = true;
    if (!eager_) return;
    for (size_t peer = 0; peer < size(); ++peer)
      if (takes_[peer].nbytes())
        std::memcpy(at(takes_[peer]), slot(peer) + header_.size(), takes_[peer].nbytes());
    for (const Step& step : steps_) do_local(step);
  }

  // (headers under way, by key as in Exchange; steps under way, and as ~step what is sent to oneself for one; what each
  // step waits for; steps that may begin)
  nb::object hand_over(nb::pointer_and_handle<PyEngine> self, std::array<Lent, 4>& lent) {
    nb::list heads, steps, waits, ready, wholes;
    for (Lent& one : lent) {
      if (!one.gpu) continue;
      wholes.append(nb::borrow(one.owner));
      wholes.append(nb::steal(new_device_memory(std::move(one.gpu))));
    }
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

  static nb::object as_transfer(nb::pointer_and_handle<PyEngine> self, SilentOp& flight, PyObject* keep) {
    Op* op = std::exchange(flight.op, nullptr);
    const bool has_ended = flight.ended;
    Transfer* t = new_transfer(self.h.ptr(), self.p, op->kind);
    if (!t) Py_FatalError("no memory for a transfer that is under way");
    t->op = op;
    t->peer = op->peer;
    t->channel = op->channel;
    t->tag = op->tag;
    t->nbytes = op->nbytes;
    t->keep = Py_NewRef(keep);
    op->cookie = t;
    PyObject* handle = reinterpret_cast<PyObject*>(t);
    Py_INCREF(handle);  // the engine's reference, until end_transfer
    if (has_ended) {
      end_transfer(t);
    } else if (op->kind == OpKind::recv && op->capacity) {
      self.p->receiving.emplace(op->data, op->capacity);
      t->tracked = true;
    }
    return nb::steal(handle);
  }

  const uint32_t channel_;
  const std::string header_;
  const size_t rank_;
  const std::vector<int> ranks_;  // of the world, by rank of the group
  const uint64_t width_;          // of a slot
  const int64_t header_tag_;
  const bool eager_;   // all data ride with the headers; the steps are what is left to do with them
  const bool writes_;  // to `out`
  const uint64_t item_;
  const Reduction reduction_;
  const bool on_gpu_;  // `in` and `out` are
  bool large_ = false;
  std::vector<Step> steps_;
  std::vector<Span> gives_, takes_;  // by rank of the group
  std::array<uint64_t, kBuffers> needs_{};
  uint64_t most_ = 0;  // bytes of a header and what rides with it

  // Of the call that runs.
  bool running_ = false, trouble_ = false, judged_ = false;
  int64_t tag_ = 0;
  uint64_t deadline_ns_ = 0;
  std::array<std::byte*, kBuffers + 1> data_{};
  std::array<const DeviceBuffer*, kBuffers> gpu_{};
  std::vector<SilentOp> flights_;  // headers from each rank, headers to each rank, steps
  std::vector<uint32_t> waits_, ready_;
  size_t missing_ = 0, sending_ = 0, left_ = 0, twins_ = 0;
};

}  // namespace

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
      .def_prop_ro("scratch_bytes", &PreparedCall::scratch_bytes)
      .def("attempt", &PreparedCall::attempt, nb::arg("engine"), nb::arg("tag"), nb::arg("given").none(),
           nb::arg("out").none(), nb::arg("slots"), nb::arg("scratch").none(), nb::arg("deadline"),
           "Do the call. None: it is done; False: nothing was begun; else what is under way.");
}

}  // namespace aiocomm::py
