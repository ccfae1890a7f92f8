// On which processor a rank should run, where its group needs all of them (pure), and how it gets there.
//
// Ranks that wait let others have their processor, but never sleep, or not for long: so the kernel may leave several of them
// on one while another has fewer, for seconds. Who sees that, of those on the fullest the last rank, moves.
#pragma once

#include <sched.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace aiocomm {

// `place(rank)`: its processor and one, or 0: not known. The processor to go to; -1: to stay.
template <typename Place>
int better_processor(size_t ranks, size_t me, const cpu_set_t& allowed, const Place& place) {
  const uint32_t here = place(me);
  size_t beside = 0;
  for (size_t rank = 0; rank < ranks; ++rank) {
    const uint32_t there = place(rank);
    if (!there || there > CPU_SETSIZE) return -1;
    if (rank > me && there == here) return -1;  // that one's to move
    beside += rank != me && there == here;
  }
  if (!beside) return -1;
  uint8_t busy[CPU_SETSIZE] = {};
  for (size_t rank = 0; rank < ranks; ++rank) {
    const uint32_t there = place(rank);  // another one by now, perhaps
    if (there && there <= CPU_SETSIZE) ++busy[there - 1];
  }
  int best = -1;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed) && (best < 0 || busy[cpu] < busy[best])) best = cpu;
  return best >= 0 && busy[here - 1] > busy[best] + 1 ? best : -1;
}

// Has the calling thread go there, and lets it be moved on at once.
inline void go_to_processor(int cpu, const cpu_set_t& allowed) {
  cpu_set_t wanted, all, found;
  CPU_ZERO(&wanted);
  CPU_SET(cpu, &wanted);
  if (sched_setaffinity(0, sizeof wanted, &wanted) != 0) return;
  // Whose limits were not its own has none of its own afterwards: these would outlast the others.
  std::memset(&all, 255, sizeof all);
  const bool ours = sched_setaffinity(0, sizeof all, &all) == 0 &&
                    sched_getaffinity(0, sizeof found, &found) == 0 && CPU_EQUAL(&found, &allowed);
  if (!ours) sched_setaffinity(0, sizeof allowed, &allowed);
}

}  // namespace aiocomm
