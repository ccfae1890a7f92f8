// One rank's part of a collective through an arena: see arena.hpp. It copies by the calling thread, and never blocks.
//
// Each rank has a stream of chunks, known to all. Chunks are for all others or for one; who has nothing to read in a chunk
// skips it. Of a reduction, block b of the arrays is reduced by rank b, in the order of the ranks, chunk by chunk, from
// where the others have put their parts; the results follow in the owner's stream. Small arrays are reduced by every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.hpp"
#include "core/reduce.hpp"

namespace aiocomm {

class SharedCall {
 public:
  enum class Kind : int { barrier, broadcast, all_gather, all_to_all, all_reduce };

  // `sizes`: bytes of the blocks: for broadcast the one; else by rank.
  SharedCall(Kind kind, size_t rank, size_t ranks, size_t root, std::vector<uint64_t> sizes, bool in_place,
             uint64_t item, Reduction reduction);

  uint64_t in_bytes() const { return in_bytes_; }
  uint64_t out_bytes() const { return out_bytes_; }
  uint64_t moved() const { return moved_; }

  // Before the ranks meet: a stream of one chunk is put where the others will look for it.
  void begin(Arena& arena, uint64_t call, const std::byte* in, std::byte* out);
  // Goes on as far as it can at once; true: something was done.
  bool advance(Arena& arena);
  bool ended() const { return left_ == 0; }

 private:
  struct Give {
    bool from_out;
    uint64_t at;  // in the array
    uint32_t nbytes;
    uint32_t needs;     // reductions that come before it
    int64_t also = -1;  // where in `out` it belongs as well
  };
  struct Take {
    uint64_t index;  // in the stream
    uint64_t at;     // in `out`
    uint32_t nbytes;
    bool part;          // of a reduction
    uint64_t from = 0;  // in the chunk
  };
  struct Fold {
    uint64_t at;
    uint32_t nbytes;
  };
  struct Piece {  // of a stream, as all ranks see it
    int64_t to;   // -1: all
    uint64_t at;  // in the array that it comes from
    uint64_t target;
    uint32_t nbytes;
    uint32_t needs;
    bool part, result;
  };
  std::vector<Piece> stream_of(size_t writer) const;
  std::byte* slot(const Arena& arena, size_t writer, uint64_t index) const {
    return lengths_[writer] == 1 ? arena.early(writer, call_) : arena.slot(writer, index);
  }
  bool give(Arena& arena);
  bool take(Arena& arena, size_t writer);
  bool fold(Arena& arena);
  bool copy_own();
  void copy(std::byte* to, const std::byte* from, size_t nbytes) const;

  const Kind kind_;
  const size_t rank_, ranks_, root_;
  const std::vector<uint64_t> sizes_;
  std::vector<uint64_t> starts_;
  const bool in_place_;
  const uint64_t item_;
  const Reduction reduction_;
  bool small_ = false, streams_ = false;
  bool packed_ = false;  // blocks for others are in one chunk
  uint64_t in_bytes_ = 0, out_bytes_ = 0, moved_ = 0;
  std::vector<Give> gives_;
  std::vector<std::vector<Take>> takes_;
  std::vector<uint64_t> lengths_;  // of the streams
  std::vector<Fold> folds_;
  uint64_t own_from_ = 0, own_to_ = 0, own_bytes_ = 0;  // a block that stays
  std::vector<std::byte> partial_;

  // Of the call that runs.
  uint64_t call_ = 0, left_ = 0, given_ = 0, free_ = 0, own_done_ = 0;
  const std::byte* in_ = nullptr;
  std::byte* out_ = nullptr;
  size_t folded_ = 0;
  std::vector<size_t> taken_;
};

}  // namespace aiocomm
