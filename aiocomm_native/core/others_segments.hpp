// Shared segments of the other ranks of a group, mapped here: arrays of `aiocomm.empty()`, which collectives read and write
// without the kernel.
//
// They are found as the arena is, and kept until the group ends or their owner has freed them. What has been freed is looked
// for when an owner says that it has freed something.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "core/arena.hpp"

namespace aiocomm {

class OthersSegments {
 public:
  explicit OthersSegments(size_t ranks) : of_(ranks) {}
  ~OthersSegments();
  OthersSegments(const OthersSegments&) = delete;
  OthersSegments& operator=(const OthersSegments&) = delete;

  // Where `nbytes` at `address` of a rank's process are here; null: they are in no segment, or it cannot be mapped.
  std::byte* find(size_t rank, pid_t process, const Arena::Holder& holder, uint64_t address, uint64_t nbytes);
  // `releases`: how many segments that rank's process has freed.
  void forget_freed(size_t rank, uint64_t releases);

 private:
  struct Mapping {
    std::byte* base;  // null: it could not be mapped
    uint64_t nbytes;
  };
  struct Owner {
    std::unordered_map<uint32_t, Mapping> mappings;  // by the segment's id
    uint64_t releases = 0;
  };
  static void unmap(const Mapping& mapping);

  std::vector<Owner> of_;  // by rank
};

}  // namespace aiocomm
