// Several transfers of one call at once: looks for their ends before the task gives its turn up.
#include <nanobind/nanobind.h>

#include "bindings/transfer.hpp"

namespace nb = nanobind;

namespace {

using aiocomm::py::Outcome;
using aiocomm::py::PyEngine;
using aiocomm::py::Transfer;

PyEngine* engine_of(const nb::list& transfers) {
  for (nb::handle one : transfers)
    if (!PyObject_TypeCheck(one.ptr(), aiocomm::py::TransferType))
      throw nb::type_error("a list of transfers");
  nb::object first = transfers[0];
  return reinterpret_cast<Transfer*>(first.ptr())->engine;
}

// Looks until something of the engine has ended, on loops that show whether they have something else to do.
bool look_for_news(PyEngine* engine, double seconds, bool is_long) {
  bool something;
  {
    nb::gil_scoped_release release;
    something = engine->engine->linger(engine->engine->now() + static_cast<uint64_t>(seconds * 1e9), is_long);
    // A loop that spins says by itself that it is about to sleep; others have done so already, and were taken awake.
    if (!engine->spinner) something = engine->engine->loop_sleeps() || something;
  }
  engine->drain(64);
  return something;
}

// Waits for any of them for a moment.
bool linger(const nb::list& transfers, double seconds, bool is_long) {
  if (!nb::len(transfers)) return false;
  PyEngine* engine = engine_of(transfers);
  while (aiocomm::py::loop_has_nothing_else(engine)) {
    const bool something = look_for_news(engine, seconds, is_long);
    for (nb::handle one : transfers)
      if (reinterpret_cast<Transfer*>(one.ptr())->outcome != Outcome::pending) return true;
    if (!something) break;
  }
  return false;
}

}  // namespace

void bind_settle(nb::module_& m) {
  m.def("linger", linger, nb::arg("transfers"), nb::arg("seconds"), nb::arg("is_long") = false,
        "Wait for any of these for a moment, and say whether one has ended. Long moments are left out only "
        "where others "
        "such have been in vain.");
}
