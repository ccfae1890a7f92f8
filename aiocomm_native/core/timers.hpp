// Deadlines, pure: the time is an argument. Not thread-safe: the owner serialises calls.
//
// Cancelling is lazy: the heap entry stays until it surfaces, or until stale entries outnumber live ones,
// when the heap is rebuilt. So memory follows the live deadlines, and every operation is amortised O(log n)
// at worst.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "core/flat_map.hpp"

namespace aiocomm {

class TimerHeap {
 public:
  // Throws std::invalid_argument if the id is pending.
  void add(uint64_t id, uint64_t at_ns) {
    if (live_.find(id) != nullptr) throw std::invalid_argument("this timer is pending already");
    heap_.push_back({at_ns, serial_, id});
    std::push_heap(heap_.begin(), heap_.end(), later);
    live_.find_or_insert(id) = serial_++;
  }

  // False if the id is not pending.
  bool cancel(uint64_t id) {
    if (!live_.erase_key(id)) return false;
    if (heap_.size() > 2 * live_.size() + kSlack) compact();
    return true;
  }

  // The earliest deadline, in ns.
  std::optional<uint64_t> next() {
    drop_stale();
    if (heap_.empty()) return std::nullopt;
    return heap_.front().at_ns;
  }

  // Appends the ids whose deadline is at or before `now_ns`, by deadline, then in the order they were added.
  void expire(uint64_t now_ns, std::vector<uint64_t>& out) {
    for (drop_stale(); !heap_.empty() && heap_.front().at_ns <= now_ns; drop_stale()) {
      out.push_back(heap_.front().id);
      live_.erase_key(heap_.front().id);
    }
  }

  size_t size() const noexcept { return live_.size(); }
  size_t capacity() const noexcept { return heap_.size(); }  // entries held, stale ones included

 private:
  static constexpr size_t kSlack = 64;
  struct Entry {
    uint64_t at_ns;
    uint64_t serial;  // tells an entry from an earlier, cancelled one of the same id
    uint64_t id;
  };

  static bool later(const Entry& a, const Entry& b) noexcept {
    return a.at_ns != b.at_ns ? a.at_ns > b.at_ns : a.serial > b.serial;
  }

  bool stale(const Entry& entry) const noexcept {
    const uint64_t* serial = live_.find(entry.id);
    return serial == nullptr || *serial != entry.serial;
  }

  void drop_stale() {
    while (!heap_.empty() && stale(heap_.front())) {
      std::pop_heap(heap_.begin(), heap_.end(), later);
      heap_.pop_back();
    }
  }

  void compact() {
    std::erase_if(heap_, [this](const Entry& entry) { return stale(entry); });
    std::make_heap(heap_.begin(), heap_.end(), later);
  }

  std::vector<Entry> heap_;
  IdMap<uint64_t> live_;
  uint64_t serial_ = 0;
};

}  // namespace aiocomm
