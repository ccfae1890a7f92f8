// Kernels as Python launches them: over memory of ours and of peers, who have told where theirs is.

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/device_py.hpp"
#include "bindings/looking.hpp"
#include "bindings/schedule.hpp"
#include "bindings/transfer.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/reaper.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

using Self = nb::pointer_and_handle<PyEngine>;
using FarTuple = std::tuple<int, nb::bytes, uint64_t, uint64_t, uint64_t, uint64_t>;

std::unique_ptr<DeviceBuffer> bound(PyEngine& e, nb::handle description) {
  Mover* mover = e.engine->mover();
  if (!mover) throw LinkFailure("no GPU can be used here: see `aiocomm doctor`", 0);
  DeviceView view;
  if (!PyTuple_CheckExact(description.ptr()) || !read_description(description.ptr(), view))
    throw nb::python_error();
  std::unique_ptr<DeviceBuffer> buffer = bind_device(*mover, view);
  if (!buffer) throw nb::python_error();
  return buffer;
}

// What a peer needs in order to reach this memory; None: it cannot.
nb::object place_for(PyEngine& e, nb::tuple description, int rank) {
  std::unique_ptr<DeviceBuffer> buffer = bound(e, description);
  if (!e.engine->share(rank, *buffer)) return nb::none();
  return nb::bytes(&buffer->place, sizeof buffer->place);
}

KernelCall::Far far_of(const FarTuple& from, size_t argument_bytes) {
  const auto& [rank, place, offset, nbytes, at, alignment] = from;
  KernelCall::Far far;
  if (place.size() != sizeof far.place || at > argument_bytes || argument_bytes - at < sizeof(uint64_t) ||
      !alignment)
    throw nb::value_error("no place, or none for it");
  std::memcpy(&far.place, place.c_str(), sizeof far.place);
  far.owner = rank;
  far.place.address += offset;
  far.nbytes = nbytes;
  far.at = at;
  far.alignment = alignment;
  return far;
}

