#include "bindings/transfer.hpp"

#include <nanobind/nanobind.h>
#include <structmember.h>
#include <structseq.h>

#include <cstdlib>
#include <cstring>

#include "bindings/spinner.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

Hooks hooks;
PyTypeObject* TransferType = nullptr;
PyTypeObject* StatusType = nullptr;

namespace {

constexpr uint64_t kSpinBudgetNs = 500000;  // a task may go on without its loop for this long
constexpr uint64_t kMostAwaitNs = 100000;   // of which it waits at a time

Transfer* cast(PyObject* self) { return reinterpret_cast<Transfer*>(self); }

// ---------------------------------------------------------------- methods

PyObject* raise_outcome(Transfer* t) {
  if (t->outcome == Outcome::cancelled && t->engine->trio) {
    // asyncio's error means nothing to trio, and trio's own can only come from a cancelled scope.
    PyObject* error = PyObject_CallFunction(hooks.make_error, "OiisKs", t, static_cast<int>(Code::cancelled),
                                            0, "self", static_cast<unsigned long long>(0), "");
    if (error) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_XDECREF(error);
    return nullptr;
  }
  if (t->outcome == Outcome::cancelled) {
    PyObject* error = t->cancel_message ? PyObject_CallOneArg(hooks.cancelled_error, t->cancel_message)
                                        : PyObject_CallNoArgs(hooks.cancelled_error);
    if (error) PyErr_SetObject(hooks.cancelled_error, error);
    Py_XDECREF(error);
    return nullptr;
  }
  t->retrieved = true;
  // Each raise would add its frames to those of the last, and keep them.
  if (PyException_SetTraceback(t->exception, Py_None) < 0) return nullptr;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(t->exception)), t->exception);
  return nullptr;
}

PyObject* get_result(Transfer* t) {
  if (t->outcome == Outcome::done) return Py_NewRef(t->result);
  return raise_outcome(t);
}

PyObject* invalid_state() {
  PyObject* asyncio = PyImport_ImportModule("asyncio");
  PyObject* error = asyncio ? PyObject_GetAttrString(asyncio, "InvalidStateError") : nullptr;
  if (error) PyErr_SetString(error, "the transfer has not ended yet: await it");
  Py_XDECREF(error);
  Py_XDECREF(asyncio);
  return nullptr;
}

PyObject* transfer_result(PyObject* self, PyObject*) {
  Transfer* t = cast(self);
  return t->outcome == Outcome::pending ? invalid_state() : get_result(t);
}

PyObject* transfer_exception(PyObject* self, PyObject*) {
  Transfer* t = cast(self);
  switch (t->outcome) {
    case Outcome::pending:
      return invalid_state();
    case Outcome::cancelled:
      return raise_outcome(t);
    case Outcome::failed:
      t->retrieved = true;
      return Py_NewRef(t->exception);
    default:
      Py_RETURN_NONE;
  }
}

PyObject* transfer_done(PyObject* self, PyObject*) {
  return PyBool_FromLong(cast(self)->outcome != Outcome::pending);
}

PyObject* transfer_cancelled(PyObject* self, PyObject*) {
  return PyBool_FromLong(cast(self)->outcome == Outcome::cancelled);
}

// True: an error is set, since the loop may be at the same transfer.
bool is_elsewhere(Transfer* t, const char* method) {
  try {
    if (t->engine->is_here()) return false;
    PyErr_Format(hooks.usage_error,
                 "this transfer belongs to another event loop or thread: "
                 "loop.call_soon_threadsafe(transfer.%s, ...) does it there",
                 method);
  } catch (nb::python_error& error) {
    error.restore();
  }
  return true;
}

PyObject* transfer_cancel(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"msg", nullptr};
  PyObject* message = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:cancel", const_cast<char**>(names), &message))
    return nullptr;
  Transfer* t = cast(self);
  if (t->outcome != Outcome::pending || !t->op) Py_RETURN_FALSE;
  if (is_elsewhere(t, "cancel")) return nullptr;
  Op* op = t->op;
  PyEngine* engine = t->engine;
  bool going;
  Py_BEGIN_ALLOW_THREADS going = engine->engine->cancel(op, Code::cancelled);
  Py_END_ALLOW_THREADS
      // It may have ended meanwhile on another thread; then its outcome waits in the completion queue and stands. So it
      // does where all is moved, and only its memory is still being given back.
      if (message != Py_None) Py_XSETREF(t->cancel_message, Py_NewRef(message));
  int drained;
  do {
    drained = engine->drain(256);
  } while (!going && drained && t->outcome == Outcome::pending);
  if (t->outcome == Outcome::cancelled || (going && t->outcome == Outcome::pending)) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
}

