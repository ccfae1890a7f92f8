// Elementwise reductions of host memory, for those whose result is the same bits however it is computed.
//
// Not here, and so left to NumPy: minima and maxima of floating numbers (signed zeros), complex numbers, and formats
// that C++ has no type for.
#pragma once

#include <cstddef>
#include <string_view>

namespace aiocomm {

// `target` may be either operand. `count` elements, aligned.
using Reduction = void (*)(std::byte* target, const std::byte* left, const std::byte* right, size_t count);

// `format`: a NumPy kind and the bytes of an element, as in "f4"; `op`: sum, prod, min or max. nullptr: not here.
Reduction find_reduction(std::string_view format, std::string_view op);

}  // namespace aiocomm
