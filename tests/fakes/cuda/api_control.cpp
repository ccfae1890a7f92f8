// What only tests call. No CUDA program has these; none of them counts as a call of the driver.
#include <cstring>
#include <string>

#include "api.hpp"

#define FAKE_CONTROL extern "C" __attribute__((visibility("default")))

using namespace fake;

namespace {
EngineState* engine(int device, int kind) {
  if (!is_device(device) || kind < 0 || static_cast<size_t>(kind) >= kEngines) return nullptr;
  return &sim().devices[device]->engines[kind];
}
}  // namespace

FAKE_CONTROL void fake_fail(const char* name, uint64_t nth, int code, int forever) {
  faults().fail(name, nth, static_cast<CUresult>(code), forever != 0);
}

// Failures and lost devices end. Contexts that were broken are as new: what was queued in them is gone.
FAKE_CONTROL void fake_heal() {
  Lock lock(sim().mutex);
  sim().heal(lock);
}

FAKE_CONTROL void fake_lose_device(int device, int code) {
  faults().lose(device, static_cast<CUresult>(code));
  Lock lock(sim().mutex);
  sim().changed.notify_all();
}

FAKE_CONTROL void fake_hold(const char* name) { faults().hold(name); }
FAKE_CONTROL int fake_wait_held() { return faults().wait_held(); }
FAKE_CONTROL int fake_let_go() { return faults().let_go(); }

FAKE_CONTROL uint64_t fake_calls(const char* name) { return faults().calls(name); }
FAKE_CONTROL uint64_t fake_counter(const char* name) { return faults().counter(name); }

// Up to `size - 1` bytes of what was noted since the last call, a line each; returns how many there are.
FAKE_CONTROL int fake_take_violations(char* text, size_t size) {
  std::string all;
  auto found = faults().take_violations();
  for (auto& one : found) all += one + "\n";
  size_t n = std::min(all.size(), size - 1);
  std::memcpy(text, all.data(), n);
  text[n] = 0;
  return static_cast<int>(found.size());
}

// Engines: 0 host to device, 1 device to host, 2 peer, 3 local, 4 host functions.
FAKE_CONTROL int fake_pause(int device, int kind) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  if (!one) return -1;
  one->paused = true;
  one->steps = 0;
  return 0;
}

// A paused engine executes `count` more operations; with fewer queued, those that come.
FAKE_CONTROL int fake_step(int device, int kind, uint64_t count) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  if (!one || !one->paused) return -1;
  one->steps += count;
  sim().changed.notify_all();
  return 0;
}

FAKE_CONTROL int fake_resume(int device, int kind) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  if (!one) return -1;
  one->paused = false;
  one->halfway = false;
  sim().changed.notify_all();
  return 0;
}

// From now on the engine stops in the middle of each copy, with half of its bytes written, until `fake_resume`.
FAKE_CONTROL int fake_stop_halfway(int device, int kind) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  if (!one) return -1;
  one->halfway = true;
  return 0;
}

FAKE_CONTROL uint64_t fake_executed(int device, int kind) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  return one ? one->executed : 0;
}

// Operations that this engine could execute now, the one that it is at included.
FAKE_CONTROL uint64_t fake_ready(int device, int kind) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  return one ? one->ready.size() + one->busy : 0;
}

// Waits until `fake_ready` is at least `count`: 1, or 0 where it is not so within `timeout_ms`.
FAKE_CONTROL int fake_wait_ready(int device, int kind, uint64_t count, int timeout_ms) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  return one && sim().changed.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                                       [&] { return one->ready.size() + one->busy >= count; });
}

// Waits until this engine has executed `count` operations in all.
FAKE_CONTROL int fake_wait_executed(int device, int kind, uint64_t count, int timeout_ms) {
  Lock lock(sim().mutex);
  EngineState* one = engine(device, kind);
  return one && sim().changed.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                                       [&] { return one->executed >= count; });
}

// What this process holds: "allocations", "imports", "mappings", "pinned", "registered", "streams", "events",
// "physicals", "references" (of physicals) or "contexts" (retained).
FAKE_CONTROL int64_t fake_held(const char* what) {
  Lock lock(sim().mutex);
  std::string name(what);
  Memory& memory = *sim().memory;
  auto count = [&](Origin origin) { return static_cast<int64_t>(memory.count(origin)); };
  if (name == "allocations") return count(Origin::malloc) + count(Origin::pool) + count(Origin::managed);
  if (name == "imports") return count(Origin::imported);
  if (name == "mappings") return count(Origin::vmm);
  if (name == "pinned") return count(Origin::pinned);
  if (name == "registered") return count(Origin::registered);
  if (name == "streams") return static_cast<int64_t>(sim().streams.size());
  if (name == "events") return static_cast<int64_t>(sim().events.size());
  if (name == "physicals") return static_cast<int64_t>(sim().physicals.size());
  int64_t sum = 0;
  if (name == "references") {
    for (auto& [handle, physical] : sim().physicals) sum += physical->references;
  } else if (name == "contexts") {
    for (auto& device : sim().devices) sum += device->context.references;
  } else {
    return -1;
  }
  return sum;
}