PyObject* transfer_add_done_callback(PyObject* self, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"", "context", nullptr};
  PyObject *callback, *context = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:add_done_callback", const_cast<char**>(names),
                                   &callback, &context))
    return nullptr;
  Transfer* t = cast(self);
  if (is_elsewhere(t, "add_done_callback")) return nullptr;
  PyObject* own_context = context && context != Py_None ? Py_NewRef(context) : PyContext_CopyCurrent();
  if (!own_context) return nullptr;
  if (t->outcome != Outcome::pending) {
    bool ok = call_back(t, callback, own_context);
    Py_DECREF(own_context);
    if (!ok) return nullptr;
  } else if (!t->callback) {
    t->callback = Py_NewRef(callback);
    t->context = own_context;
  } else {
    PyObject* pair = PyTuple_Pack(2, callback, own_context);
    Py_DECREF(own_context);
    if (!t->more) t->more = PyList_New(0);
    const bool added = pair && t->more && PyList_Append(t->more, pair) == 0;
    Py_XDECREF(pair);
    if (!added) return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* transfer_remove_done_callback(PyObject* self, PyObject* callback) {
  Transfer* t = cast(self);
  if (is_elsewhere(t, "remove_done_callback")) return nullptr;
  long removed = 0;
  if (t->callback) {
    const nb::object one = nb::borrow(t->callback);
    const int same = PyObject_RichCompareBool(one.ptr(), callback, Py_EQ);
    if (same < 0) return nullptr;
    if (same && t->callback == one.ptr()) {
      Py_CLEAR(t->callback);
      Py_CLEAR(t->context);
      ++removed;
    }
  }
  if (!t->more) return PyLong_FromLong(removed);
  // Comparing calls into Python, which may add, remove and end meanwhile: what there was is gone through, and what is still
  // there is removed.
  const nb::object all = nb::steal(PyList_AsTuple(t->more));
  if (!all) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(all.ptr()); ++i) {
    PyObject* pair = PyTuple_GET_ITEM(all.ptr(), i);
    const int same = PyObject_RichCompareBool(PyTuple_GET_ITEM(pair, 0), callback, Py_EQ);
    if (same < 0) return nullptr;
    for (Py_ssize_t at = same && t->more ? PyList_GET_SIZE(t->more) : 0; at-- > 0;) {
      if (PyList_GET_ITEM(t->more, at) != pair) continue;
      if (PyList_SetSlice(t->more, at, at + 1, nullptr) < 0) return nullptr;
      ++removed;
      break;
    }
  }
  return PyLong_FromLong(removed);
}

PyObject* transfer_get_loop(PyObject* self, PyObject*) {
  PyObject* loop = cast(self)->engine->loop;
  return Py_NewRef(loop ? loop : Py_None);
}

PyObject* transfer_reduce(PyObject*, PyObject*) {
  PyErr_SetString(PyExc_TypeError,
                  "a transfer stays in its process: it cannot be pickled or copied. Await it, and send what "
                  "that returns");
  return nullptr;
}

PyObject* transfer_make_cancelled_error(PyObject* self, PyObject*) {
  Transfer* t = cast(self);
  return t->cancel_message ? PyObject_CallOneArg(hooks.cancelled_error, t->cancel_message)
                           : PyObject_CallNoArgs(hooks.cancelled_error);
}

// ---------------------------------------------------------------- await

// Spins for the answer before giving the task's turn up: a suspended await costs more than the message.
void spin_for(Transfer* t) {
  PyEngine* engine = t->engine;
  if (!engine->is_here()) return;  // who awaits it in another loop is told so
  const uint64_t now = engine->engine->now();
  if (now - engine->spinner->slept_ns() > kSpinBudgetNs || !loop_has_nothing_else(engine)) return;
  // The rest of a longer spin is the selector's, which sees to timers.
  const uint64_t until = now + std::min(engine->spinner->spin_ns(), kMostAwaitNs);
  while (t->outcome == Outcome::pending && engine->spinner) {
    const int found = engine->spinner->spin(until);
    if (found < 0) PyErr_WriteUnraisable(reinterpret_cast<PyObject*>(t));
    if (!found || !loop_has_nothing_else(engine)) return;
  }
}

