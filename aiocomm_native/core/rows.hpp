// Many equal rows at equal distances, as one operation of copy engines, network adapters and copy threads. Pure.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

namespace aiocomm {

// `count` rows of `nbytes` bytes; offsets and steps in bytes, into memory whose addresses are not known here.
struct Rows {
  uint64_t from = 0, to = 0;
  int64_t from_step = 0, to_step = 0;
  uint64_t nbytes = 0, count = 0;
};
static_assert(sizeof(Rows) == 48);  // as they travel

// Bytes [low, high) of memory that rows lie in.
struct Cover {
  uint64_t low = 0, high = 0;
  // Takes in `count` rows from `at` on. False: they reach below the memory, or make no sense.
  bool take_in(int64_t at, int64_t step, uint64_t count, uint64_t nbytes);
};

// A list of them, whose bytes are counted one after the other, so that schedulers may cut it anywhere.
class RowList {
 public:
  void reserve(size_t count) {
    rows_.reserve(count);
    before_.reserve(count);
  }
  void add(const Rows& rows) {
    before_.push_back(total_);
    rows_.push_back(rows);
    total_ += rows.nbytes * rows.count;
  }
  // What a peer asks for, which is copied before it is looked at: `nbytes` in all, written within memory of `room` bytes.
  // None: it makes no sense, or reaches out of that.
  static std::optional<RowList> taken(std::span<const std::byte> bytes, uint64_t nbytes, uint64_t room);
  uint64_t nbytes() const { return total_; }
  size_t size() const { return rows_.size(); }
  std::span<const Rows> rows() const { return rows_; }

  // Calls `f(rows)` for what bytes [offset, offset + nbytes) consist of: whole rows together, cut ones by themselves.
  // False from `f` ends that.
  template <class F>
  void cut(uint64_t offset, uint64_t nbytes, F&& f) const {
    auto take_rows = [&](const Rows& rows) {
      if constexpr (std::is_void_v<decltype(f(rows))>)
        return f(rows), true;
      else
        return f(rows);
    };
    auto at = static_cast<size_t>(std::upper_bound(before_.begin(), before_.end(), offset) - before_.begin());
    for (size_t i = at - 1; nbytes && i < rows_.size(); ++i) {
      const Rows& rows = rows_[i];
      uint64_t skip = offset - before_[i];
      uint64_t take = std::min(nbytes, rows.nbytes * rows.count - skip);
      offset += take;
      nbytes -= take;
      if (take == rows.nbytes * rows.count) {
        if (!take_rows(rows)) return;
        continue;
      }
      auto part = [&](uint64_t row, uint64_t start, uint64_t width, uint64_t count) {
        return take_rows(Rows{rows.from + row * static_cast<uint64_t>(rows.from_step) + start,
                              rows.to + row * static_cast<uint64_t>(rows.to_step) + start, rows.from_step,
                              rows.to_step, width, count});
      };
      uint64_t row = skip / rows.nbytes, inside = skip % rows.nbytes;
      if (inside) {
        const uint64_t width = std::min(take, rows.nbytes - inside);
        if (!part(row++, inside, width, 1)) return;
        take -= width;
      }
      if (uint64_t whole = take / rows.nbytes) {
        if (!part(row, 0, rows.nbytes, whole)) return;
        row += whole;
        take -= whole * rows.nbytes;
      }
      if (take && !part(row, 0, take, 1)) return;
    }
  }

 private:
  std::vector<Rows> rows_;
  std::vector<uint64_t> before_;  // bytes before each
  uint64_t total_ = 0;
};

}  // namespace aiocomm
