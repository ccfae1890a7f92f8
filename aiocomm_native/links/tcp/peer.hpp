// One pair over TCP: an express lane for frames in order, an engine lane that wakes the other side's engine,
// and bulk lanes for payloads, of which one is kept for what is more urgent than the rest.
//
// Rules
//  * Every frame but `data` goes over the express lane, which the receiver's event loop watches: a small
//  message wakes
//    one thread. For `Wake::engine` a poke follows on the engine lane; it carries the express lane's
//    position, and the receiver's engine reads the express lane up to there, so that a busy event loop holds
//    nothing up.
//  * A lane that ends says only that the peer is gone. What it had said before is on the express lane, so
//  that one is
//    read to its end first; after kLinger without an end the pair is lost all the same.
//  * Heartbeats travel on the engine lane, which is read whatever the peer's event loop does.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/link.hpp"
#include "links/tcp/bulk_lane.hpp"
#include "links/tcp/frame_lane.hpp"
#include "links/tcp/pace.hpp"

namespace aiocomm::tcp {

class TcpPeer final : public LinkPeer, public std::enable_shared_from_this<TcpPeer> {
 public:
  // The first stream is the express lane, the second the engine's, the others carry payloads: the last one only those of
  // classes above normal, which take the others, too, while there is nothing else.
  TcpPeer(Host& host, Rank rank, uint64_t generation, std::vector<std::unique_ptr<Stream>> streams);
  ~TcpPeer() override { shut(); }
  void start() override;

  Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) override;
  uint64_t frame_limit() const override;
  Post post_data(const FrameHeader& header, const std::byte* payload, uint8_t cls) override;
  uint64_t best_chunk() const override { return pace_.chunk(); }
  uint64_t unsent() const override;
  bool let_go(OpId sop) override;
  void tick(uint64_t now_ns) override;
  // Within a host the kernel tells of every death, and an idle pair costs nothing.
  bool needs_ticks() const override { return !dead_ && (ending_ || !same_host_); }
  void close() override;

  // For the lanes.
  Host& host() { return host_; }
  FrameSink& sink() { return host_.sink(); }
  bool dead() const { return dead_; }
  void heard() { heard_ns_ = host_.now(); }
  void said() { said_ns_ = host_.now(); }
  Pace& pace() { return pace_; }
  const char* check(const FrameLane& lane,
                    const FrameHeader& header) const;  // what is wrong with it, or nullptr
  const char* check_data(const FrameHeader& header) const;
  void frame(FrameLane& lane, const FrameHeader& header, const std::byte* meta, const std::byte* payload);
  void drained(FrameLane& lane);
  void bulk_room();
  void ended(Lane& lane, int error, bool reading);
  void lose(const std::string& reason);

 private:
  void shut();
  void poke();
  std::string refusal(const Lane& but);  // what another lane tells
  void each_lane(auto&& f) {
    f(static_cast<Lane&>(express_));
    f(static_cast<Lane&>(engine_));
    for (auto& lane : bulk_) f(static_cast<Lane&>(*lane));
  }

  Host& host_;
  const uint64_t heartbeat_ns_;
  const bool same_host_;
  bool dead_ = false, ending_ = false;
  bool express_blocked_ = false, bulk_blocked_ = false, poke_owed_ = false;
  uint64_t heard_ns_, said_ns_, ticked_ns_, ending_ns_ = 0;
  std::string ending_reason_;
  Pace pace_;
  FrameLane express_, engine_;
  std::vector<std::unique_ptr<BulkLane>> bulk_;
  size_t shared_;          // of them, by the lower classes
  uint64_t lower_ns_ = 0;  // when these last had something
};

}  // namespace aiocomm::tcp
