// One rank's part of a collective from array to array: see arena.hpp. It copies by the calling thread, and never blocks.
//
// Arrays of `aiocomm.empty()` are mapped by the others, and copied as if they were their own. All others are read and written
// by cross-memory attach.
//
// What one rank has for another is cut into chunks. The writer pushes them and the reader pulls them, whoever claims one
// first: where only one of the two has something for the other, both cores copy. Of a broadcast to several, who claims a
// chunk gives it to all, while it is in the caches. Of a reduction, block b is reduced by rank b, in the order of the ranks,
// from the others' arrays, and pushed to all.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/arena.hpp"
#include "core/others_segments.hpp"
#include "core/shared_call.hpp"

namespace aiocomm {

class DirectCall {
 public:
  // As for SharedCall; `processes`: of all ranks.
  DirectCall(SharedCall::Kind kind, size_t rank, size_t ranks, size_t root, std::vector<uint64_t> sizes,
             bool in_place, uint64_t item, Reduction reduction, std::vector<pid_t> processes,
             OthersSegments& segments);

  // Whether a call of this shape is worth the system calls.
  bool pays() const { return kind_ != SharedCall::Kind::barrier && most_ > Arena::kChunk; }

  // Before the ranks meet: tells the others where the arrays are; or that they cannot be reached, where all go by rings.
  void begin(Arena& arena, uint64_t call, const std::byte* in, std::byte* out);
  void withhold(Arena& arena, uint64_t call) const { arena.tell(rank_, call, {0, 0}); }
  // Goes on by a chunk, if it can at once; true: something was done.
  bool advance(Arena& arena);
  // Nobody touches this rank's arrays any more, and what it gets is there.
  bool ended(const Arena& arena) const;
  // The errno of the last chunk that could not be moved; 0: it was. The other process may be at its end.
  int error() const { return error_; }
  // Whether bytes of this call went by cross-memory attach here: of arrays that are not mapped.
  bool attached() const { return attached_; }

 private:
  static constexpr uint64_t kLeast = 64 << 10, kMost = 512 << 10, kFoldChunk = 64 << 10;

  struct Pair {                 // what a writer has for a reader
    uint64_t from = 0, to = 0;  // in what the writer gives, in the reader's `out`
    uint64_t nbytes = 0;
  };
  struct There {  // another rank's arrays
    bool known = false;
    Arena::Arrays told;
    std::byte *given = nullptr, *out = nullptr;  // as mapped here; null: they are not
  };
  Pair pair(size_t writer, size_t reader) const;
  const There& there(Arena& arena, size_t other);
  // What they return is an errno.
  int read(size_t from, const There& there, uint64_t at, std::byte* into, size_t nbytes);
  int write(size_t to, const There& there, uint64_t at, const std::byte* from, size_t nbytes);
  uint64_t chunks(const Pair& pair) const { return (pair.nbytes + chunk_ - 1) / chunk_; }
  void copy(std::byte* to, const std::byte* from, size_t nbytes) const;
  bool own_chunk();
  bool shares() const { return kind_ == SharedCall::Kind::broadcast && ranks_ > 2; }
  bool share(Arena& arena);
  bool has_shared(const Arena& arena) const;
  bool push(Arena& arena, size_t reader);
  bool pull(Arena& arena, size_t writer);
  bool move(Arena& arena, bool push, size_t other, uint64_t chunk);
  bool may_try_again(const Arena& arena);
  bool fold(Arena& arena);
  bool reduce(Arena& arena, uint64_t at, size_t nbytes);

  const SharedCall::Kind kind_;
  const size_t rank_, ranks_, root_;
  const std::vector<uint64_t> sizes_;
  const std::vector<uint64_t> starts_;
  const bool in_place_;
  const uint64_t item_;
  const Reduction reduction_;
  const std::vector<pid_t> processes_;
  OthersSegments& segments_;
  uint64_t most_ = 0, chunk_ = kFoldChunk, folds_ = 0;
  uint64_t own_from_ = 0, own_to_ = 0, own_bytes_ = 0;  // what stays
  bool streams_ = false;
  std::vector<std::byte> sum_, part_;

  // Of the call that runs.
  uint64_t call_ = 0, own_done_ = 0, folded_ = 0;
  size_t told_ = 0;  // the others that have got the chunk that was reduced last
  bool reduced_ = false;
  const std::byte* given_ = nullptr;
  std::byte* out_ = nullptr;
  std::vector<There> there_;
  bool attached_ = false;
  std::vector<uint64_t> pushed_, pulled_;  // chunks, by the other rank
  struct {
    bool is = false, push = false;
    size_t other = 0;
    uint64_t chunk = 0;
  } left_over_;  // claimed, and not moved
  struct {
    bool is = false;
    uint64_t chunk = 0;
    size_t has = 0;  // ranks, from the root on
  } sharing_;
  int error_ = 0;
};

}  // namespace aiocomm
