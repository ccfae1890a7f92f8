// How the ranks of one group meet for a call in their arena, from this rank's side.
#pragma once

#include <nanobind/nanobind.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/turns.hpp"
#include "core/arena.hpp"
#include "core/clock.hpp"
#include "core/others_segments.hpp"
#include "core/patience.hpp"
#include "core/relax.hpp"
#include "core/spread.hpp"
#include "core/way_choice.hpp"

namespace aiocomm::py {

namespace nb = nanobind;

// In ns: how long others are waited for; the first of it without letting other threads have the core, for whom that may be
// a time slice of milliseconds: longer where no rank waits for this core.
inline constexpr uint64_t kMeetNs = 200000, kKeepCoreNs = 3000, kKeepOwnCoreNs = 100000;
// kLeaveNs: for those who touch arrays that nobody owns any more. kNapNs: what who waits leaves a core that all need.
inline constexpr uint64_t kLeaveNs = 1000000000, kNapNs = 20000;
// Where ranks outnumber the cores: how long who waits lets others have its core before it sleeps, and how much longer a call
// stays open.
inline constexpr uint64_t kYieldNs = 300000, kCrowdedNs = 10000000;
// Others are waited for while other tasks run, too, where a call moves that many bytes: a ns for each so many.
inline constexpr uint64_t kWorthWaiting = 4 << 20, kWaitBytes = 16;

inline cpu_set_t usable() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_ZERO(&set);
  return set;
}

inline constexpr uint64_t kQuickBytes =
    64 << 10;  // moved by a call for which nobody else has to get the interpreter

// Lets others have the interpreter, once this thread waits: what takes less than a microsecond does not.
class LateUnlock {
 public:
  explicit LateUnlock(bool already = false) : already_(already) {}
  void now() {
    if (!already_ && !lock_) lock_.emplace();
  }
  void over() { lock_.reset(); }

 private:
  const bool already_;
  std::optional<nb::gil_scoped_release> lock_;
};

// Every so many calls a rank looks where it runs; it goes elsewhere if it had better a second time, and stays so long, in ns.
inline constexpr uint64_t kPlaceCalls = 8, kStayNs = 5000000;

// What the calls of one group on one channel have in common at this rank.
struct Meeting {
  Meeting(std::shared_ptr<Arena> with, size_t own) : arena(std::move(with)), rank(own) {
    if (crowded) arena->set_crowded();
  }
  // `large`: of a call that takes longer than a sleep.
  void wait(uint64_t now, uint64_t began, bool large = false) const {
    if (large && crowded && now - began > kKeepCoreNs)
      std::this_thread::sleep_for(std::chrono::nanoseconds(kNapNs));
    else if (crowded || now - began > kKeepOwnCoreNs || (now - began > kKeepCoreNs && shares_core()))
      sched_yield();
    else
      relax();
  }

  // Whether another rank was last seen on the processor that this one runs on.
  bool shares_core() const {
    const int here = sched_getcpu();
    for (size_t other = 0; other < arena->ranks(); ++other)
      if (other != rank && arena->place(other) == static_cast<uint32_t>(here) + 1) return true;
    return here < 0;
  }

  // For what `bell` tells, which had rung `since` before it was looked for. To fall asleep and to wake, on a core that has
  // halted meanwhile, takes as long as to copy hundreds of KiB: all let others have the core first, though that costs them
  // their next turns. `brief`: in a call that takes no longer than that they do nothing else: those that do beside some that
  // sleep would wait for these again and again.
  void wait_for(Arena::Bell bell, uint32_t since, uint64_t now, uint64_t began, uint64_t until,
                bool brief) const {
    if (!crowded || brief || now - began < kYieldNs)
      wait(now, began);
    else if (now < until)
      arena->sleep(bell, since, until - now);
  }

  // `of`: the processes of the ranks, -1: not one whose memory can be reached. They are found once all have told theirs.
  void set_processes(std::vector<pid_t> of) {
    if (!processes.empty()) return;
    processes = std::move(of);
    processes.resize(arena->ranks(), -1);
    processes[rank] = getpid();
    if (std::find(processes.begin(), processes.end(), -1) != processes.end()) return;
    arena->set_probe(rank, reinterpret_cast<uint64_t>(&word));
    looks = true;
  }
  void look_for_others() {
    for (size_t other = 0; other < arena->ranks(); ++other)
      if (!arena->probe(other)) return;
    looks = false;
    for (size_t other = 0; other < arena->ranks(); ++other) {
      if (!arena->is_rank(other, processes[other])) return;
    }
    reaches = true;
    arena->set_reaches(rank);
  }
  bool gone(size_t other) const { return !arena->is_rank(other, processes[other]); }

  // Tells the others where this rank runs; where the group needs all processors, sees to it that they are shared evenly.
  void spread(uint64_t now) {
    if (calls++ % kPlaceCalls) return;
    const int here = sched_getcpu();
    if (here < 0) return;
    if (place != static_cast<uint32_t>(here) + 1) arena->set_place(rank, place = here + 1);
    if (!needs_all) return;
    auto better = [&] {
      return better_processor(arena->ranks(), rank, allowed, [&](size_t of) { return arena->place(of); });
    };
    if (!std::exchange(uneven, better() >= 0) || !uneven || now < stays_until) return;
    stays_until = now + kStayNs;
    allowed = usable();  // by now
    if (const int there = better(); there >= 0) go_to_processor(there, allowed);
  }

  // Whether all ranks have ended all calls that met here, and whether this one may arrive; `early`: while others are in the
  // call before.
  bool clear() const { return arena->all_done(std::max(met[0], met[1])); }
  bool may_arrive(uint64_t number, bool early) const {
    return early ? arena->all_done(met[number % 2]) : clear();
  }

