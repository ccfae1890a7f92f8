#include "core/direct_call.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/cma.hpp"
#include "core/copy.hpp"
#include "core/segments.hpp"

namespace aiocomm {

namespace {

using Kind = SharedCall::Kind;

constexpr uint64_t kStreamFrom = 2 << 20;  // bytes of a result that the nearer caches would not keep
constexpr uint64_t kPage = 4096;

std::vector<uint64_t> starts_of(const std::vector<uint64_t>& sizes) {
  std::vector<uint64_t> starts(sizes.size() + 1);
  std::partial_sum(sizes.begin(), sizes.end(), starts.begin() + 1);
  return starts;
}

Arena::Holder holder_of(const std::byte* data) {
  const auto segment = Segments::of_process().find(data, 0);
  if (!segment) return {};
  return {segment->id, segment->fd, reinterpret_cast<uint64_t>(segment->base), segment->nbytes};
}

}  // namespace

DirectCall::DirectCall(Kind kind, size_t rank, size_t ranks, size_t root, std::vector<uint64_t> sizes,
                       bool in_place, uint64_t item, Reduction reduction, std::vector<pid_t> processes,
                       OthersSegments& segments)
    : kind_(kind),
      rank_(rank),
      ranks_(ranks),
      root_(root),
      sizes_(std::move(sizes)),
      starts_(starts_of(sizes_)),
      in_place_(in_place),
      item_(item),
      reduction_(reduction),
      processes_(std::move(processes)),
      segments_(segments),
      there_(ranks),
      pushed_(ranks),
      pulled_(ranks) {
  most_ = *std::max_element(sizes_.begin(), sizes_.end());
  if (kind == Kind::all_reduce) {
    folds_ = (sizes_[rank] + chunk_ - 1) / chunk_;
    part_.resize(std::min(chunk_, sizes_[rank]));
    if (ranks > 2) sum_.resize(part_.size());
  } else {
    const uint64_t parts =
        kind == Kind::broadcast ? 4 : 1;  // few are quicker; one is not shared by two cores
    chunk_ = std::clamp((most_ / parts + kPage - 1) / kPage * kPage, kLeast, kMost);
  }
  if (kind == Kind::all_to_all || (kind == Kind::all_gather && !in_place)) {
    own_from_ = kind == Kind::all_gather ? 0 : starts_[rank];
    own_to_ = starts_[rank];
    own_bytes_ = sizes_[rank];
  }
  streams_ = starts_.back() >= kStreamFrom;
}

DirectCall::Pair DirectCall::pair(size_t writer, size_t reader) const {
  switch (kind_) {
    case Kind::barrier:
      break;
    case Kind::broadcast:
      if (writer == root_ || (shares() && reader != root_)) return {0, 0, sizes_[0]};
      break;
    case Kind::all_gather:
      return {0, starts_[writer], sizes_[writer]};
    case Kind::all_to_all:
      return {starts_[reader], starts_[writer], sizes_[writer]};
    case Kind::all_reduce:
      return {starts_[writer], starts_[writer], sizes_[writer]};
  }
  return {};
}

void DirectCall::begin(Arena& arena, uint64_t call, const std::byte* in, std::byte* out) {
  given_ = in_place_ || kind_ == Kind::broadcast ? out : in;
  if (in_place_ && kind_ == Kind::all_gather) given_ += starts_[rank_];
  arena.tell(rank_, call,
             {.given = reinterpret_cast<uint64_t>(given_),
              .out = reinterpret_cast<uint64_t>(out),
              .given_in = holder_of(given_),
              .out_in = holder_of(out),
              .releases = Segments::of_process().releases()});
  call_ = call;
  out_ = out;
  own_done_ = folded_ = 0;
  told_ = 0;
  reduced_ = left_over_.is = sharing_.is = false;
  error_ = 0;
  attached_ = false;
  std::fill(there_.begin(), there_.end(), There{});
  std::fill(pushed_.begin(), pushed_.end(), 0);
  std::fill(pulled_.begin(), pulled_.end(), 0);
}

bool DirectCall::ended(const Arena& arena) const {
  if (own_done_ < own_bytes_ || folded_ < folds_) return false;
  if (shares()) return has_shared(arena);
  for (size_t other = 0; other < ranks_; ++other) {
    if (other == rank_) continue;
    const uint64_t comes = chunks(pair(other, rank_)), goes = chunks(pair(rank_, other));
    if (comes && pulled_[other] + arena.pushed(other, rank_, call_) < comes) return false;
    if (goes && pushed_[other] + arena.read(other, rank_, call_) < goes) return false;
  }
  return true;
}

// A part of what stays, while what has been pushed is in the caches.
bool DirectCall::own_chunk() {
  if (own_done_ == own_bytes_) return false;
  const uint64_t nbytes = std::min(chunk_, own_bytes_ - own_done_);
  copy(out_ + own_to_ + own_done_, given_ + own_from_ + own_done_, nbytes);
  own_done_ += nbytes;
  return true;
}

const DirectCall::There& DirectCall::there(Arena& arena, size_t other) {
  There& found = there_[other];
  if (found.known) return found;
  found.known = true;
  found.told = arena.told(other, call_);
  segments_.forget_freed(other, found.told.releases);
  const uint64_t all = starts_.back();
  const uint64_t given = kind_ == Kind::all_gather ? sizes_[other] : all;
  found.given = segments_.find(other, processes_[other], found.told.given_in, found.told.given, given);
  found.out = segments_.find(other, processes_[other], found.told.out_in, found.told.out, all);
  return found;
}

int DirectCall::read(size_t from, const There& there, uint64_t at, std::byte* into, size_t nbytes) {
  if (there.given) {
    copy(into, there.given + at, nbytes);
    return 0;
  }
  attached_ = true;
  return read_process(processes_[from], there.told.given + at, into, nbytes);
}

int DirectCall::write(size_t to, const There& there, uint64_t at, const std::byte* from, size_t nbytes) {
  if (there.out) {
    copy(there.out + at, from, nbytes);
    return 0;
  }
  attached_ = true;
  return write_process(processes_[to], there.told.out + at, from, nbytes);
}

void DirectCall::copy(std::byte* to, const std::byte* from, size_t nbytes) const {
  (streams_ ? copy_past_caches : copy_in_caches)(to, from, nbytes);
}

bool DirectCall::move(Arena& arena, bool push, size_t other, uint64_t chunk) {
  const Pair pair = push ? this->pair(rank_, other) : this->pair(other, rank_);
  const uint64_t at = chunk * chunk_, nbytes = std::min(chunk_, pair.nbytes - at);
  left_over_ = {true, push, other, chunk};
  if (!arena.enter(rank_)) return false;
  const There& there = this->there(arena, other);
  const std::byte* from = kind_ == Kind::all_reduce ? out_ : given_;
  if (shares() && there_[root_].given) from = there_[root_].given;
  error_ = push ? write(other, there, pair.to + at, from + pair.from + at, nbytes)
                : read(other, there, pair.from + at, out_ + pair.to + at, nbytes);
  arena.leave(rank_);
  if (error_) return false;
  left_over_.is = false;
  if (push)
    arena.has_pushed(rank_, other, call_, ++pushed_[other]);
  else
    arena.has_read(rank_, other, call_, ++pulled_[other]);
  return true;
}

bool DirectCall::share(Arena& arena) {
  if (!may_try_again(arena)) return false;
  if (!sharing_.is) {
    const uint64_t all = chunks(pair(root_, rank_)), next = arena.claim(root_, root_, call_, all);
    if (next == all) return false;
    sharing_ = {true, next, 0};
  }
  // Where the root's array is mapped all is copied from there, and what this rank gets itself comes last: with that the root
  // is told that its array has been read, and may change it. Else the others get what this rank has got first.
  const size_t first = rank_ != root_ && there(arena, root_).given ? 1 : 0;
  for (; sharing_.has < ranks_; ++sharing_.has) {
    const size_t other = (root_ + first + sharing_.has) % ranks_;
    if (other != rank_ && !move(arena, other != root_, other, sharing_.chunk)) return false;
  }
  sharing_.is = false;
  return true;
}

bool DirectCall::has_shared(const Arena& arena) const {
  if (sharing_.is) return false;
  uint64_t has = pulled_[root_];
  // Of the root: what it has given to all, and what others have from it. Of the others: what they have, from whomever.
  if (rank_ == root_) has = pushed_[(root_ + 1) % ranks_];
  for (size_t other = 0; other < ranks_; ++other)
    if (other != rank_)
      has += rank_ == root_ ? arena.read(other, root_, call_) : arena.pushed(other, rank_, call_);
  return has >= chunks(pair(root_, rank_));
}

bool DirectCall::push(Arena& arena, size_t reader) {
  const uint64_t all = chunks(pair(rank_, reader)), next = arena.claim(rank_, reader, call_, all);
  return next < all && move(arena, true, reader, next);
}

bool DirectCall::pull(Arena& arena, size_t writer) {
  const uint64_t all = chunks(pair(writer, rank_)), next = arena.claim(writer, rank_, call_, all);
  return next < all && move(arena, false, writer, next);
}

// From the others' arrays into `out`. What it reads is not changed before the last of it has been read.
bool DirectCall::reduce(Arena& arena, uint64_t at, size_t nbytes) {
  const std::byte* own = given_ + at;
  const std::byte* sum = own;
  if (!arena.enter(rank_)) return false;
  for (size_t rank = 0; rank < ranks_ && !error_; ++rank) {
    const std::byte* part = own;
    if (rank != rank_) {
      const There& there = this->there(arena, rank);
      if (there.given) {
        part = there.given + at;
      } else {
        // The first goes where the sums go from then on.
        std::byte* into = rank == 0 && ranks_ > 2 ? sum_.data() : part_.data();
        error_ = read(rank, there, at, into, nbytes);
        part = into;
      }
    }
    if (rank == 0 || error_) {
      sum = part;
      continue;
    }
    std::byte* into = rank + 1 == ranks_ ? out_ + at : sum_.data();
    reduction_(into, sum, part, nbytes / item_);
    sum = into;
  }
  arena.leave(rank_);
  return !error_;
}

// After an error: a process that has ended leaves its number to others.
bool DirectCall::may_try_again(const Arena& arena) {
  for (size_t other = 0; error_ && other < ranks_; ++other)
    if (other != rank_ && !arena.is_rank(other, processes_[other])) return false;
  error_ = 0;
  return true;
}

bool DirectCall::fold(Arena& arena) {
  if (folded_ == folds_ || !may_try_again(arena)) return false;
  if (!reduced_) {
    const uint64_t at = folded_ * chunk_;
    reduced_ = reduce(arena, starts_[rank_] + at, std::min(chunk_, sizes_[rank_] - at));
    if (!reduced_) return false;
    told_ = 0;
  }
  for (; told_ < ranks_; ++told_)
    if (told_ != rank_ && !move(arena, true, told_, folded_)) return false;
  reduced_ = false;
  ++folded_;
  return true;
}

bool DirectCall::advance(Arena& arena) {
  if (kind_ == Kind::all_reduce) return fold(arena);
  if (shares()) return share(arena);
  if (left_over_.is) {
    if (!may_try_again(arena)) return false;
    if (!move(arena, left_over_.push, left_over_.other, left_over_.chunk)) return false;
  }
  bool did = false;
  for (size_t away = 1; away < ranks_ && !left_over_.is; ++away) did |= push(arena, (rank_ + away) % ranks_);
  did |= own_chunk();
  for (size_t away = 1; away < ranks_ && !did && !left_over_.is; ++away)
    did = pull(arena, (rank_ + ranks_ - away) % ranks_);
  return did;
}

}  // namespace aiocomm
