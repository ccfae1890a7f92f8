// When copies should end, who is told of it in advance, and the copy thread's sleep until then;
// and its end by an exception.
#include <poll.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "core/relax.hpp"
#include "links/cuda/device.hpp"
#include "links/cuda/reaper.hpp"

namespace aiocomm::cuda {

namespace {
constexpr uint64_t kWakeNs = 220000;
// How long before its end a long copy is announced to loops that spin, when these prepare for it, and to those that sleep.
constexpr uint64_t kAhead[] = {700000, 90000, 40000};
// A long copy takes at most this part longer than is expected of it: others share the memory and the links.
constexpr uint64_t kLateShare = 8;
constexpr uint64_t kMostLate = 1000000;
constexpr uint64_t kLongestRun = 4ull << 30;  // bytes over which a rate is taken
constexpr uint64_t kAwayNs = 20000;  // for which a loop that spins may be busy before the thread takes over
constexpr uint64_t kFullNs = 100000, kFullLongNs = 10000;  // between the thread's turns beside such a loop
constexpr int kPauses = 64;                                // of some 40 ns, between two looks at what it does
}  // namespace

// The loop may be kept from going on at any moment, so it is relied on for no longer than kAwayNs. It looks when it spins,
// and when it has submitted something.
bool Device::stands_back(uint64_t now) {
  if (!spin_ns_ || stopping_.load(std::memory_order_relaxed)) return false;
  const uint32_t looks = looks_.count.load(std::memory_order_relaxed);
  if (looks != seen_looks_) looked_ns_ = now;
  seen_looks_ = looks;
  if (now > looked_ns_ + kAwayNs || host_.loop_away()) return false;
  if (now >= full_ns_) return false;
  for (int i = 0; i < kPauses && !looks_.asks.load(std::memory_order_relaxed); ++i) relax();
  return !looks_.asks.load(std::memory_order_relaxed);
}

// The thread has had one. While a long copy is under way there is to be announced when it ends.
void Device::plan_full_turn(uint64_t now) {
  const MoveJob* first = first_between();
  full_ns_ = now + (first && first->nbytes >= kLong ? kFullLongNs : kFullNs);
}

void Device::rehearse() {
  std::unique_lock lock(turn_, std::try_to_lock);
  if (!lock.owns_lock() || lost_ || !first_between() || !streams_[kLocal].inflight.empty()) return;
  Reaper::Undisturbed undisturbed(Reaper::of_process());
  if (!undisturbed) return;
  Current current(*this);
  tell(streams_[kLocal], false);  // once more what was told last
}

// A copy between devices has ended. What is expected of the next follows a faster one at once and a slower one by and by:
// a loop that is woken too late has missed the end. Over some copies in a row one end that was seen late counts for little.
void Device::rate(const MoveJob& job) {
  if (job.issued_ns >= peer_done_ns_ || run_bytes_ > kLongestRun) {
    run_began_ns_ = std::max(job.issued_ns, peer_done_ns_);
    run_bytes_ = 0;
  }
  peer_done_ns_ = job.ended_ns;
  run_bytes_ += job.nbytes;
  if (job.nbytes < kLong || job.rows || job.ended_ns <= run_began_ns_) return;
  const double seen = static_cast<double>(run_bytes_) / static_cast<double>(job.ended_ns - run_began_ns_);
  peer_rate_ = std::max(seen, peer_rate_ + (seen - peer_rate_) / 2);
  late_ns_ -=
      late_ns_ / 64;  // where all ends are watched from the beginning, no sleep says that timers are good
}

// Whatever their streams, copies between devices run first in, first out: this one ends next. Null: none is under way.
const MoveJob* Device::first_between() const {
  const MoveJob* first = nullptr;
  for (size_t i = 0; i < kPeerStreams; ++i) {
    if (streams_[i].inflight.empty()) continue;
    const MoveJob& job = streams_[i].inflight.front().second;
    if (!first || job.order < first->order) first = &job;
  }
  return first;
}

uint64_t Device::takes(const MoveJob& job) const {
  return static_cast<uint64_t>(static_cast<double>(job.nbytes) / peer_rate_) + job.slow_ns;
}

uint64_t Device::expected_end(const MoveJob& job) const {
  return std::max(job.issued_ns, peer_done_ns_) + takes(job);
}

// About when the copy that ends next should; 0: none is under way.
uint64_t Device::expected_end() const {
  const MoveJob* first = first_between();
  uint64_t soonest = first ? expected_end(*first) : 0;
  for (size_t i = kPeerStreams; i < kStreams; ++i) {
    if (streams_[i].inflight.empty()) continue;
    const MoveJob& job = streams_[i].inflight.front().second;
    const uint64_t rate = i == kLocal ? 1000 : 60;  // bytes per ns, of the fastest
    const uint64_t end = std::max(job.issued_ns, streams_[i].done_ns) + job.nbytes / rate + job.slow_ns;
    soonest = soonest ? std::min(soonest, end) : end;
  }
  return soonest;
}

// How long before its end a copy is watched. Timers of virtual machines may be late by half a millisecond.
uint64_t Device::margin() const { return 2 * (kWakeNs + late_ns_); }

// Waking up takes longer than what is left.
bool Device::ends_soon(uint64_t now) const {
  const uint64_t end = expected_end();
  if (!end || now + margin() <= end) return false;
  const MoveJob* first = first_between();
  return now < end + spin_ns_ + (first ? takes(*first) / kLateShare : 0);
}

void Device::announce_end(uint64_t now) {
  const MoveJob* job = first_between();
  if (!job || job->nbytes < kLong) return;
  const uint64_t end = expected_end(*job), late = takes(*job) / kLateShare;
  for (size_t turn = 0; turn < announced_.size(); ++turn) {
    if (now + kAhead[turn] < end || announced_[turn] == job->order) continue;
    announced_[turn] = job->order;
    if (turn == 1)
      host_.prepare_end(job->op);
    else
      host_.ends_soon(job->op, turn == 0 ? std::max(end, now) - now + kAhead[2] + late : kAhead[2]);
  }
}

// The worst of late, which is forgotten by and by.
void Device::late_by(uint64_t ns) { late_ns_ = std::min(std::max(ns, late_ns_ - late_ns_ / 16), kMostLate); }

uint64_t Device::newest_gate() const {
  uint64_t newest = 0;
  for (const GateWait& gate : gates_) newest = std::max(newest, gate.since_ns);
  return newest;
}

void Device::sleep(uint64_t now) {
  constexpr uint64_t kShort = 20000, kRarely = 200000;
  constexpr uint64_t kOfAge = 8;  // what has been waited for so long is seen later by this part of it at most
  uint64_t ns = 0;
  prepare_sleep(wake_);
  std::unique_lock lock(turn_, std::try_to_lock);
  // Pairs with ring(): either it sees us asleep, or we see what it brought.
  if (!lock.owns_lock() || looks_.asks.load(std::memory_order_relaxed) || !left_.empty() || !jobs_.empty() ||
      !gate_queue_.empty() || (stopping_.load(std::memory_order_acquire) && idle())) {
    awake(wake_);
    return;
  }
  pollfd bell{bell_, POLLIN, 0};
  timespec limit{};
  timespec* timeout = nullptr;
  if (!idle()) {
    uint64_t end = expected_end();
    ns = kShort;
    if (end > now + margin() + kShort)
      ns = end - now - margin();
    else if (end == 0 || now > end + 1000000)
      ns = std::clamp((now - std::min(now, std::max(end, newest_gate()))) / kOfAge, kShort, kRarely);
    limit.tv_sec = static_cast<time_t>(ns / 1000000000);
    limit.tv_nsec = static_cast<long>(ns % 1000000000);
    timeout = &limit;
  }
  lock.unlock();
  if (ppoll(&bell, 1, timeout, nullptr) == 0) late_by(now_ns() - now - ns);
  awake(wake_);
  clear_fd(bell_);
}

// By the thread, which ends with an exception: nobody else would say what has become of what it has.
void Device::fail_all() noexcept try {
  std::lock_guard lock(turn_);
  if (!lost_) lost_ = CUDA_ERROR_UNKNOWN;
  for (Stream& stream : streams_) fail(stream, lost_);
  for (MoveJob job; !left_.empty() || jobs_.pop(job);) {
    if (!left_.empty()) job = left_.front(), left_.pop_front();
    job.error = lost_;
    finished_.push_back(job);
  }
  if (!finished_.empty()) finish();
} catch (const std::exception&) {
}

}  // namespace aiocomm::cuda
