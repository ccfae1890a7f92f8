// The engine: all protocol state of one communicator, and the thread that drives it when nobody else does.
//
// Theory of operation
//  * One lock, the *token*, guards everything here. It is held for microseconds: frames are handled and chunks are
//    chosen under it, bytes are copied without it (Copier, Host::leave_token).
//  * Whoever is awake makes progress. The loop's thread submits with try_lock; if another thread holds the token, the
//    op goes through a lock-free queue which every holder empties before and after it lets go, so nothing is stranded.
//  * The sender of a frame chooses which thread of the receiver wakes: the loop's for small messages (one wake-up and
//    the awaiting task runs), the engine's for what must move while the loop is busy.
//  * An op that ends inside its own submission is returned ended; every other end goes through the completion queue,
//    which the loop's thread drains, and one eventfd.
//  * Native threads never touch Python. An op's buffer is kept alive by its cookie's owner until the op has ended.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/channels.hpp"
#include "core/copier.hpp"
#include "core/counters.hpp"
#include "core/device.hpp"
#include "core/device_protocol.hpp"
#include "core/flows.hpp"
#include "core/link.hpp"
#include "core/match.hpp"
#include "core/mpsc.hpp"
#include "core/op.hpp"
#include "core/patience.hpp"
#include "core/peer.hpp"
#include "core/priority_mutex.hpp"
#include "core/sched.hpp"
#include "core/timers.hpp"
#include "core/unexpected.hpp"

