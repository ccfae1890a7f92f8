// Collectives through an arena, for Python: aiocomm/collectives/shared.py.
//
// Rules
//   - `attempt` meets the other ranks, or has the call made by messages; a call that has met is gone on with until it has
//     ended, or has taken its turn. `proceed` goes on with it then, on any thread, one at a time.
//   - Arrays are held from the attempt to the end, or to `abandon`.
//   - One call at a time goes through an arena; who owns it sees to that (aiocomm/collectives/scope.py).

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/schedule.hpp"
#include "core/clock.hpp"
#include "core/patience.hpp"
#include "core/relax.hpp"
#include "core/shared_call.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

namespace {

// In ns: how long others are waited for, the first of it without letting others have the core; after which other tasks
// get a turn.
constexpr uint64_t kMeetNs = 200000, kKeepCoreNs = 20000, kTurnNs = 1000000;
// Others are waited for while other tasks run, too, where a call moves that many bytes: a ns for each so many.
constexpr uint64_t kWorthWaiting = 4 << 20, kWaitBytes = 16;

size_t cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return sched_getaffinity(0, sizeof set, &set) == 0 ? static_cast<size_t>(CPU_COUNT(&set)) : 1;
}

// What the calls of one group on one channel have in common at this rank.
struct Meeting {
  Meeting(std::shared_ptr<Arena> with, size_t own) : arena(std::move(with)), rank(own) {
    crowded = arena->ranks() > cores();
  }
  void wait(uint64_t now, uint64_t began) const {
    if (crowded || now - began > kKeepCoreNs)
      sched_yield();
    else
      relax();
  }

  const std::shared_ptr<Arena> arena;
  const size_t rank;
  bool crowded;  // who waits keeps from running whom it waits for
  Patience patience;
  uint64_t met = 0;  // the last call that did
  uint64_t turn_began = 0;
};

class PySharedCall {
 public:
  enum Result : int { kNo, kDone, kDoneTurn, kPending, kStuck, kBroken, kOpen };

  PySharedCall(std::shared_ptr<Meeting> meeting, int kind, size_t root, std::vector<uint64_t> sizes,
               bool in_place, uint64_t item, const std::string& format, const std::string& op,
               nb::bytes header)
      : meeting_(std::move(meeting)),
        header_(header.c_str(), header.size()),
        kind_(static_cast<SharedCall::Kind>(kind)),
        item_(item),
        call_(checked(kind, *meeting_, root, sizes, item), meeting_->rank, meeting_->arena->ranks(), root,
              sizes, in_place, item, find_reduction(format, op)) {
    if (header_.size() > Arena::kHeader) throw nb::value_error("a header that is too long");
    if (kind_ == SharedCall::Kind::all_reduce && !find_reduction(format, op))
      throw nb::value_error("a reduction that is not done here");
  }

  int attempt(nb::handle engine, uint64_t number, nb::handle given, nb::handle out) {
    PyEngine& e = *nb::cast<PyEngine*>(engine);
    if (running_ || !e.on_submit.empty() || !e.on_complete.empty()) return kNo;
    const bool writes = kind_ != SharedCall::Kind::broadcast || !is_root_;
    Arrays arrays;
    if (!arrays.in.borrow(given.ptr(), false) || !arrays.out.borrow(out.ptr(), writes)) return kNo;
    const Lent &in = arrays.in, &into = arrays.out;
    if (in.nbytes != call_.in_bytes() || into.nbytes != call_.out_bytes() || in.overlaps(into)) return kNo;
    for (const Lent* one : {&in, &into})
      if (reinterpret_cast<uintptr_t>(one->data) % item_) return kNo;
    for (const auto& [start, nbytes] : e.receiving)
      if (start < into.data + into.nbytes && into.data < start + nbytes) return kNo;
    const bool waits = loop_has_nothing_else(&e);
    Result result;
    {
      nb::gil_scoped_release release;
      number_ = number;
      result = meet(waits, in.data, into.data);
      if (result == kPending) result = run(now_ns() + kTurnNs);
    }
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
    Result result = kNo;
    {
      nb::gil_scoped_release release;
      std::lock_guard lock(mutex_);
      if (!running_) return result;
      result = open_ ? look() : kPending;
      if (result == kPending) result = run(now_ns() + static_cast<uint64_t>(seconds * 1e9));
      running_ = result > kDoneTurn;
      if (!running_) over.swap(arrays_);
    }
    return result;
  }

  // The call fails here: the others are told, and nothing touches the arrays any more.
  void abandon() {
    std::unique_ptr<Arrays> over;
    {
      nb::gil_scoped_release release;
      Arena& arena = *meeting_->arena;
      if (!open_ || arena.close(number_) == Arena::Meeting::met) arena.set_broken();  // who goes on ends soon
      std::lock_guard lock(mutex_);
      open_ = false;
      running_ = false;
      over.swap(arrays_);
    }
  }

  uint64_t moved() const { return call_.moved(); }

 private:
  struct Arrays {
    Lent in, out;
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

