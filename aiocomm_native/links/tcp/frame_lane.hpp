// A lane of small frames: every frame that is not `data` goes over one of these, copied in and out.
#pragma once

#include <memory>
#include <vector>

#include "links/tcp/lane.hpp"

namespace aiocomm::tcp {

class FrameLane final : public Lane {
 public:
  using Lane::Lane;
  // Takes the frame whole. Call only while idle(): what the socket refuses is kept here, so never more than
  // one frame.
  bool send(const FrameHeader& header, const std::byte* meta, const std::byte* payload);
  bool idle() const { return backlog_at_ == backlog_.size() && open(); }
  uint64_t sent() const { return sent_; }  // position in the outgoing stream, after the last frame taken
  uint64_t received() const { return received_; }  // position in the incoming stream
  // The peer wants the engine to have read up to here.
  void chase(uint64_t position);
  void chase_end();
  // Before the pair is closed from here: hands the kernel what it would not take before, so that the peer still gets it.
  void part();

 private:
  void readable() override;
  void writable() override;
  bool parse();  // false: the pair has ended
  void reserve(size_t nbytes);
  bool chasing() const { return received_ < chase_until_; }

  static constexpr size_t kBuffer = 128 << 10;  // grows for a frame that is larger, and goes back
  std::unique_ptr<std::byte[]> buffer_;
  size_t capacity_ = 0, begin_ = 0, end_ = 0;
  uint64_t received_ = 0, sent_ = 0, chase_until_ = 0;
  std::vector<std::byte> backlog_;
  size_t backlog_at_ = 0;
};

}  // namespace aiocomm::tcp
