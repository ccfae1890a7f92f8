// Messages of experts' ranks on GPUs, and what is done with them where nothing is unusual: each step by one call. Whatever
// does not fit is left to Python, which then begins again from the same messages and says what is wrong.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "bindings/seen_memory.hpp"

namespace aiocomm::py {

// The first bytes of a message, as in aiocomm/moe/wire.py, and behind it as in aiocomm/moe/device_exchange.py.
struct ExpertHead {
  char header[160];
  uint64_t rows, assignments, flags;
  uint64_t ended, region, start, extent;
  char place[136];
};
static_assert(sizeof(ExpertHead) == 352);
inline constexpr uint64_t kListsRide = 1;

inline uint64_t padded(uint64_t rows) { return (2 * rows + 3) & ~uint64_t{3}; }

// A message with its indices and lists, all of which ride with it.
class CameExperts {
 public:
  CameExperts(const SeenBytes& slots, uint64_t slot_bytes, size_t peer)
      : bytes_(slots.bytes() + peer * slot_bytes) {
    require(slot_bytes >= sizeof(ExpertHead) && slots.nbytes() / slot_bytes > peer &&
            reinterpret_cast<uintptr_t>(bytes_) % alignof(ExpertHead) == 0);
    std::memcpy(&head, bytes_, sizeof head);
    const uint64_t left = slot_bytes - sizeof(ExpertHead);
    fits = head.flags == kListsRide && head.rows <= left / 6 && head.assignments <= left / 8 &&
           4 * head.rows + padded(head.rows) + 8 * head.assignments <= left;
  }

  std::span<const uint32_t> indices() const { return {at<uint32_t>(0), head.rows}; }
  std::span<const uint16_t> counts() const { return {at<uint16_t>(4 * head.rows), head.rows}; }
  std::span<const int32_t> experts() const { return {at<int32_t>(lists()), head.assignments}; }
  const float* weights() const { return at<float>(lists() + 4 * head.assignments); }

  ExpertHead head;
  bool fits = false;

 private:
  uint64_t lists() const { return 4 * head.rows + padded(head.rows); }
  template <class T>
  const T* at(uint64_t offset) const {
    return reinterpret_cast<const T*>(bytes_ + sizeof(ExpertHead) + offset);
  }
  const std::byte* bytes_;
};

using Starts = std::vector<int64_t>;

// What the tokens of this rank are routed to: its tokens by rank, how many experts each has there, these, their weights.
struct RoutedParts {
  SeenBytes tokens, counts, experts, weights;
};

// (first row of each rank, first assignment of each, messages by rank; None: some rank's does not fit). Nothing: an expert
// is not there.
std::optional<std::tuple<Starts, Starts, nanobind::object>> route_messages(
    const SeenBytes& ids, const SeenBytes& weights, size_t count, const SeenBytes& owner, size_t me,
    const nanobind::bytes& header, uint64_t ended, uint64_t region, uint64_t extent,
    const nanobind::list& places, uint64_t slot_bytes, const RoutedParts& routed);

// By rank, where what this one gives to others begins: heads alone. Rows of `row` bytes lie in that order.
nanobind::list sum_messages(std::span<const int64_t> starts, uint64_t row, size_t me,
                            const nanobind::bytes& header, uint64_t ended, uint64_t region,
                            const nanobind::list& places);

// Writes where the rows of all ranks are brought, in their order; returns each rank's greatest index + 1, or nothing: some
// message has not all that belongs to it.
std::optional<std::vector<uint64_t>> list_came(const SeenBytes& slots, uint64_t slot_bytes, size_t me,
                                               size_t n, const SeenBytes& own, const SeenBytes& into);

// The lists of an arrangement: first row by rank, row of each assignment, first assignment of each expert, weights, order
// and first assignment of each row.
struct ArrangedParts {
  SeenBytes starts, rows, offsets, weights, order, first;
};

// Orders what has come, and writes the tables of sums. False: the lists contradict each other.
bool arrange_came(const SeenBytes& slots, uint64_t slot_bytes, size_t me, const RoutedParts& own,
                  const SeenBytes& local, size_t held, const ArrangedParts& arranged, const SeenBytes& sent,
                  const Starts& sent_starts, size_t tokens, const SeenBytes& into);

}  // namespace aiocomm::py
