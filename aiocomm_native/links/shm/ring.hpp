// A one-way ring of frames in shared memory: one producing process, one consuming process.
//
// Layout: records start on 64-byte lines; a record is a FrameHeader, its metadata and its payload, contiguous. Where a
// record would not fit before the end of the ring, a skip record fills the rest. `tail` and `head` count bytes and
// only grow.
//
// The consumer does not trust the producer: it copies a header out before it looks at it, and checks its extent.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/frame.hpp"

namespace aiocomm::shm {

struct RingControl {
  alignas(64) std::atomic<uint64_t> tail{0};         // the producer releases, the consumer acquires
  alignas(64) std::atomic<uint64_t> head{0};         // the consumer releases, the producer acquires
  alignas(64) std::atomic<uint32_t> wants_space{0};  // the producer waits for room and is to be woken
};

constexpr uint64_t kLine = 64;
constexpr uint64_t align_up(uint64_t n) { return (n + kLine - 1) & ~(kLine - 1); }

class Producer {
 public:
  void open(RingControl* control, std::byte* bytes, uint64_t capacity) {
    control_ = control;
    bytes_ = bytes;
    capacity_ = capacity;
  }

  // Room for one record, or nullptr. Nothing is seen by the consumer before commit().
  std::byte* reserve(uint64_t record_bytes) {
    uint64_t need = align_up(record_bytes);
    uint64_t at = tail_ & (capacity_ - 1);
    uint64_t skip = capacity_ - at < need ? capacity_ - at : 0;
    if (tail_ + skip + need - head_ > capacity_ && room() < skip + need) return nullptr;
    if (skip) {
      FrameHeader filler{};
      filler.kind = FrameKind::link_private;
      filler.payload_bytes = static_cast<uint32_t>(skip - sizeof filler);
      std::memcpy(bytes_ + at, &filler, sizeof filler);
      tail_ += skip;
      at = 0;
    }
    reserved_ = need;
    return bytes_ + at;
  }

  void commit() {
    tail_ += reserved_;
    control_->tail.store(tail_, std::memory_order_release);  // pairs with Consumer::peek
  }

  uint64_t room() {
    uint64_t head = control_->head.load(std::memory_order_acquire);  // pairs with Consumer::release
    if (tail_ - head > tail_ - head_) return 0;  // a head that goes back or ahead of us is a lie
    head_ = head;
    return capacity_ - (tail_ - head_);
  }
  uint64_t capacity() const { return capacity_; }

  bool roomy() { return room() >= capacity_ / 2; }

  // Asks to be woken when half of the ring is free; true: it is by now.
  bool wait_for_room() {
    control_->wants_space.store(1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // pairs with Consumer::release
    return roomy();
  }

 private:
  RingControl* control_ = nullptr;
  std::byte* bytes_ = nullptr;
  uint64_t capacity_ = 0, tail_ = 0, head_ = 0, reserved_ = 0;
};

class Consumer {
 public:
  void open(RingControl* control, const std::byte* bytes, uint64_t capacity) {
    control_ = control;
    bytes_ = bytes;
    capacity_ = capacity;
  }

  // The next record's header and body; false: nothing there. `broken` if the record makes no sense.
  bool peek(FrameHeader& header, const std::byte*& body, bool& broken) {
    for (;;) {
      if (head_ == seen_) {
        seen_ = control_->tail.load(std::memory_order_acquire);  // pairs with Producer::commit
        if (head_ == seen_) return false;
        if (seen_ - head_ > capacity_ || (seen_ & (kLine - 1))) return broken = true;
      }
      uint64_t at = head_ & (capacity_ - 1);
      std::memcpy(&header, bytes_ + at, sizeof header);
      uint64_t extent = align_up(sizeof header + header.meta_bytes + uint64_t{header.payload_bytes});
      if (extent > seen_ - head_ || extent > capacity_ - at) return broken = true;
      extent_ = extent;
      body = bytes_ + at + sizeof header;
      if (header.kind != FrameKind::link_private) return true;
      head_ += extent;
    }
  }

  void pop() { head_ += extent_; }

  // Gives consumed room back; true: the producer is to be woken.
  bool release() {
    if (released_ == head_) return false;
    released_ = head_;
    control_->head.store(head_, std::memory_order_release);  // pairs with Producer::reserve
    std::atomic_thread_fence(std::memory_order_seq_cst);     // pairs with Producer::wait_for_room
    if (!control_->wants_space.load(std::memory_order_relaxed)) return false;
    // Waking for less would hand the producer one record's room at a time.
    if (control_->tail.load(std::memory_order_relaxed) - head_ > capacity_ / 2) return false;
    return control_->wants_space.exchange(0, std::memory_order_relaxed) != 0;
  }

 private:
  RingControl* control_ = nullptr;
  const std::byte* bytes_ = nullptr;
  uint64_t capacity_ = 0, head_ = 0, seen_ = 0, released_ = 0, extent_ = 0;
};

}  // namespace aiocomm::shm
