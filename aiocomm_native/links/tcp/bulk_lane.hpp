// A lane of `data` frames: payloads go from the sender's buffer into the receiver's, without a copy of ours
// between.
//
// The kernel's copies are made by the engine's thread and without the token, so that an urgent message waits for none of
// them. While it is at one (`busy_`), a post only queues, and close() waits for the call to return: it is of one turn at
// most, and afterwards nothing touches anybody's buffer.
//
// Two frames at most are accepted: one that is being written and one behind it, so that the socket never runs
// dry while the scheduler is asked for more. Their payloads stay the caller's until they are in the kernel.
#pragma once

#include <atomic>

#include "links/tcp/lane.hpp"
#include "links/tcp/pace.hpp"
#include "links/tcp/splice.hpp"

namespace aiocomm::tcp {

class BulkLane final : public Lane {
  struct Outgoing {
    FrameHeader header;
    const std::byte* payload;
    uint64_t done = 0;                      // of header and payload
    std::unique_ptr<std::byte[]> own = {};  // the payload, once its owner has given the message up
    uint64_t left() const { return sizeof header + header.payload_bytes - done; }
  };

 public:
  BulkLane(TcpPeer& peer, std::unique_ptr<Stream> stream, Splice splice);
  Post post(const FrameHeader& header, const std::byte* payload);
  bool full() const { return count_ == kFrames; }
  uint64_t queued() const { return queued_; }  // bytes accepted and not yet in the kernel
  bool let_go(OpId sop);                       // copies what it has of that message

 private:
  void readable() override;
  // Spliced pages may wait unread at the peer while their owner uses them again: a reset keeps it from reading them.
  bool aborts() const override { return spliced_; }
  void quiesce() override { busy_.wait(true, std::memory_order_acquire); }
  template <typename Call>
  Io outside(Call call);
  Io write_some(const Outgoing& frame, uint64_t turn);
  void writable() override;
  bool wrote(const Io& io);  // of the front frame; false: no more of it now
  Outgoing pop();
  void measure(uint64_t nbytes);
  void wait_for_more();
  std::byte* scrap();

  static constexpr int kFrames = 2;
  Outgoing out_[kFrames];
  int count_ = 0;
  uint64_t queued_ = 0;
  uint64_t run_ = 0;      // bytes sent since it was last idle
  uint64_t sent_ns_ = 0;  // when the latest frame was
  uint64_t unsent_ = Pace::kUnsentMost;
  bool spliced_ = false;
  std::atomic<bool> busy_{false};
  SpliceSender splice_;

  FrameHeader in_{};    // of the payload that is coming
  FrameHeader next_{};  // of the frame after it, as far as it has come
  size_t head_ =
      0;  // bytes of `next_` that have arrived; all of them: it is `in_`, and its payload is coming
  uint64_t done_ = 0;  // bytes of its payload that have arrived
  int low_water_ = 1;
  std::unique_ptr<std::byte[]> scrap_;
};

}  // namespace aiocomm::tcp
