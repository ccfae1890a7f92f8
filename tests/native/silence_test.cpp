// needs:
//
// A request that takes long is told from a device that says nothing, by what its port hears.

#include "links/rdma/silence.hpp"

#include <cstdint>

#include "check.hpp"

using aiocomm::rdma::Silence;

namespace {

constexpr uint64_t kPatience = 1000;

// When it is over, looked at every 10 ns while the port hears a packet each `every`; 0: none at all.
uint64_t ends(Silence& silence, uint64_t since, uint64_t every, unsigned& asked) {
  for (uint64_t now = since;; now += 10)
    if (silence.over(now, since, kPatience, [&] { return ++asked, every ? now / every : 7; })) return now;
}

void who_hears_nothing_is_given_up_when_patience_ends() {
  Silence silence;
  unsigned asked = 0;
  CHECK(ends(silence, 5000, 0, asked) == 5000 + kPatience);
  CHECK(asked == 2);
  CHECK(ends(silence, 9000, 0, asked) == 9000 + kPatience);  // and each silence is one of its own
}

void who_hears_something_is_given_up_much_later() {
  Silence silence;
  unsigned asked = 0;
  uint64_t end = ends(silence, 5000, 100, asked);
  CHECK(end > 5000 + Silence::kLongest * kPatience);
  CHECK(end <= 5000 + (Silence::kLongest + 1) * kPatience);
  CHECK(asked <= 2 * Silence::kLongest + 2);
}

void whoever_completes_something_is_not_given_up() {
  Silence silence;
  for (uint64_t now = 0; now < 20 * kPatience; now += 10)
    CHECK(!silence.over(now, now - now % (kPatience / 2 + 20), kPatience, [] { return 7u; }));
}

}  // namespace

int main() {
  who_hears_nothing_is_given_up_when_patience_ends();
  who_hears_something_is_given_up_much_later();
  whoever_completes_something_is_not_given_up();
}
