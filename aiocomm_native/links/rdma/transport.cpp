#include "links/rdma/transport.hpp"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string>

namespace aiocomm::rdma {

namespace {

constexpr double kUnitS = 4.096e-6;
constexpr uint8_t kLongest = 31;
constexpr uint64_t kGraceNs = 500000000;
constexpr uint64_t kSlowNsPerByte = 100;  // 10 MB/s

std::array<uint8_t, kClasses> numbers(std::string_view text) {
  std::array<uint8_t, kClasses> values{};
  size_t count = 0;
  for (size_t at = 0; at < text.size() && count <= kClasses;) {
    size_t end = std::min(text.find(',', at), text.size());
    std::string_view word = text.substr(at, end - at);
    while (!word.empty() && word.front() == ' ') word.remove_prefix(1);
    while (!word.empty() && word.back() == ' ') word.remove_suffix(1);
    uint8_t value = 0;
    auto [rest, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || rest != word.data() + word.size()) count = kClasses;  // refused below
    if (count < kClasses) values[count] = value;
    ++count;
    at = end + 1;
  }
  if (count > 1 && count != kClasses)
    throw std::invalid_argument("one number, or four by comma (low, normal, high, urgent), not '" +
                                std::string(text) + "'");
  if (count == 1) values.fill(values[0]);
  return values;
}

}  // namespace

void Transport::try_for(double seconds, uint64_t largest) {
  timeout = 1;  // 0 would be for ever
  while (timeout < kLongest && kUnitS * static_cast<double>(2ull << timeout) * (kRetries + 1) <= seconds)
    ++timeout;
  // A device that says nothing at all is given up a little after its own transport would have: the request that it
  // works at may take its time, too.
  patience_ns =
      static_cast<uint64_t>(retry_s() * 1e9) + std::max<uint64_t>(kGraceNs, largest * kSlowNsPerByte);
}

double Transport::retry_s() const { return kUnitS * static_cast<double>(1ull << timeout) * (kRetries + 1); }

void Transport::map_classes(std::string_view services, std::string_view traffics) {
  auto service = numbers(services), traffic = numbers(traffics);
  bulk.clear();
  for (size_t cls = 0; cls < kClasses; ++cls) {
    Level wanted{service[cls], traffic[cls]};
    auto found = std::find(bulk.begin(), bulk.end(), wanted);
    level[cls] = static_cast<uint8_t>(found - bulk.begin());
    if (found == bulk.end()) bulk.push_back(wanted);
  }
}

}  // namespace aiocomm::rdma
