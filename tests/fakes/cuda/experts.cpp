#include "experts.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <sstream>
#include <utility>

namespace fake {
namespace {

constexpr size_t kRanks = 64, kPlain = 4;  // as in aiocomm/moe/sources.py
constexpr size_t kMove = kRanks + 4 + 3 * kPlain, kWeigh = 8, kAdd = kRanks + 9;

// Reads and writes device memory; after the first error nothing more.
class View {
 public:
  explicit View(const DeviceMemory& memory) : memory_(memory) {}

  void read(uint64_t address, void* into, size_t nbytes) {
    each(address, nbytes, [&](std::byte* bytes, size_t at, size_t size) {
      std::memcpy(static_cast<std::byte*>(into) + at, bytes, size);
    });
  }

  void write(uint64_t address, const void* from, size_t nbytes) {
    each(address, nbytes, [&](std::byte* bytes, size_t at, size_t size) {
      if (!memory_.stale()) std::memcpy(bytes, static_cast<const std::byte*>(from) + at, size);
    });
  }

  template <class T>
  std::vector<T> array(uint64_t address, size_t count) {
    std::vector<T> found(count);
    read(address, found.data(), count * sizeof(T));
    return found;
  }

  // Rows are read and written by groups of 16 bytes or more (`whole`), or element by element.
  void expect_aligned(uint64_t address, size_t element) {
    if (!code && address % (whole ? 16 : element)) code = CUDA_ERROR_MISALIGNED_ADDRESS;
  }

  CUresult code = CUDA_SUCCESS;
  bool whole = false;

 private:
  template <class F>
  void each(uint64_t address, size_t nbytes, F&& f) {
    if (code || !nbytes) return;
    std::vector<Piece> pieces;
    code = memory_.pieces(address, nbytes, pieces);
    if (code) return;
    size_t at = 0;
    for (const Piece& piece : pieces) {
      f(piece.bytes, at, std::min(piece.size, nbytes - at));
      at += piece.size;
    }
  }

