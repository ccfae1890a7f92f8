// The engine as Python sees it. The calls made per message take positional arguments only; aiocomm/communicator.py
// gives them their public form.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>

#include "bindings/device_py.hpp"
#include "bindings/transfer.hpp"
#include "core/segments.hpp"
#include "links/cuda/driver.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

// statistics_py.cpp
nb::dict counters(PyEngine& engine, const std::string& link);
// half_trip_py.cpp
void bind_half_trips(nb::class_<PyEngine>& engine);

PyEngine::~PyEngine() { clear(); }

int PyEngine::traverse(visitproc visit, void* arg) {
  for (PyObject* o : {loop, call_soon, ready, on_connect, on_events, on_unretrieved}) Py_VISIT(o);
  for (auto observers : {&on_submit, &on_complete})
    for (auto& [link, o] : *observers) Py_VISIT(o);
  return 0;
}

void PyEngine::clear() {
  for (PyObject** o : {&loop, &call_soon, &ready, &on_connect, &on_events, &on_unretrieved}) Py_CLEAR(*o);
  for (auto observers : {&on_submit, &on_complete}) {
    auto dropped = std::exchange(*observers, {});
    for (auto& [link, o] : dropped) Py_DECREF(o);
  }
}

bool PyEngine::deliver_events() {
  if (!engine->has_events() || !on_events) return true;
  if (engine->connect_wanted())
    for (Rank rank : engine->take_connect_wanted()) {
      PyObject* r = on_connect ? PyObject_CallFunction(on_connect, "i", rank) : Py_NewRef(Py_None);
      if (!r) return false;
      Py_DECREF(r);
    }
  auto events = engine->take_events();
  if (events.empty()) return true;
  PyObject* list = PyList_New(0);
  if (!list) return false;
  for (auto& event : events) {
    bool binary = event.kind == EngineEvent::Kind::notification;
    PyObject* tuple =
        Py_BuildValue(binary ? "(iiKy#s)" : "(iiKs#s)", static_cast<int>(event.kind), event.rank,
                      static_cast<unsigned long long>(event.number), event.text.data(),
                      static_cast<Py_ssize_t>(event.text.size()), event.more.c_str());
    bool added = tuple && PyList_Append(list, tuple) == 0;
    Py_XDECREF(tuple);
    if (!added) return Py_DECREF(list), false;
  }
  PyObject* r = PyObject_CallOneArg(on_events, list);
  Py_DECREF(list);
  Py_XDECREF(r);
  return r != nullptr;
}

int PyEngine::drain(int budget) {
  int done = 0;
  Op* op;
  while (done < budget && engine->take_completed(op)) {
    end_transfer(static_cast<Transfer*>(op->cookie));
    ++done;
  }
  if (done == budget && engine->has_completed())
    ring_fd(engine->loop_fd());  // let the loop breathe, then go on
  return deliver_events() ? done : -1;
}

// What a submission may have caused beside its own op.
bool PyEngine::after_submit() {
  if (engine->has_completed() || engine->has_events()) return drain(256) >= 0;
  return true;
}

namespace {

enum StartFlags : int { kSynchronous = 1, kNoWait = 2 };

struct Start {
  PyEngine& e;
  Transfer* t;
  Op* op;
  bool good = true;

