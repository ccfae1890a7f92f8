// What a queue pair is told of how to travel: how long its transport tries, and by which service level. Pure.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace aiocomm::rdma {

constexpr size_t kClasses = 4;  // of channels: low, normal, high, urgent

// Service level (InfiniBand; RoCE: priority) and traffic class (RoCE: DSCP and ECN bits).
struct Level {
  uint8_t service = 0, traffic = 0;
  bool operator==(const Level&) const = default;
};

struct Transport {
  static constexpr uint8_t kRetries = 6;  // soft-RoCE takes 7 for "for ever"

  uint8_t timeout = 16;  // of one try: 4.096 us * 2^timeout
  uint64_t patience_ns = 2500000000;
  Level frames;                           // small messages and control
  std::vector<Level> bulk{Level{}};       // a queue pair for each
  std::array<uint8_t, kClasses> level{};  // into `bulk`, by class

  // The longest that the transport may try without an answer, all tries together: at least one of the shortest.
  // `largest`: bytes of one request.
  void try_for(double seconds, uint64_t largest);
  double retry_s() const;
  // `services`, `traffics`: one number for all classes, or kClasses of them by comma; "": 0. Throws
  // std::invalid_argument.
  void map_classes(std::string_view services, std::string_view traffics);
};

}  // namespace aiocomm::rdma