  const DeviceMemory& memory_;
};

size_t bytes_of(const std::string& dtype) { return dtype == "float64" ? 8 : dtype == "float32" ? 4 : 2; }

double half_to_double(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// To the nearest, ties to even: found by the distance between two neighbours. `digits` of the mantissa, the first of
// which is not stored; `least` is the exponent of the smallest number, and `inf` the bits of what is too large.
uint16_t rounded(double value, int digits, int least, uint16_t inf) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return sign | inf | static_cast<uint16_t>(1 << (digits - 2));
  if (size == 0) return sign;  // which has no exponent
  if (std::isinf(value)) return sign | inf;
  int exponent = 0;
  std::frexp(size, &exponent);
  const int step = std::max(exponent - digits, least), whole = 1 << (digits - 1);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
  const int found =
      step == least && units < whole ? units : ((step - least + 1) << (digits - 1)) + units - whole;
  return sign | static_cast<uint16_t>(std::min<int>(found, inf));
}

uint16_t to_half(double value) { return rounded(value, 11, -24, 0x7c00); }
uint16_t to_bfloat(double value) { return rounded(value, 8, -133, 0x7f80); }

// One row in the type of sums, and back.
template <class Sum>
std::vector<Sum> load(View& view, uint64_t address, const std::string& dtype, size_t hidden) {
  std::vector<Sum> row(hidden);
  view.expect_aligned(address, bytes_of(dtype));
  if (dtype == "float64") {
    const auto from = view.array<double>(address, hidden);
    std::transform(from.begin(), from.end(), row.begin(), [](double x) { return static_cast<Sum>(x); });
  } else if (dtype == "float32") {
    const auto from = view.array<float>(address, hidden);
    std::transform(from.begin(), from.end(), row.begin(), [](float x) { return static_cast<Sum>(x); });
  } else {
    const auto from = view.array<uint16_t>(address, hidden);
    const bool brain = dtype == "bfloat16";
    std::transform(from.begin(), from.end(), row.begin(), [brain](uint16_t x) {
      return static_cast<Sum>(brain ? std::bit_cast<float>(uint32_t{x} << 16) : half_to_double(x));
    });
  }
  return row;
}

template <class Sum>
void save(View& view, uint64_t address, const std::string& dtype, const std::vector<Sum>& row) {
  view.expect_aligned(address, bytes_of(dtype));
  auto write = [&](auto one, auto convert) {
    std::vector<decltype(one)> made(row.size());
    std::transform(row.begin(), row.end(), made.begin(), convert);
    view.write(address, made.data(), made.size() * sizeof one);
  };
  if (dtype == "float64") return write(double{}, [](Sum x) { return static_cast<double>(x); });
  if (dtype == "float32") return write(float{}, [](Sum x) { return static_cast<float>(x); });
  if (dtype == "float16") return write(uint16_t{}, [](Sum x) { return to_half(x); });
  write(uint16_t{}, [](Sum x) { return to_bfloat(x); });
}

void move_rows(View& view, const std::vector<uint64_t>& all) {
  struct Entry {
    uint32_t source, index, place, unused;
  };
  const uint64_t to = all[kRanks], table = all[kRanks + 1], count = all[kRanks + 2], width = all[kRanks + 3];
  auto copy = [&](uint64_t target, uint64_t from, size_t nbytes) {
    const auto bytes = view.array<std::byte>(from, nbytes);
    view.write(target, bytes.data(), nbytes);
  };
  for (size_t run = 0; run < kPlain; ++run) {
    const uint64_t* plain = &all[kRanks + 4 + 3 * run];
    copy(plain[0], plain[1], plain[2]);
  }
  for (const Entry& entry : view.array<Entry>(table, count))
    copy(to + entry.place * width, all[entry.source] + entry.index * width, width);
}

uint32_t low(uint64_t word) { return static_cast<uint32_t>(word); }
uint32_t high(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

// Of one row; `from`: addresses of the terms, their order, where each row begins in it, and the weights.
template <class Sum>
std::vector<Sum> weighed(View& view, const uint64_t* from, uint64_t row, const std::string& terms,
                         size_t hidden) {
  std::vector<Sum> sums;
  const auto ends = view.array<uint32_t>(from[2] + row * sizeof(uint32_t), 2);
  for (uint32_t k = ends[0]; k < ends[1] && !view.code; ++k) {
    const uint32_t place = view.array<uint32_t>(from[1] + k * sizeof(uint32_t), 1)[0];
    const auto weight = static_cast<Sum>(view.array<float>(from[3] + k * sizeof(float), 1)[0]);
    auto term = load<Sum>(view, from[0] + uint64_t{place} * hidden * bytes_of(terms), terms, hidden);
    for (size_t i = 0; i < hidden; ++i) {
      const volatile Sum product = term[i] * weight;  // is not fused with what follows
      term[i] = sums.empty() ? product : sums[i] + product;
    }
    sums = std::move(term);
  }
  return sums;
}

template <class Sum>
void weigh_rows(View& view, const std::vector<uint64_t>& all, const std::string& terms,
                const std::string& wire) {
  const uint32_t own_first = low(all[5]), own = high(all[5]), count = low(all[6]), hidden = high(all[6]);
  view.whole = low(all[7]);
  for (uint32_t row = 0; row < count && !view.code; ++row)
    if (row < own_first || row >= own_first + own)
      save<Sum>(view, all[4] + uint64_t{row} * hidden * bytes_of(wire), wire,
                weighed<Sum>(view, all.data(), row, terms, hidden));
}

template <class Sum>
void add_rows(View& view, const std::vector<uint64_t>& all, const std::string& terms, const std::string& wire,
              const std::string& out) {
  const uint64_t* rest = &all[kRanks];
  const uint64_t to = rest[0];
  const uint32_t own_first = low(rest[6]), size = high(rest[6]), own = low(rest[7]), count = high(rest[7]);
  const uint32_t hidden = low(rest[8]);
  view.whole = high(rest[8]);
  const auto table = view.array<int32_t>(rest[1], uint64_t{count} * size);
  for (uint64_t token = 0; token < count && !view.code; ++token) {
    std::vector<Sum> sums(hidden, Sum{0});
    for (uint32_t rank = 0; rank < size; ++rank) {
      const int32_t row = table[token * size + rank];
      if (row < 0) continue;
      const auto index = static_cast<uint64_t>(row);
      const auto part = rank == own
                            ? weighed<Sum>(view, rest + 2, own_first + index, terms, hidden)
                            : load<Sum>(view, all[rank] + index * hidden * bytes_of(wire), wire, hidden);
      for (size_t i = 0; i < hidden; ++i) sums[i] += part[i];
    }
    save<Sum>(view, to + token * hidden * bytes_of(out), out, sums);
  }
}

}  // namespace

size_t expert_argument_words(const std::string& name) {
  if (name == "move_rows") return kMove;
  if (name == "weigh_rows") return kWeigh;
  return name == "add_rows" ? kAdd : 0;
}

CUresult run_experts(const Kernel& kernel, const DeviceMemory& memory) {
  View view(memory);
  std::istringstream text(kernel.op);
  std::string name, terms, wire, out;
  text >> name >> terms >> wire >> out;
  const bool wide = terms == "float64";
  if (name == "move_rows")
    move_rows(view, kernel.in);
  else if (name == "weigh_rows")
    wide ? weigh_rows<double>(view, kernel.in, terms, wire) : weigh_rows<float>(view, kernel.in, terms, wire);
  else
    wide ? add_rows<double>(view, kernel.in, terms, wire, out)
         : add_rows<float>(view, kernel.in, terms, wire, out);
  return view.code;
}

}  // namespace fake