PySendResult transfer_send(PyObject* self, PyObject*, PyObject** result) {
  Transfer* t = cast(self);
  if (t->outcome == Outcome::pending && t->engine->spinner) spin_for(t);
  if (t->outcome == Outcome::pending) {
    t->blocking = true;
    *result = Py_NewRef(self);
    return PYGEN_NEXT;
  }
  *result = get_result(t);
  return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

PyObject* transfer_next(PyObject* self) {
  PyObject* value = nullptr;
  switch (transfer_send(self, Py_None, &value)) {
    case PYGEN_NEXT:
      return value;
    case PYGEN_RETURN: {
      PyObject* stop = PyObject_CallOneArg(PyExc_StopIteration, value);
      Py_DECREF(value);
      if (stop) PyErr_SetObject(PyExc_StopIteration, stop);
      Py_XDECREF(stop);
      return nullptr;
    }
    default:
      return nullptr;
  }
}

PyObject* transfer_await(PyObject* self) {
  Transfer* t = cast(self);
  if (!t->engine->trio || t->outcome != Outcome::pending) return Py_NewRef(self);
  PyObject* coroutine = PyObject_CallOneArg(hooks.trio_wait, self);
  if (!coroutine) return nullptr;
  PyObject* iterator = PyObject_CallMethod(coroutine, "__await__", nullptr);
  Py_DECREF(coroutine);
  return iterator;
}

// `await` asks for none; who iterates may have forgotten it, and is told so, as by a Future.
PyObject* transfer_iter(PyObject* self) { return PyObject_CallOneArg(hooks.iterate, self); }

PyObject* transfer_repr(PyObject* self) {
  Transfer* t = cast(self);
  static const char* outcomes[] = {"pending", "done", "failed", "cancelled"};
  const char* role = t->kind == OpKind::recv ? "src" : "peer";
  return PyUnicode_FromFormat("<aiocomm.Transfer %s %s=%d tag=%lld nbytes=%llu %s>", kind_name(t->kind), role,
                              t->peer, static_cast<long long>(t->tag),
                              static_cast<unsigned long long>(t->nbytes),
                              outcomes[static_cast<int>(t->outcome.load())]);
}

PyObject* get_blocking(PyObject* self, void*) { return PyBool_FromLong(cast(self)->blocking); }

int set_blocking(PyObject* self, PyObject* value, void*) {
  int truth = value ? PyObject_IsTrue(value) : 0;
  if (truth < 0) return -1;
  cast(self)->blocking = truth != 0;
  return 0;
}

PyObject* get_cancel_message(PyObject* self, void*) {
  PyObject* message = cast(self)->cancel_message;
  return Py_NewRef(message ? message : Py_None);
}

PyObject* get_kind(PyObject* self, void*) { return PyUnicode_FromString(kind_name(cast(self)->kind)); }
PyObject* get_nbytes(PyObject* self, void*) { return PyLong_FromUnsignedLongLong(cast(self)->nbytes); }
PyObject* get_tag(PyObject* self, void*) { return PyLong_FromLongLong(cast(self)->tag); }
PyObject* get_peer(PyObject* self, void*) { return PyLong_FromLong(cast(self)->peer); }
PyObject* get_channel(PyObject* self, void*) { return Py_NewRef(cast(self)->channel); }
PyObject* get_source(PyObject* self, void*) {
  Transfer* t = cast(self);
  if (t->outcome == Outcome::done && t->kind == OpKind::recv) return make_status(t);
  Py_RETURN_NONE;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Transfer* t = cast(self);
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(t->owner);
  Py_VISIT(t->callback);
  Py_VISIT(t->context);
  Py_VISIT(t->more);
  Py_VISIT(t->result);
  Py_VISIT(t->exception);
  Py_VISIT(t->cancel_message);
  Py_VISIT(t->keep);
  if (t->has_view) Py_VISIT(t->view.obj);
  return 0;
}

int clear(PyObject* self) {
  Transfer* t = cast(self);
  Py_CLEAR(t->callback);
  Py_CLEAR(t->context);
  Py_CLEAR(t->more);
  Py_CLEAR(t->result);
  Py_CLEAR(t->exception);
  Py_CLEAR(t->cancel_message);
  let_go(t);
  Py_CLEAR(t->owner);
  return 0;
}

void finalize(PyObject* self) {
  Transfer* t = cast(self);
  if (t->outcome != Outcome::failed || t->retrieved || !t->owner || !t->engine->on_unretrieved) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* r = PyObject_CallOneArg(t->engine->on_unretrieved, t->exception);
  if (!r) PyErr_WriteUnraisable(self);
  Py_XDECREF(r);
  PyErr_Restore(type, value, trace);
}

void dealloc(PyObject* self) {
  Transfer* t = cast(self);
  if (PyObject_CallFinalizerFromDealloc(self) < 0) return;
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (t->weakrefs) PyObject_ClearWeakRefs(self);
  clear(self);
  Py_CLEAR(t->channel);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"result", transfer_result, METH_NOARGS,
     "Returns what awaiting returns; raises its error or InvalidStateError."},
    {"exception", transfer_exception, METH_NOARGS,
     "Returns the error that the transfer ended with, or None."},
    {"done", transfer_done, METH_NOARGS, "Whether the transfer has ended in any way."},
    {"cancelled", transfer_cancelled, METH_NOARGS, "Whether the transfer was cancelled by this side."},
    {"cancel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(transfer_cancel)),
     METH_VARARGS | METH_KEYWORDS,
     "Cancels; False if it has ended, or all is done but giving back its memory: its outcome stands. Else it "
     "ends, as cancelled, once nothing touches its buffer."},
    {"add_done_callback",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(transfer_add_done_callback)),
     METH_VARARGS | METH_KEYWORDS, "Calls back with the transfer, on its loop, when it has ended."},
    {"remove_done_callback", transfer_remove_done_callback, METH_O, "Removes callbacks; returns how many."},
    {"get_loop", transfer_get_loop, METH_NOARGS, "The event loop that the transfer belongs to."},
    {"_make_cancelled_error", transfer_make_cancelled_error, METH_NOARGS, "For asyncio.gather."},
    {"__reduce__", transfer_reduce, METH_NOARGS, "Raises TypeError."},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, "Transfer[T]."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef getset[] = {
    {"_asyncio_future_blocking", get_blocking, set_blocking, "For asyncio's tasks.", nullptr},
    {"_cancel_message", get_cancel_message, nullptr, "For asyncio.gather.", nullptr},
    {"kind", get_kind, nullptr, "send, recv, put or get.", nullptr},
    {"nbytes", get_nbytes, nullptr, "Bytes of the message; of a pending receive, of its buffer.", nullptr},
    {"tag", get_tag, nullptr, "The message's tag; of a pending receive, as asked for.", nullptr},
    {"peer", get_peer, nullptr, "The other rank; of a pending receive, as asked for.", nullptr},
    {"channel", get_channel, nullptr, "The channel's name.", nullptr},
    {"status", get_source, nullptr, "Status of a receive that is done, else None.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyMemberDef members[] = {{"__weaklistoffset__", T_PYSSIZET, offsetof(Transfer, weakrefs), READONLY, nullptr},
                         {nullptr, 0, 0, 0, nullptr}};

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_finalize, reinterpret_cast<void*>(finalize)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_repr, reinterpret_cast<void*>(transfer_repr)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {Py_tp_iter, reinterpret_cast<void*>(transfer_iter)},
    {Py_tp_iternext, reinterpret_cast<void*>(transfer_next)},
    {Py_am_await, reinterpret_cast<void*>(transfer_await)},
    {Py_am_send, reinterpret_cast<void*>(transfer_send)},
    {Py_tp_doc,
     const_cast<char*>(
         "An operation under way: submitted at the call, awaitable any number of times.\n\n"
         "Ends exactly once: done, failed or cancelled. Cancelling a task that awaits it cancels it;\n"
         "the await ends only when nothing touches the buffer any more.")},
    {0, nullptr}};

