#include "core/reduce.hpp"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace aiocomm {

namespace {

enum class Op { sum, prod, min, max };

// Whole numbers wrap, which only unsigned arithmetic of full width may.
template <typename T>
using Wide = std::conditional_t<std::is_floating_point_v<T>, T, uint64_t>;

template <typename T, Op op>
void reduce(std::byte* target, const std::byte* left, const std::byte* right, size_t count) {
  auto* into = reinterpret_cast<T*>(target);
  auto* a = reinterpret_cast<const T*>(left);
  auto* b = reinterpret_cast<const T*>(right);
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) {
    if constexpr (op == Op::sum)
      into[i] = static_cast<T>(static_cast<Wide<T>>(a[i]) + static_cast<Wide<T>>(b[i]));
    else if constexpr (op == Op::prod)
      into[i] = static_cast<T>(static_cast<Wide<T>>(a[i]) * static_cast<Wide<T>>(b[i]));
    else if constexpr (op == Op::min)
      into[i] = std::min(a[i], b[i]);
    else
      into[i] = std::max(a[i], b[i]);
  }
}

template <typename T>
Reduction of(std::string_view op) {
  if (op == "sum") return reduce<T, Op::sum>;
  if (op == "prod") return reduce<T, Op::prod>;
  if constexpr (std::is_integral_v<T>) {
    if (op == "min") return reduce<T, Op::min>;
    if (op == "max") return reduce<T, Op::max>;
  }
  return nullptr;
}

}  // namespace

Reduction find_reduction(std::string_view format, std::string_view op) {
  if (format == "f4") return of<float>(op);
  if (format == "f8") return of<double>(op);
  if (format == "i1") return of<int8_t>(op);
  if (format == "i2") return of<int16_t>(op);
  if (format == "i4") return of<int32_t>(op);
  if (format == "i8") return of<int64_t>(op);
  if (format == "u1") return of<uint8_t>(op);
  if (format == "u2") return of<uint16_t>(op);
  if (format == "u4") return of<uint32_t>(op);
  if (format == "u8") return of<uint64_t>(op);
  return nullptr;
}

}  // namespace aiocomm
