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
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arena_result.hpp"
#include "bindings/meeting.hpp"
#include "bindings/schedule.hpp"
#include "core/clock.hpp"
#include "core/cma.hpp"
#include "core/direct_call.hpp"
#include "core/shared_call.hpp"

namespace aiocomm::py {

namespace nb = nanobind;

class PySharedCall {
 public:
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
                find_reduction(format, op), meeting_->processes, meeting_->segments) {
    let_go_of_kept();
    if (header_.size() > Arena::kHeader) throw nb::value_error("a header that is too long");
    if (kind_ == SharedCall::Kind::all_reduce && !find_reduction(format, op))
      throw nb::value_error("a reduction that is not done here");
  }

  ~PySharedCall() {
    if (!arrays_) return;
    bool left;
    {
      nb::gil_scoped_release release;
      if (running_) give_up();
      const uint64_t began = now_ns();
      while (!(left = all_left(*meeting_)) && now_ns() - began < kLeaveNs) sched_yield();
    }
    if (left) return;
    std::lock_guard lock(kept_mutex());
    kept().push_back({meeting_, std::move(arrays_)});
  }

  int attempt(PyEngine& e, uint64_t number, nb::handle given, nb::handle out) {
    if (running_) return kNotMet;
    Arrays arrays;
    if (!takes(e, given, out, arrays)) {
      meeting_->not_coming(number);
      return kNotMet;
    }
    const Lent &in = arrays.in, &into = arrays.out;
    const bool waits = loop_has_nothing_else(&e);
    number_ = number;
    if (!meeting_->turns) meeting_->turns = e.turns;
    LateUnlock unlocked;
    if (rings_.moved() > kQuickBytes) unlocked.now();
    ArenaResult result = meet(waits, in.data, into.data, unlocked);
    if (result == kGoingOn) result = run(Turns::kNs, unlocked);
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
    ArenaResult result = kNotMet;
    {
      nb::gil_scoped_release release;
      std::lock_guard lock(mutex_);
      if (!running_) return result;
      result = open_ ? look() : kGoingOn;
      LateUnlock nothing{true};
      if (result == kGoingOn) result = run(static_cast<uint64_t>(seconds * 1e9), nothing);
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
      for (const uint64_t began = now_ns(); !all_left(*meeting_);) {
        if (now_ns() - began > Turns::kNs) return false;
        sched_yield();
      }
      std::lock_guard lock(mutex_);  // a `proceed` on another thread may be about to
      over.swap(arrays_);
    }
    return true;
  }

