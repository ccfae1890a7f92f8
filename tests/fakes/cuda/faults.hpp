// What a test may do to the driver and learn from it: failures by call and count, lost devices, and a book of what
// would corrupt memory on a GPU. Thread-safe by its own lock, so that it may be asked from anywhere.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "abi.hpp"
#include "condition.hpp"

namespace fake {

class Faults {
 public:
  // Reads FAKE_CUDA_FAIL ("name:nth:code", or "name:nth+:code" for that call and all later ones; by comma) and
  // FAKE_CUDA_LOST ("ordinal:code", by comma).
  Faults();

  // The `nth` call of `name` from now on fails with `code`, and with `forever` all after it. Any name matches "*".
  void fail(const std::string& name, uint64_t nth, CUresult code, bool forever);
  void clear();
  void lose(int device, CUresult code);

  // The next call of `name` stays in the driver until it is let go, or for ten seconds; then `let_go` says no.
  void hold(const std::string& name);
  bool wait_held();  // until a call is held up. False: none comes
  bool let_go();
  void hold_up(const char* name);

  CUresult on_call(const char* name);  // counts the call; what it must fail with, or success
  CUresult lost(int device);           // what every call on that device gives, or success
  uint64_t calls(const std::string& name);

  // Use of memory that the real driver does not forbid and that would be silent corruption there. Also appended to the
  // file FAKE_CUDA_REPORT, so that a test sees those of its child processes.
  void violation(const std::string& what);
  std::vector<std::string> take_violations();

  void count(const std::string& what, uint64_t by = 1);
  uint64_t counter(const std::string& what);

 private:
  struct Plan {
    std::string name;
    uint64_t left;
    CUresult code;
    bool forever;
  };
  std::mutex mutex_;
  Condition changed_;
  std::string held_;  // the call that is to be held up
  enum class Hold { none, wanted, held, late } hold_ = Hold::none;
  std::vector<Plan> plans_;
  std::map<std::string, uint64_t> calls_, counters_;
  std::map<int, CUresult> lost_;
  std::vector<std::string> violations_;
};

Faults& faults();
const char* error_name(CUresult code);  // nullptr: no such code

}  // namespace fake
