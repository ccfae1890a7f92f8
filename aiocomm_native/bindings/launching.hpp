// A kernel, and messages to and from all other ranks, as operations that end before the loop has its turn, or become
// transfers then.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/looking.hpp"
#include "bindings/schedule.hpp"

namespace aiocomm::py {

// Hands an operation that is under way over to a transfer that nobody has, and cancels it; of one that has ended, nothing is
// left. For what is given up in the middle, by an exception: whatever it was given is kept until its end.
void disown(nanobind::pointer_and_handle<PyEngine> self, SilentOp& flight, PyObject* keep) noexcept;

// What is launched, and the bytes that it is about.
struct KernelLaunch {
  uint64_t function;
  uint32_t blocks, threads;
  nanobind::bytes argument;
  uint64_t nbytes;
};

uint64_t deadline_of(PyEngine& e, double seconds);  // 0: none
std::unique_ptr<DeviceBuffer> bound(PyEngine& e, nanobind::handle description);
void copy_on(uint64_t context, uint64_t stream, uint64_t to, uint64_t from, uint64_t nbytes);

// Memory behind the work that its streams have now: one array of each stream.
class Followed {
 public:
  Followed() = default;  // no work
  Followed(PyEngine& e, const std::vector<nanobind::tuple>& arrays);

  // What is not yet done is waited for by a kernel.
  void have(KernelCall& kernel) const {
    for (const Gate& gate : gates_)
      if (!gate.open()) kernel.gates.push_back(gate);
  }
  const nanobind::list& kept() const { return kept_; }  // by whom the gates are kept

 private:
  nanobind::list kept_;
  std::vector<Gate> gates_;
};

class Launch {
 public:
  // On the GPU of `home`. Throws where it cannot be launched at all.
  Launch(nanobind::pointer_and_handle<PyEngine> self, const KernelLaunch& from, const Followed& behind,
         const nanobind::tuple& home);
  ~Launch() { disown(self_, flight_, kept_.ptr()); }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  KernelCall& kernel() { return *gpu_->kernel; }
  bool waits() const { return waits_; }  // for work of others
  void submit(int peer, uint32_t channel, uint64_t deadline_ns);
  // Looks for its end, for less long where it waits for work of others. True: it has ended well, and is done with.
  bool look(uint64_t until_ns);
  nanobind::object transfer() { return as_transfer(self_, flight_, kept_.ptr()); }

 private:
  const nanobind::pointer_and_handle<PyEngine> self_;
  PyEngine& e_;
  std::unique_ptr<DeviceBuffer> gpu_;
  nanobind::list kept_;
  SilentOp flight_;
  uint64_t nbytes_;
  bool waits_ = false;
};

class Swap {
 public:
  Swap(nanobind::pointer_and_handle<PyEngine> self, const std::vector<int>& ranks, size_t me,
       nanobind::list messages, nanobind::object slots, uint64_t slot_bytes);
  Swap(const Swap&) = delete;
  Swap& operator=(const Swap&) = delete;
  ~Swap();
  void post(uint32_t channel, int64_t tag, uint64_t deadline_ns);
  void look(uint64_t until_ns);
  // What has not ended, or not well: (receives by rank, sends from the number of ranks on; the transfer). The rest is done with.
  nanobind::list left();

 private:
  const nanobind::pointer_and_handle<PyEngine> self_;
  PyEngine& e_;
  const std::vector<int>& ranks_;
  const size_t me_;
  const uint64_t slot_bytes_;
  nanobind::object messages_, slots_, kept_;
  Lent into_;
  std::vector<std::pair<char*, Py_ssize_t>> given_;
  std::vector<SilentOp> flights_;
};

}  // namespace aiocomm::py
