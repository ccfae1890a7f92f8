#include "core/fair_queue.hpp"

#include <algorithm>

namespace aiocomm {

void FairQueue::enter(FairNode& node) {
  node.start_ = std::max(node.start_, now());
  re_enter(node);
}

void FairQueue::resume(FairNode& node, uint64_t credit) {
  node.start_ = std::max(node.start_, now() - static_cast<VirtualTime>(credit));
  re_enter(node);
}

void FairQueue::re_enter(FairNode& node) {
  heap_.push_back(&node);
  sift_up(heap_.size() - 1, &node);
}

void FairQueue::leave(FairNode& node) {
  const size_t at = node.position_;
  node.position_ = FairNode::kOut;
  FairNode* filler = heap_.back();
  heap_.pop_back();
  if (filler == &node) return;
  sift_down(at, filler);
  sift_up(filler->position_, filler);
}

void FairQueue::charge(FairNode& node, uint64_t cost) {
  node.start_ += cost;
  furthest_ = std::max(furthest_, node.start_);
  if (node.queued()) sift_down(node.position_, &node);
}

void FairQueue::refund(FairNode& node, uint64_t cost) {
  node.start_ -= cost;
  if (node.queued()) sift_up(node.position_, &node);
}

void FairQueue::place(size_t at, FairNode* node) noexcept {
  heap_[at] = node;
  node->position_ = static_cast<uint32_t>(at);
}

void FairQueue::sift_up(size_t at, FairNode* node) noexcept {
  for (; at > 0; at = (at - 1) / 2) {
    FairNode* parent = heap_[(at - 1) / 2];
    if (!before(*node, *parent)) break;
    place(at, parent);
  }
  place(at, node);
}

void FairQueue::sift_down(size_t at, FairNode* node) noexcept {
  for (size_t child = 2 * at + 1; child < heap_.size(); child = 2 * at + 1) {
    if (child + 1 < heap_.size() && before(*heap_[child + 1], *heap_[child])) ++child;
    if (!before(*heap_[child], *node)) break;
    place(at, heap_[child]);
    at = child;
  }
  place(at, node);
}

}  // namespace aiocomm
