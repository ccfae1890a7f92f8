// Rows of a plan, as puts and gets of GPU memory take them: made once, for as many pairs of arrays as there are.
#pragma once

#include <cstdint>

#include "core/rows.hpp"

namespace aiocomm::py {

// Offsets in the list count from `low` on each side.
struct PlacedRows {
  RowList list;
  Cover from, to;
};

}  // namespace aiocomm::py