namespace aiocomm {

struct EngineConfig {
  std::vector<std::string> links;         // empty: all, cheapest first
  std::map<std::string, double> numbers;  // Settings.native()
  std::map<std::string, std::string> texts;
};

// Something that the loop should hear of, beside ends of ops.
struct EngineEvent {
  enum class Kind : uint8_t {
    notification,
    peer_lost,
    link_up,
    link_down,
    fallback,
    undelivered,
    region_free
  };
  Kind kind;
  Rank rank = -1;
  uint64_t number = 0;  // notification: bytes; region_free: its id; peer_lost: generation; undelivered: tag
  std::string text;     // payload, reason or path
  std::string more;
};

// A peer that has a region's key.
struct KeyHolder {
  Rank rank = -1;
  bool owes_word = false;  // the key is revoked, and it has not answered since it was last asked
};

struct RegionInfo {
  std::byte* base = nullptr;
  uint64_t nbytes = 0;
  bool writable = false;
  bool closing = false;
  uint32_t active = 0;        // transfers of peers that use it now
  uint32_t registration = 0;  // with `link`, whose devices peers reach it by; 0: none has asked
  std::vector<Rank> asking;   // for its key, while that is being made
  uint8_t link = 0;
  bool letting_go = false;  // of its registration: on_released frees it
  std::vector<KeyHolder> holders;
  std::unique_ptr<DeviceBuffer> gpu;  // device memory; `base` is its address then
};

class Engine final : public Host, public FrameSink {
 public:
  explicit Engine(EngineConfig config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // --- control plane; any thread
  void set_identity(Rank rank, uint64_t generation);
  void set_open(bool open);  // whether somebody may still join: receives from any source wait for them, too
  std::vector<std::string> link_names() const;
  Link& link(const std::string& name);
  void add_peer(Rank rank, uint64_t generation);
  // In two steps, since the other side may fail to take the link: attached, a pair carries nothing and can be
  // detached without a word; started, its queued operations go out and its end is a loss.
  void attach(Rank rank, uint64_t generation, const std::string& link, const std::vector<int>& fds,
              const std::string& card, bool initiator);
  void start_pair(Rank rank, uint64_t generation);
  void detach(Rank rank, uint64_t generation);
  void lose_peer(Rank rank, uint64_t generation, const std::string& reason);
  // It said goodbye to the group. A connected pair ends by its own last word, after the data that comes before it.
  void leave_peer(Rank rank, uint64_t generation);
  std::string pair_state(Rank rank, uint64_t generation);   // "up", "rested" or "failed"
  void fail_connect(Rank rank, const std::string& reason);  // no pair could be made: what waited for it fails
  void close();
  void release_descriptors();  // after close(), once the loop has forgotten them

  // --- the loop's thread
  Op* new_op() { return ops_.take(); }
  void release(Op* op) { ops_.give_back(op); }
  // Starts the op; true: it has ended already, inside the call. Afterwards take_connect_wanted() may name peers.
  bool submit(Op* op);
  void begin_submitted();         // also what was submitted while another thread held the token
  bool cancel(Op* op, Code why);  // false: too late, the op has ended
  // Makes progress as far as it goes without waiting; `rung`: the doorbell is to be cleared.
  void progress(bool rung, bool may_linger = true);
  // Polls all engines of a loop, at least one, until one of them has news or `until_ns`; for loops that spin before they
  // sleep. `patience` is the loop's; so is `others`: when anything comes there, the spin ends, too.
  static bool spin(std::span<Engine* const> engines, uint64_t until_ns, Patience& patience,
                   Others* others = nullptr) {
    return spin(engines, until_ns, patience, false, others);
  }
  // As spin(), letting others have the core: for waits that no user asked to spin. Long ones have a patience of their own.
  bool linger(uint64_t until_ns, bool is_long = false) {
    Engine* self = this;
    return spin({&self, 1}, until_ns, is_long ? staying_ : lingering_, true, nullptr);
  }
  // While it may, the loop's thread copies by itself what its own looks would have copied: it is about to look.
  void host_copies(bool may) {
    hosts_copies_ = may;
    if (!may && std::exchange(spin_copies_, false)) copier_->rouse();
  }
  bool take_completed(Op*& op);
  bool has_completed() const { return !completed_.empty() || overflowed_.load(std::memory_order_acquire); }
  std::vector<EngineEvent> take_events();
  bool has_events() const { return has_events_.load(std::memory_order_acquire) || connect_wanted(); }
  std::vector<Rank> take_connect_wanted();
  bool connect_wanted() const { return has_wanted_.load(std::memory_order_acquire); }
  bool has_news() const { return has_completed() || has_events(); }
  // From now on the loop has to be woken. True: something has come before that.
  bool loop_sleeps();
  void loop_wakes() { awake(page_->loop); }

  // channels.hpp tells of their lives; ids are those of channels here, which peers do not know.
  uint32_t open_channel(const std::string& name, uint8_t cls, double weight);
  void close_channel(uint32_t id, bool for_good);  // its operations end; nothing to do if it is closed
  void drop_below(uint32_t id, Tag tag);           // messages of lower tags, now and later; but none of tag 0
  std::string name_of_channel(uint32_t id);        // "?" once it is forgotten
  uint64_t add_region(std::byte* base, uint64_t nbytes, bool writable,
                      std::unique_ptr<DeviceBuffer> gpu = nullptr);
  bool close_region(uint64_t id);  // true: free at once; else region_free follows

  LinkCounters counters(const std::string& link);
  std::map<std::string, double> gauges(const std::string& link);
  std::map<std::string, uint64_t> served_by_channel(const std::string& link);
  std::vector<Op*> outgoing();     // sends and puts that have not ended
  std::string link_of(Rank rank);  // of a connected peer, else empty
  bool takes_rows(Rank rank);      // whether devices of ours move rows to and from its regions, also on hosts
  int process_of(Rank rank);       // whose private memory can be reached from here; -1: none
  std::string why_lost(Rank rank);  // of a peer that is lost, or could not be connected; else empty
  uint8_t likely_link(Rank rank);   // the link that an operation with this rank will use
  uint8_t link_index(const std::string& link) const;
  const std::string& link_name(uint8_t index) const { return link_names_[index]; }

  int loop_fd() const override { return loop_fd_; }
  int express_fd() const { return express_epoll_; }
  // Descriptors for the loop that tell what polling the links does not.
  bool has_express() const { return express_watched_.load(std::memory_order_relaxed) > 0; }

  // --- Host
  void watch(int fd, uint32_t events, Pollable* target, bool loop) override;
  void rewatch(int fd, uint32_t events, Pollable* target, bool loop) override;
  void unwatch(int fd, bool loop) override;
  void watch_polled(int fd, Pollable* target) override;
  void unwatch_polled(int fd) override;
  uint64_t now() const override;
  double setting(std::string_view name, double fallback) const override;
  std::string text_setting(std::string_view name) const override;
  WakePage& wake_page() override { return *page_; }
  int wake_page_fd() const override { return page_fd_; }
  int engine_fd() const override { return engine_fd_; }
  void ring_engine() override { engine_fd_.ring(); }
  FrameSink& sink() override { return *this; }
  bool look() override;
  bool loop_looks() override {
    return page_->loop_spins.load(std::memory_order_relaxed) &&
           page_->loop.word.load(std::memory_order_relaxed) != WakeWord::kAsleep;
  }
  void leave_token() override;
  void enter_token() override;
  void fallback(Rank rank, const std::string& path, const std::string& reason) override;
  void part_down(Rank rank, const std::string& part, const std::string& reason) override;
  void part_up(Rank rank, const std::string& part) override;
  MoverHost& mover_host() override { return device_; }
  void failed(const char* why) noexcept override;
  Mover* mover() { return device_.mover(); }
  bool share(Rank rank, DeviceBuffer& buffer) { return device_.share(rank, buffer); }
  // The link that moves an op.
  uint8_t executor_of(const Op& op) const { return op.gpu ? device_.index() : op.link; }

  // Whether the caller, the loop's thread, is to issue copies that it has just submitted: by issue(), which calls the
  // driver. Where the loop does not spin, its other tasks come first, and the copy thread issues.
  bool issues() const { return page_->loop_spins.load(std::memory_order_relaxed) && device_.due(); }
  void issue() { device_.turn(); }
  void may_spin(bool may) { page_->loop_spins.store(may, std::memory_order_relaxed); }
  bool loop_spins() const { return loop_spins_.load(std::memory_order_relaxed); }

  // --- FrameSink (protocol_receive.cpp)
  void on_frame(LinkPeer& from, const FrameHeader& header, const std::byte* meta,
                const std::byte* payload) override;
  std::byte* data_target(LinkPeer& from, const FrameHeader& header, uint64_t done) override;
  void on_data(LinkPeer& from, const FrameHeader& header, uint64_t nbytes, const std::byte* into) override;
  void on_sent(LinkPeer& to, OpId sop, uint64_t nbytes) override;
  void on_remote(LinkPeer& with, OpId op, uint64_t nbytes, int error, uint64_t elapsed_ns) override;
  void on_immediate(LinkPeer& from, uint32_t value, uint64_t nbytes) override;
  void on_writable(LinkPeer& to) override;
  void on_held(Link& link, uint32_t id, int error, const std::string& reason) override;
  void on_released(Link& link, uint32_t id) override;
  void on_unsure(LinkPeer& to, const FrameHeader& header) override;
  void on_lost(LinkPeer& peer, const std::string& reason) override;

 private:
  static constexpr int kPollBudget = 64;  // frames per peer and turn: the loop breathes between turns
  class Token;                            // scoped lock that empties the submission queue before and after
  friend class DeviceProtocol;

  // engine.cpp: threads, queues, time
  void run();
  int poll_links();
  void tell_peers_of_sleep();
  void drain_submissions() noexcept;
  void after_unlock() noexcept;
  void guarded(auto&& f) noexcept;            // token.hpp
  void break_down(const char* why) noexcept;  // everything ends with that, and nothing begins any more
  void wake_loop();
  void expire(uint64_t now);
  void dispatch_fds(int epoll, int timeout_ms, bool locked);
  void emit(EngineEvent event);
  void start_deadline(Op& op);
  void start_timer(uint64_t id, uint64_t at_ns);

  // statistics.cpp
  uint8_t usual_link(Rank rank);
  void count_submitted(Op& op, uint8_t link);

  // protocol_send.cpp: from a submission to frames on a link
  void start(Op& op) noexcept;
  void go(Op& op);
  void start_on(Op& op, Peer& peer);
  bool fits_frame(const Op& op, const Peer& peer) const;
  bool shares_memory(const Peer& peer) const;
  bool rows_fit(const Op& op, const Peer& peer) const;
  Post send_header(Op& op, Peer& peer);
  Post would_block(Op& op);
  Post send_message(Op& op, Peer& peer);
  Post send_put(Op& op, Peer& peer);
  Post not_by_rows(Op& op);
  Post send_get(Op& op, Peer& peer);
  void queue_header(Op& op, Peer& peer);
  void send_control(Peer& peer, FrameHeader header, Wake wake, const void* meta = nullptr,
                    size_t meta_bytes = 0);
  bool flush_control(Peer& peer);
  void send_fin(Peer& peer, OpId sop, Code code, uint64_t nbytes, Wake wake = Wake::loop);
  void pump(uint8_t link_index);
  uint32_t copy_limit(uint8_t cls) const;
  bool post_chunk(uint8_t link_index, const Scheduler::Chunk& chunk);
  // protocol_copy.cpp: bytes that copy threads fetch
  void job_done(CopyJob& job);
  void stream_instead(Op& op, Peer& peer);
  // protocol_remote.cpp: bytes that devices move
  // pending: on_held goes on with it. failed: it has ended with that.
  enum class Hold : uint8_t { ready, pending, failed };
  Hold hold(Op& op, Access access);
  void cannot_hold(Op& op, int error);
  // The same for device memory, once its gate is open. failed: it goes another way, and has not ended.
  Hold reach(Op& op, Peer& peer, Access access);
  void go_on_held(Op& op);
  struct Held {
    uint8_t link;
    uint32_t registration;
    bool operator==(const Held&) const = default;
  };
  void let_go(std::optional<Held> which);
  void answer_get(Op& op, Peer& peer);
  void get_ready(Op& op, Peer& peer, bool pulls, bool on_device);
  void let_flow_go_on(Op& op);
  bool post_remote(Op& op, Peer& peer, const Scheduler::Chunk& chunk);
  Op* writing_into(Peer& peer, OpId receive);
  bool can_copy_from(Peer& peer) const;

  // protocol_offer.cpp: receives that tell their source where to write
  void offer(Op& op, Peer& peer);
  Post send_into(Op& op, Peer& peer, const Offer& offer);
  void on_offer(Peer& peer, const FrameHeader& header, const std::byte* meta);
  void on_withdraw(Peer& peer, const FrameHeader& header);
  void on_withdrawn(Peer& peer, const FrameHeader& header);
  void on_took(Peer& peer, const FrameHeader& header);
  void on_quit(Peer& peer, const FrameHeader& header);
  void taken(Op& op);
  void complete_offer(Op& op, Peer& peer);
  bool written_after_all(Op& op, Peer& peer);
  void drop_offer(Op& op);
  bool withdraw(Op& op, Code code);
  void send_quit(Peer& peer, OpId receive, Code code);
  MessageKey key_of(const Op& op) const { return {op.scope->wire, op.tag}; }
  Flow& flow_of(const Op& op, const Peer& peer) { return flows_[peer.link_index]->of(*op.scope, peer.rank); }
  void queue_data(Op& op, Peer& peer, bool at_once = true);

  // protocol_channels.cpp: channels that open, close and are over
  void enter(Op& op, Channel& channel);  // until it has ended
  void leave(Channel& channel);
  void declare(uint8_t cls);

  // protocol_receive.cpp: from frames to matched receives
  void start_recv(Op& op);
  void want_connection(Peer& peer);
  void arrived(Peer& peer, const FrameHeader& header, const std::byte* meta, const std::byte* payload);
  void deliver(Op& op, Peer& peer, const FrameHeader& header, const std::byte* meta,
               const std::byte* payload);
  void deliver_eager(Op& op, Peer& peer, const FrameHeader& header, const std::byte* payload);
  void ask_for(const Op& op, Peer& peer, OpId message);
  void start_rendezvous(Op& op, Peer& peer, const FrameHeader& header, bool ask);
  bool make_room(Op& op, const FrameHeader& header);
  void owe_credit(Peer& peer, uint64_t nbytes);
  Unexpected take_unexpected(uint64_t id);
  void refuse(Peer& peer, const FrameHeader& header);
  void drop_unread(uint64_t id);
  void drop_unread(const Channel& channel);
  void received(Op& op);
  void on_fin(Peer& peer, const FrameHeader& header);
  void on_cancel(Peer& peer, const FrameHeader& header);
  void on_stop(Peer& peer, const FrameHeader& header);
  void on_cts(Peer& peer, const FrameHeader& header, const std::byte* meta);
  Op* streaming_to(Rank source, OpId rop);

  // protocol_onesided.cpp
  void on_put(Peer& peer, const FrameHeader& header, const std::byte* meta, const std::byte* payload);
  void on_get(Peer& peer, const FrameHeader& header, const std::byte* payload);
  bool asked_for(const Op& op, const Peer& peer) const;
  void on_get_ready(Peer& peer, const FrameHeader& header, const std::byte* meta);
  void on_get_fail(Peer& peer, const FrameHeader& header);
  Code check_region(uint64_t id, uint64_t offset, uint64_t nbytes, bool write, RegionInfo** out);
  void region_idle(uint64_t id);
  bool free_region(uint64_t id);
  void notify(Rank source, const std::byte* payload, size_t payload_bytes, uint64_t nbytes);

  // protocol_keys.cpp: put and get by devices
  bool by_key(const Op& op, const Peer& peer) const;
  Post access(Op& op, Peer& peer);
  void begin_access(Op& op, Peer& peer, RegionKey& key);
  void end_access(Op& op);
  bool hold_back(const Op& op, const Scheduler::Chunk& chunk);
  void release_held_back(const Op& op);
  void drop_held_back(const Op& op);
  void announce(const Op& op, Peer& peer);
  void tell(Peer& peer, const std::vector<Note>& notes);
  void on_key_ask(Peer& peer, const FrameHeader& header);
  void give_key(Peer& peer, uint64_t id);
  void answer_askers(uint64_t id, int error, const std::string& reason);
  void on_key(Peer& peer, const FrameHeader& header);
  void on_key_revoke(Peer& peer, const FrameHeader& header);
  void on_key_revoked(Peer& peer, const FrameHeader& header);
  void revoke(uint64_t region, uint8_t flags);
  void ask_again(uint64_t region);
  void forget_holder(uint64_t region, Rank rank);
  void forget_holder(Rank rank);
  void on_note(Peer& peer, const FrameHeader& header, const std::byte* payload);

  // protocol_rest.cpp: idle pairs
  bool is_idle(const Peer& peer);
  bool is_under_way(const Peer& peer);
  void look_at_rest(Peer& peer, uint64_t now, uint64_t heartbeat_ns);
  void on_rest(Peer& peer);
  void on_resting(Peer& peer, const FrameHeader& header);
  void rest(Peer& peer);
  void begin_waiting(Peer& peer);

  // protocol_end.cpp: every way an op ends
  void finish(Op& op, Code code);     // nothing touches its buffer any more
  void end_early(Op& op, Code code);  // decides the outcome; finishes once nothing can touch the buffer
  void drop_inflight(Op& op);
  bool let_go_by_link(Op& op, Peer& peer);
  void tell_other(Op& op, Code code);
  void drain(Op& op);
  void outlast(Op& op);
  static bool may_be_done(const Op& op);
  void done_after_all(Op& op);
  bool settle(Op& op);  // finishes a draining op if it can; true: finished
  void end_peer(Peer& peer, const std::string& reason);
  void tear_down(Peer& peer, const std::string& reason);
  void break_pair(Peer& peer, const std::string& reason);
  void let_go_of_link(Peer& peer, bool failed);
  void end_link(Peer& peer, bool with_ops);
  void drop_announced(Peer& peer);
  void drop_attached(Peer& peer);
  void fail_hopeless_receives();
  Op* find(OpId id);
  Peer* find_peer(Rank rank);
  Peer* peer_of(LinkPeer& link_peer);

  // configuration
  const EngineConfig config_;
  uint64_t eager_max_, unexpected_max_, drain_ns_, spin_ns_, rest_ns_;  // rest_ns_ 0: never
  size_t queue_depth_;

  // wake-up
  Descriptor page_fd_, loop_fd_, engine_epoll_, express_epoll_;
  OwnBell engine_fd_;
  std::atomic<int> express_watched_{0}, express_polled_{0};
  std::unique_ptr<WakePage, UnmapPage> page_;
  std::atomic<bool> stopping_{false};
  bool closed_ = false, open_ = false;
  std::string fault_;  // why the engine broke down
  std::thread thread_;

  // spin.cpp
  static bool spin(std::span<Engine* const> engines, uint64_t until_ns, Patience& patience, bool yields,
                   Others* others);
  void begin_spin();
  bool look_spinning();  // true: it has copied by itself, which takes its time
  void end_spin();
  int poll_told();
  Patience lingering_, staying_;  // the loop's thread only, as what follows
  bool covers_engine_ = false;    // in a spin: it sees what the engine's thread would be woken for
  bool met_ = false;              // in a spin: frames have come

  // under the token
  PriorityMutex token_;
  bool in_loop_thread_ = false;
  // The loop's thread only: a chunk waits for the spinning loop to copy it; chunks may do so.
  bool spin_copies_ = false, hosts_copies_ = false;
  Op* inline_op_ = nullptr;
  Rank rank_ = 0;
  uint64_t generation_ = 0;
  std::vector<std::string> link_names_;
  std::vector<std::unique_ptr<Link>> links_;
  std::vector<std::unique_ptr<Scheduler>> schedulers_;
  std::vector<std::unique_ptr<Flows>> flows_;  // of each
  std::vector<LinkCounters> counters_;
  std::vector<std::unique_ptr<Peer>> peers_;  // by rank
  std::vector<LinkPeer*> polled_;
  // Closed; freed when no call into them can be on the stack.
  std::vector<std::shared_ptr<LinkPeer>> retired_;
  Channels channels_;
  Matcher matcher_;
  UnexpectedStore unexpected_;  // by arrival id
  std::unordered_map<uint64_t, RegionInfo> regions_;
  uint64_t next_region_ = 1;
  std::unordered_map<OpId, Scheduler::Chunk> held_back_;  // last chunks of puts that wait for the others
  static constexpr uint64_t kRegionTimer = 1ull << 63;    // with a region's id; others are those of ops
  TimerHeap timers_;
  uint64_t engine_sleeps_until_ = 0;  // 0: no timer armed
  uint32_t jobs_ = 0;                 // chunks with the copier
  OpTable ops_;                       // taken and given back by the loop's thread
  OpTable served_{1ull << 62};        // ops on behalf of peers; under the token
  std::vector<EngineEvent> events_;
  std::atomic<bool> has_events_{false};
  std::vector<Rank> wanted_;
  std::atomic<bool> has_wanted_{false};
  std::deque<Op*> overflow_;
  std::atomic<bool> overflowed_{false};

  BoundedQueue<Op*> submissions_;
  BoundedQueue<Op*> completed_;
  uint32_t cores_ = 1;  // that this process may use
  std::unique_ptr<Copier> copier_;

  int spin_tries_ = 0;
  alignas(64) std::atomic<bool> loop_spins_{false};  // copy threads look at it all the time
  alignas(64) DeviceProtocol device_{*this};
};

}  // namespace aiocomm
