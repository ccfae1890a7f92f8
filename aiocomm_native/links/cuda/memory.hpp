// Device memory of this process as the driver describes it, and the host memory through which it is staged.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "core/device.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/refusal.hpp"

namespace aiocomm::cuda {

// The caller's mistake, said as such.
struct DeviceUsage : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// What the driver says of an address.
struct Allocation {
  int device = 0;
  uint64_t base = 0, extent = 0, buffer_id = 0;
  bool ipc = false;    // a legacy handle can be had
  bool fresh = false;  // not asked for shortly before
};

// Throws DeviceUsage where it is not memory that can be moved, LinkFailure where the driver fails.
Allocation look_up(const Driver& driver, uint64_t address, uint64_t nbytes);

// Pinned host memory in sizes of powers of two, kept for the next message; beyond a bound, ordinary memory.
class Bounces {
 public:
  Bounces(const Driver& driver, uint64_t limit) : driver_(driver), limit_(limit) {}
  std::function<void()> give_up();    // what gives back all that is pinned, in a current context
  std::byte* take(uint64_t nbytes);   // at hand; nullptr: see make()
  std::byte* plain(uint64_t nbytes);  // ordinary memory, at once; nullptr: none left
  bool may_pin(uint64_t nbytes);      // whether make() is worth a try
  std::byte* make(uint64_t nbytes);   // pinned; takes milliseconds, in a current context; nullptr: refused
  void give_back(std::byte* memory);

 private:
  enum class Kind : uint8_t { plain, pinned, registered };
  struct Block {
    uint64_t nbytes;
    Kind kind;
  };
  void* make_huge(uint64_t size);
  const Driver& driver_;
  const uint64_t limit_;
  std::mutex mutex_;
  uint64_t pinned_ = 0;
  Refusal refusal_;                     // the system pins no more for now
  std::map<std::byte*, Block> blocks_;  // in use and free
  std::map<uint64_t, std::vector<std::byte*>> free_;
};

// Device memory that other processes can map, in sizes of powers of two, kept for the next message.
class Relays {
 public:
  Relays(const Driver& driver, uint64_t limit) : driver_(driver), limit_(limit) {}
  std::function<void()> give_up();                             // what frees all at hand, in a current context
  uint64_t take(int device, uint64_t nbytes, uint64_t& size);  // at hand; 0: see make()
  bool may_make(int device, uint64_t nbytes);
  void make(int device, uint64_t nbytes);  // puts one at hand; takes milliseconds, in a context of the device
  void give_back(int device, uint64_t memory, uint64_t size);

 private:
  struct Pool {
    uint64_t made = 0;
    Refusal refusal;
    std::map<uint64_t, std::vector<uint64_t>> free;
  };
  const Driver& driver_;
  const uint64_t limit_;  // bytes per device
  std::mutex mutex_;
  std::map<int, Pool> pools_;
};

}  // namespace aiocomm::cuda
