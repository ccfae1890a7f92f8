// needs: core/rows.cpp core/cma.cpp
//
// Rows that a peer asks for, and rows that are read out of another process's memory: here this one's, which the kernel
// reads in the same way.

#include "core/rows.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "check.hpp"
#include "core/cma.hpp"

using namespace aiocomm;

namespace {

std::optional<RowList> taken(const std::vector<Rows>& rows, uint64_t nbytes, uint64_t room) {
  return RowList::taken(std::as_bytes(std::span(rows)), nbytes, room);
}

void what_a_peer_asks_for_is_looked_through() {
  const Rows good{0, 100, 50, -20, 10, 3};  // written to [60, 110)
  const auto list = taken({good, {7, 0, 0, 0, 60, 1}}, 90, 110);
  CHECK(list && list->size() == 2 && list->nbytes() == 90);
  CHECK(!taken({good}, 30, 109));
  for (uint64_t other : {0, 29, 31, 60}) CHECK(!taken({good}, other, 110));
  CHECK(!taken({}, 0, 110) && !taken({good, good}, 30, 110));
  const uint64_t most = 1ull << 56;
  for (const Rows& bad : {
           Rows{0, 0, 0, 0, 0, 1},
           Rows{0, 0, 0, 0, 1, 0},
           Rows{0, 0, 0, 0, most, 1},
           Rows{0, 0, 0, 0, 1, most},
           Rows{~0ull, 0, 0, 0, 1, 1},
           Rows{0, ~0ull, 0, 0, 1, 1},
           Rows{0, 9, 0, -10, 1, 2},
           Rows{9, 0, -10, 0, 1, 2},
           Rows{0, 0, 0, INT64_MAX, 1, 3},
           Rows{0, 0, 0, INT64_MIN, 1, 3},
           Rows{0, 0, 0, 0, most - 1, most - 1},
           Rows{0, 100, 0, 1, 10, 2},
           Rows{0, 101, 0, 0, 10, 1},
       })
    for (uint64_t nbytes : {bad.nbytes * bad.count, uint64_t{1}, uint64_t{10}, uint64_t{20}})
      CHECK(!taken({bad}, nbytes, 110));
  CHECK(taken({{0, 0, 1, 0, 10, 11}}, 110, 110) && !taken({{0, 0, 1, 0, 10, 11}}, 110, 109));
  const std::vector<Rows> two(2, good);
  const auto bytes = std::as_bytes(std::span(two));
  for (size_t cut = 1; cut < bytes.size(); ++cut)
    CHECK(RowList::taken(bytes.first(cut), 30, 110).has_value() == (cut == sizeof(Rows)));
}

// Every number of bytes from every place: rows that are cut, and more of them than one call of the kernel takes.
void rows_are_read_where_they_are() {
  std::vector<std::byte> source(40000), target(40000), model(40000);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 7 + i / 256);
  RowList rows;
  rows.add({3, 20000, 9, -11, 5, 1500});
  rows.add({30000, 30000, 0, 0, 1, 1});
  rows.add({20000, 36000, 10, 7, 7, 13});
  const auto address = reinterpret_cast<uint64_t>(source.data());
  for (uint64_t offset : {0, 1, 5, 17, 7499, 7500, 7501, 7502})
    for (uint64_t nbytes : {0, 1, 4, 5, 6, 90, 2561, 7510}) {
      if (offset + nbytes > rows.nbytes()) continue;
      std::fill(target.begin(), target.end(), std::byte{});
      std::fill(model.begin(), model.end(), std::byte{});
      if (nbytes)
        rows.cut(offset, nbytes, [&](const Rows& one) {
          for (uint64_t i = 0; i < one.count; ++i)
            std::memcpy(model.data() + one.to + static_cast<int64_t>(i) * one.to_step,
                        source.data() + one.from + static_cast<int64_t>(i) * one.from_step, one.nbytes);
        });
      CHECK(read_rows(getpid(), address, target.data(), rows, offset, nbytes) == 0);
      CHECK(target == model);
    }
}

void what_cannot_be_read_is_told() {
  constexpr size_t kPage = 4096;
  void* at = mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(at != MAP_FAILED);
  CHECK(munmap(static_cast<std::byte*>(at) + kPage, kPage) == 0);
  std::vector<std::byte> target(kPage);
  RowList rows;
  rows.add({0, 0, 64, 32, 32, 70});  // the last ones are behind the end
  const auto address = reinterpret_cast<uint64_t>(at);
  CHECK(read_rows(getpid(), address, target.data(), rows, 0, rows.nbytes()) == EFAULT);
  CHECK(read_rows(getpid(), address, target.data(), rows, 0, 64 * 32) == 0);
  CHECK(munmap(at, kPage) == 0);
}

}  // namespace

int main() {
  what_a_peer_asks_for_is_looked_through();
  rows_are_read_where_they_are();
  what_cannot_be_read_is_told();
}