// Has what is submitted meanwhile launched by this thread.
class Held {
 public:
  Held(Mover& mover, int device) : mover_(mover), device_(device) { mover_.hold(device_); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { mover_.let_go(device_); }

 private:
  Mover& mover_;
  const int device_;
};

constexpr double kOthersWork = 1e-4;  // seconds that an end is looked for where a kernel waits for work of others

std::tuple<nb::object, bool> launch(Self self, uint64_t function, uint32_t blocks, uint32_t threads,
                                    nb::bytes argument, nb::tuple home, const std::vector<nb::tuple>& after,
                                    const std::vector<FarTuple>& far, int peer, uint32_t channel,
                                    uint64_t nbytes, double deadline, double seconds) {
  PyEngine& e = *self.p;
  if (!function || !blocks || !threads) throw nb::value_error("no kernel that could be launched");
  auto kernel = std::make_unique<KernelCall>();
  kernel->function = function;
  kernel->blocks = blocks;
  kernel->threads = threads;
  const auto* bytes = reinterpret_cast<const std::byte*>(argument.c_str());
  kernel->argument.assign(bytes, bytes + argument.size());
  for (const FarTuple& one : far) kernel->far.push_back(far_of(one, argument.size()));
  nb::list kept;
  for (const nb::tuple& description : after) {
    std::unique_ptr<DeviceBuffer> buffer = bound(e, description);
    if (!buffer->gate.open()) kernel->gates.push_back(buffer->gate);
    kept.append(description);
    kept.append(nb::steal(new_device_memory(std::move(buffer))));  // whose gate goes back with it
  }
  std::unique_ptr<DeviceBuffer> gpu = bound(e, home);
  kept.append(home);
  const bool waits = !kernel->gates.empty();
  kernel->awaited = !waits && loop_has_nothing_else(&e);
  gpu->kernel = std::move(kernel);
  SilentOp flight;
  flight.op = e.engine->new_op();
  flight.op->kind = OpKind::get;
  flight.op->peer = peer;
  flight.op->channel = channel;
  flight.op->link = 0;
  flight.op->nbytes = flight.op->capacity = nbytes;
  flight.op->gpu = std::move(gpu);
  if (deadline >= 0) flight.op->deadline_ns = e.engine->now() + static_cast<uint64_t>(deadline * 1e9) + 1;
  flight.op->cookie = silent_cookie(&flight);
  {
    // The driver may wait for a thread that has its lock and waits for the interpreter's.
    nb::gil_scoped_release release;
    const Held held(*e.engine->mover(), flight.op->gpu->device);
    flight.ended = e.engine->submit(flight.op);
  }
  if (seconds > 0) {
    const double longest = waits ? std::min(seconds, kOthersWork) : seconds;
    const uint64_t until = e.engine->now() + static_cast<uint64_t>(longest * 1e9);
    look_for_ends(e, until, [&] { return flight.ended; });
    if (ended_well(flight)) {
      e.engine->release(flight.op);
      return {nb::none(), waits};
    }
  }
  nb::object transfer = as_transfer(self, flight, kept.ptr());
  if (!e.after_submit()) throw nb::python_error();
  return {std::move(transfer), waits};
}

nb::object swap_heads(Self self, uint32_t channel, int64_t tag, size_t me, const std::vector<int>& ranks,
                      nb::list messages, nb::object slots, uint64_t slot_bytes, double deadline,
                      double seconds) {
  PyEngine& e = *self.p;
  const size_t n = ranks.size();
  Lent into;
  if (!e.on_submit.empty() || !e.on_complete.empty()) return nb::none();
  if (nb::len(messages) != n || !into.borrow(slots.ptr(), true) || into.nbytes / n < slot_bytes)
    throw nb::value_error("slots or messages that do not fit");
  std::vector<std::pair<char*, Py_ssize_t>> given(n);
  for (size_t peer = 0; peer < n; ++peer)
    if (peer != me && PyBytes_AsStringAndSize(nb::handle(messages[peer]).ptr(), &given[peer].first,
                                              &given[peer].second) != 0)
      throw nb::python_error();
  std::vector<SilentOp> flights(2 * n);
  Engine& engine = *e.engine;
  const uint64_t deadline_ns =
      deadline >= 0 ? engine.now() + static_cast<uint64_t>(deadline * 1e9) + 1 : 0;
  auto post = [&](OpKind kind, size_t key, size_t peer, void* data, uint64_t nbytes) {
    Op* op = engine.new_op();
    op->kind = kind;
    op->peer = ranks[peer];
    op->channel = channel;
    op->tag = tag;
    op->link = 0;
    op->data = static_cast<std::byte*>(data);
    op->nbytes = op->capacity = nbytes;
    op->deadline_ns = deadline_ns;
    flights[key].op = op;
    op->cookie = silent_cookie(&flights[key]);
    flights[key].ended = engine.submit(op);
  };
  {
    nb::gil_scoped_release release;
    for (size_t away = 1; away < n; ++away) {  // sent first: the peers wait for it
      const size_t peer = (me + away) % n;
      post(OpKind::send, n + peer, peer, given[peer].first, static_cast<uint64_t>(given[peer].second));
    }
    for (size_t away = 1; away < n; ++away) {
      const size_t peer = (me + n - away) % n;
      post(OpKind::recv, peer, peer, into.data + peer * slot_bytes, slot_bytes);
    }
  }
  look_for_ends(e, engine.now() + static_cast<uint64_t>(seconds * 1e9), [&] {
    for (const SilentOp& one : flights)
      if (one.op && !one.ended) return false;
    return true;
  });
  nb::list left;
  const nb::object kept = nb::make_tuple(messages, slots);
  for (size_t key = 0; key < flights.size(); ++key) {
    SilentOp& flight = flights[key];
    if (!flight.op) continue;
    if (ended_well(flight))
      engine.release(std::exchange(flight.op, nullptr));
    else
      left.append(nb::make_tuple(key, as_transfer(self, flight, kept.ptr())));
  }
  return left;
}

// Ordinal of the GPU whose memory this is.
int device_of(uint64_t address) {
  const cuda::Driver& driver = cuda::Driver::of_process();
  if (!driver.usable()) throw LinkFailure(driver.refusal, driver.error);
  int ordinal = 0;
  const cuda::CUresult code =
      driver.cuPointerGetAttribute(&ordinal, cuda::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address);
  if (code != cuda::CUDA_SUCCESS) throw LinkFailure("whose memory it is: " + driver.describe(code), code);
  return ordinal;
}

// Ordinal of the GPU whose context the calling thread has, as array libraries leave it; -1: it has none.
int current_device() {
  const cuda::Driver& driver = cuda::Driver::of_process();
  cuda::CUcontext context = nullptr;
  cuda::CUdevice device = -1;
  if (!driver.usable() || driver.cuCtxGetCurrent(&context) != cuda::CUDA_SUCCESS || !context) return -1;
  return driver.cuCtxGetDevice(&device) == cuda::CUDA_SUCCESS ? device : -1;
}

// Makes a context the thread's own, apart from graphs that other threads capture, and puts back what it was.
class Within {
 public:
  explicit Within(uint64_t context)
      : driver(cuda::Driver::of_process()), wanted_(reinterpret_cast<cuda::CUcontext>(context)) {
    if (!driver.usable()) throw LinkFailure(driver.refusal, driver.error);
    driver.cuThreadExchangeStreamCaptureMode(&mode_);
    driver.cuCtxGetCurrent(&before_);
    if (before_ != wanted_) driver.cuCtxSetCurrent(wanted_);
  }
  Within(const Within&) = delete;
  Within& operator=(const Within&) = delete;
  ~Within() {
    if (before_ != wanted_) driver.cuCtxSetCurrent(before_);
    driver.cuThreadExchangeStreamCaptureMode(&mode_);
  }

