// Host memory that peers share (PeerMemory), pinned here: copy engines read and write it without a bounce.
//
// Rules
//  * Pinning holds the driver's locks, for which launches and copies of this process wait: 2 ms for 16 MiB, 150 ms and more
//    for 1 GiB. So it is done by the helper in blocks of 16 MiB, those that messages have lain in, and is not waited for.
//  * The driver takes each block for an allocation of its own: no copy may reach over the end of one.
//  * Pages that nobody had touched are there afterwards, so no more than `limit` bytes are pinned.
//  * It ends before the memory is unmapped, by the reaper.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "core/device.hpp"
#include "core/peer_memory.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/mappings.hpp"

namespace aiocomm::cuda {

class PinnedMemory {
 public:
  PinnedMemory(const Driver& driver, MoverHost& host, Helper& helper, uint64_t limit)
      : driver_(driver), host_(host), helper_(helper), limit_(limit) {}
  struct Extent {
    uint64_t offset = 0, nbytes = 0;
    // Of these bytes only rows are meant: where they are written (`outgoing`), or else read.
    const RowList* rows = nullptr;
    bool outgoing = false;
  };
  // Under the token. True: all of these bytes are pinned. Else those that are not will be, as far as they can.
  bool covers(CUcontext context, const std::shared_ptr<PeerMemory>& memory, const Extent& extent);
  void clear();  // once nothing is copied any more, and the helper has stopped

 private:
  class Blocks;
  void pin_next(const std::shared_ptr<PeerMemory>& memory);

  const Driver& driver_;
  MoverHost& host_;
  Helper& helper_;
  const uint64_t limit_;
  const std::shared_ptr<std::atomic<uint64_t>> nbytes_ = std::make_shared<std::atomic<uint64_t>>(0);
  std::mutex mutex_;
  std::vector<std::weak_ptr<Blocks>> all_;
};

// What rows of memory that is pinned in blocks from `job.pinned_from` on consist of in each block, in order.
void cut_by_block(const MoveJob& job, const Rows& rows, const std::function<void(const Rows&)>& take);
// A copy that is no rows, from or to such memory.
int copy_in_blocks(const Driver& driver, const MoveJob& job, CUstream stream);

}  // namespace aiocomm::cuda
