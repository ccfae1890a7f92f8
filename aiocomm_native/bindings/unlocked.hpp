// Work on memory that is held by then, for which the interpreter's lock is let go of where it is long.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <optional>

namespace aiocomm::py {

class Unlocked {
 public:
  explicit Unlocked(size_t elements) {
    if (elements >= kLong) release_.emplace();
  }

 private:
  // Below, the work is over sooner than another thread would give the lock back.
  static constexpr size_t kLong = 16384;
  std::optional<nanobind::gil_scoped_release> release_;
};

}  // namespace aiocomm::py
