#include "bindings/schedule.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

nb::object as_transfer(nb::pointer_and_handle<PyEngine> self, SilentOp& flight, PyObject* keep) {
  Op* op = std::exchange(flight.op, nullptr);
  const bool has_ended = flight.ended;
  Transfer* t = new_transfer(self.h.ptr(), self.p, op->kind, op->channel);
  if (!t) Py_FatalError("no memory for a transfer that is under way");
  t->op = op;
  t->peer = op->peer;
  t->tag = op->tag;
  t->nbytes = op->nbytes;
  t->keep = Py_NewRef(keep);
  op->cookie = t;
  PyObject* handle = reinterpret_cast<PyObject*>(t);
  Py_INCREF(handle);  // the engine's reference, until end_transfer
  if (has_ended) {
    end_transfer(t);
  } else if (op->kind == OpKind::recv && op->capacity) {
    self.p->receiving.emplace(op->data, op->capacity);
    t->tracked = true;
  }
  return nb::steal(handle);
}

nb::list wholes_of(std::array<Lent, 4>& lent) {
  nb::list wholes;
  for (Lent& one : lent) {
    if (!one.gpu) continue;
    wholes.append(nb::borrow(one.owner));
    wholes.append(nb::steal(new_device_memory(std::move(one.gpu))));
  }
  return wholes;
}

}  // namespace aiocomm::py
