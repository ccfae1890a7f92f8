#include "core/page_plan.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>

namespace aiocomm {

namespace {

constexpr int64_t kNone = -1;
constexpr int64_t kSparse = 16;  // pages per entry beyond which sorting is cheaper than a table of all pages

bool outside(const PageSide& side, int64_t& wrong) {
  for (int64_t page : side.pages) {
    if (page < 0 || page >= side.count) {
      wrong = page;
      return true;
    }
  }
  return false;
}

// Places of the list, by the page that stands there. Empty if a page comes twice.
std::vector<int64_t> by_page(const PageSide& side, int64_t& repeated) {
  const auto n = static_cast<int64_t>(side.pages.size());
  std::vector<int64_t> order;
  if (std::is_sorted(side.pages.begin(), side.pages.end())) {
    order.resize(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
  } else if (side.count <= kSparse * n) {
    std::vector<int64_t> place(static_cast<size_t>(side.count), kNone);
    for (int64_t i = 0; i < n; ++i) {
      int64_t& there = place[static_cast<size_t>(side.pages[static_cast<size_t>(i)])];
      if (there != kNone) {
        repeated = side.pages[static_cast<size_t>(i)];
        return {};
      }
      there = i;
    }
    order.reserve(static_cast<size_t>(n));
    for (int64_t i : place)
      if (i != kNone) order.push_back(i);
    return order;
  } else {
    order.resize(static_cast<size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return side.pages[static_cast<size_t>(a)] < side.pages[static_cast<size_t>(b)];
    });
  }
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t page = side.pages[static_cast<size_t>(order[i])];
    if (page == side.pages[static_cast<size_t>(order[i - 1])]) {
      repeated = page;
      return {};
    }
  }
  return order;
}

int64_t offset(const PageSide& side, int64_t unit) {
  const int64_t page = side.parts == 1 ? unit : unit / side.parts;
  const int64_t part = unit - page * side.parts;
  return side.pages[static_cast<size_t>(page)] * side.stride + part * side.step;
}

// Collects parts in their order, and merges neighbours.
class Runs {
 public:
  Runs(PageRuns& runs, size_t most, int64_t nbytes) : runs_(runs), nbytes_(nbytes) {
    for (auto* list : {&runs.source, &runs.target, &runs.nbytes}) list->resize(most);
  }

  void add(int64_t from, int64_t to) {
    if (from == next_source_ && to == next_target_) {
      runs_.nbytes[used_ - 1] += nbytes_;
      runs_.equal = false;
    } else {
      runs_.source[used_] = from;
      runs_.target[used_] = to;
      runs_.nbytes[used_++] = nbytes_;
    }
    next_source_ = from + nbytes_;
    next_target_ = to + nbytes_;
  }

  void end() {
    for (auto* list : {&runs_.source, &runs_.target, &runs_.nbytes}) list->resize(used_);
    if (runs_.equal) return;
    runs_.equal = std::all_of(runs_.nbytes.begin(), runs_.nbytes.end(),
                              [&](int64_t one) { return one == runs_.nbytes.front(); });
  }

 private:
  PageRuns& runs_;
  int64_t nbytes_;
  size_t used_ = 0;
  int64_t next_source_ = kNone, next_target_ = kNone;  // where a part would have to begin to be merged
};

// For undivided pages in no order: one pass writes a table, one reads it in its order.
bool merge_by_table(const PageSide& source, const PageSide& target, int64_t nbytes, PageRuns& runs) {
  std::vector<int32_t> given(static_cast<size_t>(target.count), kNone);
  for (size_t i = 0; i < target.pages.size(); ++i) {
    int32_t& there = given[static_cast<size_t>(target.pages[i])];
    if (there != kNone) {
      runs.error = PageError::repeated;
      runs.page = target.pages[i];
      return false;
    }
    there = static_cast<int32_t>(source.pages[i]);
  }
  Runs collected(runs, target.pages.size(), nbytes);
  int64_t to = 0;
  for (int32_t page : given) {
    if (page != kNone) collected.add(page * source.stride, to);
    to += target.stride;
  }
  collected.end();
  return true;
}

struct Row {
  int64_t far, near, nbytes;
};

constexpr size_t kFewRows = 512;  // that comparing sorts sooner
constexpr int kDigit = 11;        // bits

// By digits of what tells them apart: a hundred thousand take a tenth of the time that comparing them does.
void sort_by_far(std::vector<Row>& rows) {
  const auto before = [](const Row& a, const Row& b) { return a.far < b.far; };
  if (std::is_sorted(rows.begin(), rows.end(), before)) return;
  if (rows.size() < kFewRows) return std::stable_sort(rows.begin(), rows.end(), before);
  const int64_t least = std::min_element(rows.begin(), rows.end(), before)->far;
  const auto key = [&](const Row& row) {
    return static_cast<uint64_t>(row.far) - static_cast<uint64_t>(least);
  };
  uint64_t any = 0;
  for (const Row& row : rows) any |= key(row);
  const int bits = std::bit_width(any);
  std::vector<Row> sorted(rows.size());
  for (int shift = std::countr_zero(any); shift < bits; shift += kDigit) {
    std::array<size_t, (1 << kDigit) + 1> place{};
    const auto digit = [&](const Row& row) { return (key(row) >> shift) & ((1 << kDigit) - 1); };
    for (const Row& row : rows) ++place[digit(row) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const Row& row : rows) sorted[place[digit(row)]++] = row;
    rows.swap(sorted);
  }
}

}  // namespace

