#include <nanobind/nanobind.h>

#include "bindings/transfer.hpp"

namespace nb = nanobind;

namespace aiocomm::py {
void bind_engine(nb::module_& m);
void bind_schedule(nb::module_& m);
void bind_repeats(nb::module_& m);
void bind_shared(nb::module_& m);
void bind_device_call(nb::module_& m);
void bind_device_memory(nb::module_& m);
void bind_expert_calls(nb::module_& m);
}  // namespace aiocomm::py
void bind_expert_heads(nb::module_& m);
void bind_expert_tables(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_match(nb::module_& m);
void bind_pages(nb::module_& m);
void bind_rows(nb::module_& m, nb::module_& pure);
void bind_sched(nb::module_& m);
void bind_settle(nb::module_& m);

NB_MODULE(_core, m) {
  nb::set_leak_warnings(false);  // interpreters may end without collecting cycles
  m.doc() = "Native core of aiocomm.";
  if (aiocomm::py::init_memory(m.ptr()) < 0 || aiocomm::py::init_transfer(m.ptr()) < 0)
    throw nb::python_error();
  nb::module_ pure = m.def_submodule("pure", "Matching, scheduling and deadlines, without I/O: for tests.");
  bind_rows(m, pure);
  aiocomm::py::bind_engine(m);
  aiocomm::py::bind_schedule(m);
  aiocomm::py::bind_shared(m);
  aiocomm::py::bind_device_call(m);
  aiocomm::py::bind_repeats(m);
  aiocomm::py::bind_expert_calls(m);
  bind_expert_heads(m);
  bind_expert_tables(m);
  bind_experts(m);
  bind_pages(m);
  bind_settle(m);
  aiocomm::py::bind_device_memory(m);
  bind_match(pure);
  bind_sched(pure);
}
