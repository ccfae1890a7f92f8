// Rows as requests to a device: each is about one stretch of the peer's memory, and several of ours, gathered or scattered.
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/rows.hpp"

namespace aiocomm::rdma {

struct Piece {
  uint64_t local = 0;
  uint32_t nbytes = 0;
};

struct Request {
  uint64_t remote = 0;
  size_t pieces = 0;  // of those that follow
};

// Requests that are posted together, and whose last tells the end of all.
struct Requests {
  std::vector<Request> requests;
  std::vector<Piece> pieces;  // of all, in their order
  uint64_t nbytes = 0;
};

// What of `rows`, from byte `offset` on, at most `nbytes`, goes into `most` requests of `most_pieces` each. `local` and
// `remote`: where the rows begin on each side.
inline Requests requests_of(const RowList& rows, bool read, uint64_t offset, uint64_t nbytes, uint64_t local,
                            uint64_t remote, size_t most, size_t most_pieces) {
  Requests found;
  uint64_t ends = 0, ends_here = 0;  // the last request, its last piece
  auto add = [&](uint64_t here, uint64_t there, uint64_t length) {
    const bool goes_on = !found.requests.empty() && there == ends;
    if (goes_on && here == ends_here) {
      found.pieces.back().nbytes += static_cast<uint32_t>(length);
    } else {
      if (!goes_on || found.requests.back().pieces == most_pieces) {
        if (found.requests.size() == most) return false;
        found.requests.push_back({there, 0});
      }
      found.pieces.push_back({here, static_cast<uint32_t>(length)});
      ++found.requests.back().pieces;
    }
    ends = there + length;
    ends_here = here + length;
    found.nbytes += length;
    return true;
  };
  rows.cut(offset, nbytes, [&](const Rows& some) {
    for (uint64_t i = 0; i < some.count; ++i) {
      const uint64_t from = some.from + i * static_cast<uint64_t>(some.from_step),
                     to = some.to + i * static_cast<uint64_t>(some.to_step);
      if (!add(local + (read ? to : from), remote + (read ? from : to), some.nbytes)) return false;
    }
    return true;
  });
  return found;
}

}  // namespace aiocomm::rdma
