// Start-time fair queueing over embedded nodes (Goyal, Vin, Cheng: "Start-Time Fair Queuing", SIGCOMM 1996),
// with the virtual time taken as the least start tag of the backlogged nodes.
//
// Tags are integers, so that refund() undoes charge() exactly, and the order (tag, rank) is total, so that
// nothing depends on history. When the last node leaves, the virtual time jumps past every tag given out: all
// start the next busy period equal, and nobody carries credit or debt over.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace aiocomm {

class FairNode {
 public:
  explicit FairNode(uint64_t rank) : rank_(rank) {}
  bool queued() const noexcept { return position_ != kOut; }

 private:
  friend class FairQueue;
  static constexpr uint32_t kOut = UINT32_MAX;
  __extension__ using VirtualTime = __int128;  // 64 bits of weighted bytes would wrap within hours

  VirtualTime start_ = 0;
  uint64_t rank_;  // breaks ties
  uint32_t position_ = kOut;
};

class FairQueue {
 public:
  bool empty() const noexcept { return heap_.empty(); }
  size_t size() const noexcept { return heap_.size(); }
  FairNode* top() const noexcept { return heap_.front(); }

  // Becomes backlogged: starts no earlier than where the others stand now.
  void enter(FairNode& node);
  // Was backlogged and could not be served: keeps its place, but for what it lags by more than `credit`. Nodes that lost
  // theirs each time that the transport is full would be served in turns, whatever the weights.
  void resume(FairNode& node, uint64_t credit);
  // Becomes backlogged by a refund: keeps its start tag.
  void re_enter(FairNode& node);
  void leave(FairNode& node);
  // `cost` = bytes served / weight, in any fixed unit. The node may be queued or not.
  void charge(FairNode& node, uint64_t cost);
  void refund(FairNode& node, uint64_t cost);

 private:
  using VirtualTime = FairNode::VirtualTime;

  static bool before(const FairNode& a, const FairNode& b) noexcept {
    return a.start_ != b.start_ ? a.start_ < b.start_ : a.rank_ < b.rank_;
  }
  void place(size_t at, FairNode* node) noexcept;
  void sift_up(size_t at, FairNode* node) noexcept;
  void sift_down(size_t at, FairNode* node) noexcept;

  std::vector<FairNode*> heap_;
  VirtualTime now() const noexcept { return heap_.empty() ? furthest_ : heap_.front()->start_; }

  VirtualTime furthest_ = 0;  // at least every start tag given out
};

}  // namespace aiocomm
