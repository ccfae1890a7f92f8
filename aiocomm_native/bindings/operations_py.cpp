// Operations as Python submits them. They are made per message: positional arguments only.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <utility>

#include "bindings/device_py.hpp"
#include "bindings/rows_py.hpp"
#include "bindings/transfer.hpp"
#include "core/listed.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

enum StartFlags : int { kSynchronous = 1, kNoWait = 2 };

struct Start {
  PyEngine& e;
  Transfer* t;
  Op* op;
  bool good = true;

  Start(nb::pointer_and_handle<PyEngine> self, OpKind kind, int peer, uint32_t channel, double deadline)
      : e(*self.p), t(new_transfer(self.h.ptr(), self.p, kind, channel)), op(nullptr) {
    if (!t) throw nb::python_error();
    op = e.engine->new_op();
    op->kind = kind;
    op->peer = peer;
    op->channel = channel;
    op->cookie = t;
    op->link = 0;
    t->op = op;
    t->peer = peer;
    if (deadline >= 0) op->deadline_ns = e.engine->now() + static_cast<uint64_t>(deadline * 1e9) + 1;
  }

  // Nothing was submitted: takes everything back and raises the error that is set.
  [[noreturn]] void give_up() {
    e.engine->release(op);
    t->op = nullptr;
    t->outcome = Outcome::cancelled;
    Py_DECREF(t);
    throw nb::python_error();
  }

  void buffer(PyObject* object, bool writable) {
    if (!try_buffer(object, writable)) give_up();
  }

  // False: an error is set.
  bool try_buffer(PyObject* object, bool writable) {
    int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &t->view, flags) != 0) return false;
    t->has_view = true;
    if (t->view.format && std::strchr(t->view.format, 'O')) {
      PyErr_SetString(PyExc_TypeError,
                      "Python objects");  // as_buffer() says more, or finds that it is only a name
      return false;
    }
    op->data = static_cast<std::byte*>(t->view.buf);
    op->nbytes = op->capacity = static_cast<uint64_t>(t->view.len);
    t->nbytes = op->nbytes;
    return true;
  }

  // An array of the host or of a device. A tuple describes device memory, as aiocomm/_device.py makes it.
  void memory(PyObject* object, bool writable) {
    if (!e.engine->mover()) return buffer(object, writable);
    // CuPy's arrays have buffers that refuse: what has no buffer to give may still be device memory.
    if (PyObject_CheckBuffer(object)) {
      if (try_buffer(object, writable)) return;
      if (!describes_device_memory(object)) give_up();
      PyErr_Clear();
    }
    DeviceView view;
    Found found = PyTuple_CheckExact(object) ? Found::ask : read_interface(object, writable, view);
    if (found == Found::error) give_up();
    if (found == Found::view) {
      const nb::object shape = nb::steal(view.shape);
      t->keep = Py_NewRef(object);
      return device_memory(view);
    }
    PyObject* description = PyTuple_CheckExact(object)
                                ? Py_NewRef(object)
                                : PyObject_CallFunction(hooks.describe_device, "Oi", object, writable);
    if (!description) give_up();
    if (description == Py_None) {
      Py_DECREF(description);
      return buffer(object, writable);
    }
    t->keep = description;
    if (!read_description(description, view)) give_up();
    device_memory(view);
  }

  void device_memory(const DeviceView& view) {
    op->gpu = bind_device(*e.engine->mover(), view);
    if (!op->gpu) give_up();
    op->data = reinterpret_cast<std::byte*>(view.address);
    op->nbytes = op->capacity = view.nbytes;
    t->nbytes = view.nbytes;
    if (!encode_meta(*op, view.format, view.shape)) give_up();
  }

  // Two transfers that write one buffer would mix their bytes.
  void claim() {
    if (op->nbytes == 0) return;
    auto& busy = e.receiving;
    auto after = busy.lower_bound(op->data);
    bool clash = after != busy.end() && op->data + op->nbytes > after->first;
    if (!clash && after != busy.begin()) {
      auto before = std::prev(after);
      clash = before->first + before->second > op->data;
    }
    if (clash) {
      PyErr_SetString(PyExc_ValueError, "overlap");
      give_up();
    }
  }

  nb::object submit() {
    t->tag = op->tag;
    uint64_t written = op->allocate ? 0 : op->nbytes;
    const bool by_rows = op->rows != nullptr;  // its memory is shared with others
    PyObject* handle = reinterpret_cast<PyObject*>(t);
    Py_INCREF(handle);  // the engine's reference, until end_transfer
    if (!e.on_submit.empty()) report();
    const bool on_device = op->gpu != nullptr;
    bool ended = e.engine->submit(op);
    if (on_device && e.engine->issues()) {
      Py_BEGIN_ALLOW_THREADS  // the driver may have to wait for a thread that wants the GIL
          e.engine->issue();
      Py_END_ALLOW_THREADS
    }
    if (ended) {
      end_transfer(t);
    } else if ((op->kind == OpKind::recv || op->kind == OpKind::get) && written && !by_rows) {
      // The op may have ended on another thread, but is taken back only by drain(), on this one.
      e.receiving.emplace(op->data, written);
      t->tracked = true;
    }
    nb::object result = nb::steal(handle);
    e.after_submit();
    return result;
  }

  void report() {
    static const char* names[] = {"send", "recv", "put", "get"};
    auto observer = e.on_submit.find(op->gpu ? e.engine->executor_of(*op) : e.engine->likely_link(op->peer));
    if (observer == e.on_submit.end()) return;
    PyObject* callback = Py_NewRef(observer->second);  // which may end its own observation
    PyObject* r = PyObject_CallFunction(callback, "KsiOK", static_cast<unsigned long long>(op->id),
                                        names[static_cast<int>(op->kind)], op->peer, t->channel,
                                        static_cast<unsigned long long>(op->nbytes));
    if (!r) PyErr_WriteUnraisable(callback);
    Py_XDECREF(r);
    Py_DECREF(callback);
  }
};

