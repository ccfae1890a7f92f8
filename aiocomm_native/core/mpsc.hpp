// Bounded lock-free queue, many producers, one consumer at a time (Dmitry Vyukov's array queue).
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <memory>
#include <utility>

namespace aiocomm {

template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity)
      : mask_(std::bit_ceil(capacity < 2 ? 2 : capacity) - 1), cells_(std::make_unique<Cell[]>(mask_ + 1)) {
    for (size_t i = 0; i <= mask_; ++i) cells_[i].sequence.store(i, std::memory_order_relaxed);
  }

  bool push(T value) {
    size_t at = tail_.load(std::memory_order_relaxed);
    for (;;) {
      Cell& cell = cells_[at & mask_];
      // acquire: pairs with the consumer's release in pop(), so the slot's old value has been read
      auto lag = static_cast<std::ptrdiff_t>(cell.sequence.load(std::memory_order_acquire) - at);
      if (lag < 0) return false;
      if (lag > 0) {
        at = tail_.load(std::memory_order_relaxed);
      } else if (tail_.compare_exchange_weak(at, at + 1, std::memory_order_relaxed)) {
        cell.value = value;
        cell.sequence.store(at + 1, std::memory_order_release);  // pairs with pop()'s acquire
        return true;
      }
    }
  }

  bool pop(T& out) {
    size_t at = head_.load(std::memory_order_relaxed);
    Cell& cell = cells_[at & mask_];
    if (cell.sequence.load(std::memory_order_acquire) != at + 1) return false;
    out = std::move(cell.value);
    cell.sequence.store(at + mask_ + 1, std::memory_order_release);
    head_.store(at + 1, std::memory_order_relaxed);
    return true;
  }

  bool empty() const {
    size_t at = head_.load(std::memory_order_relaxed);
    return cells_[at & mask_].sequence.load(std::memory_order_acquire) != at + 1;
  }

 private:
  struct Cell {
    std::atomic<size_t> sequence;
    T value;
  };
  const size_t mask_;
  std::unique_ptr<Cell[]> cells_;
  alignas(64) std::atomic<size_t> tail_{0};
  alignas(64) std::atomic<size_t> head_{0};
};

}  // namespace aiocomm
