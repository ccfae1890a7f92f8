// Scheduler: which class is served, and whether the window admits it.
#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

#include "core/sched.hpp"

namespace aiocomm {

namespace {

void require(bool legal, const char* what) {
  if (!legal) throw std::invalid_argument(what);
}

constexpr unsigned below(unsigned cls) { return (1u << cls) - 1; }

// `classes` has a bit per backlogged class.
constexpr bool contended(unsigned cls, unsigned classes) {
  return (classes >> cls & 1) != 0 && (classes & below(cls)) != 0;
}

}  // namespace

void Scheduler::complete(uint64_t nbytes, uint64_t elapsed_ns, uint8_t cls) {
  require(cls < kClasses, "classes are 0 to 3");
  require(nbytes <= in_flight_[cls], "more than is in flight");
  in_flight_[cls] -= nbytes;
  if (elapsed_ns == 0 || nbytes < config_.min_chunk) return;
  rate_.add(nbytes, elapsed_ns);
}

void Scheduler::declare(uint8_t cls, bool declared) {
  require(cls < kClasses, "classes are 0 to 3");
  declared_[cls] = declared;
}

bool Scheduler::has_urgent() const noexcept {
  bool below = false;
  for (unsigned cls = 0; cls < kClasses; ++cls) {
    if (below && bounds(cls)) return true;
    below |= registered_[cls] > 0;
  }
  return false;
}

bool Scheduler::has_rivals() const noexcept {
  return std::any_of(classes_.begin(), classes_.end(),
                     [](const FairQueue& groups) { return groups.size() > 1; });
}

uint64_t Scheduler::in_flight() const noexcept {
  return std::accumulate(in_flight_.begin(), in_flight_.end(), uint64_t{0});
}

uint64_t Scheduler::in_flight(uint8_t cls) const {
  require(cls < kClasses, "classes are 0 to 3");
  return in_flight_[cls];
}

uint64_t Scheduler::window(uint8_t cls) const {
  require(cls < kClasses, "classes are 0 to 3");
  uint64_t window = config_.max_window;
  for (unsigned urgent = cls + 1u; urgent < kClasses; ++urgent) {
    if (bounds(urgent)) window = std::min(window, preempt_window(urgent));
  }
  return window;
}

uint64_t Scheduler::chunk_size(uint8_t cls) const {
  require(cls < kClasses, "classes are 0 to 3");
  for (unsigned urgent = cls + 1u; urgent < kClasses; ++urgent) {
    if (bounds(urgent)) return std::clamp(window(cls) / 2, config_.min_chunk, config_.max_chunk);
  }
  return config_.max_chunk;
}

// The window that classes below `cls` share.
uint64_t Scheduler::preempt_window(unsigned cls) const noexcept {
  const double drained = rate() * static_cast<double>(preempt_ns_[cls]);
  if (!(drained < static_cast<double>(config_.max_window))) return config_.max_window;
  return std::max(static_cast<uint64_t>(drained), config_.min_window);
}

Scheduler::Admission Scheduler::admit(unsigned cls, uint64_t nbytes) const noexcept {
  const auto first = in_flight_.begin();
  const auto own = first + cls;
  if (std::accumulate(own, in_flight_.end(), uint64_t{0}) == 0) return Admission::kYes;
  uint64_t less_urgent = std::accumulate(first, own, uint64_t{0});
  for (unsigned urgent = cls + 1; urgent < kClasses; ++urgent) {
    less_urgent += in_flight_[urgent - 1];
    if (bounds(urgent) && less_urgent + nbytes > preempt_window(urgent)) {
      return Admission::kOwnWindowFull;
    }
  }
  return in_flight() + nbytes > config_.max_window ? Admission::kLinkFull : Admission::kYes;
}

// The most urgent class, unless one below is owed a whole chunk. Where that chunk only lacks room on the
// link, it is chosen nevertheless: else small urgent chunks would take every gap before it.
unsigned Scheduler::choose_class(unsigned classes) noexcept {
  if (std::has_single_bit(classes)) {
    owed_ = {};
    return static_cast<unsigned>(std::countr_zero(classes));
  }
  auto choice = static_cast<unsigned>(std::countr_zero(classes));
  for (unsigned cls = 1; cls < kClasses; ++cls) {
    if (!contended(cls, classes)) {
      owed_[cls] = 0;
      if ((classes >> cls & 1) != 0) choice = cls;
      continue;
    }
    const uint64_t nbytes = front_bytes(choice);
    const int64_t due = (kShareOne - share_) * static_cast<int64_t>(charged(nbytes));
    if (owed_[cls] < due || admit(choice, nbytes) == Admission::kOwnWindowFull) choice = cls;
  }
  return choice;
}

void Scheduler::account_share(unsigned cls, uint64_t nbytes, unsigned classes) noexcept {
  const auto cost = static_cast<int64_t>(charged(nbytes));
  // Below the cap fit what is owed but not due yet, and this chunk. What could not be posted in time is lost.
  const int64_t cap = kShareOne * static_cast<int64_t>(config_.max_chunk);
  if (contended(cls, classes)) owed_[cls] = std::min(owed_[cls] + share_ * cost, cap);
  for (unsigned urgent = cls + 1; urgent < kClasses; ++urgent) {
    if (contended(urgent, classes)) owed_[urgent] -= (kShareOne - share_) * cost;
  }
}

}  // namespace aiocomm
