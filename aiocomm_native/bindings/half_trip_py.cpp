// Round trips without Python: what the engine and a link cost by themselves. For benchmarks.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <string>

#include "bindings/transfer.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

namespace {

constexpr uint64_t kPatienceNs = 30000000000;
constexpr uint64_t kSpinNs = 1000000;

class Bare {
 public:
  Bare(Engine& engine, Rank peer, uint64_t nbytes) : engine_(engine), peer_(peer), bytes_(nbytes) {}

  void exchange(OpKind kind) {
    Op* op = engine_.new_op();
    op->kind = kind;
    op->peer = peer_;
    op->channel = 0;
    op->tag = 0;
    op->link = 0;
    op->data = bytes_.data();
    op->nbytes = op->capacity = bytes_.size();
    op->cookie = nullptr;
    if (!engine_.submit(op)) await(op);
    Code code = op->code;
    int error = op->error;
    engine_.release(op);
    if (code != Code::ok)
      throw LinkFailure("a round trip ended with code " + std::to_string(int(code)), error);
  }

  std::vector<Op*> others;  // transfers that have ended meanwhile

 private:
  void await(Op* mine) {
    const uint64_t give_up = engine_.now() + kPatienceNs;
    for (;;) {
      Op* done;
      while (engine_.take_completed(done)) {
        if (done == mine) return;
        others.push_back(done);
      }
      if (engine_.has_events()) engine_.progress(false);  // they wait for Python, and end every spin at once
      uint64_t now = engine_.now();
      Engine* engine = &engine_;
      Engine::spin({&engine, 1}, now + kSpinNs, patience_);
      // The buffer is this object's: the operation must have let go of it, however it ends.
      if (now > give_up) engine_.cancel(mine, Code::deadline);
    }
  }

  Engine& engine_;
  const Rank peer_;
  std::vector<std::byte> bytes_;
  Patience patience_;
};

std::vector<double> half_trips(PyEngine& e, int peer, uint64_t nbytes, int count, bool first) {
  std::vector<double> halves;
  Bare bare(*e.engine, peer, nbytes);
  std::exception_ptr failure;
  {
    nb::gil_scoped_release release;
    e.engine->may_spin(true);
    try {
      uint64_t began = e.engine->now();
      for (int i = 0; i < count; ++i) {
        bare.exchange(first ? OpKind::send : OpKind::recv);
        bare.exchange(first ? OpKind::recv : OpKind::send);
        const uint64_t ended = e.engine->now();
        halves.push_back(static_cast<double>(ended - began) / 2e9);
        began = ended;
      }
    } catch (...) {
      failure = std::current_exception();
    }
    e.engine->may_spin(e.spinner != nullptr);
    e.engine->progress(false);  // from here on the loop has to be woken again
  }
  for (Op* op : bare.others) end_transfer(static_cast<Transfer*>(op->cookie));
  e.drain(256);
  if (failure) std::rethrow_exception(failure);
  return halves;
}

}  // namespace

void bind_half_trips(nb::class_<PyEngine>& engine) {
  engine.def(
      "half_trips", half_trips, nb::arg("peer"), nb::arg("nbytes"), nb::arg("count"), nb::arg("first"),
      "Half round trips of the loop's thread without Python between, in seconds. The peer calls it, too; "
      "messages go over the default channel with tag 0.");
}

}  // namespace aiocomm::py
