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
#pragma once

#include <nanobind/nanobind.h>

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
#include "core/copy.hpp"
#include "core/reduce.hpp"
#include "core/relax.hpp"

namespace aiocomm::py {

class PreparedCall {
 public:
  using Self = nanobind::pointer_and_handle<PyEngine>;
  PreparedCall(uint32_t channel, nanobind::bytes header, int rank, std::vector<int> ranks, uint64_t width,
               int64_t header_tag, const Rides& sends, const Rides& receives, bool eager, bool writes,
               const std::vector<StepTuple>& steps, uint64_t item, const std::string& format,
               const std::string& op, bool on_gpu);

  // Bytes of `slots`: what comes from each rank, then what is sent to each.
  uint64_t slot_bytes() const { return ranks_.size() * (width_ + most_); }

  nanobind::object attempt(Self self, int64_t tag, nanobind::handle given, nanobind::handle out,
                           nanobind::handle slots, nanobind::handle scratch, double deadline);

 private:
  // In ns: how long news is looked for before the loop gets its turn, at most; after which a large message that both sides
  // have called for is under way.
  static constexpr uint64_t kLingerNs = 100000, kAnswerNs = 15000;
  static constexpr uint64_t kLargeBytes = 8 << 20;  // to be received by GPUs: takes longer than a wake-up

  size_t size() const { return ranks_.size(); }
  size_t step_key(size_t step) const { return 2 * size() + step; }
  // Of the message of a step that copies within a GPU: what is sent to oneself.
  size_t twin_key(size_t step) const { return step_key(steps_.size() + step); }
  bool done() const { return !trouble_ && judged_ && !missing_ && !sending_ && !left_ && !twins_; }
  std::byte* at(const Span& span) const { return data_[span.buffer] + span.start; }
  std::byte* slot(size_t peer) const { return data_[kBuffers] + peer * width_; }

  void need(const Span& span) {
    if (span.buffer < 0 || span.buffer >= kBuffers || span.stop < span.start)
      throw nanobind::value_error("a span of no buffer");
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
      nanobind::gil_scoped_release release;
      const uint64_t turn_ends = engine.now() + Turns::kNs;
      engine.host_copies(lingers);
      begin(engine);
      while (!trouble_ && !done()) {
        if (take_ended(engine, others)) continue;
        if (!others.empty() || engine.has_events()) {
          nanobind::gil_scoped_acquire acquire;
          for (Op* op : std::exchange(others, {})) end_transfer(static_cast<Transfer*>(op->cookie));
          e.ended_outside = true;
          e.deliver_events();
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
    if (!eager_) enqueue_first();
    advance(engine, true);
    for (size_t away = 1; away < n; ++away) {
      const size_t peer = (rank_ + n - away) % n;
      post(engine, OpKind::recv, peer, peer, slot(peer), width_, header_tag_, nullptr);
    }
    advance(engine);
    judge_if_all_came(engine);
  }

  void enqueue_first() {
    for (size_t i = 0; i < steps_.size(); ++i) {
      waits_[i] = steps_[i].waits;
      if (!waits_[i]) enqueue(static_cast<uint32_t>(i));
    }
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
      copy_large(at(step.first), at(step.second), step.first.nbytes());
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
    judge_if_all_came(engine);
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
  void judge_if_all_came(Engine& engine) {
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
  // step waits for; steps that may begin; how many have not ended)
  nanobind::object hand_over(Self self, std::array<Lent, 4>& lent);

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

}  // namespace aiocomm::py
