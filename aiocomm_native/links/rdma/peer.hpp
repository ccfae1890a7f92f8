// One pair over RDMA: frames in order over one of its lanes, bulk over all of them.
//
// Rules
//  * The pair's socket carries the handshake (numbers of queue pairs), then signs of life; its end is the pair's end.
//  * Queue pairs are connected by other threads (connector.hpp).
//  * Frames carry a sequence number and are kept until the peer's device has acknowledged them: when a lane fails, those
//    go out again over another, and the receiver drops what it has had.
//  * A lane that fails is closed on both sides before its chunks go out again: what the wire still carries of them
//    cannot be written late. recovery.cpp has that, and how it comes back.
//  * A frame needs a credit; each frame tells how many of the peer's were consumed here. The last kReserve credits are
//    for frames that only tell this.
//  * Small frames for a loop that spins are written to where it looks, instead of being sent: ring.cpp.
//  * What pollers report waits in the inbox for the token's holder.
//  * Nothing that a peer sends is trusted: what makes no sense ends this pair.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/link.hpp"
#include "links/rdma/acks.hpp"
#include "links/rdma/connector.hpp"
#include "links/rdma/rail.hpp"
#include "links/rdma/registrations.hpp"
#include "links/rdma/ring.hpp"
#include "links/rdma/silence.hpp"

namespace aiocomm::rdma {

class RdmaLink;
class RdmaPeer;
struct Head;

// One rail of a pair.
struct Lane final : Completions {
  // failed: closed here; its chunks wait until the peer has closed its end, too. down: nothing of it is left.
  // probing: there again, and tried out.
  enum class State : uint8_t { connecting, up, failed, down, probing };

  Lane(RdmaPeer& owner, Rail& over, uint32_t which) : peer(owner), rail(over), index(which) {}
  std::string name() const;  // for events
  void arrived(uint32_t slot, uint32_t nbytes, const std::byte* data) override;
  void immediate(uint32_t value, uint32_t nbytes) override;
  void frame_sent(uint32_t seq) override;
  void chunk_posted() override;
  void chunk_done(uint32_t chunk, int error) override;
  void failed(const std::string& reason) override;
  bool expects() const override;
  bool moves() const override;
  void look(uint64_t now_ns) override;
  void attend() override;

  RdmaPeer& peer;
  Rail& rail;
  const uint32_t index;
  Address theirs;
  QueuePairs pairs;
  std::shared_ptr<Connecting> connecting;  // those pairs; null: no thread is at them
  std::string lacks;                       // why it was not there when the pair was made
  std::mutex posting;
  Silence silence;                        // under `posting`
  std::atomic<uint32_t> outstanding{0};   // chunks posted, for the poller
  std::atomic<uint64_t> last_sign_ns{0};  // when something was posted to an idle lane, or completed
  std::atomic<bool> stalled{false};
  State state = State::connecting;  // under the token, as what follows
  bool reachable = true;            // false: its ports have never met, and are not tried again
  uint32_t requests = 0;            // in flight
  std::atomic<uint64_t> bytes{0};
  double rate = 1.0;  // bytes per ns, of late
  uint64_t last_done_ns = 0;
};

class RdmaPeer final : public LinkPeer, public Pollable, public std::enable_shared_from_this<RdmaPeer> {
 public:
  RdmaPeer(RdmaLink& link, Rank rank, uint64_t generation, int socket, bool initiator);
  ~RdmaPeer() override;
  void open(const std::vector<Address>& theirs);  // throws LinkFailure
  void start() override;

  Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) override;
  // What neither side's device can reach (it lies in a GPU) comes in frames, as credits allow; one chunk at a time.
  Post post_data(const FrameHeader& header, const std::byte* payload, uint8_t cls) override;
  uint64_t unsent() const override {
    return streamed_.payload ? streamed_.header.payload_bytes - streamed_.done : 0;
  }
  Post post_remote(const RemoteChunk& chunk) override;
  bool takes_offers() const override { return true; }
  bool reaches_regions() const override { return true; }
  uint64_t frame_limit() const override { return kFrameMax; }
  int poll(int budget) override;
  int poll_last(int budget) override;
  int poll_spinning(int budget) override;
  int poll_told(int budget) override {
    return has_inbox_.load(std::memory_order_acquire) || (ring_ && Ring::waits(ring_slot())) ? poll(budget)
                                                                                             : 0;
  }
  void loop_sleeps() override;
  Path pull_path(const Location&) override { return Path::read; }
  void expect_writes(bool due) override;
  void tick(uint64_t now_ns) override;
  bool needs_ticks() const override { return !dead_; }
  void close() override;

