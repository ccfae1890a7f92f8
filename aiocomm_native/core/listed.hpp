// One access to many ranges of a region, in one message: their list, and their bytes close together. Pure.
//
//   put: count, then (offset, nbytes) of each range, then the bytes of all, in the order of the list
//   get: (offset, nbytes) of each range; its answer is the bytes of all
//
// A list comes from the peer: it is looked through before a byte moves. It may lie where the peer still writes, as in the
// ring of a pair over shm, so it is copied first, and nothing of it is read there twice. Numbers are of 64 bits, and not
// aligned.
// Of host memory it is copied here; of device memory it becomes rows, which a device moves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/op.hpp"
#include "core/rows.hpp"

namespace aiocomm {

// Bytes of such a message, which are copied under the token: a range of 1 MiB, and its list.
constexpr uint64_t kMostListed = (1 << 20) + 4096;
constexpr uint64_t kMostAtOnce = 1 << 30;  // bytes of those of one peer that are being moved
constexpr size_t kMostInGet = 512;         // ranges of a get: its list rides in the frame

struct Range {
  uint64_t offset, nbytes;
};

// A list of ranges, in memory of this process's own.
class Ranges {
 public:
  // None: it makes no sense.
  static std::optional<Ranges> taken(std::span<const std::byte> list);
  uint64_t nbytes() const { return nbytes_; }  // of all
  bool all_inside(uint64_t nbytes) const;      // of memory of so many bytes
  auto begin() const { return ranges_.begin(); }
  auto end() const { return ranges_.end(); }

 private:
  explicit Ranges(std::span<const std::byte> list);
  std::vector<Range> ranges_;
  uint64_t nbytes_ = 0;
};

// The bytes that a list of ranges has in all; none where it makes no sense.
std::optional<uint64_t> listed_bytes(std::span<const std::byte> list);

// Copies what a put carries to its ranges of `memory`. out_of_range: nothing was copied.
Code spread(std::span<const std::byte> message, std::span<std::byte> memory);

// Copies ranges of `memory` close together. `into` has room for all of them.
Code collect(const Ranges& ranges, std::span<const std::byte> memory, std::byte* into);

// Rows that are apart in memory, and close together in a message.
class Packing {
 public:
  // `from_memory`: they go into the message, else out of it. `start`: of the first, in the message.
  Packing(bool from_memory, uint64_t start) : from_memory_(from_memory), next_(start) {}
  void add(uint64_t at, uint64_t nbytes);
  std::shared_ptr<const RowList> take();

 private:
  void flush();
  const bool from_memory_;
  uint64_t next_;      // where the next one is in the message
  Rows run_;           // equal ones at equal distances, `from` in memory
  uint64_t last_ = 0;  // where the last of them begins
  std::shared_ptr<RowList> list_ = std::make_shared<RowList>();
};

// What `spread` copies, as rows of a device; null: out of range.
std::shared_ptr<const RowList> rows_to_spread(std::span<const std::byte> message, uint64_t nbytes);

// What `collect` copies, likewise.
std::shared_ptr<const RowList> rows_to_collect(const Ranges& ranges, uint64_t nbytes);

}  // namespace aiocomm