using Self = nb::pointer_and_handle<PyEngine>;

nb::object send(Self self, nb::handle object, int dst, uint32_t channel, int64_t tag, double deadline,
                int flags) {
  Start start(self, OpKind::send, dst, channel, deadline);
  start.memory(object.ptr(), false);
  start.op->tag = tag;
  start.op->synchronous = flags & kSynchronous;
  start.op->no_wait = flags & kNoWait;
  if (!start.op->gpu) encode_meta(*start.op, start.t->view);
  return start.submit();
}

nb::object recv(Self self, nb::handle object, int src, uint32_t channel, int64_t tag, double deadline) {
  Start start(self, OpKind::recv, src, channel, deadline);
  start.op->tag = tag;
  if (object.is_none()) {
    start.op->allocate = true;
  } else {
    start.memory(object.ptr(), true);
    start.claim();
  }
  return start.submit();
}

nb::object recv_on(Self self, int src, uint32_t channel, int64_t tag, double deadline, int device) {
  Mover* mover = self.p->engine->mover();
  if (!mover) throw LinkFailure("no GPU can be used here: see `aiocomm doctor`", 0);
  std::unique_ptr<DeviceBuffer> buffer;
  {
    nb::gil_scoped_release release;
    buffer = mover->reserve(device);
  }
  Start start(self, OpKind::recv, src, channel, deadline);
  start.op->tag = tag;
  start.op->allocate = true;
  start.op->gpu = std::move(buffer);
  return start.submit();
}

void set_notification(Start& start, nb::handle notify) {
  if (notify.is_none()) return;
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(notify.ptr(), &data, &size) < 0) start.give_up();
  start.op->notify.assign(data, static_cast<size_t>(size));
  start.op->has_notify = true;
}

nb::object put(Self self, nb::handle object, int dst, uint32_t channel, uint64_t region, uint64_t offset,
               nb::object notify, double deadline) {
  Start start(self, OpKind::put, dst, channel, deadline);
  start.memory(object.ptr(), false);
  start.op->region = region;
  start.op->offset = offset;
  set_notification(start, notify);
  return start.submit();
}

nb::object get(Self self, nb::handle object, int src, uint32_t channel, uint64_t region, uint64_t offset,
               double deadline) {
  Start start(self, OpKind::get, src, channel, deadline);
  start.memory(object.ptr(), true);
  start.claim();
  start.op->region = region;
  start.op->offset = offset;
  return start.submit();
}

// A put or get of many ranges of host memory, as one message: see core/listed.hpp.
nb::object put_listed(Self self, nb::handle object, int dst, uint32_t channel, uint64_t region,
                      double deadline) {
  Start start(self, OpKind::put, dst, channel, deadline);
  start.buffer(object.ptr(), false);
  if (start.op->nbytes > kMostListed) {
    PyErr_SetString(PyExc_ValueError, "more than one message takes");
    start.give_up();
  }
  start.op->region = region;
  start.op->listed = true;
  return start.submit();
}

