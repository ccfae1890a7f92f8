// One rank's calls through an arena, as Python makes them: aiocomm/collectives/shared.py.
//
// Rules
//   - `attempt` meets the other ranks, or has the call made by messages; a call that has met is gone on with until it has
//     ended, or has taken its turn. `proceed` goes on with it then, on any thread, one at a time.
//   - Arrays are held from the attempt to the end, or until a call that is abandoned is left by all who touch them.
//   - One call at a time goes through an arena; who owns it sees to that (aiocomm/collectives/scope.py).

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/schedule.hpp"
#include "core/clock.hpp"
#include "core/cma.hpp"
#include "core/direct_call.hpp"
#include "core/patience.hpp"
#include "core/relax.hpp"
#include "core/shared_call.hpp"
#include "core/way_choice.hpp"

namespace aiocomm::py {

namespace nb = nanobind;

// In ns: how long others are waited for, the first of it without letting others have the core; after which other tasks
// get a turn.
inline constexpr uint64_t kMeetNs = 200000, kKeepCoreNs = 3000, kTurnNs = 1000000;
// kLeaveNs: for those who touch arrays that nobody owns any more. kNapNs: what who waits leaves a core that all need.
inline constexpr uint64_t kLeaveNs = 1000000000, kNapNs = 20000;
// Others are waited for while other tasks run, too, where a call moves that many bytes: a ns for each so many.
inline constexpr uint64_t kWorthWaiting = 4 << 20, kWaitBytes = 16;

inline size_t cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof set, &set) == 0 ? static_cast<size_t>(CPU_COUNT(&set)) : 1;
}

inline constexpr uint64_t kQuickBytes =
    64 << 10;  // moved by a call for which nobody else has to get the interpreter

// Lets others have the interpreter, once this thread waits: what takes less than a microsecond does not.
class Unlocked {
 public:
  explicit Unlocked(bool already = false) : already_(already) {}
  void now() {
    if (!already_ && !lock_) lock_.emplace();
  }
  void over() { lock_.reset(); }

 private:
  const bool already_;
  std::optional<nb::gil_scoped_release> lock_;
};

// What the calls of one group on one channel have in common at this rank.
struct Meeting {
  Meeting(std::shared_ptr<Arena> with, size_t own) : arena(std::move(with)), rank(own) {
    crowded = arena->ranks() > cores();
  }
  // `large`: of a call that takes longer than a sleep.
  void wait(uint64_t now, uint64_t began, bool large = false) const {
    if (large && crowded && now - began > kKeepCoreNs)
      std::this_thread::sleep_for(std::chrono::nanoseconds(kNapNs));
    else if (crowded || now - began > kKeepCoreNs)
      sched_yield();
    else
      relax();
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

  const std::shared_ptr<Arena> arena;
  const size_t rank;
  uint64_t word = arena->nonce();  // by which others know this process
  std::vector<pid_t> processes;    // by rank; empty: not known yet
  bool looks = false, reaches = false;
  bool crowded;  // who waits keeps from running whom it waits for
  Patience patience;
  uint64_t met = 0;    // the last call that did
  std::string header;  // that is in the arena
  // Rank 0's last call that ended: how long it took all ranks is known once all have ended it.
  struct {
    std::shared_ptr<WayChoice> choice;
    size_t way = 0;
  } ran;
  uint64_t turn_began = 0;
};

class PySharedCall {
 public:
  enum Result : int { kNotMet, kDone, kDoneTurn, kPending, kStuck, kBroken, kOpen };

  PySharedCall(std::shared_ptr<Meeting> meeting, int kind, size_t root, std::vector<uint64_t> sizes,
               bool in_place, uint64_t item, const std::string& format, const std::string& op,
               nb::bytes header)
      : meeting_(std::move(meeting)),
        header_(header.c_str(), header.size()),
        kind_(static_cast<SharedCall::Kind>(kind)),
        item_(item),
        rings_(checked(kind, *meeting_, root, sizes, item), meeting_->rank, meeting_->arena->ranks(), root,
               sizes, in_place, item, find_reduction(format, op)),
        direct_(kind_, meeting_->rank, meeting_->arena->ranks(), root, sizes, in_place, item,
                find_reduction(format, op), meeting_->processes) {
    if (header_.size() > Arena::kHeader) throw nb::value_error("a header that is too long");
    if (kind_ == SharedCall::Kind::all_reduce && !find_reduction(format, op))
      throw nb::value_error("a reduction that is not done here");
  }

  ~PySharedCall() {
    if (!arrays_) return;
    nb::gil_scoped_release release;
    if (running_) give_up();
    for (const uint64_t began = now_ns(); !left() && now_ns() - began < kLeaveNs;) sched_yield();
  }

