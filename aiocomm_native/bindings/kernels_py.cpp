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
#include "bindings/launching.hpp"
#include "bindings/schedule.hpp"
#include "bindings/transfer.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/reaper.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

using Self = nb::pointer_and_handle<PyEngine>;
using FarTuple = std::tuple<int, nb::bytes, uint64_t, uint64_t, uint64_t, uint64_t>;

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

std::tuple<nb::object, bool> launch(Self self, uint64_t function, uint32_t blocks, uint32_t threads,
                                    nb::bytes argument, nb::tuple home, const std::vector<nb::tuple>& after,
                                    const std::vector<FarTuple>& far, int peer, uint32_t channel,
                                    uint64_t nbytes, double deadline, double seconds) {
  PyEngine& e = *self.p;
  Launch launch(self, {function, blocks, threads, argument, nbytes}, Followed(e, after), home);
  for (const FarTuple& one : far) launch.kernel().far.push_back(far_of(one, argument.size()));
  launch.submit(peer, channel, deadline_of(e, deadline));
  if (seconds > 0 && launch.look(e.engine->now() + static_cast<uint64_t>(seconds * 1e9)))
    return {nb::none(), launch.waits()};
  nb::object transfer = launch.transfer();
  e.after_submit();
  return {std::move(transfer), launch.waits()};
}

nb::object swap_heads(Self self, uint32_t channel, int64_t tag, size_t me, const std::vector<int>& ranks,
                      nb::list messages, nb::object slots, uint64_t slot_bytes, double deadline,
                      double seconds) {
  PyEngine& e = *self.p;
  if (!e.on_submit.empty() || !e.on_complete.empty()) return nb::none();
  Swap swap(self, ranks, me, messages, slots, slot_bytes);
  swap.post(channel, tag, deadline_of(e, deadline));
  swap.look(e.engine->now() + static_cast<uint64_t>(seconds * 1e9));
  return swap.left();
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

void copy_on(uint64_t context, uint64_t stream, uint64_t to, uint64_t from, uint64_t nbytes) {
  const Within within(context);
  const cuda::Driver& driver = within.driver;
  const cuda::CUresult code =
      driver.cuMemcpyAsync(to, from, nbytes, reinterpret_cast<cuda::CUstream>(stream));
  if (code != cuda::CUDA_SUCCESS) throw LinkFailure("a copy of tables: " + driver.describe(code), code);
}

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
      .def(
          "launch", launch, nb::arg("function"), nb::arg("blocks"), nb::arg("threads"), nb::arg("argument"),
          nb::arg("home"), nb::arg("after"), nb::arg("far"), nb::arg("peer"), nb::arg("channel"),
          nb::arg("nbytes"), nb::arg("deadline"), nb::arg("seconds") = 0.0,
          "Launch a kernel on the GPU of `home` behind the work on the streams of `after`; ends with it. "
          "Returns with it whether it waits for such work. `seconds`: for which its end is looked for; None: "
          "that has come.")
      .def(
          "swap_heads", swap_heads, nb::arg("channel"), nb::arg("tag"), nb::arg("me"), nb::arg("ranks"),
          nb::arg("messages"), nb::arg("slots"), nb::arg("slot_bytes"), nb::arg("deadline"),
          nb::arg("seconds"),
          "Send each rank but `me` its message and receive one from it, and look for the ends for that long. "
          "Returns those that have not come, or not well: receives by rank, sends from the number of ranks "
          "on. None: nothing was begun.");
}

}  // namespace aiocomm::py
