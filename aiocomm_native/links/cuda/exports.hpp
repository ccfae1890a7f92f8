// What other processes need to map memory of this one.
//
//  * cudaMalloc's memory has a legacy handle, which is bytes.
//  * VMM memory (torch's expandable segments) consists of blocks, each of which is exported as a descriptor. Others take
//    descriptors out of this process (pidfd_getfd), by a table that they read first: the kernel lets those do so that
//    may read its memory. The table begins with a number that is cleared before its descriptors are closed, and looked
//    at before and after they are taken: nobody takes a descriptor that means something else by now.
//  * A block is exported once, whatever tables it is in. Messages whose blocks follow each other in a table share it;
//    others have one of their own, and peers map some blocks several times.
//  * A mapping elsewhere keeps freed memory from coming back, and so does a block's descriptor. The driver tells nobody of
//    a free, so what was exported is looked at from time to time (gone()): peers hear what is no longer there.
//  * Beyond a bound the tables that were used longest ago are given up; peers then hear of it as if it were freed.
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
  struct Descriptor {
    explicit Descriptor(size_t& all) : live(all) { ++live; }
    ~Descriptor();
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int fd = -1;
    size_t& live;
  };
  struct Block {
    uint64_t base = 0, nbytes = 0, id = 0;
    std::shared_ptr<const Descriptor> descriptor = {};
    bool operator==(const Block& other) const {
      return base == other.base && nbytes == other.nbytes && id == other.id;
    }
  };
  struct Exported {
    uint64_t buffer_id;
    bool possible;
    std::array<std::byte, 64> handle;
  };
  struct Table {
    Table() = default;
    ~Table();
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;
    Gone memory() const { return {blocks.front().base, number}; }
    uint64_t number = 0;
    std::vector<Block> blocks;
    int fd = -1;
    BlockTable* shared = nullptr;
  };
  bool find_blocks(uint64_t address, uint64_t nbytes, std::vector<Block>& out) const;
  bool fill(Table& table, std::vector<Block> blocks);
  bool export_block(Block& block);
  void drop_unmapped(std::unique_lock<std::mutex>& lock, std::vector<Gone>& gone);
  void make_room();

  const Driver& driver_;
  const std::function<void()> made_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Exported> exported_;  // by base
  size_t descriptors_ = 0;                           // of blocks
  std::list<Table> tables_;                          // used longest ago first
  std::vector<Gone> given_up_;                       // of which peers are to hear
};

}  // namespace aiocomm::cuda
