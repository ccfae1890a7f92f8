// Collectives that repeat: numbered, found by what they are given, and made through an arena, by one call into here.
//
// A call is found by its operation, the types and sizes of its arrays (NumPy's, or on a GPU), and two arguments more.
// Everything else (other arrays and options, a scope with calls under way) is Python's: aiocomm/collectives/collecting.py.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <functional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "bindings/collected.hpp"
#include "bindings/device_call_py.hpp"
#include "bindings/device_py.hpp"
#include "bindings/shared_call_py.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace aiocomm::py {

namespace {

// Python's objects are compared by identity: names and types are the same objects for ever, other numbers are not found.
struct Key {
  PyObject *operation, *extra, *option;
  const void *out_type = nullptr, *given_type = nullptr;  // null: there is no array
  Py_ssize_t out_bytes = 0, given_bytes = 0;
  int64_t inside = kApart;  // where in `out` the other begins, in bytes
  static constexpr int64_t kApart = INT64_MIN;
  bool operator==(const Key&) const = default;
};

struct Hash {
  size_t operator()(const Key& key) const {
    size_t hash = 0;
    auto mix = [&](size_t value) { hash = (hash ^ value) * 0x9e3779b97f4a7c15ull; };
    mix(reinterpret_cast<size_t>(key.operation));
    mix(reinterpret_cast<size_t>(key.extra));
    mix(reinterpret_cast<size_t>(key.option));
    mix(static_cast<size_t>(key.inside));
    mix(reinterpret_cast<size_t>(key.out_type));
    mix(static_cast<size_t>(key.out_bytes));
    mix(reinterpret_cast<size_t>(key.given_type));
    mix(static_cast<size_t>(key.given_bytes));
    return hash ^ hash >> 32;
  }
};

class Repeats {
 public:
  // `here`: whether the caller is on the loop that owns the engine. `calls`, `failed`: those under way, and those that
  // others have given up. `counts`: calls by the way they went.
  Repeats(PyEngine& engine, nb::object here, nb::object calls, nb::object failed, nb::object counts)
      : engine_(&engine),
        here_(std::move(here)),
        calls_(nb::cast<nb::dict>(calls)),
        failed_(nb::cast<nb::dict>(failed)),
        counts_(nb::cast<nb::dict>(counts)),
        array_(nb::module_::import_("numpy").attr("ndarray")),
        dtype_(nb::str("dtype")),
        nbytes_(nb::str("nbytes")) {}

  uint64_t take() { return next_++; }
  uint64_t last() const { return next_ - 1; }

  int attempt(nb::handle operation, nb::handle out, nb::handle given, nb::handle extra, nb::handle option,
              nb::handle channel, nb::handle deadline, nb::handle stream) {
    if (found_.empty() || !channel.is_none() || !deadline.is_none() || !stream.is_none() ||
        PyDict_GET_SIZE(calls_.ptr()) || PyDict_GET_SIZE(failed_.ptr()))
      return kNotBegun;
    Key key{operation.ptr(), extra.ptr(), option.ptr()};
    Arrays arrays;
    if (!describe(out, given, key, arrays)) return kNotBegun;
    auto it = found_.find(key);
    if (it == found_.end() || !nb::cast<bool>(here_())) return kNotBegun;
    Entry& entry = it->second;
    int outcome;
    int way = 0;
    if (entry.on_device) {
      outcome = entry.on_device->attempt(*engine_, take(), arrays.given, arrays.out);
    } else {
      outcome = entry.call->attempt(*engine_, take(), given, out);
      way = entry.call->way();
    }
    if (outcome == kDone || outcome == kDoneTurn) count(nb::borrow<nb::str>(entry.names[way]));
    return outcome;
  }

  void add(nb::str operation, nb::object out, nb::object given, nb::object extra, nb::object call,
           nb::tuple names, nb::object option) {
    Key key{operation.ptr(), extra.ptr(), option.ptr()};
    Arrays arrays;
    if (!describe(out, given, key, arrays)) return;
    DeviceCall* on_device = nullptr;
    PySharedCall* host = nullptr;
    if (!nb::try_cast(call, on_device)) host = nb::cast<PySharedCall*>(call);
    nb::list types;  // of NumPy; those on GPUs are kept for ever
    for (const nb::object& array : {out, given})
      if (is_plain(array)) types.append(array.attr("dtype"));
    found_.insert_or_assign(
        key, Entry{host, on_device, std::move(names), nb::make_tuple(operation, extra, option, types, call)});
  }

  void clear() { found_.clear(); }

  int traverse(visitproc visit, void* arg) {
    for (const nb::object* one : {&here_, static_cast<nb::object*>(&calls_),
                                  static_cast<nb::object*>(&failed_), static_cast<nb::object*>(&counts_)})
      Py_VISIT(one->ptr());
    for (auto& [key, entry] : found_) Py_VISIT(entry.keeps.ptr());
    return 0;
  }
  void forget() {
    found_.clear();
    here_ = nb::none();
    calls_ = failed_ = counts_ = nb::dict();
  }