  // kPending: all ranks have met.
  Result meet(bool waits, const std::byte* in, std::byte* out) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    const uint64_t began = now_ns();
    uint64_t now = began;
    while (!arena.all_done(m.met)) {
      if (!waits || now - began > kKeepCoreNs) return kNo;
      m.wait(now, began);
      now = now_ns();
    }
    if (arena.broken()) return kNo;
    waits = waits && m.patience.may_spin(now);
    std::memcpy(arena.header(m.rank), header_.data(), header_.size());
    call_.begin(arena, number_, in, out);
    Arena::Meeting state = arena.arrive(number_);
    if (state == Arena::Meeting::open && waits) {
      do {
        m.wait(now, began);
        state = arena.look(number_);
      } while (state == Arena::Meeting::open && (now = now_ns()) - began < kMeetNs);
      if (state == Arena::Meeting::open && call_.moved() >= kWorthWaiting) {
        open_ = true;
        closes_ns_ = began + kMeetNs + call_.moved() / kWaitBytes;
        return kOpen;
      }
      if (state == Arena::Meeting::open) state = arena.close(number_);
      m.patience.spun(state == Arena::Meeting::met, false, began, now, kMeetNs);
    } else if (state == Arena::Meeting::open) {
      state = arena.close(number_);
    }
    return judge(state);
  }

  // Whether all ranks have met by now.
  Result look() {
    Arena::Meeting state = meeting_->arena->look(number_);
    if (state == Arena::Meeting::open) {
      if (now_ns() < closes_ns_) return kOpen;
      state = meeting_->arena->close(number_);
    }
    open_ = false;
    return judge(state);
  }

  Result judge(Arena::Meeting state) {
    if (state != Arena::Meeting::met) return kNo;
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    m.met = number_;
    for (size_t rank = 0; rank < arena.ranks(); ++rank)
      if (std::memcmp(arena.header(rank), header_.data(), header_.size()) != 0) {
        arena.set_done(m.rank, number_);  // all see that, and say by messages what is wrong
        return kNo;
      }
    return kPending;
  }

  Result run(uint64_t until) {
    Meeting& m = *meeting_;
    Arena& arena = *m.arena;
    uint64_t now = now_ns(), last = now;
    bool did = false;
    while (!call_.ended()) {
      if (call_.advance(arena)) {
        did = true;
        if (++looks_ % 16) continue;
        last = now = now_ns();
        if (arena.broken()) return kBroken;
      } else {
        m.wait(now, last);
        now = now_ns();
        if (arena.broken()) return kBroken;
      }
      if (now > until && !call_.ended()) {
        m.turn_began = now;
        return did ? kPending : kStuck;
      }
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
  SharedCall call_;
  std::mutex mutex_;  // who goes on with a call, and who gives it up
  bool running_ = false, open_ = false;
  uint64_t number_ = 0, closes_ns_ = 0;
  uint32_t looks_ = 0;
  std::unique_ptr<Arrays> arrays_;
};

}  // namespace

void bind_shared(nb::module_& m) {
  nb::class_<Meeting>(m, "Arena", "Memory that the ranks of a group on one host share.")
      .def_static(
          "create",
          [](size_t ranks) {
            if (ranks < 2 || ranks > Arena::kRanks) throw nb::value_error("not that many ranks");
            return std::make_shared<Meeting>(Arena::create(ranks), 0);
          },
          "ranks"_a, "Make one, as rank 0 of the group.")
      .def_static(
          "open",
          [](const std::tuple<int, int, uint64_t>& place, size_t rank, size_t ranks) -> nb::object {
            if (ranks < 2 || ranks > Arena::kRanks || rank >= ranks)
              throw nb::value_error("not that many ranks");
            auto [owner, fd, nonce] = place;
            auto arena = Arena::open(owner, fd, nonce, ranks);
            return arena ? nb::cast(std::make_shared<Meeting>(std::move(arena), rank)) : nb::none();
          },
          "place"_a, "rank"_a, "ranks"_a, "Open the one that another process has made. None: it cannot be.")
      .def_prop_ro(
          "place",
          [](const Meeting& self) {
            return std::make_tuple(getpid(), self.arena->fd(), self.arena->nonce());
          },
          "Where others find it: process, descriptor, and what tells it from others.");
  nb::class_<PySharedCall>(m, "SharedCall", "One rank's part of a collective of one shape through an arena.")
      .def(nb::init<std::shared_ptr<Meeting>, int, size_t, std::vector<uint64_t>, bool, uint64_t,
                    const std::string&, const std::string&, nb::bytes>(),
           "arena"_a, "kind"_a, "root"_a, "sizes"_a, "in_place"_a, "item"_a, "format"_a, "op"_a, "header"_a)
      .def("attempt", &PySharedCall::attempt, "engine"_a, "number"_a, "given"_a.none(), "out"_a.none(),
           "Do the call. 0: it is to be made by messages; 1: done; 2: done, and other tasks should have a "
           "turn; "
           "3: going on; 4: the same, and others are waited for; 5: another rank has given it up; 6: not all "
           "have come "
           "yet.")
      .def("proceed", &PySharedCall::proceed, "seconds"_a, "Go on with it; as `attempt`.")
      .def("abandon", &PySharedCall::abandon, "Give it up, for all ranks.")
      .def_prop_ro("moved", &PySharedCall::moved, "Bytes that it copies to or from the arena here.");
}

}  // namespace aiocomm::py
