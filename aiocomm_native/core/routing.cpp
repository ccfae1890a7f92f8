#include "core/routing.hpp"

#include <algorithm>

namespace aiocomm {

bool route_tokens(const int64_t* ids, const float* weights, size_t tokens, size_t choices,
                  std::span<const int64_t> owner, size_t ranks, const Routed& routed,
                  std::vector<int64_t>& rows, std::vector<int64_t>& assignments) {
  rows.assign(ranks + 1, 0);
  assignments.assign(ranks + 1, 0);
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
