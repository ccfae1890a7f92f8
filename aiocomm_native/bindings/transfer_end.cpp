// How a transfer ends: its op's outcome becomes a result or an error, its buffer is let go, its callbacks run.

#include <cstdlib>

#include "bindings/transfer.hpp"

namespace aiocomm::py {

PyObject* make_status(const Transfer* t) {
  PyObject* status = PyStructSequence_New(StatusType);
  if (!status) return nullptr;
  PyStructSequence_SET_ITEM(status, 0, PyLong_FromLong(t->peer));
  PyStructSequence_SET_ITEM(status, 1, PyLong_FromLongLong(t->tag));
  PyStructSequence_SET_ITEM(status, 2, PyLong_FromUnsignedLongLong(t->nbytes));
  return status;
}

const char* kind_name(OpKind kind) {
  static const char* names[] = {"send", "recv", "put", "get", "serve"};
  return names[static_cast<int>(kind)];
}

void let_go(Transfer* t) {
  if (t->has_view) {
    PyBuffer_Release(&t->view);
    t->has_view = false;
  }
  Py_CLEAR(t->keep);
}

namespace {

bool schedule(Transfer* t, PyObject* callback, PyObject* context) {
  PyObject* argv[3] = {callback, reinterpret_cast<PyObject*>(t), context};
  static PyObject* names = Py_BuildValue("(s)", "context");
  PyObject* handle = context && context != Py_None
                         ? PyObject_Vectorcall(t->engine->call_soon, argv, 2, names)
                         : PyObject_Vectorcall(t->engine->call_soon, argv, 2, nullptr);
  Py_XDECREF(handle);
  return handle != nullptr;
}

}  // namespace

// Under trio a callback is called at once, on the loop's thread.
bool call_back(Transfer* t, PyObject* callback, PyObject* context) {
  if (t->engine->call_soon) return schedule(t, callback, context);
  bool entered = context && context != Py_None && PyContext_Enter(context) == 0;
  if (!entered) PyErr_Clear();  // it is the one that runs already
  PyObject* r = PyObject_CallOneArg(callback, reinterpret_cast<PyObject*>(t));
  if (entered) PyContext_Exit(context);
  Py_XDECREF(r);
  return r != nullptr;
}

namespace {

void run_callbacks(Transfer* t) {
  PyObject* callback = t->callback;
  PyObject* context = t->context;
  PyObject* more = t->more;
  t->callback = t->context = t->more = nullptr;
  if (callback && !call_back(t, callback, context)) PyErr_WriteUnraisable(callback);
  for (Py_ssize_t i = 0; more && i < PyList_GET_SIZE(more); ++i) {
    PyObject* pair = PyList_GET_ITEM(more, i);
    if (!call_back(t, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1))) PyErr_WriteUnraisable(pair);
  }
  Py_XDECREF(callback);
  Py_XDECREF(context);
  Py_XDECREF(more);
}

// Other threads may ask at any time: what it comes to is there before.
void conclude(Transfer* t, Outcome outcome) { t->outcome.store(outcome, std::memory_order_release); }

void fail_with_current_error(Transfer* t) {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  t->exception = value;
  conclude(t, Outcome::failed);
  Py_XDECREF(type);
  Py_XDECREF(trace);
}

void take_failure(Transfer* t, const Op& op) {
  const std::string& link = t->engine->engine->link_name(t->engine->engine->executor_of(op));
  const std::string reason = op.code == Code::peer_lost || op.code == Code::link_failed
                                 ? t->engine->engine->why_lost(op.peer)
                                 : std::string();
  t->exception =
      PyObject_CallFunction(hooks.make_error, "OiisKs", t, static_cast<int>(op.code), op.error, link.c_str(),
                            static_cast<unsigned long long>(op.capacity), reason.c_str());
  if (t->exception)
    conclude(t, Outcome::failed);
  else
    fail_with_current_error(t);
}

void take_success(Transfer* t, Op& op) {
  if (op.kind == OpKind::recv && op.allocate && op.gpu) {
    int device = op.gpu->device;
    PyObject* memory = new_device_memory(std::move(op.gpu));
    t->result = memory ? decode_device_meta(op, memory, device) : nullptr;
    Py_XDECREF(memory);
    op.data = nullptr;
  } else if (op.kind == OpKind::recv && op.allocate) {
    PyObject* memory = new_memory(op.data, op.nbytes);
    op.data = nullptr;
    t->result = memory ? decode_meta(op, memory) : nullptr;
    Py_XDECREF(memory);
  } else if (op.kind == OpKind::recv) {
    t->result = make_status(t);
  } else {
    t->result = Py_NewRef(Py_None);
  }
  if (t->result)
    conclude(t, Outcome::done);
  else
    fail_with_current_error(t);
}

void report_completion(Transfer* t, const Op& op) {
  PyEngine* engine = t->engine;
  auto observer = engine->on_complete.find(op.counted_by);
  if (observer == engine->on_complete.end()) return;
  uint64_t began = op.started_ns ? op.started_ns : op.ended_ns;
  PyObject* callback = Py_NewRef(observer->second);  // which may end its own observation
  PyObject* r = PyObject_CallFunction(
      callback, "KsiOKidd", static_cast<unsigned long long>(op.id), kind_name(op.kind), op.peer, t->channel,
      static_cast<unsigned long long>(op.moved), static_cast<int>(op.code == Code::ok),
      static_cast<double>(began - op.submitted_ns) * 1e-9, static_cast<double>(op.ended_ns - began) * 1e-9);
  if (!r) PyErr_WriteUnraisable(callback);
  Py_XDECREF(r);
  Py_DECREF(callback);
}

}  // namespace

void end_transfer(Transfer* t) {
  Op* op = t->op;
  t->op = nullptr;
  t->peer = op->peer;
  t->tag = op->tag;
  t->nbytes = op->code == Code::ok ? op->moved : op->nbytes;
  if (t->tracked) t->engine->receiving.erase(op->data);
  if (!t->engine->on_complete.empty()) report_completion(t, *op);
  if (op->code == Code::ok)
    take_success(t, *op);
  else if (op->code == Code::cancelled)
    conclude(t, Outcome::cancelled);
  else
    take_failure(t, *op);
  if (op->allocate && op->data && !op->gpu) std::free(op->data);
  t->engine->engine->release(op);
  let_go(t);
  run_callbacks(t);
  Py_DECREF(t);  // the engine's reference
}

}  // namespace aiocomm::py