  // How the call went that has met last: by rings; from array to array, all in shared segments, or others among them.
  enum Way : int { kRings, kMapped, kAttached };
  int way() const { return way_ == kMapped && direct_.attached() ? kAttached : way_; }
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
    into.data = from.data;  // for a call whose ranks have yet to meet: it begins later
    into.nbytes = from.nbytes;
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
    if (!open_ || meeting_->leave(number_)) arena.set_broken();  // who goes on ends soon
    std::lock_guard lock(mutex_);
    open_ = false;
    running_ = false;
  }

  // Arrays of a call that nobody has any more, and that a rank which stands still has entered: it may go on later, and write
  // there. They are looked at whenever another is made; where it never goes on, this process keeps them to its end.
  struct Kept {
    std::shared_ptr<Meeting> meeting;
    std::unique_ptr<Arrays> arrays;
  };
  static std::vector<Kept>& kept() {
    static auto* all = new std::vector<Kept>;
    return *all;
  }
  static std::mutex& kept_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
  static void let_go_of_kept() {
    std::vector<Kept> over;  // which runs code of Python's: without the lock
    std::lock_guard lock(kept_mutex());
    std::erase_if(kept(), [&](Kept& one) {
      const bool left = all_left(*one.meeting);
      if (left) over.push_back(std::move(one));
      return left;
    });
  }

  // A broken arena is entered by nobody any more, so who is in there is a moment from leaving it, or killed.
  static bool all_left(const Meeting& m) {
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
      direct_.withhold(arena, number_);
    if (m.rank != 0) return;
    auto& ran = m.ran[number_ % 2];
    if (ran.choice) ran.choice->took(ran.way, arena.longest(number_));  // all have ended that call
    ran = {};
    const bool direct = able && arena.all_reach() && choice_->next();
    arena.choose(number_, direct ? Arena::Way::direct : Arena::Way::rings);
  }

  // False: not with these arrays, or not now.
  bool takes(PyEngine& e, nb::handle given, nb::handle out, Arrays& arrays) const {
    if (!e.on_submit.empty() || !e.on_complete.empty()) return false;
    const bool writes = kind_ != SharedCall::Kind::broadcast || !is_root_;
    if (!arrays.in.borrow(given.ptr(), false) || !arrays.out.borrow(out.ptr(), writes)) return false;
    const Lent &in = arrays.in, &into = arrays.out;
    if (in.nbytes != rings_.in_bytes() || into.nbytes != rings_.out_bytes() || in.overlaps(into))
      return false;
    for (const Lent* one : {&in, &into})
      if (reinterpret_cast<uintptr_t>(one->data) % item_) return false;
    for (const auto& [start, nbytes] : e.receiving)
      if (start < into.data + into.nbytes && into.data < start + nbytes) return false;
    return true;
  }

  // kGoingOn: all ranks have met.
  ArenaResult meet(bool waits, const std::byte* in, std::byte* out, LateUnlock& unlocked) {
    const Meeting& m = *meeting_;
    const uint64_t beside = m.crowded ? kCrowdedNs >> 2 * misses_ : large();
    const uint64_t stays = beside && waits ? beside + (large() ? rings_.moved() / kWaitBytes : 0) : 0;
    return begun(meeting_->meet(number_, header_, waits, m.crowded, !direct_.pays(), stays, unlocked,
                                [&] { begin(in, out); }));
  }

  ArenaResult look() {
    return begun(meeting_->look(
        number_, header_, [&] { begin(arrays_->in.data, arrays_->out.data); }, meeting_->crowded,
        !direct_.pays()));
  }

  ArenaResult begun(Meeting::Begun how) {
    open_ = how == Meeting::Begun::open;
    if (open_) return kOpen;
    misses_ = how == Meeting::Begun::met ? 0 : std::min(misses_ + 1, kMisses);
    if (how == Meeting::Begun::not_met) return kNotMet;
    const Arena& arena = *meeting_->arena;
    direct_now_ = direct_.pays() && arena.way(number_) == Arena::Way::direct && arena.all_told(number_);
    way_ = !direct_now_ ? kRings : arena.all_shared(number_) ? kMapped : kAttached;
    if (direct_.pays()) met_ns_ = now_ns();
    return kGoingOn;
  }

  bool large() const { return rings_.moved() >= kWorthWaiting; }

  ArenaResult run(uint64_t ns, LateUnlock& unlocked) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    uint64_t now = now_ns(), last = now;
    const uint64_t until = now + ns;
    bool did = false, tells = false;
    uint32_t rung = arena.rung(Arena::Bell::moves);
    auto ended = [&] { return direct_now_ ? direct_.ended(arena) : rings_.ended(); };
    while (!ended()) {
      if (direct_now_ ? direct_.advance(arena) : rings_.advance(arena)) {
        did = tells = true;
        if (!direct_now_ && ++looks_ % 16) continue;  // chunks of a ring are small
        last = now = now_ns();
        if (arena.broken()) return kBroken;
      } else {
        unlocked.now();
        if (std::exchange(tells, false))
          arena.ring(Arena::Bell::moves);
        else
          m.wait_for(Arena::Bell::moves, rung, now, last, until, !direct_.pays());
        rung = arena.rung(Arena::Bell::moves);
        now = now_ns();
        // Of a process that has ended others will tell; nobody else's memory has to be out of reach.
        if (direct_now_ && direct_.error() && direct_.error() != ESRCH) arena.set_broken();
        if (arena.broken()) return kBroken;
      }
      if (now > until && !ended()) {
        m.turns->had(now);
        return did ? kGoingOn : kStuck;
      }
    }
    if (tells) arena.ring(Arena::Bell::moves);
    if (direct_.pays()) {
      now = now_ns();
      arena.set_took(m.rank, number_, now - met_ns_);
      if (m.rank == 0) m.ran[number_ % 2] = {choice_, direct_now_};
    }
    arena.set_done(m.rank, number_);
    return m.turns->due(now) ? kDoneTurn : kDone;
  }

  const std::shared_ptr<Meeting> meeting_;
  const std::string header_;
  const SharedCall::Kind kind_;
  const uint64_t item_;
  static constexpr uint32_t kMisses = 5;
  bool is_root_ = false;
  uint32_t misses_ = 0;  // in a row: others are not waited for as long
  SharedCall rings_;
  DirectCall direct_;
  const std::shared_ptr<WayChoice> choice_ = std::make_shared<WayChoice>();  // rank 0's
  bool direct_now_ = false;
  Way way_ = kRings;
  uint64_t met_ns_ = 0;
  Seen seen_in_, seen_out_;
  std::mutex mutex_;  // who goes on with a call, and who gives it up
  std::atomic<bool> running_{false}, open_{false};
  uint64_t number_ = 0;
  uint32_t looks_ = 0;
  std::unique_ptr<Arrays> arrays_;
};

}  // namespace aiocomm::py