  void on_ready(uint32_t events) override;
  void connected(const Connecting& job);  // or not: by the link

 private:
  friend struct Lane;
  static constexpr uint32_t kHello = 0x52494f41, kVersion = 3;  // "AIOR"
  // Words on the socket; those of a lane are followed by its number, and two of them by the numbers of its queue pairs;
  // kNoRail by the number of frames taken in.
  static constexpr char kReady = 'r', kAlive = 'a', kFailed = 'f', kClosed = 'c', kAgain = 'o', kThere = 't',
                        kGo = 'g', kNoRail = 'n', kBroken = 'b';
  static constexpr uint32_t kProbe = 0xffffffff;
  static constexpr uint32_t kReserve = 2;
  static constexpr uint32_t kLooksPerPoll = 16;  // into the ring, for one at completions
  static constexpr uint32_t kAwakeFor =
      8;  // frames that have come to a loop since it slept, before it promises to look
  static constexpr uint64_t kFrameMax = sizeof(FrameHeader) + kMaxMeta + 4096;

  struct Event {
    enum class Kind : uint8_t { frame, immediate, chunk, stalled, failed } kind;
    uint32_t lane = 0;
    uint32_t which = 0;   // slot, value or chunk
    uint32_t nbytes = 0;  // or errno
    std::string reason;
  };
  struct Posted {
    uint32_t requests = 0;
    uint64_t nbytes = 0;
  };
  struct Chunk {
    RemoteChunk of;
    Keys local, remote;
    uint32_t lane = 0;
    uint64_t posted_ns = 0;
    uint64_t handed = 0;        // bytes that were posted
    std::deque<Posted> posted;  // of those the parts that are in flight; without rows there is one
    uint32_t launches = 0;      // so that word of an earlier one is told from that of the latest
    bool busy = false;
    bool parked = false;   // its lane has failed
    bool refused = false;  // by the peer's device: told when the peer is known to live
  };
  struct Arrived {  // a frame before its turn
    uint32_t lane, slot, nbytes;
  };

  void put(Event event, Wake wake);
  bool has_credit(uint32_t reserve) const { return sent_ - consumed_there_ + reserve < Rail::kCredits; }
  std::byte* frame_slot(uint32_t seq) {
    return frames_.get() + (seq % Rail::kCredits) * size_t{Rail::kSlotBytes};
  }
  // `upgrades`: it may wake the engine instead of the loop, where credits run out.
  void emit(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake,
            bool upgrades = true);
  void emit_word(Wake wake, bool upgrades = true);
  FramePiece frame_piece(const Lane& lane, uint32_t seq, size_t nbytes);
  void transmit(uint32_t seq);
  int take_in(bool completions);
  void handle(Event& event);
  void frame(const Arrived& from);
  bool deliver_slot(const Arrived& from);  // false: the pair has ended, as that of
  bool deliver(const std::byte* data, size_t length);
  void advance();
  void chunk(Lane& lane, uint32_t which, int error);
  void launch(uint32_t index, Lane& lane);
  void post_rows(uint32_t index, Lane& lane);
  Work work_of(uint32_t index, Lane& lane) const;
  void hand_over(Chunk& chunk, Work&& work, Lane& lane);
  void finish(uint32_t index, int error, uint64_t elapsed_ns);
  Lane* best_lane(uint64_t nbytes, int node);
  Lane* nearest_lane();  // to the memory of frames
  void violated(const char* what);
  void answer();
  void tell_credit();
  void unblock();
  void stream();
  // ring.cpp
  std::byte* ring_slot() const { return ring_.get() + (expected_ % Rail::kCredits) * Ring::kSlotBytes; }
  void offer_ring();
  bool promises();
  bool write_to_ring(uint32_t seq);
  int take_from_ring();
  void heard_of_ring(const Head& head);
  void tell_of_ring();
  // recovery.cpp
  Lane* another_lane(const Lane& but);  // that is up
  // path: nothing comes through, or the device is gone. pairs: the queue pairs broke, and new ones will do.
  enum class Loss : uint8_t { path, pairs };
  void connect(Lane& lane, const Numbers& numbers, bool answers);
  void close_lane(Lane& lane);
  void leave_out(Lane& lane, const std::string& reason);
  void lane_failed(Lane& lane, const std::string& reason, Loss loss = Loss::path);
  void tell_failed(const Lane& lane, Loss loss = Loss::path);
  void no_rail(const std::string& reason);
  void lane_closed(Lane& lane);  // by the peer
  void refuse(const Lane& lane);
  void relaunch(Lane& lane);
  void resend_frames();
  void give_up(const std::string& reason);
  void try_again(Lane& lane);
  void reopen(Lane& lane, const Numbers& numbers, bool answer);
  void probe(Lane& lane);
  void probed(Lane& lane, int error);
  size_t word(const std::byte* data, size_t nbytes);  // bytes used; 0: not all of it has come
  void read_socket();
  bool handshake(const std::byte* data, size_t nbytes);  // false: the pair has ended
  bool greet();                                          // false: it has ended, or not all has come
  void get_ready();
  void begin();
  void say(const void* data, size_t nbytes);
  void lose(const std::string& reason);
  void shut();