  int attempt(PyEngine& e, uint64_t number, nb::handle given, nb::handle out) {
    if (running_ || !e.on_submit.empty() || !e.on_complete.empty()) return kNotMet;
    const bool writes = kind_ != SharedCall::Kind::broadcast || !is_root_;
    Arrays arrays;
    if (!arrays.in.borrow(given.ptr(), false) || !arrays.out.borrow(out.ptr(), writes)) return kNotMet;
    const Lent &in = arrays.in, &into = arrays.out;
    if (in.nbytes != rings_.in_bytes() || into.nbytes != rings_.out_bytes() || in.overlaps(into))
      return kNotMet;
    for (const Lent* one : {&in, &into})
      if (reinterpret_cast<uintptr_t>(one->data) % item_) return kNotMet;
    for (const auto& [start, nbytes] : e.receiving)
      if (start < into.data + into.nbytes && into.data < start + nbytes) return kNotMet;
    const bool waits = loop_has_nothing_else(&e);
    number_ = number;
    Unlocked unlocked;
    if (rings_.moved() > kQuickBytes) unlocked.now();
    Result result = meet(waits, in.data, into.data, unlocked);
    if (result == kPending) result = run(kTurnNs, unlocked);
    unlocked.over();
    if (result > kDoneTurn) {
      running_ = true;
      arrays_ = std::make_unique<Arrays>();
      hold(arrays_->in, arrays.in);
      hold(arrays_->out, arrays.out);
    }
    return result;
  }

  int proceed(double seconds) {
    std::unique_ptr<Arrays> over;
    Result result = kNotMet;
    {
      nb::gil_scoped_release release;
      std::lock_guard lock(mutex_);
      if (!running_) return result;
      result = open_ ? look() : kPending;
      Unlocked nothing{true};
      if (result == kPending) result = run(static_cast<uint64_t>(seconds * 1e9), nothing);
      running_ = result > kDoneTurn;
      if (!running_) over.swap(arrays_);
    }
    return result;
  }

  // The call fails here, and the others are told. False: one of them still touches the arrays; to be called again.
  bool abandon() {
    std::unique_ptr<Arrays> over;
    {
      nb::gil_scoped_release release;
      if (running_) give_up();
      for (const uint64_t began = now_ns(); !left();) {
        if (now_ns() - began > kTurnNs) return false;
        sched_yield();
      }
      over.swap(arrays_);
    }
    return true;
  }

  bool direct() const { return direct_now_; }
  // The errno of memory that could not be read or written, though it could before; 0: there was none.
  int error() const { return direct_now_ && direct_.error() != ESRCH ? direct_.error() : 0; }
  uint64_t moved() const { return rings_.moved(); }

 private:
  struct Arrays {
    Lent in, out;
  };

  struct Seen {
    const std::byte* data = nullptr;
    uint64_t nbytes = 0;
  };

  static void hold(Lent& into, Lent& from) {
    std::memcpy(static_cast<void*>(&into.view), &from.view, sizeof into.view);
    into.held = std::exchange(from.held, false);
  }

  SharedCall::Kind checked(int kind, const Meeting& meeting, size_t root, const std::vector<uint64_t>& sizes,
                           uint64_t item) {
    const size_t ranks = meeting.arena->ranks();
    const auto one = static_cast<SharedCall::Kind>(kind);
    const bool whole = one == SharedCall::Kind::broadcast || one == SharedCall::Kind::barrier;
    if (kind < 0 || one > SharedCall::Kind::all_reduce || root >= ranks ||
        sizes.size() != (whole ? 1 : ranks))
      throw nb::value_error("not a call of this group");
    if (!item || Arena::kChunk % item) throw nb::value_error("elements that chunks would cut");
    is_root_ = root == meeting.rank;
    return one;
  }

  void give_up() {
    Arena& arena = *meeting_->arena;
    if (!open_ || arena.close(number_) == Arena::Meeting::met) arena.set_broken();  // who goes on ends soon
    std::lock_guard lock(mutex_);
    open_ = false;
    running_ = false;
  }

  // A broken arena is entered by nobody any more, so who is in there is a moment from leaving it, or killed.
  bool left() const {
    const Meeting& m = *meeting_;
    if (!m.reaches) return true;  // nobody was told where they are
    for (size_t other = 0; other < m.arena->ranks(); ++other)
      if (other != m.rank && m.arena->entered(other) && !m.gone(other)) return false;
    return true;
  }

  // Memory of devices, for one, cannot be reached by other processes: nor by this one in their way.
  bool reachable(const std::byte* data, uint64_t nbytes, Seen& seen) const {
    if (!nbytes || (seen.data == data && seen.nbytes == nbytes)) return true;
    std::byte byte;
    for (const std::byte* at : {data, data + nbytes - 1})
      if (read_process(meeting_->processes[meeting_->rank], reinterpret_cast<uint64_t>(at), &byte, 1))
        return false;
    seen = {data, nbytes};
    return true;
  }

  void begin(const std::byte* in, std::byte* out) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    rings_.begin(arena, number_, in, out);
    if (!direct_.pays()) return;
    if (m.looks) m.look_for_others();
    const bool able = m.reaches && reachable(in, rings_.in_bytes(), seen_in_) &&
                      reachable(out, rings_.out_bytes(), seen_out_);
    if (able)
      direct_.begin(arena, number_, in, out);
    else
      direct_.withhold(arena);
    if (m.rank != 0) return;
    if (m.ran.choice) m.ran.choice->took(m.ran.way, arena.longest());  // all have ended that call
    m.ran = {};
    const bool direct = able && arena.all_reach() && choice_->next();
    arena.choose(direct ? Arena::Way::direct : Arena::Way::rings);
  }

