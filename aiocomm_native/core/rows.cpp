#include "core/rows.hpp"

#include <cstring>

namespace aiocomm {

namespace {

constexpr uint64_t kMost = 1ull << 56;  // of any offset, step or number: no sum overflows

bool is_sane(uint64_t number) { return number > 0 && number < kMost; }

}  // namespace

bool Cover::take_in(int64_t at, int64_t step, uint64_t count, uint64_t nbytes) {
  if (!is_sane(count) || !is_sane(nbytes)) return false;
  const auto last = static_cast<__int128>(at) + static_cast<__int128>(step) * static_cast<int64_t>(count - 1);
  const __int128 least = std::min<__int128>(at, last), most = std::max<__int128>(at, last) + nbytes;
  if (least < 0 || most > kMost) return false;
  low = high ? std::min(low, static_cast<uint64_t>(least)) : static_cast<uint64_t>(least);
  high = std::max(high, static_cast<uint64_t>(most));
  return true;
}

std::optional<RowList> RowList::taken(std::span<const std::byte> bytes, uint64_t nbytes, uint64_t room) {
  if (bytes.empty() || bytes.size() % sizeof(Rows) || nbytes > room) return {};  // no byte is written twice
  RowList list;
  list.reserve(bytes.size() / sizeof(Rows));
  Cover from, to;
  for (size_t at = 0; at < bytes.size(); at += sizeof(Rows)) {
    Rows rows;
    std::memcpy(&rows, bytes.data() + at, sizeof rows);
    const bool inside =
        from.take_in(static_cast<int64_t>(rows.from), rows.from_step, rows.count, rows.nbytes) &&
        to.take_in(static_cast<int64_t>(rows.to), rows.to_step, rows.count, rows.nbytes) && to.high <= room;
    if (!inside || rows.nbytes > nbytes / rows.count) return {};
    list.add(rows);
    if (list.nbytes() > nbytes) return {};
  }
  if (list.nbytes() != nbytes) return {};
  return list;
}

}  // namespace aiocomm