PyType_Spec spec = {"aiocomm_native.Transfer", sizeof(Transfer), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

PyStructSequence_Field status_fields[] = {{"source", "rank that sent the message"},
                                          {"tag", "tag of the message"},
                                          {"nbytes", "bytes that came; the buffer may be larger"},
                                          {nullptr, nullptr}};
PyStructSequence_Desc status_desc = {"aiocomm_native.Status", "What a receive got.", status_fields, 3};

}  // namespace

bool loop_has_nothing_else(PyEngine* engine) {
  if (!engine->ready) return false;
  const Py_ssize_t size = PyObject_Size(engine->ready);
  if (size < 0) PyErr_Clear();
  if (size <= 0 || !engine->bells || size > PyTuple_GET_SIZE(engine->bells)) return size == 0;
  for (Py_ssize_t i = 0; i < size; ++i) {  // what they would call for is looked for here
    PyObject* handle = PySequence_GetItem(engine->ready, i);
    if (!handle) PyErr_Clear();
    const int bell = handle ? PySequence_Contains(engine->bells, handle) : 0;
    Py_XDECREF(handle);
    if (bell < 0) PyErr_Clear();
    if (bell <= 0) return false;
  }
  return true;
}

Transfer* new_transfer(PyObject* owner, PyEngine* engine, OpKind kind, uint32_t channel) {
  auto t = cast(TransferType->tp_alloc(TransferType, 0));  // zeroed
  if (!t) return nullptr;
  t->owner = Py_NewRef(owner);
  t->engine = engine;
  t->kind = kind;
  t->channel = engine->name_of_channel(channel);
  return t;
}

int init_transfer(PyObject* module) {
  StatusType = PyStructSequence_NewType(&status_desc);
  TransferType = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
  if (!StatusType || !TransferType) return -1;
  if (PyModule_AddObjectRef(module, "Status", reinterpret_cast<PyObject*>(StatusType)) < 0) return -1;
  return PyModule_AddObjectRef(module, "Transfer", reinterpret_cast<PyObject*>(TransferType));
}

}  // namespace aiocomm::py
