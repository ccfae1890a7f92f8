// needs: core/listed.cpp
//
// Lists of ranges come from peers, who may write where a list lies while it is looked at. What was checked is what is
// used: here the first range that is copied overwrites the list itself, as such a peer would.

#include "core/listed.hpp"

#include <cstring>
#include <vector>

#include "check.hpp"

using namespace aiocomm;

namespace {

constexpr uint64_t kRegion = 4096, kMessage = 1024;  // the message lies in the region, from there on

std::vector<std::byte> with_list(const std::vector<Range>& list, size_t carried) {
  std::vector<std::byte> message(sizeof(uint64_t) + list.size() * sizeof(Range) + carried);
  const uint64_t count = list.size();
  std::memcpy(message.data(), &count, sizeof count);
  std::memcpy(message.data() + sizeof count, list.data(), list.size() * sizeof(Range));
  return message;
}

void a_list_that_changes_while_it_is_used() {
  std::vector<std::byte> memory(2 * kRegion);
  const uint64_t second = kMessage + sizeof(uint64_t) + sizeof(Range);  // where the list's second range is
  std::vector<std::byte> message = with_list({{second, sizeof(Range)}, {0, 8}}, sizeof(Range) + 8);
  const Range outside{kRegion + 64, 8};
  std::memcpy(message.data() + message.size() - 8 - sizeof outside, &outside, sizeof outside);
  std::memset(message.data() + message.size() - 8, 0xab, 8);
  std::memcpy(memory.data() + kMessage, message.data(), message.size());
  CHECK(spread({memory.data() + kMessage, message.size()}, {memory.data(), kRegion}) == Code::ok);
  for (uint64_t i = kRegion; i < memory.size(); ++i) CHECK(memory[i] == std::byte{0});
  CHECK(memory[0] == std::byte{0xab} && memory[7] == std::byte{0xab} && memory[8] == std::byte{0});
}

void a_list_that_changes_once_it_is_taken() {
  std::vector<Range> list{{0, 8}, {16, 8}};
  const std::span bytes{reinterpret_cast<const std::byte*>(list.data()), 2 * sizeof(Range)};
  const auto ranges = Ranges::taken(bytes);
  list = {{0, 1 << 20}, {1 << 20, 1 << 20}};
  CHECK(ranges && ranges->nbytes() == 16 && ranges->all_inside(24) && !ranges->all_inside(23));
  std::vector<std::byte> memory(24), into(16);
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(i);
  CHECK(collect(*ranges, {memory.data(), 24}, into.data()) == Code::ok);
  CHECK(into[7] == std::byte{7} && into[8] == std::byte{16} && into[15] == std::byte{23});
  CHECK(collect(*ranges, {memory.data(), 23}, into.data()) == Code::out_of_range);
  CHECK(rows_to_collect(*ranges, 24)->nbytes() == 16 && !rows_to_collect(*ranges, 23));
}

void what_makes_no_sense() {
  const std::byte some[sizeof(Range) + 1] = {};
  CHECK(!Ranges::taken({some, sizeof some}) && !Ranges::taken({some, 1}));
  CHECK(Ranges::taken({some, 0})->nbytes() == 0 && Ranges::taken({some, sizeof(Range)})->nbytes() == 0);
  for (const Range& bad : {Range{16, 1}, Range{9, 8}, Range{~0ull, 8}, Range{~0ull - 7, 8}, Range{0, 17}}) {
    std::vector<std::byte> memory(16), message = with_list({{0, 1}, bad}, 1 + bad.nbytes);
    CHECK(spread(message, memory) == Code::out_of_range && !rows_to_spread(message, memory.size()));
  }
  std::vector<std::byte> memory(16), message = with_list({{0, 1}}, 1);
  CHECK(spread(message, memory) == Code::ok && rows_to_spread(message, memory.size())->nbytes() == 1);
  for (size_t cut = 0; cut < message.size(); ++cut)
    CHECK(spread({message.data(), cut}, memory) == Code::out_of_range);
  message.push_back({});
  CHECK(spread(message, memory) == Code::out_of_range);
}

}  // namespace

int main() {
  a_list_that_changes_while_it_is_used();
  a_list_that_changes_once_it_is_taken();
  what_makes_no_sense();
}
