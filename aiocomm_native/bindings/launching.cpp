#include "bindings/launching.hpp"

#include <algorithm>

#include "bindings/held.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

// For which, or for a tenth of the time, an end is looked for where a kernel waits for work of others.
constexpr uint64_t kOthersWorkNs = 100000;

}  // namespace

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

uint64_t deadline_of(PyEngine& e, double seconds) {
  return seconds >= 0 ? e.engine->now() + static_cast<uint64_t>(seconds * 1e9) + 1 : 0;
}

void disown(nb::pointer_and_handle<PyEngine> self, SilentOp& flight, PyObject* keep) noexcept {
  if (!flight.op) return;
  if (flight.ended) return self.p->engine->release(std::exchange(flight.op, nullptr));
  try {
    as_transfer(self, flight, keep).attr("cancel")();
  } catch (nb::python_error& error) {
    error.discard_as_unraisable(self.h);
  }
}

Followed::Followed(PyEngine& e, const std::vector<nb::tuple>& arrays) {
  std::vector<uint64_t> streams;
  for (const nb::tuple& description : arrays) {
    DeviceView view;
    if (!read_description(description.ptr(), view)) throw nb::python_error();
    if (!view.nbytes || std::find(streams.begin(), streams.end(), view.stream) != streams.end()) continue;
    streams.push_back(view.stream);
    std::unique_ptr<DeviceBuffer> buffer = bound(e, description);
    gates_.push_back(buffer->gate);
    kept_.append(description);
    kept_.append(nb::steal(new_device_memory(std::move(buffer))));  // whose gate goes back with it
  }
}

Launch::Launch(nb::pointer_and_handle<PyEngine> self, const KernelLaunch& from, const Followed& behind,
               const nb::tuple& home)
    : self_(self), e_(*self.p) {
  const auto& [function, blocks, threads, argument, nbytes] = from;
  if (!function || !blocks || !threads) throw nb::value_error("no kernel that could be launched");
  nbytes_ = nbytes;
  auto kernel = std::make_unique<KernelCall>();
  kernel->function = function;
  kernel->blocks = blocks;
  kernel->threads = threads;
  const auto* bytes = reinterpret_cast<const std::byte*>(argument.c_str());
  kernel->argument.assign(bytes, bytes + argument.size());
  behind.have(*kernel);
  for (nb::handle one : behind.kept()) kept_.append(one);
  gpu_ = bound(e_, home);
  kept_.append(home);
  waits_ = !kernel->gates.empty();
  kernel->awaited = !waits_ && loop_has_nothing_else(&e_);
  gpu_->kernel = std::move(kernel);
}

void Launch::submit(int peer, uint32_t channel, uint64_t deadline_ns) {
  Engine& engine = *e_.engine;
  const int device = gpu_->device;
  Op* op = flight_.op = engine.new_op();
  op->kind = OpKind::get;
  op->peer = peer;
  op->channel = channel;
  op->link = 0;
  op->nbytes = op->capacity = nbytes_;
  op->gpu = std::move(gpu_);
  op->deadline_ns = deadline_ns;
  op->cookie = silent_cookie(&flight_);
  // The driver may wait for a thread that has its lock and waits for the interpreter's.
  nb::gil_scoped_release release;
  const Held held(*engine.mover(), device);
  flight_.ended = engine.submit(op);
}

bool Launch::look(uint64_t until_ns) {
  const uint64_t now = e_.engine->now();
  const uint64_t left = until_ns - std::min(until_ns, now);
  look_for_ends(e_, waits_ ? now + std::min(left, std::max(kOthersWorkNs, left / 10)) : until_ns,
                [this] { return flight_.ended; });
  if (!ended_well(flight_)) return false;
  e_.engine->release(std::exchange(flight_.op, nullptr));
  return true;
}

Swap::Swap(nb::pointer_and_handle<PyEngine> self, const std::vector<int>& ranks, size_t me, nb::list messages,
           nb::object slots, uint64_t slot_bytes)
    : self_(self),
      e_(*self.p),
      ranks_(ranks),
      me_(me),
      slot_bytes_(slot_bytes),
      messages_(messages),
      slots_(std::move(slots)),
      given_(ranks.size()),
      flights_(2 * ranks.size()) {
  kept_ = nb::make_tuple(messages_, slots_);
  const size_t n = ranks.size();
  if (nb::len(messages) != n || !into_.borrow(slots_.ptr(), true) || into_.nbytes / n < slot_bytes)
    throw nb::value_error("slots or messages that do not fit");
  for (size_t peer = 0; peer < n; ++peer)
    if (peer != me && PyBytes_AsStringAndSize(nb::handle(messages[peer]).ptr(), &given_[peer].first,
                                              &given_[peer].second) != 0)
      throw nb::python_error();
}

void Swap::post(uint32_t channel, int64_t tag, uint64_t deadline_ns) {
  Engine& engine = *e_.engine;
  const size_t n = ranks_.size();
  auto begin = [&](OpKind kind, size_t key, size_t peer, void* data, uint64_t nbytes) {
    Op* op = flights_[key].op = engine.new_op();
    op->kind = kind;
    op->peer = ranks_[peer];
    op->channel = channel;
    op->tag = tag;
    op->link = 0;
    op->data = static_cast<std::byte*>(data);
    op->nbytes = op->capacity = nbytes;
    op->deadline_ns = deadline_ns;
    op->cookie = silent_cookie(&flights_[key]);
    flights_[key].ended = engine.submit(op);
  };
  nb::gil_scoped_release release;
  for (size_t away = 1; away < n; ++away) {  // sent first: the peers wait for it
    const size_t peer = (me_ + away) % n;
    begin(OpKind::send, n + peer, peer, given_[peer].first, static_cast<uint64_t>(given_[peer].second));
  }
  for (size_t away = 1; away < n; ++away) {
    const size_t peer = (me_ + n - away) % n;
    begin(OpKind::recv, peer, peer, into_.data + peer * slot_bytes_, slot_bytes_);
  }
}

void Swap::look(uint64_t until_ns) {
  look_for_ends(e_, until_ns, [this] {
    return std::all_of(flights_.begin(), flights_.end(),
                       [](const SilentOp& one) { return !one.op || one.ended; });
  });
}

Swap::~Swap() {
  for (SilentOp& flight : flights_) disown(self_, flight, kept_.ptr());
}

nb::list Swap::left() {
  nb::list left;
  for (size_t key = 0; key < flights_.size(); ++key) {
    SilentOp& flight = flights_[key];
    if (!flight.op) continue;
    if (ended_well(flight))
      e_.engine->release(std::exchange(flight.op, nullptr));
    else
      left.append(nb::make_tuple(key, as_transfer(self_, flight, kept_.ptr())));
  }
  return left;
}

}  // namespace aiocomm::py