  const cuda::Driver& driver;

 private:
  const cuda::CUcontext wanted_;
  cuda::CUcontext before_ = nullptr;
  int mode_ = cuda::CU_STREAM_CAPTURE_MODE_RELAXED;
};

void copy_on(uint64_t context, uint64_t stream, uint64_t to, uint64_t from, uint64_t nbytes) {
  const Within within(context);
  const cuda::Driver& driver = within.driver;
  const cuda::CUresult code =
      driver.cuMemcpyAsync(to, from, nbytes, reinterpret_cast<cuda::CUstream>(stream));
  if (code != cuda::CUDA_SUCCESS) throw LinkFailure("a copy of tables: " + driver.describe(code), code);
}

// Whether a stream has no work and is not captured: then it need not be asked for more.
bool stream_is_idle(uint64_t context, uint64_t stream) {
  const Within within(context);
  const auto handle = reinterpret_cast<cuda::CUstream>(stream);
  int capturing = 0;
  return within.driver.cuStreamIsCapturing(handle, &capturing) == cuda::CUDA_SUCCESS &&
         capturing == cuda::CU_STREAM_CAPTURE_STATUS_NONE &&
         within.driver.cuStreamQuery(handle) == cuda::CUDA_SUCCESS;
}

}  // namespace

void bind_device_memory(nb::module_& m) {
  m.def(
      "begin_long_call", [] { cuda::Reaper::of_process().begin_long_call(); },
      "Until `end_long_call`, loops leave all copies and launches to other threads.");
  m.def("end_long_call", [] { cuda::Reaper::of_process().end_long_call(); }, "See `begin_long_call`.");
  m.def("free_later", cuda::free_later, nb::arg("device"), nb::arg("address"), nb::arg("pinned"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Free memory of the driver's once the GPU is at rest, without waiting for that.");
  m.def("given_back", cuda::given_back, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
        "Wait for memory that was let go of until the driver has it. False: it takes longer.");
  m.def("device_of", device_of, nb::arg("address"), nb::call_guard<nb::gil_scoped_release>(),
        "Ordinal of the GPU whose memory this is.");
  m.def("current_device", current_device, nb::call_guard<nb::gil_scoped_release>(),
        "Ordinal of the GPU whose context the calling thread has. -1: it has none.");
  m.def("copy_on", copy_on, nb::arg("context"), nb::arg("stream"), nb::arg("to"), nb::arg("source"),
        nb::arg("nbytes"), nb::call_guard<nb::gil_scoped_release>(),
        "Queue a copy on a stream of this context.");
  m.def("stream_is_idle", stream_is_idle, nb::arg("context"), nb::arg("stream"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Whether a stream of this context has no work, and is not captured into a graph.");
}

void bind_kernels(nb::class_<PyEngine>& engine) {
  engine
      .def("place_for", place_for, nb::arg("description"), nb::arg("rank"),
           "What a peer's kernels need in order to reach this memory. None: they cannot.")
      .def("launch", launch, nb::arg("function"), nb::arg("blocks"), nb::arg("threads"), nb::arg("argument"),
           nb::arg("home"), nb::arg("after"), nb::arg("far"), nb::arg("peer"), nb::arg("channel"),
           nb::arg("nbytes"), nb::arg("deadline"), nb::arg("seconds") = 0.0,
           "Launch a kernel on the GPU of `home` behind the work on the streams of `after`; ends with it. "
           "Returns with it whether it waits for such work. `seconds`: for which its end is looked for; None: "
           "that has come.")
      .def("swap_heads", swap_heads, nb::arg("channel"), nb::arg("tag"), nb::arg("me"), nb::arg("ranks"),
           nb::arg("messages"), nb::arg("slots"), nb::arg("slot_bytes"), nb::arg("deadline"),
           nb::arg("seconds"),
           "Send each rank but `me` its message and receive one from it, and look for the ends for that long. "
           "Returns those that have not come, or not well: receives by rank, sends from the number of ranks "
           "on. None: nothing was begun.");
}

}  // namespace aiocomm::py
