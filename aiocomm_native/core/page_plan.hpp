// The loops of planning paged copies, over lists of pages and rows. Pure: offsets in, offsets out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace aiocomm {

// Where the parts of the pages of one side begin: page * stride + part * step, in bytes. Pages are divided so
// that the parts of both sides have one size.
struct PageSide {
  std::span<const int64_t> pages;
  int64_t count;  // pages that there are
  int64_t stride;
  int64_t parts;  // of each page
  int64_t step;
};

enum class PageError : uint8_t { none, source_range, target_range, repeated };

struct PageRuns {
  std::vector<int64_t> source, target, nbytes;
  bool equal = true;  // all of one length
  PageError error = PageError::none;
  int64_t page = 0;  // which is wrong
};

// Parts in the order of the target, neighbours on both sides merged into runs. As many parts on both sides.
PageRuns merge_pages(const PageSide& source, const PageSide& target, int64_t nbytes);

struct EqualSteps {
  std::vector<int64_t> begin, length;         // of each stretch, in the lists
  std::vector<int64_t> a, step_a, b, step_b;  // where it begins, and its steps; 0 for a single element
};

// Cuts two lists into the fewest stretches in which both grow by constant steps.
EqualSteps equal_steps(std::span<const int64_t> a, std::span<const int64_t> b);

// 2-D copies of one pair of arrays: `rows[i]` rows of `nbytes[i]` bytes, at constant strides on both sides.
struct StridedCopies {
  std::span<const int64_t> near, near_stride, far, far_stride, nbytes, rows;
};

// Ranges that are contiguous on the far side, of at most `most` bytes where they have several rows.
struct FarRanges {
  std::vector<int64_t> far, nbytes;  // of each range
  std::vector<int64_t> first;        // row of each range, and at the end the number of all
  std::vector<int64_t> near, row;    // offset and bytes of each row on the near side
};

FarRanges far_ranges(const StridedCopies& copies, int64_t most);

// Copies rows between their places in `array` and close together in `packed`.
void pack_rows(std::span<const int64_t> at, std::span<const int64_t> nbytes, const std::byte* array,
               std::byte* packed);
void unpack_rows(std::span<const int64_t> at, std::span<const int64_t> nbytes, std::byte* array,
                 const std::byte* packed);

}  // namespace aiocomm
