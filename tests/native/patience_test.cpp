// needs:
// Whether and how long to spin, at times that are given.

#include "core/patience.hpp"

#include "check.hpp"

namespace {

using aiocomm::Patience;

constexpr uint64_t kSpin = 50000;

// A loop that waits for an answer which comes `after_ns` from `now`, in steps as the runtime takes them; returns when it
// runs again. Sleeping costs `wake_ns` more.
uint64_t wait(Patience& patience, uint64_t now, uint64_t after_ns, uint64_t wake_ns, bool& slept) {
  const uint64_t answer = now + after_ns;
  slept = true;
  if (patience.may_spin(now)) {
    const uint64_t end = now + patience.stretched(kSpin);
    slept = answer > end;
    patience.spun(!slept, false, now, slept ? end : answer, kSpin);
    if (!slept) return answer;
  }
  patience.woke(answer + wake_ns);
  return answer + wake_ns;
}

// Peers that wake each other through the kernel come to find each other spinning.
void a_little_more_is_enough() {
  for (uint64_t wake_ns : {80000, 130000}) {  // of a peer that has to be woken first, and of this one
    Patience patience;
    uint64_t now = 1000;
    bool slept = true;
    for (int turn = 0; turn < 6; ++turn) now = wait(patience, now, wake_ns + 40000, wake_ns, slept);
    CHECK(!slept);
    now = wait(patience, now, 3000, wake_ns, slept);  // fast again
    CHECK(!slept && patience.stretched(kSpin) == kSpin);
  }
}

// Whoever hears nothing for long spins no longer than was asked for, and soon not at all for a while.
void idleness_costs_little() {
  Patience patience;
  uint64_t now = 1000, spun = 0;
  bool slept = false;
  for (int turn = 0; turn < 1000; ++turn) {
    if (patience.may_spin(now)) spun += patience.stretched(kSpin);
    CHECK(patience.stretched(kSpin) == kSpin);
    now = wait(patience, now, 1000000, 80000, slept);
    CHECK(slept);
  }
  CHECK(spun * 20 < now);
}

// Short sleeps that no spin ever shortens stop the spinning, too.
void what_never_pays_ends() {
  Patience patience;
  uint64_t now = 1000, spun = 0;
  for (int turn = 0; turn < 1000; ++turn) {  // something else wakes the loop: the answer does not come
    if (patience.may_spin(now)) {
      const uint64_t end = now + patience.stretched(kSpin);
      patience.spun(false, false, now, end, kSpin);
      spun += end - now;
      now = end;
    }
    now += 100000;
    patience.woke(now);
  }
  CHECK(spun < now / 3);
}

void a_core_that_was_taken_ends_it_at_once() {
  Patience patience;
  CHECK(patience.may_spin(1000));
  patience.spun(false, true, 1000, 400000, kSpin);
  CHECK(!patience.may_spin(400001));
  CHECK(patience.may_spin(400000 + 200000));
}

}  // namespace

int main() {
  a_little_more_is_enough();
  idleness_costs_little();
  what_never_pays_ends();
  a_core_that_was_taken_ends_it_at_once();
}
