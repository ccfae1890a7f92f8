#include "core/routing.hpp"

#include <algorithm>
#include <bit>
#include <memory>
#include <utility>

namespace aiocomm {

namespace {

constexpr size_t kBits = 64;  // ranks that a word has a bit of each for
constexpr uint8_t kNobody = 0xff;

// Up to so many ranks: nothing branches on whom a token goes to, which cannot be foreseen.
bool route_by_bits(const int64_t* ids, const float* weights, size_t tokens, size_t choices,
                   std::span<const int64_t> owner, size_t ranks, const Routed& routed, int64_t* rows,
                   int64_t* assignments) {
  const size_t all = tokens * choices;
  const std::unique_ptr<uint8_t[]> goes(new uint8_t[all]);
  int64_t row[kBits] = {}, next[kBits] = {};
  uint16_t here[kBits] = {};  // choices of one token
  auto each = [](uint64_t ranks_of, auto of) {
    for (; ranks_of; ranks_of &= ranks_of - 1) of(static_cast<size_t>(std::countr_zero(ranks_of)));
  };
  for (size_t token = 0, at = 0; token < tokens; ++token) {
    uint64_t ranks_of = 0;
    for (const size_t end = at + choices; at < end; ++at) {
      goes[at] = kNobody;
      if (ids[at] == -1) continue;
      if (static_cast<uint64_t>(ids[at]) >= owner.size()) return false;
      const auto rank = static_cast<uint64_t>(owner[static_cast<size_t>(ids[at])]);
      if (rank >= ranks) return false;
      goes[at] = static_cast<uint8_t>(rank);
      ranks_of |= uint64_t{1} << rank;
      ++next[rank];
    }
    each(ranks_of, [&](size_t rank) { ++row[rank]; });
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    rows[rank + 1] = rows[rank] + row[rank];
    assignments[rank + 1] = assignments[rank] + next[rank];
    row[rank] = rows[rank];
    next[rank] = assignments[rank];
  }
  for (size_t token = 0, at = 0; token < tokens; ++token) {
    uint64_t ranks_of = 0;
    for (const size_t end = at + choices; at < end; ++at) {
      const size_t rank = goes[at];
      if (rank == kNobody) continue;
      ranks_of |= uint64_t{1} << rank;
      ++here[rank];
      routed.experts[next[rank]] = static_cast<int32_t>(ids[at]);
      routed.weights[next[rank]++] = weights[at];
    }
    each(ranks_of, [&](size_t rank) {
      routed.tokens[row[rank]] = static_cast<int64_t>(token);
      routed.counts[row[rank]++] = std::exchange(here[rank], uint16_t{0});
    });
  }
  return true;
}

}  // namespace

bool route_tokens(const int64_t* ids, const float* weights, size_t tokens, size_t choices,
                  std::span<const int64_t> owner, size_t ranks, const Routed& routed,
                  std::vector<int64_t>& rows, std::vector<int64_t>& assignments) {
  rows.assign(ranks + 1, 0);
  assignments.assign(ranks + 1, 0);
  if (ranks <= kBits)
    return route_by_bits(ids, weights, tokens, choices, owner, ranks, routed, rows.data(),
                         assignments.data());
  std::vector<int64_t> last(ranks, -1);  // token that was seen last
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t at = token * choices; at < (token + 1) * choices; ++at) {
      if (ids[at] == -1) continue;
      if (static_cast<uint64_t>(ids[at]) >= owner.size()) return false;
      const auto rank = static_cast<uint64_t>(owner[static_cast<size_t>(ids[at])]);
      if (rank >= ranks) return false;
      rows[rank + 1] += last[rank] != static_cast<int64_t>(token);
      last[rank] = static_cast<int64_t>(token);
      ++assignments[rank + 1];
    }
  }
  for (size_t rank = 0; rank < ranks; ++rank) {
    rows[rank + 1] += rows[rank];
    assignments[rank + 1] += assignments[rank];
  }
  std::vector<int64_t> row(rows.begin(), rows.end() - 1), next(assignments.begin(), assignments.end() - 1);
  std::fill(last.begin(), last.end(), -1);
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t at = token * choices; at < (token + 1) * choices; ++at) {
      if (ids[at] < 0) continue;
      const auto rank = static_cast<size_t>(owner[static_cast<size_t>(ids[at])]);
      if (last[rank] != static_cast<int64_t>(token)) {
        last[rank] = static_cast<int64_t>(token);
        routed.tokens[row[rank]] = static_cast<int64_t>(token);
        routed.counts[row[rank]++] = 0;
      }
      ++routed.counts[row[rank] - 1];
      routed.experts[next[rank]] = static_cast<int32_t>(ids[at]);
      routed.weights[next[rank]++] = weights[at];
    }
  }
  return true;
}

namespace {
// Rows have a handful of experts each.
void sort_few(int64_t* begin, int64_t* end) {
  if (end - begin > 16) return std::sort(begin, end);
  for (int64_t* next = begin; next < end; ++next) {
    const int64_t one = *next;
    int64_t* at = next;
    for (; at > begin && at[-1] > one; --at) *at = at[-1];
    *at = one;
  }
}
}  // namespace

bool arrange_parts(std::span<const CamePart> parts, std::span<const int64_t> local, size_t held,
                   const Arranged& arranged) {
  std::fill_n(arranged.offsets, held + 1, 0);
  arranged.starts[0] = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    arranged.starts[p + 1] = arranged.starts[p] + static_cast<int64_t>(parts[p].counts.size());
    size_t total = 0;
    for (uint16_t count : parts[p].counts) {
      if (!count) return false;
      total += count;
    }
    if (total != parts[p].experts.size()) return false;
    for (int32_t expert : parts[p].experts) {
      if (expert < 0 || static_cast<size_t>(expert) >= local.size()) return false;
      const auto mine = static_cast<uint64_t>(local[static_cast<size_t>(expert)]);
      if (mine >= held) return false;
      ++arranged.offsets[mine + 1];
    }
  }
  for (size_t expert = 0; expert < held; ++expert) arranged.offsets[expert + 1] += arranged.offsets[expert];
  std::vector<int64_t> next(arranged.offsets, arranged.offsets + held);
  int64_t row = 0, done = 0;
  arranged.first[0] = 0;
  for (const CamePart& part : parts) {
    size_t at = 0;
    for (uint16_t count : part.counts) {
      for (size_t end = at + count; at < end; ++at) {
        const auto expert = static_cast<size_t>(local[static_cast<size_t>(part.experts[at])]);
        const int64_t place = next[expert]++;
        arranged.rows[place] = row;
        arranged.weights[place] = part.weights[at];
        arranged.order[done++] = place;
      }
      sort_few(arranged.order + arranged.first[row], arranged.order + done);
      arranged.first[++row] = done;
    }
  }
  return true;
}

}  // namespace aiocomm
