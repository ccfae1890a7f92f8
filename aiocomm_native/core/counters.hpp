// What is counted of one link.
//
// Rules
//   - An op is counted by one link: as submitted once that link is known, and by how it ended. What has been submitted
//     and has not ended is on its way there; a receive is not, until its message comes.
//   - Accesses of peers to our regions are their operations: of them only what moved is counted here.
//   - Bytes are counted when they go over a link, by the link that carries them, whatever comes of their message. Where
//     the other end fetches them, the one they come from learns of them by its `fin`.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "core/op.hpp"

namespace aiocomm {

// How many operations took how long: slot i counts those of at least 2^(i-1) and less than 2^i ns.
class DurationHistogram {
 public:
  static constexpr size_t kSlots = 42;  // the last one is open: more than half an hour
  void add(uint64_t ns) { ++counts[std::min<size_t>(std::bit_width(ns), kSlots - 1)]; }
  std::array<uint64_t, kSlots> counts{};
};

struct LinkCounters {
  uint64_t submitted = 0, completed = 0, failed = 0, cancelled = 0;
  uint64_t frames_sent = 0, frames_received = 0, bytes_sent = 0, bytes_received = 0;
  uint64_t fallbacks = 0, would_block = 0, violations = 0;
  std::map<std::string, uint64_t> device;  // of the link itself
  std::array<uint64_t, static_cast<size_t>(Path::count)> path_messages{}, path_bytes{};
  DurationHistogram queued, moved;  // of completed operations: until the first byte moved, and from then on

  void ended(const Op& op);                // an operation of this process
  void came(Path path, uint64_t nbytes) {  // a message, in whole
    ++path_messages[static_cast<size_t>(path)];
    path_bytes[static_cast<size_t>(path)] += nbytes;
  }
};

}  // namespace aiocomm