  Start(nb::pointer_and_handle<PyEngine> self, OpKind kind, int peer, uint32_t channel, double deadline)
      : e(*self.p), t(new_transfer(self.h.ptr(), self.p, kind)), op(nullptr) {
    if (!t) throw nb::python_error();
    op = e.engine->new_op();
    op->kind = kind;
    op->peer = peer;
    op->channel = channel;
    op->cookie = t;
    op->link = 0;
    t->op = op;
    t->peer = peer;
    t->channel = channel;
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
    int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &t->view, flags) != 0) give_up();
    t->has_view = true;
    if (t->view.format && std::strchr(t->view.format, 'O')) {
      PyErr_SetString(PyExc_TypeError,
                      "Python objects");  // as_buffer() says more, or finds that it is only a name
      give_up();
    }
    op->data = static_cast<std::byte*>(t->view.buf);
    op->nbytes = op->capacity = static_cast<uint64_t>(t->view.len);
    t->nbytes = op->nbytes;
  }

  // An array of the host or of a device. A tuple describes device memory, as aiocomm/_device.py makes it.
  void memory(PyObject* object, bool writable) {
    if (PyObject_CheckBuffer(object) || !e.engine->mover()) return buffer(object, writable);
    DeviceView view;
    Found found = PyTuple_CheckExact(object) ? Found::ask : read_interface(object, writable, view);
    if (found == Found::error) give_up();
    if (found == Found::view) {
      t->keep = Py_NewRef(object);
      device_memory(view);
      Py_DECREF(view.shape);
      return;
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
    PyObject* array;
    unsigned long long address, nbytes, stream;
    if (!PyArg_ParseTuple(description, "OKKiKsO", &array, &address, &nbytes, &view.device, &stream,
                          &view.format, &view.shape))
      give_up();
    view.address = address, view.nbytes = nbytes, view.stream = stream;
    device_memory(view);
  }

  void device_memory(const DeviceView& view) {
    PyObject* refusal = nullptr;
    std::string reason;
    int code = 0;
    Py_BEGIN_ALLOW_THREADS  // the driver may have to wait for a thread that wants the GIL
        try {
      op->gpu = e.engine->mover()->bind(view.address, view.nbytes, view.device, view.stream);
    } catch (const LinkFailure& failure) {
      refusal = hooks.link_error, reason = failure.what(), code = failure.code;
    } catch (const std::exception& usage) {
      refusal = hooks.usage_error, reason = usage.what();
    }
    Py_END_ALLOW_THREADS if (refusal) {
      nb::object args = refusal == hooks.link_error ? nb::object(nb::make_tuple(reason, code))
                                                    : nb::object(nb::make_tuple(reason));
      PyErr_SetObject(refusal, args.ptr());
      give_up();
    }
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
    PyObject* handle = reinterpret_cast<PyObject*>(t);
    Py_INCREF(handle);  // the engine's reference, until end_transfer
    if (!e.on_submit.empty()) report();
    bool ended = e.engine->submit(op);
    if (ended) {
      end_transfer(t);
    } else if ((op->kind == OpKind::recv || op->kind == OpKind::get) && written) {
      // The op may have ended on another thread, but is taken back only by drain(), on this one.
      e.receiving.emplace(op->data, written);
      t->tracked = true;
    }
    nb::object result = nb::steal(handle);
    if (!e.after_submit()) throw nb::python_error();
    return result;
  }

  void report() {
    static const char* names[] = {"send", "recv", "put", "get"};
    auto observer = e.on_submit.find(op->gpu ? e.engine->executor_of(*op) : e.engine->likely_link(op->peer));
    if (observer == e.on_submit.end()) return;
    PyObject* r = PyObject_CallFunction(
        observer->second, "KsisK", static_cast<unsigned long long>(op->id), names[static_cast<int>(op->kind)],
        op->peer, e.engine->channel(op->channel).name.c_str(), static_cast<unsigned long long>(op->nbytes));
    if (!r) PyErr_WriteUnraisable(observer->second);
    Py_XDECREF(r);
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

nb::object put(Self self, nb::handle object, int dst, uint32_t channel, uint64_t region, uint64_t offset,
               nb::object notify, double deadline) {
  Start start(self, OpKind::put, dst, channel, deadline);
  start.buffer(object.ptr(), false);
  start.op->region = region;
  start.op->offset = offset;
  if (!notify.is_none()) {
    char* data;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(notify.ptr(), &data, &size) < 0) start.give_up();
    start.op->notify.assign(data, static_cast<size_t>(size));
    start.op->has_notify = true;
  }
  return start.submit();
}

nb::object get(Self self, nb::handle object, int src, uint32_t channel, uint64_t region, uint64_t offset,
               double deadline) {
  Start start(self, OpKind::get, src, channel, deadline);
  start.buffer(object.ptr(), true);
  start.claim();
  start.op->region = region;
  start.op->offset = offset;
  return start.submit();
}

int drain_after(PyEngine& e, int budget, bool rung) {
  {
    nb::gil_scoped_release release;
    e.engine->progress(rung);
  }
  int done = e.drain(budget);
  if (done < 0) throw nb::python_error();
  return done;
}

int drain(PyEngine& e, int budget) { return drain_after(e, budget, true); }

// For the descriptor of messages from other hosts: the doorbell has not rung for them.
int drain_express(PyEngine& e) { return drain_after(e, 256, false); }

// For loops with a selector of ours: spins, then says whether there is something to run.
bool spin(PyEngine& e, double seconds) {
  bool found;
  {
    nb::gil_scoped_release release;
    found = e.engine->has_completed() || e.engine->has_events() ||
            e.engine->spin(e.engine->now() + static_cast<uint64_t>(seconds * 1e9));
  }
  if (found && e.drain(256) < 0) throw nb::python_error();
  return found;
}

bool prepare_to_sleep(PyEngine& e) {
  bool found;
  {
    nb::gil_scoped_release release;
    e.engine->loop_sleeps();
    found = e.engine->anything_to_poll() || e.engine->has_completed() || e.engine->has_events();
  }
  if (found && e.drain(256) < 0) throw nb::python_error();
  return found;
}

void woken(PyEngine& e) {
  e.slept_ns = e.engine->now();
  e.engine->loop_wakes();
}

template <PyObject* PyEngine::* Member>
void set_hook(PyEngine& e, nb::object value) {
  Py_XSETREF(e.*Member, value.is_none() ? nullptr : value.release().ptr());
}

void observe(PyEngine& e, std::map<uint8_t, PyObject*>& observers, const std::string& link,
             nb::object callback) {
  uint8_t index = e.engine->link_index(link);
  PyObject* old = nullptr;
  if (auto it = observers.find(index); it != observers.end()) {
    old = it->second;
    observers.erase(it);
  }
  if (!callback.is_none()) observers[index] = callback.release().ptr();
  Py_XDECREF(old);
}

// Transfers whose bytes this process still owes to others.
nb::list outgoing(PyEngine& e) {
  nb::list out;
  for (Op* op : e.engine->outgoing()) out.append(nb::borrow(static_cast<PyObject*>(op->cookie)));
  return out;
}

int tp_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<PyEngine>(self)->traverse(visit, arg) : 0;
}

