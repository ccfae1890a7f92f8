// For loops with a selector of ours; see spinner.hpp.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <utility>

#include "bindings/spinner.hpp"
#include "bindings/transfer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

Spinner::~Spinner() {
  while (!members_.empty()) discard(*members_.back());
}

void Spinner::add(PyEngine& engine) {
  if (engine.spinner) engine.spinner->discard(engine);
  members_.push_back(&engine);
  engines_.push_back(engine.engine.get());
  engine.spinner = this;
  engine.engine->may_spin(true);
}

void Spinner::discard(PyEngine& engine) {
  if (engine.spinner != this) return;
  std::erase(members_, &engine);
  std::erase(engines_, engine.engine.get());
  engine.spinner = nullptr;
  engine.engine->may_spin(false);
}

int Spinner::spin(uint64_t until_ns) {
  if (engines_.empty()) return 0;
  bool found;
  {
    nb::gil_scoped_release release;
    found = Engine::spin(engines_, until_ns, patience_, others_.fd < 0 ? nullptr : &others_);
  }
  if (std::exchange(others_.rehearses, false) && !found) return rehearse();
  return found ? hand_over() : 0;
}

int Spinner::prepare_to_sleep() {
  bool found = false;
  {
    nb::gil_scoped_release release;
    for (Engine* one : engines_) found = one->loop_sleeps() || one->has_news() || found;
  }
  return found ? hand_over() : 0;
}

void Spinner::woken() {
  if (engines_.empty()) return;
  slept_ns_ = others_.looked_ns = engines_[0]->now();
  patience_.woke(slept_ns_);
  for (Engine* one : engines_) one->loop_wakes();
}

bool Spinner::looked() {
  const uint64_t t = now();
  if (!others_.looked(t)) return false;
  slept_ns_ = t;  // its tasks may wait by themselves again, also those that find the answer here each time
  return true;
}

// A callback that does nothing takes the way of those that the loop is about to run.
int Spinner::rehearse() {
  if (!members_[0]->call_soon) return 0;
  PyObject* handle = PyObject_CallOneArg(members_[0]->call_soon, reinterpret_cast<PyObject*>(&PyBool_Type));
  Py_XDECREF(handle);
  return handle ? 1 : -1;
}

// What is called back may attach and detach engines.
int Spinner::hand_over() {
  for (size_t i = 0; i < members_.size(); ++i) members_[i]->drain(256);
  return 1;
}

namespace {

bool or_throw(int found) {
  if (found < 0) throw nb::python_error();
  return found > 0;
}

}  // namespace

void bind_spinner(nb::module_& m) {
  nb::class_<Spinner>(m, "Spinner", "The engines of a loop that polls them before it sleeps.")
      .def(
          "__init__",
          [](Spinner* self, double spin_s, int others) {
            new (self) Spinner(static_cast<uint64_t>(spin_s * 1e9), others);
          },
          "spin_s"_a, "others"_a = -1,
          "`others`: a descriptor that is readable when something else has come that the loop waits for.")
      .def("add", &Spinner::add, "engine"_a, "The caller keeps it until it is discarded.")
      .def("discard", &Spinner::discard, "engine"_a)
      .def(
          "spin",
          [](Spinner& self, double seconds) {
            constexpr double kStretch = 8;  // by which patience may make it longer
            const double ns = std::min(seconds * 1e9 / kStretch, static_cast<double>(self.spin_ns()));
            return or_throw(self.spin(self.now() + static_cast<uint64_t>(ns)));
          },
          "seconds"_a,
          "Poll all of them until one has news, and say whether one has; its tasks are made ready. Ends "
          "after "
          "`seconds` at the latest, or when the loop may spin no longer, or something else has come.")
      .def(
          "look", [](Spinner& self) { return or_throw(self.spin(0)); }, "The same, once.")
      .def(
          "prepare_to_sleep", [](Spinner& self) { return or_throw(self.prepare_to_sleep()); },
          "Have them wake the loop from now on. True: something has come before that.")
      .def("woken", &Spinner::woken, "The loop has slept.")
      .def("looked", &Spinner::looked,
           "Called at the selector. Whether its descriptors were looked at a moment ago: then all is done.");
}

}  // namespace aiocomm::py
