// Memory that devices may access: registered once per rail, looked up by range.
//
// Rules
//  * Under the engine's token. A registration that is in use is never dropped.
//  * Kept after its last use is only what lies in memory of which this process hears when it goes (segments of
//    `aiocomm.empty()`): addresses come back with other pages behind them, and a device would go on with
//    the old ones. Everything else is registered for the time of one operation. Device memory is known by its
//    allocation's number as well, which does not come back: it is kept, and dropped when that address is another's.
//  * What is kept is bounded in bytes; the least recently used goes first.
//  * A key opens no more than its purpose needs: what a peer is to read, it cannot write.
//  * What is large is registered aside (registrar.hpp). Until then its registration is not ready: it has no keys yet, and
//    whoever holds it waits for word of it (`take`). If all have let go of it by then, it is given back at once, and
//    nobody finds it meanwhile. What is large is given back aside, too; where peers could write into it, its last holder
//    waits for word of that (`take_released`): until then the memory is not its own.
//  * Ids are small and used again, so that a peer's table of them stays small.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/link.hpp"
#include "links/rdma/port.hpp"
#include "links/rdma/registrar.hpp"

namespace aiocomm::rdma {

class Rail;

struct Keys {
  std::array<uint32_t, kMaxRails> of{};  // by rail
};

struct Registration {
  uint32_t id = 0;
  std::byte* base = nullptr;
  uint64_t nbytes = 0;
  Access access = Access::local;
  uint32_t segment = 0;    // of Segments, that holds it
  uint64_t buffer_id = 0;  // of the device's allocation; 0: host memory
  uint64_t of_base = 0;    // where that begins
  bool kept = false;       // after its last use
  uint32_t users = 0;
  uint64_t used = 0;     // when last, in uses
  int node = -1;         // of NUMA, where its first page lies; -1: not asked, or not told
  bool ready = true;     // false: it is being registered
  bool failed = false;   // it could not be, which its holders have been told
  bool leaving = false;  // it is being given back
  Regions regions{};
  Keys local() const;
  Keys peer() const;
};

// Memory of a device, and the allocation that holds it.
struct DeviceRange {
  uint64_t address = 0, nbytes = 0, base = 0, extent = 0, buffer_id = 0;
  int node = -1;
  // Exports pages as a dma-buf, by any thread; empty: they are registered by their address.
  std::function<int(uint64_t address, uint64_t nbytes)> open;
};

struct RegistrationCounters {
  uint64_t made = 0, found = 0, evicted = 0, aside = 0, pinned_bytes = 0, of_devices = 0;
};

// What has become of a registration that was not ready.
struct Registered {
  uint32_t id = 0;
  int error = 0;  // errno: it could not be made; whoever holds it lets go of it
  std::string reason;
  bool of_device = false;
};

class Registrations {
 public:
  // More than this is registered aside: to wake a thread costs as much as to pin about so many bytes.
  static constexpr uint64_t kAside = 1 << 20;
  // More than this is given back aside where somebody waits for it: two threads are woken, then.
  static constexpr uint64_t kAsideAwaited = 4 << 20;

  // `by_node`: the rails are on several NUMA nodes, so that it matters where memory lies. `ring`: called by another
  // thread, take() has something. `failed`: likewise, that thread ends with an exception.
  Registrations(
      const Verbs& verbs, std::vector<ibv_pd*> domains, uint64_t keep_bytes, bool by_node = false,
      std::function<void()> ring = [] {}, std::function<void(const char* why)> failed = [](const char*) {});
  ~Registrations();
  // Registers the range, or finds a registration that holds it, ready or not. Throws LinkFailure.
  Registration& acquire(const std::byte* data, uint64_t nbytes, Access access);
  Registration& acquire_device(const DeviceRange& range, Access access);
  void forget_device(uint64_t base, uint64_t buffer_id);  // it was freed
  // Registrations that have become ready, or have failed, and are still held.
  std::vector<Registered> take();
  // Memory is being registered or given back: no rail may be forgotten now. If so, it rings once that is over.
  bool busy() { return registrar_.busy(); }
  bool release(uint32_t id);  // false: take_released has word of it once peers cannot write there any more
  std::vector<uint32_t> take_released();
  Registration* get(uint32_t id);
  // That rail's device is gone: nothing is registered with it any more.
  void forget_rail(size_t rail);
  const RegistrationCounters& counters() const { return counters_; }

 private:
  Registration* find(const std::byte* data, uint64_t nbytes, Access access, uint64_t buffer_id = 0);
  Registering job_for(std::byte* base, uint64_t nbytes, Access access);
  Registration& add(std::unique_ptr<Registration> fresh, Registering job);
  void forget_freed();
  bool drop(Registration& registration);  // false: as `release`
  void unlist(const Registration& registration);
  void free_slot(Registration& registration);
  void trim();

  const Verbs& verbs_;
  std::vector<ibv_pd*> domains_;  // null: gone
  const uint64_t keep_bytes_;
  const bool by_node_;
  uint64_t kept_bytes_ = 0, uses_ = 0, releases_ = 0;
  std::vector<std::unique_ptr<Registration>> slots_;  // id - 1
  std::vector<uint32_t> free_;
  std::multimap<uintptr_t, uint32_t> by_base_;
  RegistrationCounters counters_;
  Registrar registrar_;  // the last: its thread ends before what it works with
};

}  // namespace aiocomm::rdma