using Integers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object get_listed(Self self, nb::handle object, const Integers& list, int src, uint32_t channel,
                      uint64_t region, double deadline) {
  Start start(self, OpKind::get, src, channel, deadline);
  start.buffer(object.ptr(), true);
  start.claim();
  Op& op = *start.op;
  const std::span bytes(reinterpret_cast<const std::byte*>(list.data()), list.size() * sizeof(int64_t));
  if (list.size() > 2 * kMostInGet || op.nbytes > kMostListed || listed_bytes(bytes) != op.nbytes) {
    PyErr_SetString(PyExc_ValueError, "a list that makes no sense");
    start.give_up();
  }
  op.region = region;
  op.listed = true;
  op.list_bytes = static_cast<uint32_t>(bytes.size());
  op.own = std::make_unique_for_overwrite<std::byte[]>(bytes.size());
  std::memcpy(op.own.get(), bytes.data(), bytes.size());
  return start.submit();
}

// The memory of a list on a GPU: rows of it, which are close together in the message behind `list`, or without that.
void take_listed(Start& start, nb::tuple memory, const Integers& list, const Integers& near,
                 const Integers& nbytes, bool outgoing) {
  DeviceView view;
  Op& op = *start.op;
  start.t->keep = Py_NewRef(memory.ptr());
  if (!start.e.engine->mover() || near.size() != nbytes.size()) {
    PyErr_SetString(PyExc_ValueError, "no rows of GPU memory");
    start.give_up();
  }
  if (!read_description(memory.ptr(), view)) start.give_up();
  const uint64_t head = list.size() * sizeof(int64_t), before = outgoing ? head : 0;
  uint64_t total = 0;
  Packing packing(outgoing, before);
  for (size_t i = 0; i < near.size(); ++i) {
    const auto at = static_cast<uint64_t>(near.data()[i]), row = static_cast<uint64_t>(nbytes.data()[i]);
    if (at > view.nbytes || row > view.nbytes - at || row > kMostListed || total > kMostListed) {
      PyErr_SetString(PyExc_ValueError, "rows outside the memory, or more than one message takes");
      start.give_up();
    }
    packing.add(at, row);
    total += row;
  }
  if (before + total > kMostListed || (!outgoing && head > 2 * kMostInGet * sizeof(int64_t))) {
    PyErr_SetString(PyExc_ValueError, "more than one message takes");
    start.give_up();
  }
  start.device_memory(view);
  op.listed = true;
  op.rows = packing.take();
  op.nbytes = op.capacity = start.t->nbytes = before + total;
  op.list_bytes = static_cast<uint32_t>(head);
  op.own = std::make_unique_for_overwrite<std::byte[]>(head);
  std::memcpy(op.own.get(), list.data(), head);
}

nb::object put_listed_from(Self self, nb::tuple memory, const Integers& list, const Integers& near,
                           const Integers& nbytes, int dst, uint32_t channel, uint64_t region,
                           double deadline) {
  Start start(self, OpKind::put, dst, channel, deadline);
  take_listed(start, memory, list, near, nbytes, true);
  start.op->region = region;
  return start.submit();
}

nb::object get_listed_into(Self self, nb::tuple memory, const Integers& list, const Integers& near,
                           const Integers& nbytes, int src, uint32_t channel, uint64_t region,
                           double deadline) {
  Start start(self, OpKind::get, src, channel, deadline);
  take_listed(start, memory, list, near, nbytes, false);
  const std::span bytes(start.op->own.get(), start.op->list_bytes);
  if (listed_bytes(bytes) != start.op->nbytes) {
    PyErr_SetString(PyExc_ValueError, "a list that makes no sense");
    start.give_up();
  }
  start.op->region = region;
  return start.submit();
}

// Rows between memory of ours, a GPU's (described) or the host's, and a region: each side shifts its memory to where they
// begin there.
void take_rows(Start& start, nb::handle memory, bool outgoing, std::shared_ptr<PlacedRows> rows,
               uint64_t region, uint64_t offset) {
  Op& op = *start.op;
  const Cover &ours = outgoing ? rows->from : rows->to, &theirs = outgoing ? rows->to : rows->from;
  const bool on_device = PyTuple_CheckExact(memory.ptr());
  DeviceView view;
  if (on_device) {
    start.t->keep = Py_NewRef(memory.ptr());
    if (!start.e.engine->mover()) {
      PyErr_SetString(PyExc_ValueError, "rows of GPU memory");
      start.give_up();
    }
    if (!read_description(memory.ptr(), view)) start.give_up();
  } else {
    start.buffer(memory.ptr(), !outgoing);
  }
  if (ours.high > (on_device ? view.nbytes : op.nbytes)) {
    PyErr_SetString(PyExc_ValueError, "rows outside the memory");
    start.give_up();
  }
  if (on_device) {
    view.address += ours.low;
    view.nbytes = ours.high - ours.low;
    start.device_memory(view);
  } else {
    op.data += ours.low;
  }
  op.region = region;
  op.offset = offset + theirs.low;
  op.extent = ours.high - ours.low;
  op.reach = theirs.high - theirs.low;
  op.nbytes = op.capacity = start.t->nbytes = rows->list.nbytes();
  op.rows = std::shared_ptr<const RowList>(rows, &rows->list);
}