PageRuns merge_pages(const PageSide& source, const PageSide& target, int64_t nbytes) {
  PageRuns runs;
  if (outside(source, runs.page)) runs.error = PageError::source_range;
  if (runs.error == PageError::none && outside(target, runs.page)) runs.error = PageError::target_range;
  if (runs.error != PageError::none) return runs;
  const auto n = static_cast<int64_t>(target.pages.size());
  if (source.parts == 1 && target.parts == 1 && source.count <= INT32_MAX && target.count <= kSparse * n) {
    merge_by_table(source, target, nbytes, runs);
    return runs;
  }
  const std::vector<int64_t> order = by_page(target, runs.page);
  if (order.size() != target.pages.size()) {
    runs.error = PageError::repeated;
    return runs;
  }
  Runs collected(runs, order.size() * static_cast<size_t>(target.parts), nbytes);
  const auto add = [&](int64_t unit) { collected.add(offset(source, unit), offset(target, unit)); };
  if (target.parts == 1 || target.step <= target.stride) {
    for (int64_t place : order)
      for (int64_t part = 0; part < target.parts; ++part) add(place * target.parts + part);
  } else {  // pages lie between the parts of a page
    for (int64_t part = 0; part < target.parts; ++part)
      for (int64_t place : order) add(place * target.parts + part);
  }
  collected.end();
  return runs;
}

EqualSteps equal_steps(std::span<const int64_t> a, std::span<const int64_t> b) {
  EqualSteps found;
  const size_t most = a.size();
  for (auto* list : {&found.begin, &found.length, &found.a, &found.step_a, &found.b, &found.step_b})
    list->reserve(most / 2 + 1);
  // Any part of a stretch is one, too: so to take as much as possible each time gives the fewest.
  for (size_t begin = 0; begin < most;) {
    size_t end = std::min(begin + 2, most);
    int64_t step_a = 0, step_b = 0;
    if (end == begin + 2) {
      step_a = a[begin + 1] - a[begin];
      step_b = b[begin + 1] - b[begin];
      while (end < most && a[end] - a[end - 1] == step_a && b[end] - b[end - 1] == step_b) ++end;
    }
    found.begin.push_back(static_cast<int64_t>(begin));
    found.length.push_back(static_cast<int64_t>(end - begin));
    found.a.push_back(a[begin]);
    found.step_a.push_back(step_a);
    found.b.push_back(b[begin]);
    found.step_b.push_back(step_b);
    begin = end;
  }
  return found;
}

FarRanges far_ranges(const StridedCopies& copies, int64_t most) {
  std::vector<Row> rows;
  rows.reserve(static_cast<size_t>(std::reduce(copies.rows.begin(), copies.rows.end())));
  const auto add = [&](size_t i, int64_t k) {
    rows.push_back({copies.far[i] + k * copies.far_stride[i], copies.near[i] + k * copies.near_stride[i],
                    copies.nbytes[i]});
  };
  // Pages of several layers: where the k-th rows of all copies come before all (k + 1)-th ones, that order is the
  // far side's, and saves sorting.
  const size_t count = copies.rows.size();
  bool layered = count > 1 && copies.rows[0] > 1;
  for (size_t i = 1; layered && i < count; ++i)
    layered = copies.rows[i] == copies.rows[0] && copies.far_stride[i] == copies.far_stride[0] &&
              copies.far[i] > copies.far[i - 1];
  if (layered && copies.far[count - 1] - copies.far[0] < copies.far_stride[0]) {
    for (int64_t k = 0; k < copies.rows[0]; ++k)
      for (size_t i = 0; i < count; ++i) add(i, k);
  } else {
    for (size_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < copies.rows[i]; ++k) add(i, k);
  }
  sort_by_far(rows);
  FarRanges found;
  found.near.reserve(rows.size());
  found.row.reserve(rows.size());
  int64_t end = 0;
  for (const Row& row : rows) {
    if (found.far.empty() || row.far != end || found.nbytes.back() + row.nbytes > most) {
      found.far.push_back(row.far);
      found.nbytes.push_back(0);
      found.first.push_back(static_cast<int64_t>(found.near.size()));
    }
    found.nbytes.back() += row.nbytes;
    found.near.push_back(row.near);
    found.row.push_back(row.nbytes);
    end = row.far + row.nbytes;
  }
  found.first.push_back(static_cast<int64_t>(found.near.size()));
  return found;
}

void pack_rows(std::span<const int64_t> at, std::span<const int64_t> nbytes, const std::byte* array,
               std::byte* packed) {
  for (size_t i = 0; i < at.size(); ++i) {
    std::memcpy(packed, array + at[i], static_cast<size_t>(nbytes[i]));
    packed += nbytes[i];
  }
}

void unpack_rows(std::span<const int64_t> at, std::span<const int64_t> nbytes, std::byte* array,
                 const std::byte* packed) {
  for (size_t i = 0; i < at.size(); ++i) {
    std::memcpy(array + at[i], packed, static_cast<size_t>(nbytes[i]));
    packed += nbytes[i];
  }
}

}  // namespace aiocomm
