// Which frames of a pair have been acknowledged, whatever the order in which word of them comes.
//
// Frames travel by two queue pairs, and again by another lane where one has failed: word of a later one may come first.
// `all_before` is the oldest frame of which there is none. At most 32 are open: more need credits.
#pragma once

#include <atomic>
#include <cstdint>

namespace aiocomm::rdma {

class Acks {
 public:
  // acquire: pairs with the release of whoever heard of them.
  uint32_t all_before() const { return static_cast<uint32_t>(state_.load(std::memory_order_acquire) >> 32); }
  void one(uint32_t seq) {
    change([&](uint32_t& base, uint32_t& seen) {
      if (seq - base >= 32) return false;  // it has been heard of
      seen |= 1u << (seq - base);
      return true;
    });
  }
  // The peer has consumed all before `seq`, so its device has had them.
  void before(uint32_t seq) {
    change([&](uint32_t& base, uint32_t& seen) {
      auto ahead = static_cast<int32_t>(seq - base);
      if (ahead <= 0) return false;
      seen = ahead < 32 ? seen >> ahead : 0;
      base = seq;
      return true;
    });
  }

 private:
  template <class F>
  void change(F&& f) {
    uint64_t state = state_.load(std::memory_order_relaxed), next;
    do {
      auto base = static_cast<uint32_t>(state >> 32);
      auto seen = static_cast<uint32_t>(state);  // of the 32 from `base` on
      if (!f(base, seen)) return;
      for (; seen & 1; seen >>= 1) ++base;
      next = static_cast<uint64_t>(base) << 32 | seen;
    } while (
        !state_.compare_exchange_weak(state, next, std::memory_order_acq_rel, std::memory_order_relaxed));
  }

  std::atomic<uint64_t> state_{0};
};

}  // namespace aiocomm::rdma
