// needs:
//
// Who moves to another processor: of the fullest, the last rank, and only where that makes them more even. However they
// were placed, ranks that move one after another are spread evenly in the end, and then stay.

#include "core/spread.hpp"

#include <algorithm>
#include <random>
#include <vector>

#include "seeded.hpp"

using namespace aiocomm;

namespace {

cpu_set_t of(const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) CPU_SET(cpu, &set);
  return set;
}

int better(const std::vector<uint32_t>& places, size_t me, const cpu_set_t& allowed) {
  return better_processor(places.size(), me, allowed, [&](size_t rank) { return places[rank]; });
}

void known() {
  const cpu_set_t two = of({0, 1});
  CHECK(better({1, 1}, 1, two) == 1 && better({1, 1}, 0, two) == -1);
  CHECK(better({1, 2}, 0, two) == -1 && better({1, 2}, 1, two) == -1);
  CHECK(better({1, 1, 2}, 1, two) == -1);         // no more even
  CHECK(better({1, 1, 2, 1}, 3, two) == 1);       // to where one is
  CHECK(better({1, 1}, 1, of({0})) == -1);        // it may not
  CHECK(better({1, 0, 1}, 2, two) == -1);         // one is not known
  CHECK(better({1, 1u << 30, 1}, 2, two) == -1);  // nor this one
  CHECK(better({8, 8, 8}, 2, of({7, 1000})) == 1000);
}

void in_the_end() {
  std::mt19937 random(g_seed);
  for (int turn = 0; turn < 300; ++turn) {
    const size_t ranks = 2 + random() % 15;
    std::vector<int> cpus;
    for (int cpu = 0; cpu < 20 && cpus.size() < ranks; cpu += 1 + static_cast<int>(random() % 3))
      cpus.push_back(cpu);
    const cpu_set_t allowed = of(cpus);
    std::vector<uint32_t> places(ranks);
    for (uint32_t& place : places) place = 1 + static_cast<uint32_t>(cpus[random() % cpus.size()]);
    size_t moves = 0;
    for (size_t still = 0; still < ranks;) {
      still = 0;
      for (size_t me = 0; me < ranks; ++me) {
        const int there = better(places, me, allowed);
        if (there < 0) {
          ++still;
          continue;
        }
        CHECK(CPU_ISSET(there, &allowed));
        places[me] = 1 + static_cast<uint32_t>(there);
        ++moves;
      }
      CHECK(moves < ranks * ranks);
    }
    size_t least = ranks, most = 0;
    for (int cpu : cpus) {
      const auto there = static_cast<size_t>(std::count(places.begin(), places.end(), cpu + 1));
      least = std::min(least, there);
      most = std::max(most, there);
    }
    CHECK(most <= least + 1);
  }
}

// It is where it was told to go, and its limits are as before.
void moved() {
  cpu_set_t before, after;
  CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &before)) continue;
    go_to_processor(cpu, before);
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&before, &after));
    const cpu_set_t one = of({cpu});
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);  // limits of its own stay
    go_to_processor(cpu, one);
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&one, &after));
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
  }
}

}  // namespace

int main() {
  known();
  for (g_seed = 1; g_seed <= 20; ++g_seed) in_the_end();
  moved();
}
