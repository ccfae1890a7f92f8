// Scheduler and TimerHeap for Python: what the property tests drive. The engine uses the classes themselves.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "core/sched.hpp"
#include "core/timers.hpp"

namespace nb = nanobind;

namespace {

void bind_scheduler(nb::module_& m) {
  using aiocomm::SchedConfig;
  using aiocomm::Scheduler;
  using Chunk = Scheduler::Chunk;

  nb::class_<Chunk>(m, "Chunk")
      .def_ro("item", &Chunk::item)
      .def_ro("offset", &Chunk::offset)
      .def_ro("nbytes", &Chunk::nbytes)
      .def_ro("last", &Chunk::last)
      .def_ro("header", &Chunk::header)
      .def_ro("cls", &Chunk::cls)
      .def_ro("flow", &Chunk::flow)
      .def_ro("serial", &Chunk::serial);

  constexpr SchedConfig kDefault;
  nb::class_<Scheduler>(m, "Scheduler")
      .def(
          "__init__",
          [](Scheduler* self, uint64_t min_chunk, uint64_t max_chunk, uint64_t min_window,
             uint64_t max_window, double initial_rate, double min_share) {
            new (self) Scheduler({min_chunk, max_chunk, min_window, max_window, initial_rate, min_share});
          },
          nb::kw_only(), nb::arg("min_chunk") = kDefault.min_chunk, nb::arg("max_chunk") = kDefault.max_chunk,
          nb::arg("min_window") = kDefault.min_window, nb::arg("max_window") = kDefault.max_window,
          nb::arg("initial_rate") = kDefault.initial_rate, nb::arg("min_share") = kDefault.min_share)
      .def("add_flow", &Scheduler::add_flow, nb::arg("flow"), nb::arg("cls"), nb::arg("weight"),
           nb::arg("group"))
      .def("remove_flow", &Scheduler::remove_flow, nb::arg("flow"))
      .def("set_weight", &Scheduler::set_weight, nb::arg("group"), nb::arg("weight"))
      .def("set_ready", &Scheduler::set_ready, nb::arg("flow"), nb::arg("ready"))
      .def("set_chunk", &Scheduler::set_chunk, nb::arg("flow"), nb::arg("nbytes"))
      .def("set_preempt", &Scheduler::set_preempt, nb::arg("cls"), nb::arg("ns"))
      .def("declare", &Scheduler::declare, nb::arg("cls"), nb::arg("declared"))
      .def("push", &Scheduler::push, nb::arg("flow"), nb::arg("item"), nb::arg("nbytes"),
           nb::arg("header") = false)
      .def("next", &Scheduler::next)
      .def("unget", &Scheduler::unget, nb::arg("chunk"))
      .def("complete", &Scheduler::complete, nb::arg("nbytes"), nb::arg("elapsed_ns"), nb::arg("cls"))
      .def("cancel", &Scheduler::cancel, nb::arg("item"))
      .def("backlog", &Scheduler::backlog, nb::arg("flow"))
      .def("served", &Scheduler::served, nb::arg("group"))
      .def("window", &Scheduler::window, nb::arg("cls"))
      .def("chunk_size", &Scheduler::chunk_size, nb::arg("cls"))
      .def("in_flight", nb::overload_cast<uint8_t>(&Scheduler::in_flight, nb::const_), nb::arg("cls"))
      .def("in_flight", nb::overload_cast<>(&Scheduler::in_flight, nb::const_))
      .def_prop_ro("items", &Scheduler::items)
      .def_prop_ro("runnable", &Scheduler::runnable)
      .def_prop_ro("has_urgent", &Scheduler::has_urgent)
      .def_prop_ro("has_rivals", &Scheduler::has_rivals)
      .def_prop_ro("rate", &Scheduler::rate);
}

void bind_timers(nb::module_& m) {
  using aiocomm::TimerHeap;

  nb::class_<TimerHeap>(m, "TimerHeap")
      .def(nb::init<>())
      .def("add", &TimerHeap::add, nb::arg("id"), nb::arg("at_ns"))
      .def("cancel", &TimerHeap::cancel, nb::arg("id"))
      .def("next", &TimerHeap::next)
      .def(
          "expire",
          [](TimerHeap& self, uint64_t now_ns) {
            std::vector<uint64_t> expired;
            self.expire(now_ns, expired);
            return expired;
          },
          nb::arg("now_ns"))
      .def("__len__", &TimerHeap::size)
      .def_prop_ro("capacity", &TimerHeap::capacity);
}

}  // namespace

void bind_sched(nb::module_& m) {
  bind_scheduler(m);
  bind_timers(m);
}
