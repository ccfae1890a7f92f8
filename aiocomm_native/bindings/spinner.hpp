// The engines of one loop that spins: it looks at all of them together, whichever of them a task waits for.
#pragma once

#include <cstdint>
#include <vector>

#include "core/engine.hpp"
#include "core/patience.hpp"

namespace aiocomm::py {

class PyEngine;

// With the GIL, on the loop's thread. The engines are kept by whoever adds them (aiocomm/_loop/spin.py).
class Spinner {
 public:
  Spinner(uint64_t spin_ns, int others) : spin_ns_(spin_ns), others_{others} {}
  ~Spinner();
  Spinner(const Spinner&) = delete;
  Spinner& operator=(const Spinner&) = delete;

  void add(PyEngine& engine);
  void discard(PyEngine& engine);
  // Polls until one has news or `until_ns`; then tasks are made ready. Whether one has; -1: a Python error is set.
  int spin(uint64_t until_ns);
  // From now on the engines wake the loop. Whether something has come before that; -1: a Python error is set.
  int prepare_to_sleep();
  void woken();

  uint64_t now() const { return engines_.empty() ? 0 : engines_[0]->now(); }
  uint64_t spin_ns() const { return spin_ns_; }
  uint64_t slept_ns() const { return slept_ns_; }  // when the loop last was at its selector
  // The loop is at its selector. Whether its descriptors were looked at a moment ago: then it need not do so itself.
  bool looked();

 private:
  int hand_over();
  int rehearse();

  const uint64_t spin_ns_;
  Others others_;  // of the loop's selector, which closes it after the last spin
  uint64_t slept_ns_ = 0;
  std::vector<PyEngine*> members_;
  std::vector<Engine*> engines_;  // theirs
  Patience patience_;
};

}  // namespace aiocomm::py