  // kPending: all ranks have met.
  Result meet(bool waits, const std::byte* in, std::byte* out, Unlocked& unlocked) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    const uint64_t began = now_ns();
    uint64_t now = began;
    if (arena.broken()) return kNotMet;
    while (!arena.all_done(m.met)) {
      unlocked.now();
      if (!waits || now - began > kMeetNs) return kNotMet;
      m.wait(now, began);
      now = now_ns();
    }
    waits = waits && m.patience.may_spin(now);
    if (m.header != header_)  // else it is there, and in the others' caches
      std::memcpy(arena.header(m.rank), header_.data(), header_.size()), m.header = header_;
    begin(in, out);
    Arena::Meeting state = arena.arrive(number_);
    if (state == Arena::Meeting::open && waits) {
      unlocked.now();
      do {
        m.wait(now, began, large());
        state = arena.look(number_);
      } while (state == Arena::Meeting::open && (now = now_ns()) - began < kMeetNs);
      if (state == Arena::Meeting::open && large()) {
        open_ = true;
        closes_ns_ = began + kMeetNs + rings_.moved() / kWaitBytes;
        return kOpen;
      }
      if (state == Arena::Meeting::open) state = arena.close(number_);
      m.patience.spun(state == Arena::Meeting::met, false, began, now, kMeetNs);
    } else if (state == Arena::Meeting::open) {
      state = arena.close(number_);
    }
    return judge(state);
  }

  bool large() const { return rings_.moved() >= kWorthWaiting; }

  // Whether all ranks have met by now; where they lack a core for that, a little later.
  Result look() {
    Arena::Meeting state = meeting_->arena->look(number_);
    const uint64_t began = now_ns();
    for (uint64_t now = began; meeting_->crowded && state == Arena::Meeting::open && now - began < kMeetNs;
         now = now_ns()) {
      meeting_->wait(now, 0, true);
      state = meeting_->arena->look(number_);
    }
    if (state == Arena::Meeting::open) {
      if (now_ns() < closes_ns_) return kOpen;
      state = meeting_->arena->close(number_);
    }
    open_ = false;
    return judge(state);
  }

  Result judge(Arena::Meeting state) {
    if (state != Arena::Meeting::met) return kNotMet;
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    m.met = number_;
    for (size_t rank = 0; rank < arena.ranks(); ++rank)
      if (std::memcmp(arena.header(rank), header_.data(), header_.size()) != 0) {
        arena.set_done(m.rank, number_);  // all see that, and say by messages what is wrong
        return kNotMet;
      }
    direct_now_ = direct_.pays() && arena.way() == Arena::Way::direct && arena.all_told();
    if (direct_.pays()) met_ns_ = now_ns();
    return kPending;
  }

  Result run(uint64_t ns, Unlocked& unlocked) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    uint64_t now = now_ns(), last = now;
    const uint64_t until = now + ns;
    bool did = false;
    auto ended = [&] { return direct_now_ ? direct_.ended(arena) : rings_.ended(); };
    while (!ended()) {
      if (direct_now_ ? direct_.advance(arena) : rings_.advance(arena)) {
        did = true;
        if (!direct_now_ && ++looks_ % 16) continue;  // chunks of a ring are small
        last = now = now_ns();
        if (arena.broken()) return kBroken;
      } else {
        unlocked.now();
        m.wait(now, last, large());
        now = now_ns();
        // Of a process that has ended others will tell; nobody else's memory has to be out of reach.
        if (direct_now_ && direct_.error() && direct_.error() != ESRCH) arena.set_broken();
        if (arena.broken()) return kBroken;
      }
      if (now > until && !ended()) {
        m.turn_began = now;
        return did ? kPending : kStuck;
      }
    }
    if (direct_.pays()) {
      now = now_ns();
      arena.set_took(m.rank, now - met_ns_);
      if (m.rank == 0) m.ran = {choice_, direct_now_};
    }
    arena.set_done(m.rank, number_);
    if (now - m.turn_began < kTurnNs) return kDone;
    m.turn_began = now;
    return kDoneTurn;
  }

  const std::shared_ptr<Meeting> meeting_;
  const std::string header_;
  const SharedCall::Kind kind_;
  const uint64_t item_;
  bool is_root_ = false;
  SharedCall rings_;
  DirectCall direct_;
  const std::shared_ptr<WayChoice> choice_ = std::make_shared<WayChoice>();  // rank 0's
  bool direct_now_ = false;
  uint64_t met_ns_ = 0;
  Seen seen_in_, seen_out_;
  std::mutex mutex_;  // who goes on with a call, and who gives it up
  std::atomic<bool> running_{false}, open_{false};
  uint64_t number_ = 0, closes_ns_ = 0;
  uint32_t looks_ = 0;
  std::unique_ptr<Arrays> arrays_;
};

}  // namespace aiocomm::py