// (function, blocks, threads) of a kernel for rows without a common stride, or None.
void take_gather(Start& start, nb::handle how) {
  if (how.is_none()) return;
  unsigned long long function;
  unsigned blocks, threads;
  if (!PyArg_ParseTuple(how.ptr(), "KII", &function, &blocks, &threads)) start.give_up();
  if (!function || !blocks || threads < 32 || threads > 1024 || threads % 32) {
    PyErr_SetString(PyExc_ValueError, "no kernel that could be launched");
    start.give_up();
  }
  if (!start.op->gpu) {
    PyErr_SetString(PyExc_ValueError, "a kernel for host memory");
    start.give_up();
  }
  start.op->gpu->gather = std::make_unique<Gather>(Gather{function, blocks, threads});
}

nb::object put_rows(Self self, nb::handle memory, int dst, uint32_t channel, uint64_t region, uint64_t offset,
                    std::shared_ptr<PlacedRows> rows, nb::object notify, double deadline, nb::object gather) {
  Start start(self, OpKind::put, dst, channel, deadline);
  take_rows(start, memory, true, std::move(rows), region, offset);
  take_gather(start, gather);
  set_notification(start, notify);
  return start.submit();
}

nb::object get_rows(Self self, nb::handle memory, int src, uint32_t channel, uint64_t region, uint64_t offset,
                    std::shared_ptr<PlacedRows> rows, double deadline, nb::object gather) {
  Start start(self, OpKind::get, src, channel, deadline);
  take_rows(start, memory, false, std::move(rows), region, offset);
  take_gather(start, gather);
  return start.submit();
}

// The caller keeps what the tuple names until close_region says that it is free.
std::pair<uint64_t, uint64_t> add_device_region(PyEngine& e, nb::tuple description, bool writable) {
  if (!e.engine->mover()) throw LinkFailure("no GPU can be used here: see `aiocomm doctor`", 0);
  DeviceView view;
  if (!read_description(description.ptr(), view)) throw nb::python_error();
  std::unique_ptr<DeviceBuffer> gpu = bind_device(*e.engine->mover(), view);
  if (!gpu) throw nb::python_error();
  auto base = reinterpret_cast<std::byte*>(view.address);
  return {e.engine->add_region(base, view.nbytes, writable, std::move(gpu)), view.nbytes};
}

}  // namespace

void bind_operations(nb::class_<PyEngine>& engine) {
  engine.def("send", send)
      .def("recv", recv, nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg())
      .def("recv_on", recv_on)
      .def("put", put, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("get", get)
      .def("put_listed", put_listed)
      .def("get_listed", get_listed)
      .def("put_listed_from", put_listed_from)
      .def("get_listed_into", get_listed_into)
      .def("put_rows", put_rows, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg().none(), nb::arg(), nb::arg().none())
      .def("get_rows", get_rows, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg().none())
      .def(
          "add_region",
          [](PyEngine& e, nb::handle object, bool writable) {
            Py_buffer view;
            if (PyObject_GetBuffer(object.ptr(), &view,
                                   PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0)) != 0)
              throw nb::python_error();
            auto base = static_cast<std::byte*>(view.buf);
            auto nbytes = static_cast<uint64_t>(view.len);
            PyBuffer_Release(&view);  // the caller keeps the object until close_region says it is free
            return std::pair(e.engine->add_region(base, nbytes, writable), nbytes);
          },
          nb::arg("buffer"), nb::arg("writable"))
      .def(
          "check_device_memory",
          [](PyEngine& e, nb::tuple description) {
            DeviceView view;
            if (!e.engine->mover()) throw LinkFailure("no GPU can be used here: see `aiocomm doctor`", 0);
            if (!read_description(description.ptr(), view) || !bind_device(*e.engine->mover(), view))
              throw nb::python_error();
          },
          nb::arg("description"), "Refuses what no transfer could move.")
      .def("add_device_region", add_device_region, nb::arg("description"), nb::arg("writable"))
      .def(
          "close_region", [](PyEngine& e, uint64_t id) { return e.engine->close_region(id); },
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace aiocomm::py
