// A lane of `data` frames: payloads go from the sender's buffer into the receiver's, without a copy of ours
// between.
//
// Two frames at most are accepted: one that is being written and one behind it, so that the socket never runs
// dry while the scheduler is asked for more. Their payloads stay the caller's until they are in the kernel.
#pragma once

#include "links/tcp/lane.hpp"
#include "links/tcp/splice.hpp"

namespace aiocomm::tcp {

class BulkLane final : public Lane {
 public:
  BulkLane(TcpPeer& peer, std::unique_ptr<Stream> stream, Splice splice);
  Post post(const FrameHeader& header, const std::byte* payload);
  bool full() const { return count_ == kFrames; }
  uint64_t queued() const { return queued_; }  // bytes accepted and not yet in the kernel
  bool spliced() const { return spliced_; }

 private:
  void readable() override;
  struct Outgoing {
    FrameHeader header;
    const std::byte* payload;
    uint64_t done;  // of header and payload
    uint64_t left() const { return sizeof header + header.payload_bytes - done; }
  };
  void writable() override;
  bool write_front(uint64_t turn);  // true: the front frame is in the kernel
  Outgoing pop();
  void wait_for_more();
  std::byte* scrap();

  static constexpr int kFrames = 2;
  Outgoing out_[kFrames];
  int count_ = 0;
  uint64_t queued_ = 0;
  bool spliced_ = false;
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
