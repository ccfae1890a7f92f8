// How a small frame stands in a ring of slots that the peer writes: at the slot's end, its mark last.
//
// The reader looks at marks: one that is not zero says how long the frame is, and carries a checksum of it and of its
// number, so that no order in which the bytes come to be seen is relied on. It clears the mark before it gives the slot
// back.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace aiocomm::rdma {

class Ring {
 public:
  static constexpr size_t kSlotBytes = 256;
  using Mark = uint64_t;  // low half: checksum; then the bytes of the frame
  static constexpr size_t kMostBytes = kSlotBytes - sizeof(Mark);

  // Where in a ring of `slots` a frame of this length begins, its mark being appended.
  static size_t offset(uint32_t seq, uint32_t slots, size_t nbytes) {
    return (seq % slots + 1) * kSlotBytes - sizeof(Mark) - nbytes;
  }

  static Mark mark(uint32_t seq, const std::byte* frame, size_t nbytes) {
    uint64_t sum = (seq + 1) * kFactor;
    for (size_t at = 0; at < nbytes; at += sizeof(uint64_t)) {
      uint64_t word = 0;
      std::memcpy(&word, frame + at, nbytes - at < sizeof word ? nbytes - at : sizeof word);
      sum = (sum ^ word) * kFactor;
      sum ^= sum >> 29;
    }
    return (sum >> 32) | static_cast<Mark>(nbytes) << 32;
  }

  // The frame that lies in `slot`, copied: peers may write there at any time. 0: none, or not all of it as yet.
  static size_t take(std::byte* slot, uint32_t seq, std::byte (&frame)[kSlotBytes]) {
    std::atomic_ref<Mark> place(*reinterpret_cast<Mark*>(slot + kSlotBytes - sizeof(Mark)));
    const Mark found = place.load(std::memory_order_acquire);
    const size_t nbytes = found >> 32;
    if (!nbytes || nbytes > kMostBytes) return 0;
    std::memcpy(frame, slot + kMostBytes - nbytes, nbytes);
    if (mark(seq, frame, nbytes) != found) return 0;
    place.store(0, std::memory_order_relaxed);
    return nbytes;
  }

  static bool waits(const std::byte* slot) {
    Mark found;
    std::memcpy(&found, slot + kMostBytes, sizeof found);
    return found != 0;
  }

 private:
  static constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
};

}  // namespace aiocomm::rdma