  RdmaLink& link_;
  Host& host_;
  int socket_;
  const uint64_t heartbeat_ns_;
  bool initiator_;
  bool dead_ = false, open_ = false, blocked_ = false, remote_blocked_ = false;
  std::atomic<bool> starved_{false};  // we wait for credits: the pollers look for them
  uint64_t heard_ns_, said_ns_, ticked_ns_;
  uint64_t dark_ns_ = 0;  // since when no lane is up, though the last one is being made anew; 0: one is
  std::vector<std::byte> incoming_;
  bool broken_ = false, greeted_ = false, ready_told_ = false, ready_heard_ = false;

  std::vector<std::unique_ptr<Lane>> lanes_;
  std::atomic<uint32_t> active_{0};                                       // the lane of frames
  std::unique_ptr<std::byte, void (*)(void*)> frames_{nullptr, nullptr};  // sent and not acknowledged
  uint32_t frames_registration_ = 0;
  std::array<uint32_t, Rail::kCredits> frame_bytes_{};
  std::atomic<uint32_t> due_{0};      // as `sent_`, for the pollers
  uint32_t sent_ = 0;                 // frames, that is the next sequence number
  Acks acks_;                         // of those, by the peer's device
  uint32_t consumed_there_ = 0;       // of those, by the peer
  uint32_t expected_ = 0, told_ = 0;  // frames of the peer: handed over here, and told so
  struct Streamed {
    FrameHeader header{};
    const std::byte* payload = nullptr;
    uint64_t done = 0;
  } streamed_;                         // the chunk of post_data that is on its way; no payload: none
  std::map<uint32_t, Arrived> early_;  // by sequence number
  // Where the peer writes small frames while the loop looks, which the latest frame out has promised.
  std::unique_ptr<std::byte, void (*)(void*)> ring_{nullptr, nullptr};
  uint32_t ring_registration_ = 0;
  bool looks_told_ = false;
  uint32_t looks_ = 0;
  uint32_t slept_at_ = 0;  // the frame that was expected when the loop slept last
  struct RingThere {       // the peer's
    uint64_t address = 0;
    Keys keys;
    bool looks = false;
    bool word_due = false;  // it has stopped to look, and may have missed what was written
    uint32_t written = 0;   // one more than the last frame that was
  } ring_there_;
  std::unordered_map<uint32_t, Keys> remote_keys_;  // by the peer's registration
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> free_chunks_;

  std::mutex inbox_mutex_;
  std::atomic<int> writes_due_{
      0};  // receives whose last chunk was first over another lane; under the inbox's lock
  std::vector<Event> inbox_;
  uint32_t inbox_frames_ = 0;
  std::vector<Event> events_;  // taken from the inbox, of which so many have been handled; under the token
  size_t handled_ = 0;
  std::atomic<bool> has_inbox_{false};
};

}  // namespace aiocomm::rdma