 private:
  struct Entry {
    PySharedCall* call;
    DeviceCall* on_device;  // instead
    nb::tuple names;
    nb::object keeps;  // what the key and the call are
  };

  bool is_plain(nb::handle array) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(array.ptr())) == array_.ptr();
  }

  struct Arrays {
    DeviceLent out, given;
  };

  // False: they are neither NumPy's nor on GPUs, or cannot be used as they are.
  bool describe(nb::handle out, nb::handle given, Key& key, Arrays& arrays) {
    if ((out.is_none() || is_plain(out)) && (given.is_none() || is_plain(given))) {
      describe(out, key.out_type, key.out_bytes);
      describe(given, key.given_type, key.given_bytes);
      return true;
    }
    if (!engine_->engine->mover() || !on_device(out, true, key.out_type, key.out_bytes, arrays.out) ||
        !on_device(given, false, key.given_type, key.given_bytes, arrays.given))
      return false;
    if (arrays.out.owner.is_valid() && arrays.given.owner.is_valid()) {
      const auto start = static_cast<int64_t>(arrays.given.view.address - arrays.out.view.address);
      if (-key.given_bytes < start && start < key.out_bytes) key.inside = start, arrays.given = {};
    }
    return true;
  }

  void describe(nb::handle array, const void*& type, Py_ssize_t& nbytes) const {
    if (array.is_none()) return;
    nb::object found = nb::steal(PyObject_GetAttr(array.ptr(), dtype_.ptr()));
    nb::object size = nb::steal(PyObject_GetAttr(array.ptr(), nbytes_.ptr()));
    if (!found.is_valid() || !size.is_valid()) nb::raise_python_error();
    type = found.ptr();  // the array keeps it
    nbytes = PyLong_AsSsize_t(size.ptr());
  }

  // What is wrong with an array is told by the call as it is made the first time.
  bool on_device(nb::handle array, bool writable, const void*& type, Py_ssize_t& nbytes, DeviceLent& lent) {
    if (array.is_none()) return true;
    Found found = read_interface(array.ptr(), writable, lent.view);
    lent.owner = nb::borrow(array);
    if (found == Found::view) {
      Py_CLEAR(lent.view.shape);
    } else {
      PyErr_Clear();
      if (found != Found::ask) return false;
      lent.owner = nb::steal(
          PyObject_CallFunction(hooks.describe_device, "Oi", array.ptr(), static_cast<int>(writable)));
      if (!lent.owner.is_valid() || lent.owner.is_none() || !read_description(lent.owner.ptr(), lent.view)) {
        PyErr_Clear();
        return false;
      }
    }
    type = &*formats_.emplace(lent.view.format).first;
    nbytes = static_cast<Py_ssize_t>(lent.view.nbytes);
    return true;
  }

  void count(const nb::str& name) {
    PyObject* before = PyDict_GetItemWithError(counts_.ptr(), name.ptr());
    if (!before && PyErr_Occurred()) nb::raise_python_error();
    nb::object now = nb::steal(PyLong_FromLongLong(1 + (before ? PyLong_AsLongLong(before) : 0)));
    if (!now.is_valid() || PyDict_SetItem(counts_.ptr(), name.ptr(), now.ptr())) nb::raise_python_error();
  }

  PyEngine* const engine_;  // the communicator's, which has this
  nb::object here_;
  nb::dict calls_, failed_, counts_;
  const nb::object array_;
  const nb::str dtype_, nbytes_;
  uint64_t next_ = 1;
  std::unordered_map<Key, Entry, Hash> found_;
  std::unordered_set<std::string> formats_;  // of elements on GPUs
};

}  // namespace

void bind_repeats(nb::module_& m) {
  nb::class_<Repeats>(m, "Repeats", nb::type_slots(collected<Repeats>),
                      "Numbered calls of one scope, and those that repeat.")
      .def(nb::init<PyEngine&, nb::object, nb::object, nb::object, nb::object>(), "engine"_a, "here"_a,
           "calls"_a, "failed"_a, "counts"_a)
      .def("take", &Repeats::take, "Number a call.")
      .def_prop_ro("last", &Repeats::last, "The number of the last call.")
      .def("attempt", &Repeats::attempt, "operation"_a, "out"_a.none(), "given"_a.none(), "extra"_a.none(),
           "option"_a.none(), "channel"_a.none(), "deadline"_a.none(), "stream"_a.none(),
           "Number and do a call, if it is one that repeats. -1: nothing was begun; else as "
           "`SharedCall.attempt`.")
      .def(
          "add", &Repeats::add, "operation"_a, "out"_a.none(), "given"_a.none(), "extra"_a.none(), "call"_a,
          "names"_a, "option"_a = nb::none(),
          "Keep a call for others with such arrays, and the names that it is counted by: one for each `way`.")
      .def("clear", &Repeats::clear, "Keep none.");
}

}  // namespace aiocomm::py
