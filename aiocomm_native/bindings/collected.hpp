// Slots of classes that keep Python objects: these have `traverse(visit, arg)`, and `forget()`, which lets go of them.
#pragma once

#include <nanobind/nanobind.h>

namespace aiocomm::py {

template <class T>
int traverse_instance(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nanobind::inst_ready(self) ? nanobind::inst_ptr<T>(self)->traverse(visit, arg) : 0;
}

template <class T>
int forget_instance(PyObject* self) {
  nanobind::inst_ptr<T>(self)->forget();
  return 0;
}

template <class T>
inline PyType_Slot collected[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_instance<T>)},
                                  {Py_tp_clear, reinterpret_cast<void*>(forget_instance<T>)},
                                  {0, nullptr}};

}  // namespace aiocomm::py
