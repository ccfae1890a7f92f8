// Counters as Python sees them.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/transfer.hpp"

namespace nb = nanobind;

namespace aiocomm::py {

nb::dict counters(PyEngine& e, const std::string& link) {
  LinkCounters c = e.engine->counters(link);
  static const char* paths[] = {"none",   "eager",  "mapped", "cma",  "stream",
                                "device", "staged", "read",   "write"};
  nb::dict out, messages, nbytes;
  for (size_t i = 1; i < static_cast<size_t>(Path::count); ++i) {
    messages[paths[i]] = c.path_messages[i];
    nbytes[paths[i]] = c.path_bytes[i];
  }
  out["submitted"] = c.submitted;
  out["completed"] = c.completed;
  out["failed"] = c.failed;
  out["cancelled"] = c.cancelled;
  out["frames_sent"] = c.frames_sent;
  out["frames_received"] = c.frames_received;
  out["bytes_sent"] = c.bytes_sent;
  out["bytes_received"] = c.bytes_received;
  out["fallbacks"] = c.fallbacks;
  out["would_block"] = c.would_block;
  out["violations"] = c.violations;
  out["messages_by_path"] = messages;
  out["bytes_by_path"] = nbytes;
  nb::dict device;
  for (const auto& [name, value] : c.device) device[name.c_str()] = value;
  out["device"] = device;
  auto list = [](const DurationHistogram& h) { return std::vector(h.counts.begin(), h.counts.end()); };
  out["queued_s"] = list(c.queued);
  out["moved_s"] = list(c.moved);
  return out;
}

}  // namespace aiocomm::py
