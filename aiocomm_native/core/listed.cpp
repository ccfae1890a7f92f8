#include "core/listed.hpp"

#include <cstring>
#include <utility>

namespace aiocomm {

namespace {

struct Range {
  uint64_t offset, nbytes;
};

size_t count_of(std::span<const std::byte> list) { return list.size() / sizeof(Range); }

Range range_of(std::span<const std::byte> list, size_t i) {
  Range range;
  std::memcpy(&range, list.data() + i * sizeof range, sizeof range);
  return range;
}

bool all_inside(std::span<const std::byte> list, uint64_t nbytes) {
  for (size_t i = 0; i < count_of(list); ++i) {
    const Range range = range_of(list, i);
    if (range.offset > nbytes || range.nbytes > nbytes - range.offset) return false;
  }
  return true;
}

}  // namespace

std::optional<uint64_t> listed_bytes(std::span<const std::byte> list) {
  if (list.size() % sizeof(Range)) return {};
  uint64_t total = 0;
  for (size_t i = 0; i < count_of(list); ++i) {
    const uint64_t nbytes = range_of(list, i).nbytes;
    if (nbytes > kMostListed) return {};  // so that no sum overflows
    total += nbytes;
  }
  return total;
}

namespace {

// The list of a put's message; what it carries begins behind it. None: it makes no sense for memory of so many bytes.
std::optional<std::span<const std::byte>> list_of(std::span<const std::byte> message, uint64_t nbytes) {
  uint64_t count = 0;
  if (message.size() < sizeof count) return {};
  std::memcpy(&count, message.data(), sizeof count);
  message = message.subspan(sizeof count);
  if (count > message.size() / sizeof(Range)) return {};
  const auto list = message.first(count * sizeof(Range));
  if (listed_bytes(list) != message.size() - list.size() || !all_inside(list, nbytes)) return {};
  return list;
}

}  // namespace

Code spread(std::span<const std::byte> message, std::span<std::byte> memory) {
  const auto list = list_of(message, memory.size());
  if (!list) return Code::out_of_range;
  const std::byte* from = list->data() + list->size();
  for (size_t i = 0; i < count_of(*list); ++i) {
    const Range range = range_of(*list, i);
    std::memcpy(memory.data() + range.offset, from, range.nbytes);
    from += range.nbytes;
  }
  return Code::ok;
}

Code collect(std::span<const std::byte> list, std::span<const std::byte> memory, std::byte* into) {
  if (!all_inside(list, memory.size())) return Code::out_of_range;
  for (size_t i = 0; i < count_of(list); ++i) {
    const Range range = range_of(list, i);
    std::memcpy(into, memory.data() + range.offset, range.nbytes);
    into += range.nbytes;
  }
  return Code::ok;
}

void Packing::add(uint64_t at, uint64_t nbytes) {
  if (!nbytes) return;
  const auto step = static_cast<int64_t>(at - last_);
  const bool goes_on = run_.count && nbytes == run_.nbytes && (run_.count == 1 || step == run_.from_step);
  if (!goes_on) {
    flush();
    run_ = {at, next_, 0, static_cast<int64_t>(nbytes), nbytes, 0};
  } else if (run_.count == 1) {
    run_.from_step = step;
  }
  ++run_.count;
  last_ = at;
  next_ += nbytes;
}

void Packing::flush() {
  if (!run_.count) return;
  if (!from_memory_) {
    std::swap(run_.from, run_.to);
    std::swap(run_.from_step, run_.to_step);
  }
  list_->add(run_);
  run_ = {};
}

std::shared_ptr<const RowList> Packing::take() {
  flush();
  return std::move(list_);
}

std::shared_ptr<const RowList> rows_to_spread(std::span<const std::byte> message, uint64_t nbytes) {
  const auto list = list_of(message, nbytes);
  if (!list) return nullptr;
  Packing packing(false, static_cast<uint64_t>(list->data() + list->size() - message.data()));
  for (size_t i = 0; i < count_of(*list); ++i) {
    const Range range = range_of(*list, i);
    packing.add(range.offset, range.nbytes);
  }
  return packing.take();
}

std::shared_ptr<const RowList> rows_to_collect(std::span<const std::byte> list, uint64_t nbytes) {
  if (!all_inside(list, nbytes)) return nullptr;
  Packing packing(true, 0);
  for (size_t i = 0; i < count_of(list); ++i) {
    const Range range = range_of(list, i);
    packing.add(range.offset, range.nbytes);
  }
  return packing.take();
}

}  // namespace aiocomm
