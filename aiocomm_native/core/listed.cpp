#include "core/listed.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace aiocomm {

Ranges::Ranges(std::span<const std::byte> list) : ranges_(list.size() / sizeof(Range)) {
  if (!ranges_.empty()) std::memcpy(ranges_.data(), list.data(), ranges_.size() * sizeof(Range));
}

std::optional<Ranges> Ranges::taken(std::span<const std::byte> list) {
  if (list.size() % sizeof(Range)) return {};
  Ranges ranges(list);
  for (const Range& range : ranges.ranges_) {
    if (range.nbytes > kMostListed) return {};  // so that no sum overflows
    ranges.nbytes_ += range.nbytes;
  }
  return ranges;
}

bool Ranges::all_inside(uint64_t nbytes) const {
  return std::all_of(ranges_.begin(), ranges_.end(), [&](const Range& range) {
    return range.offset <= nbytes && range.nbytes <= nbytes - range.offset;
  });
}

std::optional<uint64_t> listed_bytes(std::span<const std::byte> list) {
  const auto ranges = Ranges::taken(list);
  return ranges ? std::optional(ranges->nbytes()) : std::nullopt;
}

namespace {

// A put's message.
struct Message {
  Ranges ranges;
  uint64_t begins;  // what it carries, behind the list
};

// None: it makes no sense for memory of so many bytes.
std::optional<Message> message_of(std::span<const std::byte> message, uint64_t nbytes) {
  uint64_t count = 0;
  if (message.size() < sizeof count) return {};
  std::memcpy(&count, message.data(), sizeof count);
  const auto behind = message.subspan(sizeof count);
  if (count > behind.size() / sizeof(Range)) return {};
  auto ranges = Ranges::taken(behind.first(count * sizeof(Range)));
  const uint64_t begins = sizeof count + count * sizeof(Range);
  if (!ranges || ranges->nbytes() != message.size() - begins || !ranges->all_inside(nbytes)) return {};
  return Message{std::move(*ranges), begins};
}

}  // namespace

Code spread(std::span<const std::byte> message, std::span<std::byte> memory) {
  const auto whole = message_of(message, memory.size());
  if (!whole) return Code::out_of_range;
  const std::byte* from = message.data() + whole->begins;
  for (const Range& range : whole->ranges) {
    if (range.nbytes) std::memcpy(memory.data() + range.offset, from, range.nbytes);
    from += range.nbytes;
  }
  return Code::ok;
}

Code collect(const Ranges& ranges, std::span<const std::byte> memory, std::byte* into) {
  if (!ranges.all_inside(memory.size())) return Code::out_of_range;
  for (const Range& range : ranges) {
    if (range.nbytes) std::memcpy(into, memory.data() + range.offset, range.nbytes);
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
  const auto whole = message_of(message, nbytes);
  if (!whole) return nullptr;
  Packing packing(false, whole->begins);
  for (const Range& range : whole->ranges) packing.add(range.offset, range.nbytes);
  return packing.take();
}

std::shared_ptr<const RowList> rows_to_collect(const Ranges& ranges, uint64_t nbytes) {
  if (!ranges.all_inside(nbytes)) return nullptr;
  Packing packing(true, 0);
  for (const Range& range : ranges) packing.add(range.offset, range.nbytes);
  return packing.take();
}

}  // namespace aiocomm
