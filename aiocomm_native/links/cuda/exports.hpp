// What other processes need to map memory of this one.
//
//  * cudaMalloc's memory has a legacy handle, which is bytes.
//  * VMM memory (torch's expandable segments) consists of blocks, each of which is exported as a descriptor. Others take
//    descriptors out of this process (pidfd_getfd), by a table that they read first: the kernel lets those do so that
//    may read its memory. The table begins with a number that is cleared before its descriptors are closed, and looked
//    at before and after they are taken: nobody takes a descriptor that means something else by now.
//  * A mapping elsewhere keeps freed memory from coming back, and so does a block's descriptor. The driver tells nobody of
//    a free, so what was exported is looked at from time to time (gone()): peers hear what is no longer there.
//  * Beyond a bound the blocks that were used longest ago are not exported any more.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/device.hpp"
#include "links/cuda/device.hpp"
#include "links/cuda/driver.hpp"

namespace aiocomm::cuda {

constexpr size_t kMostBlocks = 64;  // of one message

// In shared memory; what a place's handle names.
struct BlockTable {
  uint64_t number = 0;  // 0: no longer
  uint32_t count = 0;
  int32_t descriptors[kMostBlocks] = {};
  uint64_t sizes[kMostBlocks] = {};
};

// In DevicePlace::handle, where it is exported by descriptors.
struct BlockHandle {
  uint64_t number = 0;
  int32_t table = -1;
};

class Exports {
 public:
  // `made` is called for whatever was not exported before.
  Exports(const Driver& driver, std::function<void()> made) : driver_(driver), made_(std::move(made)) {}
  ~Exports() { clear(); }
  // A legacy handle of the allocation; false: it has none. Any thread.
  bool handle_of(const DevicePlace& place, const Device& owner, std::array<std::byte, 64>& handle);
  // Descriptors of the blocks that hold these bytes: `base`, `extent`, `buffer_id` and `handle` become theirs. False:
  // they are no such memory, or of too many blocks. Any thread.
  bool blocks_of(DevicePlace& place, uint64_t nbytes);
  void clear();
  bool empty();
  // Drops what its owner has freed, and says what it was. With a current context; any thread.
  std::vector<Gone> gone();

 private:
  struct Block {
    uint64_t base = 0, nbytes = 0, id = 0;
  };
  struct Exported {
    uint64_t buffer_id;
    bool possible;
    std::array<std::byte, 64> handle;
  };
  struct Blocks {
    ~Blocks();
    uint64_t number = 0, id = 0;
    std::vector<Block> blocks;
    int table = -1;
    BlockTable* shared = nullptr;
    std::list<uint64_t>::iterator age;
  };
  bool find_blocks(uint64_t address, uint64_t nbytes, std::vector<Block>& out) const;
  bool is_there(const Block& block) const;
  std::unique_ptr<Blocks> make(std::vector<Block> blocks, uint64_t id);
  void drop(uint64_t base);
  std::vector<Gone> drop_unmapped(std::unique_lock<std::mutex>& lock);
  void make_room(size_t count);

  const Driver& driver_;
  const std::function<void()> made_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Exported> exported_;                // by base
  std::unordered_map<uint64_t, std::unique_ptr<Blocks>> by_base_;  // of the first block
  std::list<uint64_t> ages_;                                       // used longest ago first
  size_t descriptors_ = 0;
};

}  // namespace aiocomm::cuda