int tp_clear(PyObject* self) {
  nb::inst_ptr<PyEngine>(self)->clear();
  return 0;
}

PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(tp_traverse)},
                       {Py_tp_clear, reinterpret_cast<void*>(tp_clear)},
                       {0, nullptr}};

}  // namespace

void bind_engine(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const LinkFailure& failure) {
      nb::object args = nb::make_tuple(failure.what(), failure.code);
      PyErr_SetObject(hooks.link_error ? hooks.link_error : PyExc_OSError, args.ptr());
    }
  });

  m.def(
      "install_hooks",
      [](nb::object make_error, nb::object make_array, nb::object trio_wait, nb::object cancelled,
         nb::object link_error, nb::object usage_error, nb::object describe_device,
         nb::object make_device_array) {
        hooks.make_error = make_error.release().ptr();
        hooks.make_array = make_array.release().ptr();
        hooks.trio_wait = trio_wait.release().ptr();
        hooks.cancelled_error = cancelled.release().ptr();
        hooks.link_error = link_error.release().ptr();
        hooks.usage_error = usage_error.release().ptr();
        hooks.make_device_array = make_device_array.release().ptr();
        hooks.describe_device = describe_device.release().ptr();
      },
      "make_error"_a, "make_array"_a, "trio_wait"_a, "cancelled_error"_a, "link_error"_a, "usage_error"_a,
      "describe_device"_a, "make_device_array"_a);
  m.def(
      "available_links",
      [] {
        std::vector<std::string> names;
        for (const auto& entry : link_registry()) names.push_back(entry.name);
        return names;
      },
      "Names of the links that were built in, cheapest first.");
  m.def(
      "describe_device_error", [](int code) { return cuda::Driver::of_process().describe(code); }, "code"_a,
      "Name, number and text of an error of the CUDA driver.");
  m.def(
      "allocate_shared",
      [](uint64_t nbytes) {
        auto segment = Segments::of_process().allocate(nbytes);
        PyObject* memory = new_segment_memory(segment->base, segment->nbytes);
        if (!memory) throw nb::python_error();
        return nb::steal(memory);
      },
      "nbytes"_a, "Memory in a shared segment that peers on this host can map.");

  using release_gil = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<PyEngine> engine(m, "Engine", nb::type_slots(slots), "Native engine of one communicator.");
  bind_half_trips(engine);
  engine
      .def(
          "__init__",
          [](PyEngine* self, std::vector<std::string> links, std::map<std::string, double> numbers,
             std::map<std::string, std::string> texts) {
            new (self) PyEngine(EngineConfig{std::move(links), std::move(numbers), std::move(texts)});
          },
          "links"_a, "numbers"_a, "texts"_a)
      .def("send", send)
      .def("recv", recv, nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg())
      .def("recv_on", recv_on)
      .def("put", put, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("get", get)
      .def("drain", drain, "budget"_a = 256)
      .def("drain_express", drain_express)
      .def("spin", spin, "seconds"_a)
      .def("prepare_to_sleep", prepare_to_sleep)
      .def("woken", woken)
      .def(
          "bind_asyncio",
          [](PyEngine& e, nb::object loop, nb::object ready, double spin_s) {
            Py_XSETREF(e.call_soon, nb::object(loop.attr("call_soon")).release().ptr());
            Py_XSETREF(e.ready, ready.is_none() ? nullptr : ready.release().ptr());
            Py_XSETREF(e.loop, loop.release().ptr());
            e.spin_ns = static_cast<uint64_t>(spin_s * 1e9);
          },
          "loop"_a, "ready"_a.none(), "spin_s"_a)
      .def("bind_trio", [](PyEngine& e) { e.trio = true; })
      .def("on_connect_wanted", set_hook<&PyEngine::on_connect>, "callback"_a.none())
      .def("on_events", set_hook<&PyEngine::on_events>, "callback"_a.none())
      .def("on_unretrieved", set_hook<&PyEngine::on_unretrieved>, "callback"_a.none())
      .def(
          "on_submit",
          [](PyEngine& e, const std::string& link, nb::object callback) {
            observe(e, e.on_submit, link, std::move(callback));
          },
          "link"_a, "callback"_a.none())
      .def(
          "on_complete",
          [](PyEngine& e, const std::string& link, nb::object callback) {
            observe(e, e.on_complete, link, std::move(callback));
          },
          "link"_a, "callback"_a.none())
      .def("outgoing", outgoing)
      .def("link_of", [](PyEngine& e, int rank) { return e.engine->link_of(rank); })
      .def("rank_known", [](PyEngine& e, int rank) { return e.engine->rank_known(rank); })
      .def(
          "open_channel",
          [](PyEngine& e, const std::string& name, int cls, double weight) {
            return e.engine->open_channel(name, static_cast<uint8_t>(cls), weight);
          },
          "name"_a, "cls"_a, "weight"_a, release_gil())
      .def(
          "close_channel", [](PyEngine& e, uint32_t index) { e.engine->close_channel(index); }, release_gil())
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
          "buffer"_a, "writable"_a)
      .def(
          "close_region", [](PyEngine& e, uint64_t id) { return e.engine->close_region(id); }, release_gil())
      .def(
          "set_identity",
          [](PyEngine& e, int rank, uint64_t generation) {
            e.engine->set_identity(rank, generation);
            e.engine->add_peer(rank, generation);
            e.engine->attach(rank, generation, "self", {}, "", true);
            e.engine->start_pair(rank, generation);
          },
          release_gil())
      .def("has_mover", [](PyEngine& e) { return e.engine->mover() != nullptr; })
      .def("devices", [](PyEngine& e) { return e.engine->mover() ? e.engine->mover()->devices() : 0; })
      .def("link_names", [](PyEngine& e) { return e.engine->link_names(); })
      .def("link_streams",
           [](PyEngine& e, const std::string& link) {
             StreamNeed need = e.engine->link(link).streams();
             return std::pair(need.kind, need.count);
           })
      .def("link_card",
           [](PyEngine& e, const std::string& link) {
             std::string card = e.engine->link(link).card();
             return nb::bytes(card.data(), card.size());
           })
      .def(
          "add_peer",
          [](PyEngine& e, int rank, uint64_t generation) { e.engine->add_peer(rank, generation); },
          release_gil())
      .def("attach",
           [](PyEngine& e, int rank, uint64_t generation, const std::string& link, std::vector<int> fds,
              nb::bytes card, bool initiator) {
             std::string bytes(card.c_str(), card.size());
             nb::gil_scoped_release release;
             e.engine->attach(rank, generation, link, fds, bytes, initiator);
           })
      .def(
          "start_pair",
          [](PyEngine& e, int rank, uint64_t generation) { e.engine->start_pair(rank, generation); },
          release_gil())
      .def(
          "detach", [](PyEngine& e, int rank, uint64_t generation) { e.engine->detach(rank, generation); },
          release_gil())
      .def(
          "pair_state",
          [](PyEngine& e, int rank, uint64_t generation) { return e.engine->pair_state(rank, generation); },
          release_gil())
      .def(
          "fail_connect",
          [](PyEngine& e, int rank, const std::string& reason) { e.engine->fail_connect(rank, reason); },
          release_gil())
      .def(
          "lose_peer",
          [](PyEngine& e, int rank, uint64_t generation, const std::string& reason) {
            e.engine->lose_peer(rank, generation, reason);
          },
          release_gil())
      .def(
          "leave_peer",
          [](PyEngine& e, int rank, uint64_t generation) { e.engine->leave_peer(rank, generation); },
          release_gil())
      .def(
          "close", [](PyEngine& e) { e.engine->close(); }, release_gil())
      .def("release_descriptors", [](PyEngine& e) { e.engine->release_descriptors(); })
      .def("counters", counters)
      .def("gauges", [](PyEngine& e, const std::string& link) { return e.engine->gauges(link); })
      .def("served_by_channel",
           [](PyEngine& e, const std::string& link) { return e.engine->served_by_channel(link); })
      .def_prop_ro("loop_fd", [](PyEngine& e) { return e.engine->loop_fd(); })
      .def_prop_ro("express_fd", [](PyEngine& e) { return e.engine->express_fd(); });
}

}  // namespace aiocomm::py
