// Ends of operations that no transfer stands for, looked for before the loop gets its turn back.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>
#include <vector>

#include "bindings/transfer.hpp"

namespace aiocomm::py {

inline bool ended_well(const SilentOp& flight) { return flight.ended && flight.op->code == Code::ok; }

// Until `done()` or `until_ns`, as long as the loop has nothing else to do. With the GIL, which it lets go of.
template <class Done>
void look_for_ends(PyEngine& e, uint64_t until_ns, Done done) {
  Engine& engine = *e.engine;
  bool lingers = loop_has_nothing_else(&e), looked = false;
  std::vector<Op*> others;  // of transfers
  {
    nanobind::gil_scoped_release release;
    while (!done()) {
      bool any = false;
      for (Op* op; engine.take_completed(op); any = true) {
        if (SilentOp* silent = silent_of(op))
          silent->ended = true;
        else
          others.push_back(op);
      }
      if (!others.empty() || engine.has_events()) {
        nanobind::gil_scoped_acquire acquire;
        for (Op* op : std::exchange(others, {})) end_transfer(static_cast<Transfer*>(op->cookie));
        e.ended_outside = true;
        e.deliver_events();
        lingers = lingers && loop_has_nothing_else(&e);
        continue;
      }
      if (any) continue;
      if (!lingers || engine.now() >= until_ns) break;
      looked = true;
      if (!engine.linger(until_ns, true)) break;
    }
    // A loop that spins says by itself that it is about to sleep; others have done so already, and were taken awake.
    if (looked && !e.spinner) engine.loop_sleeps();
  }
  e.after_submit();
}

}  // namespace aiocomm::py
