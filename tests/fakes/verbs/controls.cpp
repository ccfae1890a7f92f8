// What a test does to the adapters, and asks of them.

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "queues.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace fake;

// Registrations of `from` bytes and more wait from now on; ~0: none does.
EXPORT void fake_verbs_pause(size_t from) {
  std::lock_guard lock(machine().mutex);
  machine().paused.from = from;
  machine().changed.notify_all();
}
EXPORT void fake_verbs_keep(size_t from) {  // the same for what is deregistered
  std::lock_guard lock(machine().mutex);
  machine().kept.from = from;
  machine().changed.notify_all();
}
// Calls by threads of this name throw from now on; null: none does. The name stays the caller's.
EXPORT void fake_verbs_break(const char* thread) { machine().broken.store(thread); }
EXPORT void fake_verbs_fail(size_t from, int error) {
  std::lock_guard lock(machine().mutex);
  machine().failing = {from, error};
}
EXPORT void fake_verbs_dma_buf(int takes) {  // whether the adapters do
  std::lock_guard lock(machine().mutex);
  machine().dma_buf = takes;
}
// How many reads a queue pair of the device may have under way, and answers; whether it needs its GID in packets.
EXPORT void fake_verbs_limit(int device, int initiates, int answers, int routed) {
  std::lock_guard lock(machine().mutex);
  machine().limits[device] = {initiates, answers, routed != 0};
}
// Whoever has the device open in this process is told.
EXPORT void fake_verbs_tell(int device, int event) {
  std::lock_guard lock(machine().mutex);
  auto [first, last] = machine().contexts.equal_range(device);
  ibv_async_event told{};
  told.element.port_num = 1;
  told.event_type = static_cast<ibv_event_type>(event);
  for (auto it = first; it != last; ++it) tell(it->second, told);
}
// A queue pair that fails is at a receive, and its device says so late (1) or never (2); 0: it is at none, and at once.
EXPORT void fake_verbs_last(int how) {
  std::lock_guard lock(machine().mutex);
  machine().last = static_cast<Machine::Last>(how);
}
// Queue pairs of that device are not connected before another call says so; -1: all are.
EXPORT void fake_verbs_hold(int device) {
  std::lock_guard lock(machine().mutex);
  machine().held = device;
  machine().changed.notify_all();
}
EXPORT int fake_verbs_connecting() {  // how many wait
  std::lock_guard lock(machine().mutex);
  return machine().connecting;
}
EXPORT void fake_verbs_unreach(int device, int error) {  // what connects there fails; 0: no more
  std::lock_guard lock(machine().mutex);
  if (error)
    machine().unreachable[device] = error;
  else
    machine().unreachable.erase(device);
}
// That call fails for the device from now on; 0: no more.
EXPORT void fake_verbs_lack(int device, const char* call, int error) {
  std::lock_guard lock(machine().mutex);
  if (error)
    machine().lacking[{device, call}] = error;
  else
    machine().lacking.erase({device, call});
}
// The same for a process that no test is in: FAKE_VERBS_LACKS=device:call:errno.
namespace {
[[maybe_unused]] const bool kAsked = [] {
  int device = 0, error = 0;
  char call[32];
  const char* text = getenv("FAKE_VERBS_LACKS");
  if (text && std::sscanf(text, "%d:%31[^:]:%d", &device, call, &error) == 3)
    fake_verbs_lack(device, call, error);
  return true;
}();
}  // namespace
EXPORT void fake_verbs_stall(int stalls) {  // reads and writes
  std::lock_guard lock(machine().mutex);
  machine().stalled = stalls;
  progress_all();
}
EXPORT int fake_verbs_pair_count() {
  std::lock_guard lock(machine().mutex);
  return static_cast<int>(machine().pairs.size());
}
EXPORT int fake_verbs_fork_safe() {
  std::lock_guard lock(machine().mutex);
  return machine().fork_safe;
}
EXPORT void fake_verbs_pairs(size_t most) {  // queue pairs that there may be
  std::lock_guard lock(machine().mutex);
  machine().most_pairs = most;
}
EXPORT int fake_verbs_vectors() {
  std::lock_guard lock(machine().mutex);
  return static_cast<int>(machine().vectors.size());
}
EXPORT int fake_verbs_waiting() {
  std::lock_guard lock(machine().mutex);
  return machine().waiting;
}
EXPORT int fake_verbs_leaving() {
  std::lock_guard lock(machine().mutex);
  return machine().leaving;
}
EXPORT int fake_verbs_regions(size_t from) {  // there now, of `from` bytes and more
  std::lock_guard lock(machine().mutex);
  int n = 0;
  for (auto& [key, region] : machine().regions) n += region->length >= from;
  return n;
}
EXPORT uint64_t fake_verbs_requests() {  // posted so far
  std::lock_guard lock(machine().mutex);
  return machine().requests;
}
EXPORT uint64_t fake_verbs_registered() {
  std::lock_guard lock(machine().mutex);
  return machine().registered;
}
