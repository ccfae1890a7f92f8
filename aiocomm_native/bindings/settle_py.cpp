// Several transfers of one call at once: spins for all of them before the task gives its turn up.
#include <nanobind/nanobind.h>

#include "bindings/transfer.hpp"

namespace nb = nanobind;

namespace {

using aiocomm::py::Outcome;
using aiocomm::py::PyEngine;
using aiocomm::py::Transfer;

enum Settled { kPending = 0, kDone = 1, kTrouble = 2 };

Settled look(const nb::list& transfers) {
  Settled found = kDone;
  for (nb::handle one : transfers) {
    switch (reinterpret_cast<Transfer*>(one.ptr())->outcome) {
      case Outcome::done:
        break;
      case Outcome::pending:
        if (found == kDone) found = kPending;
        break;
      default:
        return kTrouble;
    }
  }
  return found;
}

// All of one engine, none of them waited for by anybody.
int settle(const nb::list& transfers) {
  for (nb::handle one : transfers)
    if (!PyObject_TypeCheck(one.ptr(), aiocomm::py::TransferType))
      throw nb::type_error("a list of transfers");
  Settled found = look(transfers);
  if (found != kPending) return found;
  nb::object first = transfers[0];
  PyEngine* engine = reinterpret_cast<Transfer*>(first.ptr())->engine;
  const uint64_t now = engine->engine->now();
  if (!engine->spin_ns || !aiocomm::py::may_spin(engine, now)) return kPending;
  const uint64_t until = now + engine->spin_ns;
  while (found == kPending) {
    bool something;
    {
      nb::gil_scoped_release release;
      something = engine->engine->spin(until);
    }
    if (engine->drain(64) < 0) throw nb::python_error();
    found = look(transfers);
    if (!something || !aiocomm::py::loop_has_nothing_else(engine)) break;
  }
  return found;
}

}  // namespace

void bind_settle(nb::module_& m) {
  m.def("settle", settle, nb::arg("transfers"),
        "Spin for transfers, where the loop spins and has nothing else to do: 0 some are pending, 1 all are "
        "done, 2 some have failed.");
}