  enum class Begun : uint8_t { met, open, not_met };
  // `text` is compared by all ranks. `early`, `brief`: see above. `waits`: others are waited for, if not for long. `stays`:
  // in ns, how much longer the call may stay open while other tasks run; 0: it does not. `prepare` tells the others what
  // they need once all have met.
  template <typename Prepare>
  Begun meet(uint64_t number, const std::string& text, bool waits, bool early, bool brief, uint64_t stays,
             LateUnlock& unlocked, const Prepare& prepare) {
    const uint64_t began = now_ns();
    uint64_t now = began;
    spread(now);
    const uint64_t longest = early ? Turns::kNs : kMeetNs;
    closes_ns = began + longest + stays;
    has_arrived = false;
    if (arena->broken()) return Begun::not_met;
    for (;;) {
      const uint32_t rung = arena->rung(Arena::Bell::begins);
      if (may_arrive(number, early)) break;
      unlocked.now();
      if (!waits || now - began > longest) return stays ? Begun::open : not_coming(number);
      wait_for(Arena::Bell::begins, rung, now, began, began + longest, brief);
      now = now_ns();
    }
    waits = waits && patience.may_spin(now);
    Arena::Meeting state = arrive(number, text, prepare);
    if (state == Arena::Meeting::open && waits) {
      unlocked.now();
      state = await(number, began, began + longest, brief);
      now = now_ns();
      if (state != Arena::Meeting::open || !stays)
        patience.spun(state == Arena::Meeting::met, false, began, now, longest);
    }
    if (state == Arena::Meeting::open && stays) return Begun::open;
    if (state == Arena::Meeting::open) state = arena->close(number);
    return judge(number, text, state);
  }

  // Of a call that is open: whether all ranks have met by now; where they lack a core for that, a little later.
  template <typename Prepare>
  Begun look(uint64_t number, const std::string& text, const Prepare& prepare, bool early, bool brief) {
    const uint64_t began = now_ns();
    if (!has_arrived) {
      if (arena->broken()) return Begun::not_met;
      const uint32_t rung = arena->rung(Arena::Bell::begins);
      if (!may_arrive(number, early)) {
        if (crowded) arena->sleep(Arena::Bell::begins, rung, kMeetNs);
        return began < closes_ns ? Begun::open : not_coming(number);
      }
      arrive(number, text, prepare);
    }
    Arena::Meeting state = crowded ? await(number, 0, began + kMeetNs, brief) : arena->look(number);
    if (state == Arena::Meeting::open) {
      if (now_ns() < closes_ns) return Begun::open;
      state = arena->close(number);
    }
    return judge(number, text, state);
  }

  // `began`: since when this rank waits.
  Arena::Meeting await(uint64_t number, uint64_t began, uint64_t until, bool brief) const {
    for (;;) {
      const uint32_t rung = arena->rung(Arena::Bell::begins);
      const Arena::Meeting state = arena->look(number);
      const uint64_t now = now_ns();
      if (state != Arena::Meeting::open || now > until) return state;
      wait_for(Arena::Bell::begins, rung, now, began, until, brief);
    }
  }

  // This rank makes a call by messages, at which it has not arrived: the others need not wait for it. All of its earlier
  // calls have ended; where some are still in the one before by that word, they find out by themselves.
  Begun not_coming(uint64_t number) const {
    if (arena->all_done(met[number % 2])) arena->close(number);
    return Begun::not_met;
  }

  // Gives up a call that is open. True: all ranks have met all the same.
  bool leave(uint64_t number) const {
    if (has_arrived) return arena->close(number) == Arena::Meeting::met;
    not_coming(number);
    return false;
  }

  template <typename Prepare>
  Arena::Meeting arrive(uint64_t number, const std::string& text, const Prepare& prepare) {
    if (headers[number % 2] != text)  // else it is there, and in the others' caches
      std::memcpy(arena->header(rank, number), text.data(), text.size()), headers[number % 2] = text;
    prepare();
    has_arrived = true;
    return arena->arrive(number);
  }

  Begun judge(uint64_t number, const std::string& text, Arena::Meeting state) {
    if (state != Arena::Meeting::met) return Begun::not_met;
    met[number % 2] = number;
    for (size_t other = 0; other < arena->ranks(); ++other)
      if (std::memcmp(arena->header(other, number), text.data(), text.size()) != 0) {
        arena->set_done(rank, number);  // all see that, and say by messages what is wrong
        return Begun::not_met;
      }
    return Begun::met;
  }

  const std::shared_ptr<Arena> arena;
  const size_t rank;
  uint64_t word = arena->nonce();  // by which others know this process
  std::vector<pid_t> processes;    // by rank; empty: not known yet
  OthersSegments segments{arena->ranks()};
  bool looks = false, reaches = false;
  cpu_set_t allowed = usable();
  const size_t cores = std::max<size_t>(1, CPU_COUNT(&allowed));
  const bool crowded = arena->ranks() > cores;  // who waits keeps from running whom it waits for
  const bool needs_all = arena->ranks() >= cores;
  uint32_t place = 0;
  bool uneven = false;
  uint64_t calls = 0, stays_until = 0;
  Patience patience;
  uint64_t met[2] = {};    // by each word, the last call that did
  uint64_t closes_ns = 0;  // of one that is open
  bool has_arrived = false;
  uint64_t device_calls = 0;  // that have begun, the same on all ranks: what their words count
  std::string headers[2];     // that are in the arena
  // Rank 0's last calls that ended, by word: how long it took all ranks is known once all have ended it.
  struct {
    std::shared_ptr<WayChoice> choice;
    size_t way = 0;
  } ran[2];
  std::shared_ptr<Turns> turns;  // of who calls: there is one once a call has begun
};

}  // namespace aiocomm::py
