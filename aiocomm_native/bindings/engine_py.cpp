// The engine as Python sees it; aiocomm/communicator.py gives its calls their public form.

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/collected.hpp"
#include "bindings/spinner.hpp"
#include "bindings/transfer.hpp"
#include "core/clock.hpp"
#include "core/segments.hpp"
#include "links/cuda/driver.hpp"
#include "links/tcp/tls.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

// operations_py.cpp
void bind_kernels(nb::class_<PyEngine>& engine);
void bind_operations(nb::class_<PyEngine>& engine);
// statistics_py.cpp
nb::dict counters(PyEngine& engine, const std::string& link);
// spin_py.cpp
void bind_spinner(nb::module_& m);
// half_trip_py.cpp
void bind_half_trips(nb::class_<PyEngine>& engine);

template <class F>
static auto without_lock(F&& f) {
  nb::gil_scoped_release released;
  return f();
}

PyEngine::~PyEngine() {
  if (spinner) spinner->discard(*this);
  forget();
}

int PyEngine::traverse(visitproc visit, void* arg) {
  for (PyObject* o : {loop, call_soon, ready, bells, on_connect, on_events, on_unretrieved}) Py_VISIT(o);
  for (auto observers : {&on_submit, &on_complete})
    for (auto& [link, o] : *observers) Py_VISIT(o);
  return 0;
}

void PyEngine::forget() {
  for (PyObject** o : {&loop, &call_soon, &ready, &bells, &on_connect, &on_events, &on_unretrieved})
    Py_CLEAR(*o);
  for (auto observers : {&on_submit, &on_complete}) {
    auto dropped = std::exchange(*observers, {});
    for (auto& [link, o] : dropped) Py_DECREF(o);
  }
  for (auto& [id, name] : std::exchange(channel_names, {})) Py_DECREF(name);
}

void PyEngine::lives_here() { thread_.store(PyThread_get_thread_ident(), std::memory_order_relaxed); }

bool PyEngine::is_here() {
  if (thread_.load(std::memory_order_relaxed) == PyThread_get_thread_ident()) return true;
  if (!loop) return false;  // trio's stays where it was begun
  if (!nb::cast<bool>(nb::handle(loop).attr("is_running")())) return true;
  if (!nb::module_::import_("asyncio").attr("_get_running_loop")().is(loop)) return false;
  lives_here();
  return true;
}

void PyEngine::name_channel(uint32_t id, const std::string& name) {
  PyObject*& known = channel_names[id];
  if (!known && !(known = PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size())))) {
    channel_names.erase(id);
    throw nb::python_error();
  }
}

PyObject* PyEngine::name_of_channel(uint32_t id) {
  if (auto it = channel_names.find(id); it != channel_names.end()) return Py_NewRef(it->second);
  const std::string name = engine->name_of_channel(id);  // closed, and maybe not forgotten
  PyObject* made = PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size()));
  if (made) return made;
  PyErr_Clear();
  return Py_NewRef(Py_None);
}

void PyEngine::deliver_events() {
  if (!engine->has_events() || !on_events) return;
  // What is taken is told, whatever one of them makes of it: nobody else knows of the rest.
  auto tell = [](PyObject* hook, PyObject* what) {
    PyObject* r = what ? PyObject_CallOneArg(hook, what) : nullptr;
    if (!r) PyErr_WriteUnraisable(hook);
    Py_XDECREF(r);
    Py_XDECREF(what);
  };
  const nb::object connects = nb::borrow(on_connect),
                   hears = nb::borrow(on_events);  // which may take them back
  if (engine->connect_wanted())
    for (Rank rank : engine->take_connect_wanted())
      if (connects) tell(connects.ptr(), PyLong_FromLong(rank));
  for (auto& event : engine->take_events()) {
    bool binary = event.kind == EngineEvent::Kind::notification;
    PyObject* tuple =
        Py_BuildValue(binary ? "(iiKy#s)" : "(iiKs#s)", static_cast<int>(event.kind), event.rank,
                      static_cast<unsigned long long>(event.number), event.text.data(),
                      static_cast<Py_ssize_t>(event.text.size()), event.more.c_str());
    tell(hears.ptr(), tuple);
  }
}

int PyEngine::drain(int budget) {
  int done = 0;
  Op* op;
  while (done < budget && engine->take_completed(op)) {
    if (SilentOp* silent = silent_of(op))
      silent->ended = true;
    else
      end_transfer(static_cast<Transfer*>(op->cookie));
    ++done;
  }
  if (done == budget && engine->has_completed())
    ring_fd(engine->loop_fd());  // let the loop breathe, then go on
  deliver_events();
  return done;
}

// What a submission may have caused beside its own op.
void PyEngine::after_submit() {
  if (!engine->has_completed() && !engine->has_events()) return;
  ended_outside = true;
  drain(256);
}

