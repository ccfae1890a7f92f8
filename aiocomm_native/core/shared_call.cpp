#include "core/shared_call.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/copy.hpp"

namespace aiocomm {

namespace {
constexpr uint64_t kReducedByAll = 16 << 10;  // bytes up to which every rank reduces all of the arrays
constexpr uint64_t kStreamFrom = 8 << 20;     // moved by a call: what it writes will not be in the caches
constexpr uint64_t kLag = 2;                  // chunks given for reductions before the first result is due
}  // namespace

SharedCall::SharedCall(Kind kind, size_t rank, size_t ranks, size_t root, std::vector<uint64_t> sizes,
                       bool in_place, uint64_t item, Reduction reduction)
    : kind_(kind),
      rank_(rank),
      ranks_(ranks),
      root_(root),
      sizes_(std::move(sizes)),
      in_place_(in_place),
      item_(item),
      reduction_(reduction),
      takes_(ranks),
      taken_(ranks) {
  starts_.resize(sizes_.size() + 1);
  std::partial_sum(sizes_.begin(), sizes_.end(), starts_.begin() + 1);
  const uint64_t total = starts_.back();
  small_ = kind == Kind::all_reduce && total <= kReducedByAll;
  packed_ = kind == Kind::all_to_all && ranks > 2 && total <= Arena::kChunk;
  out_bytes_ = total;
  if (!in_place_ && kind != Kind::barrier && kind != Kind::broadcast)
    in_bytes_ = kind == Kind::all_gather ? sizes_[rank] : total;
  for (size_t writer = 0; writer < ranks; ++writer) {
    const std::vector<Piece> stream = stream_of(writer);
    lengths_.push_back(stream.size());
    for (uint64_t index = 0; index < stream.size(); ++index) {
      const Piece& piece = stream[index];
      if (writer != rank) {
        if (piece.to >= 0 && static_cast<size_t>(piece.to) != rank) continue;
        const uint64_t nbytes = packed_ ? sizes_[rank] : piece.nbytes;
        takes_[writer].push_back(
            {index, piece.target, static_cast<uint32_t>(nbytes), piece.part, packed_ ? starts_[rank] : 0});
        moved_ += nbytes;
        continue;
      }
      const bool from_out = piece.result || in_place_ || kind == Kind::broadcast;
      const bool also = kind == Kind::all_gather && !in_place_;
      gives_.push_back({from_out, piece.at, piece.nbytes, piece.needs,
                        also ? static_cast<int64_t>(starts_[rank] + piece.at) : -1});
      moved_ += piece.nbytes;
    }
  }
  if (kind == Kind::all_to_all) own_from_ = own_to_ = starts_[rank], own_bytes_ = sizes_[rank];
  if (kind == Kind::all_reduce) {
    const uint64_t from = small_ ? 0 : starts_[rank], nbytes = small_ ? total : sizes_[rank];
    for (uint64_t at = 0; at < nbytes; at += Arena::kChunk)
      folds_.push_back({from + at, static_cast<uint32_t>(std::min(Arena::kChunk, nbytes - at))});
    if (ranks > 2) partial_.resize(Arena::kChunk);
  }
  streams_ = moved_ >= kStreamFrom;
}

std::vector<SharedCall::Piece> SharedCall::stream_of(size_t writer) const {
  std::vector<Piece> stream;
  auto cut = [](uint64_t nbytes, uint64_t at) {
    return static_cast<uint32_t>(std::min(Arena::kChunk, nbytes - at));
  };
  auto to_all = [&](uint64_t nbytes, uint64_t from, uint64_t target, bool part) {
    for (uint64_t at = 0; at < nbytes; at += Arena::kChunk)
      stream.push_back({-1, from + at, target + at, cut(nbytes, at), 0, part, false});
  };
  switch (kind_) {
    case Kind::barrier:
      break;
    case Kind::broadcast:
      if (writer == root_) to_all(sizes_[0], 0, 0, false);
      break;
    case Kind::all_gather:
      to_all(sizes_[writer], in_place_ ? starts_[writer] : 0, starts_[writer], false);
      break;
    case Kind::all_to_all:
      if (packed_) {
        to_all(starts_.back(), 0, starts_[writer], false);
        break;
      }
      for (uint64_t at = 0; at < sizes_[0]; at += Arena::kChunk)
        for (size_t away = 1; away < ranks_; ++away) {
          const size_t to = (writer + away) % ranks_;
          stream.push_back({static_cast<int64_t>(to), starts_[to] + at, starts_[writer] + at,
                            cut(sizes_[0], at), 0, false, false});
        }
      break;
    case Kind::all_reduce: {
      if (small_) {
        to_all(starts_.back(), 0, 0, true);
        break;
      }
      auto chunks = [&](size_t block) { return (sizes_[block] + Arena::kChunk - 1) / Arena::kChunk; };
      const uint64_t most = chunks(0);  // the first blocks are the largest
      for (uint64_t i = 0; i < most + kLag; ++i) {
        const uint64_t at = i * Arena::kChunk;
        for (size_t away = 1; away < ranks_; ++away) {
          const size_t to = (writer + away) % ranks_;
          if (i < chunks(to))
            stream.push_back(
                {static_cast<int64_t>(to), starts_[to] + at, 0, cut(sizes_[to], at), 0, true, false});
        }
        if (i < kLag || i - kLag >= chunks(writer)) continue;
        const uint64_t behind = (i - kLag) * Arena::kChunk, from = starts_[writer] + behind;
        stream.push_back(
            {-1, from, from, cut(sizes_[writer], behind), static_cast<uint32_t>(i - kLag + 1), false, true});
      }
      break;
    }
  }
  return stream;
}

void SharedCall::begin(Arena& arena, uint64_t call, const std::byte* in, std::byte* out) {
  call_ = call;
  in_ = in;
  out_ = out;
  given_ = 0;
  free_ = Arena::kSlots;
  folded_ = 0;
  own_done_ = 0;
  std::fill(taken_.begin(), taken_.end(), 0);
  left_ = gives_.size() + folds_.size() + (own_bytes_ + Arena::kChunk - 1) / Arena::kChunk;
  for (const auto& takes : takes_) left_ += takes.size();
  if (gives_.size() == 1) give(arena);
}

void SharedCall::copy(std::byte* to, const std::byte* from, size_t nbytes) const {
  if (streams_)
    copy_past_caches(to, from, nbytes);
  else
    copy_in_caches(to, from, nbytes);
}

bool SharedCall::give(Arena& arena) {
  if (given_ == gives_.size()) return false;
  const Give& next = gives_[given_];
  if (next.needs > folded_) return false;
  if (given_ >= free_) {
    uint64_t least = lengths_[rank_];
    for (size_t reader = 0; reader < ranks_; ++reader)
      if (reader != rank_) least = std::min(least, arena.read(reader, rank_, call_));
    free_ = least + Arena::kSlots;
    if (given_ >= free_) return false;
  }
  const std::byte* from = (next.from_out ? out_ : in_) + next.at;
  copy_in_caches(slot(arena, rank_, given_), from, next.nbytes);
  arena.wrote(rank_, call_, ++given_);
  if (next.also >= 0) copy(out_ + next.also, from, next.nbytes);
  --left_;
  return true;
}

bool SharedCall::take(Arena& arena, size_t writer) {
  const auto& takes = takes_[writer];
  size_t& taken = taken_[writer];
  if (taken == takes.size()) return false;
  const Take& next = takes[taken];
  if (next.part || arena.written(writer, call_) <= next.index) return false;
  copy(out_ + next.at, slot(arena, writer, next.index) + next.from, next.nbytes);
  ++taken;
  arena.has_read(rank_, writer, call_, taken == takes.size() ? lengths_[writer] : takes[taken].index);
  --left_;
  return true;
}

bool SharedCall::fold(Arena& arena) {
  if (folded_ == folds_.size()) return false;
  for (size_t writer = 0; writer < ranks_; ++writer) {
    if (writer == rank_) continue;
    const auto& takes = takes_[writer];
    const size_t taken = taken_[writer];
    if (taken == takes.size() || !takes[taken].part || arena.written(writer, call_) <= takes[taken].index)
      return false;
  }
  const Fold& next = folds_[folded_];
  const std::byte* own = (in_place_ ? out_ : in_) + next.at;
  auto part = [&](size_t rank) {
    return rank == rank_ ? own : slot(arena, rank, takes_[rank][taken_[rank]].index);
  };
  const std::byte* sum = part(0);
  for (size_t rank = 1; rank < ranks_; ++rank) {
    std::byte* into = rank + 1 == ranks_ ? out_ + next.at : partial_.data();
    reduction_(into, sum, part(rank), next.nbytes / item_);
    sum = into;
  }
  ++folded_;
  --left_;
  for (size_t writer = 0; writer < ranks_; ++writer) {
    if (writer == rank_) continue;
    const auto& takes = takes_[writer];
    const size_t taken = ++taken_[writer];
    arena.has_read(rank_, writer, call_, taken == takes.size() ? lengths_[writer] : takes[taken].index);
    --left_;
  }
  return true;
}

bool SharedCall::copy_own() {
  if (own_done_ == own_bytes_) return false;
  const uint64_t nbytes = std::min(Arena::kChunk, own_bytes_ - own_done_);
  copy(out_ + own_to_ + own_done_, in_ + own_from_ + own_done_, nbytes);
  own_done_ += nbytes;
  --left_;
  return true;
}

bool SharedCall::advance(Arena& arena) {
  bool did = give(arena);
  did |= fold(arena);
  for (size_t away = 1; away < ranks_; ++away) did |= take(arena, (rank_ + away) % ranks_);
  return did || copy_own();  // what nobody waits for comes last
}

}  // namespace aiocomm
