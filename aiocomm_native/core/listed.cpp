#include "core/listed.hpp"

#include <cstring>

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

Code spread(std::span<const std::byte> message, std::span<std::byte> memory) {
  uint64_t count = 0;
  if (message.size() < sizeof count) return Code::out_of_range;
  std::memcpy(&count, message.data(), sizeof count);
  message = message.subspan(sizeof count);
  if (count > message.size() / sizeof(Range)) return Code::out_of_range;
  const auto list = message.first(count * sizeof(Range));
  const std::byte* from = message.data() + list.size();
  if (listed_bytes(list) != message.size() - list.size() || !all_inside(list, memory.size()))
    return Code::out_of_range;
  for (size_t i = 0; i < count; ++i) {
    const Range range = range_of(list, i);
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

}  // namespace aiocomm