namespace {

int drain_after(PyEngine& e, int budget, bool rung) {
  {
    nb::gil_scoped_release release;
    // Where operations have ended in between, the tasks that awaited them may be next in the loop.
    e.engine->progress(rung, !e.ended_outside);
  }
  int done = e.drain(budget);
  e.ended_outside = false;
  if (done < 0) throw nb::python_error();
  return done;
}

int drain(PyEngine& e, int budget) { return drain_after(e, budget, true); }

// For the descriptor of messages from other hosts: the doorbell has not rung for them.
int drain_express(PyEngine& e) { return drain_after(e, 256, false); }

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
  for (Op* op : e.engine->outgoing())
    if (!silent_of(op)) out.append(nb::borrow(static_cast<PyObject*>(op->cookie)));
  return out;
}

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
      [](nb::object make_error, nb::object make_array, nb::object trio_wait, nb::object iterate,
         nb::object cancelled, nb::object link_error, nb::object usage_error, nb::object describe_device,
         nb::object make_device_array) {
        hooks.make_error = make_error.release().ptr();
        hooks.make_array = make_array.release().ptr();
        hooks.trio_wait = trio_wait.release().ptr();
        hooks.iterate = iterate.release().ptr();
        hooks.cancelled_error = cancelled.release().ptr();
        hooks.link_error = link_error.release().ptr();
        hooks.usage_error = usage_error.release().ptr();
        hooks.make_device_array = make_device_array.release().ptr();
        hooks.describe_device = describe_device.release().ptr();
      },
      "make_error"_a, "make_array"_a, "trio_wait"_a, "iterate"_a, "cancelled_error"_a, "link_error"_a,
      "usage_error"_a, "describe_device"_a, "make_device_array"_a);
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
      "check_tls",
      [](std::string certificate, std::string key, std::string authorities) {
        tcp::TlsContext::load({std::move(certificate), std::move(key), std::move(authorities)});
      },
      "certificate"_a, "key"_a, "authorities"_a,
      "Read files as the tcp link will. `LinkError` says what cannot be used, and begins with its setting.");
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
  nb::class_<PyEngine> engine(m, "Engine", nb::type_slots(collected<PyEngine>),
                              "Native engine of one communicator.");
  bind_kernels(engine);
  bind_operations(engine);
  bind_half_trips(engine);
  bind_spinner(m);
  engine
      .def(
          "__init__",
          [](PyEngine* self, std::vector<std::string> links, std::map<std::string, double> numbers,
             std::map<std::string, std::string> texts) {
            new (self) PyEngine(EngineConfig{std::move(links), std::move(numbers), std::move(texts)});
          },
          "links"_a, "numbers"_a, "texts"_a)
      .def("drain", drain, "budget"_a = 256)
      .def(
          "begin_submitted",
          [](PyEngine& e) {
            {
              nb::gil_scoped_release release;
              e.engine->begin_submitted();
            }
            e.drain(256);
          },
          "Have what was submitted begin, and take what has ended.")
      .def("drain_express", drain_express)
      .def(
          "turn_due",
          [](PyEngine& e, bool had, double seconds) {
            if (!had) return e.turns->due(now_ns(), static_cast<uint64_t>(seconds * 1e9));
            e.turns->had(now_ns());
            return false;
          },
          "had"_a, "seconds"_a,
          "Whether a call that has ended is to let other tasks run now, which have not for that long. `had`: "
          "they "
          "did meanwhile.")
      .def(
          "bind_asyncio",
          [](PyEngine& e, nb::object loop, nb::object ready, nb::tuple bells) {
            Py_XSETREF(e.call_soon, nb::object(loop.attr("call_soon")).release().ptr());
            Py_XSETREF(e.ready, ready.is_none() ? nullptr : ready.release().ptr());
            Py_XSETREF(e.bells, bells.release().ptr());
            Py_XSETREF(e.loop, loop.release().ptr());
            e.lives_here();
          },
          "loop"_a, "ready"_a.none(), "bells"_a = nb::make_tuple())
      .def("bind_trio",
           [](PyEngine& e) {
             e.trio = true;
             e.lives_here();
           })
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
      .def("takes_rows", [](PyEngine& e, int rank) { return e.engine->takes_rows(rank); })
      .def("process_of", [](PyEngine& e, int rank) { return e.engine->process_of(rank); })
      .def(
          "open_channel",
          [](PyEngine& e, const std::string& name, int cls, double weight) {
            const uint32_t id =
                without_lock([&] { return e.engine->open_channel(name, static_cast<uint8_t>(cls), weight); });
            e.name_channel(id, name);
            return id;
          },
          "name"_a, "cls"_a, "weight"_a)
      .def(
          "close_channel",
          [](PyEngine& e, uint32_t index, bool for_good) {
            if (auto name = e.channel_names.extract(index)) Py_DECREF(name.mapped());
            without_lock([&] { e.engine->close_channel(index, for_good); });
          },
          "index"_a, "for_good"_a = false)
      .def(
          "drop_below",
          [](PyEngine& e, uint32_t index, Tag tag) {
            without_lock([&] { e.engine->drop_below(index, tag); });
          },
          "index"_a, "tag"_a)
      .def(
          "set_identity",
          [](PyEngine& e, int rank, uint64_t generation) {
            e.engine->set_identity(rank, generation);
            e.engine->add_peer(rank, generation);
            e.engine->attach(rank, generation, "self", {}, "", true);
            e.engine->start_pair(rank, generation);
          },
          release_gil())
      .def(
          "set_open", [](PyEngine& e, bool open) { e.engine->set_open(open); }, release_gil())
      .def("has_mover", [](PyEngine& e) { return e.engine->mover() != nullptr; })
      .def(
          "devices",
          [](PyEngine& e) {
            if (e.engine->mover()) return e.engine->mover()->devices();
            const cuda::Driver& driver = cuda::Driver::of_process();
            throw LinkFailure(
                driver.usable() ? "no GPU is shown to this process: see `aiocomm doctor`" : driver.refusal,
                driver.error);
          },
          "GPUs that can be used. `LinkError` says why none can.")
      .def("link_names", [](PyEngine& e) { return e.engine->link_names(); })
      .def(
          "left_out",
          [](PyEngine& e, const std::string& link) {
            std::vector<std::pair<std::string, std::string>> devices;
            for (const LeftOut& one : e.engine->link(link).left_out())
              devices.emplace_back(one.name, one.reason);
            return devices;
          },
          "link"_a, "Devices of this machine that a link does without, each with why.")
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
