// Host memory that stands for device memory.
//
//  * A device address is a reservation without access: a processor that reads it dies, as on the real thing. The bytes
//    lie in memfds, mapped elsewhere; `Memory::pieces` translates.
//  * cudaMalloc's memory is cut from one memfd per device, lowest address first, so that freed addresses come back at
//    once. Each allocation has a slot in the process's control page: alive while the slot holds its generation. Other
//    processes open both by /proc/<pid>/fd.
//  * A VMM allocation is a memfd of its own, whose last page says whether its owner still holds it.
//  * Freed bytes are overwritten, fresh ones too.
// Everything is called under the simulator's lock.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "abi.hpp"

namespace fake {

constexpr size_t kPage = 4096, kGranularity = 2 << 20, kSlots = 1 << 16, kEvents = 1 << 13;
constexpr uint64_t kMagic = 0x4145'4b46'4143'5544;

// First-fit over a span, lowest address first.
class FirstFit {
 public:
  explicit FirstFit(uint64_t size) { free_[0] = size; }
  std::optional<uint64_t> take(uint64_t size, uint64_t align);
  void give(uint64_t at, uint64_t size);

 private:
  std::map<uint64_t, uint64_t> free_;
};

// A memfd and its mapping.
struct Backing {
  ~Backing();
  static std::shared_ptr<Backing> make(size_t size);
  static std::shared_ptr<Backing> open(int fd, uint64_t offset,
                                       size_t size);  // takes over fd; nullptr: refused
  std::byte* bytes = nullptr;
  size_t size = 0;
  int fd = -1;
};

struct EventCell {  // of an interprocess event
  std::atomic<uint64_t> generation{0}, recorded{0}, completed{0};
};
struct Control {
  uint64_t magic;
  std::atomic<uint64_t> alive[kSlots];
  EventCell events[kEvents];
};
struct Trailer {  // last page of a VMM allocation's memfd
  uint64_t magic, size;
  int device;
  std::atomic<uint64_t> alive;
};

struct Physical {  // one cuMemCreate, or its import
  std::shared_ptr<Backing> backing;
  size_t size;
  int device;
  bool exportable, imported = false;
  uint64_t id;
  int references = 1;
  Trailer* trailer;
};

enum class Origin { malloc, pool, managed, vmm, imported, pinned, registered };

struct Pool;

struct Range {
  uint64_t start;
  size_t size;
  std::byte* bytes;
  std::shared_ptr<Backing> backing;
  Origin origin;
  int device;  // where it lies; of host memory: the context's that made it
  uint64_t id;
  CUcontext context;
  uint64_t handle = 0;  // of a VMM range
  uint64_t access = 0;  // devices that cuMemSetAccess named
  int opener = -1;      // of an imported range: the device that was current
  bool lazy_peer = false;
  int opened = 0;
  int32_t slot = -1;
  uint64_t offset = 0;  // in its arena
  Pool* pool = nullptr;
  std::string key;  // of an imported range: its handle
  const std::atomic<uint64_t>* alive = nullptr;
  uint64_t expected = 1;
  int pending = 0;  // queued operations that name it

  bool on_host() const { return origin == Origin::pinned || origin == Origin::registered; }
  bool stale() const { return alive && alive->load(std::memory_order_acquire) != expected; }
};
using RangePtr = std::shared_ptr<Range>;

struct Arena {  // from which allocations are cut
  std::shared_ptr<Backing> backing;
  uint64_t address = 0;
  std::unique_ptr<FirstFit> free;
};

struct Pool {
  int device;
  bool exportable, is_default;
  Arena* arena;
  std::unique_ptr<Arena> own;  // of an exportable pool
  uint64_t used = 0;
  uint64_t threshold = 0;
  bool imported = false;
};

struct Piece {
  std::byte* bytes;
  size_t size;
  RangePtr range;  // nullptr: pageable host memory
};

class Memory {
 public:
  Memory(int devices, size_t capacity);

  CUresult allocate(int device, size_t nbytes, Origin origin, CUcontext context, Pool* pool,
                    CUdeviceptr* out);
  CUresult release(const RangePtr& range);
  CUresult host(size_t nbytes, int device, CUcontext context, void** out);
  CUresult pin(void* at, size_t nbytes, int device, CUcontext context);
  void forget(const RangePtr& range);  // a mapping ends, its bytes stay

  RangePtr find(uint64_t address) const;
  RangePtr find_import(const std::string& key) const;
  bool in_device_space(uint64_t address) const { return address >= base_ && address < base_ + span_; }
  // Translates; false: part of it is not mapped.
  bool pieces(uint64_t address, size_t nbytes, std::vector<Piece>& out) const;

  std::optional<uint64_t> reserve(size_t nbytes, size_t align);
  CUresult unreserve(uint64_t address, size_t nbytes);
  std::optional<std::pair<uint64_t, size_t>> reservation(uint64_t address) const;
  void add(const RangePtr& range) { ranges_[range->start] = range; }
  CUresult map(uint64_t address, uint64_t handle, const std::shared_ptr<Physical>& physical,
               CUcontext context);

  uint64_t fresh_id() { return ++ids_; }
  size_t used(int device) const { return used_[device]; }
  size_t capacity() const { return capacity_; }
  bool charge(int device, size_t nbytes);
  void discharge(int device, size_t nbytes) { used_[device] -= nbytes; }
  Control& control() { return *control_; }
  int control_fd() const { return control_backing_->fd; }
  Arena& arena(int device) { return arenas_[device]; }
  std::unique_ptr<Arena> make_arena(size_t size);
  size_t count(Origin origin) const;

 private:
  uint64_t base_, span_, reserved_from_;
  size_t capacity_;
  std::vector<Arena> arenas_;
  std::vector<size_t> used_;
  FirstFit reservations_free_;
  std::map<uint64_t, size_t> reservations_;
  std::map<uint64_t, RangePtr> ranges_;
  std::shared_ptr<Backing> control_backing_;
  Control* control_;
  std::vector<int32_t> slots_;
  uint64_t ids_ = 0;
};

void poison(std::byte* bytes, size_t size, int value);

}  // namespace fake
