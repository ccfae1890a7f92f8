// What has come of a collective call through an arena. Python has these numbers from here, by `bind_arena_results`.
#pragma once

#include <nanobind/nanobind.h>

namespace aiocomm::py {

enum ArenaResult : int {
  kNotBegun = -1,  // such calls do not repeat
  kNotMet,         // it is to be made by messages
  kDone,
  kDoneTurn,  // done, and other tasks should have a turn
  kGoingOn,   // all ranks have met
  kStuck,     // this rank can do nothing at the moment
  kBroken,    // somebody has given it up under way
  kOpen,      // not all have come
};

inline void bind_arena_results(nanobind::module_& m) {
  m.attr("NOT_BEGUN") = int{kNotBegun};
  m.attr("NOT_MET") = int{kNotMet};
  m.attr("DONE") = int{kDone};
  m.attr("DONE_TURN") = int{kDoneTurn};
  m.attr("GOING_ON") = int{kGoingOn};
  m.attr("STUCK") = int{kStuck};
  m.attr("BROKEN") = int{kBroken};
  m.attr("OPEN") = int{kOpen};
}

}  // namespace aiocomm::py
