// One port of one device: its queues, its memory for frames, and its two threads.
//
// Theory of operation
//  * The sender of a frame chooses who wakes (Wake), and with that the queue pair: frames for the event loop complete in
//    the express queue, whose channel the loop itself watches, so that a small message wakes one thread. All others
//    complete in the poller's queues.
//  * The poller looks at its queues while they give something, then arms their channel and sleeps. It hands
//    what came to the lanes (one per peer) and rings whoever the sender of a frame wants awake; it never takes the token.
//    It looks at the express queue only now and then, while something is due: whoever polls the pair does so anyway.
//  * Frames are posted by the token's holder: they are small. So are chunks where a posting call is known to be quick, as
//    it is where hardware does the work. Where it takes as long as the transfer itself (soft-RoCE, reads as well as
//    writes) the poster does it: whoever holds the token must not.
//  * Frames arrive in slots of one shared receive queue. A slot is the receiver's until the engine has looked at it;
//    credits keep peers from sending more than there are slots. Immediates arrive in a receive queue without memory,
//    which the poller refills as it empties it.
//  * Where a message goes over several rails, its last chunk may come before others. Then all completions wake until those
//    have come (LinkPeer::expect_writes).
//  * A send completion wakes nobody by itself (`solicited only`): while some are due the poller looks every kLookMs. Nor
//    does a chunk that a peer has written, unless it is its last one: the bulk queue is armed for all that completes only
//    while chunks of ours are under way.
//  * Where the device is through with a chunk by the time that it is posted (soft-RoCE), the poster takes in what has
//    completed, and drives the engine, which gives it the next one: three threads less are woken for each chunk.
//  * Bulk has a queue pair for each service level and traffic class that classes of channels are mapped to, so that one
//    class does not stand behind another in a send queue.
//
//  * A queue pair that fails may be at a receive of the shared queue, and its last ones may not have completed yet. It is
//    destroyed once its device says that they have (IBV_EVENT_QP_LAST_WQE_REACHED): else those receives would be gone for
//    good, and with them messages that the peer takes for delivered.
//
// Locks: `polling_` is held while completions are handed out and guards `lanes_`; a lane that has been removed under it
// hears nothing more. `queue_` guards the poster's queue. Neither is held while a thread waits.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/link.hpp"
#include "links/rdma/port.hpp"
#include "links/rdma/requests.hpp"
#include "links/rdma/transport.hpp"

namespace aiocomm::rdma {

// What a lane is told by its rail's poller, without the token.
class Completions {
 public:
  virtual void arrived(uint32_t slot, uint32_t nbytes, const std::byte* data) = 0;
  virtual void immediate(uint32_t value, uint32_t nbytes) = 0;
  virtual void frame_sent(uint32_t seq) = 0;
  virtual void chunk_posted() = 0;  // the call has returned, which may be when the bytes are through
  virtual void chunk_done(uint32_t chunk, int error) = 0;  // 0: its bytes are where they should be
  virtual void failed(const std::string& reason) = 0;      // its queue pairs will not come back by themselves
  virtual bool expects() const = 0;                        // completions are due, which may wake nobody
  virtual bool moves() const = 0;          // each completion matters, also one that wakes nobody
  virtual void look(uint64_t now_ns) = 0;  // now and then while it expects
  virtual void attend() = 0;               // under the token: what has come is to be handled

 protected:
  ~Completions() = default;
};

constexpr size_t kQueuePairs = 2 + kClasses;
using Numbers = std::array<uint32_t, kQueuePairs>;  // of queue pairs; 0: there is none

struct QueuePairs {
  std::array<ibv_qp*, kQueuePairs> all{};
  ibv_qp* frames(Wake wake) const { return all[wake == Wake::loop ? 0 : 1]; }
  ibv_qp* bulk(uint8_t level) const { return all[2 + level]; }
  explicit operator bool() const { return all[0] != nullptr; }
  Numbers numbers() const;
};

struct FramePiece {
  uint32_t seq;
  const std::byte* data;
  uint32_t nbytes, lkey;
};

struct Work {
  Completions* lane = nullptr;
  ibv_qp* qp = nullptr;
  std::mutex* posting = nullptr;  // of the lane: held during the call
  ibv_wr_opcode opcode = IBV_WR_RDMA_READ;
  uint8_t cls = 0;         // of the channel: more urgent work is posted first
  bool solicited = false;  // wakes the peer's poller
  uint64_t local = 0, remote = 0;
  uint32_t lkey = 0, rkey = 0, nbytes = 0, immediate = 0, chunk = 0;
  Requests rows;  // instead of the stretch that `local`, `remote` and `nbytes` say
};

// While it lives, this thread looks at what it hands out itself, and rings nobody for it: `whom`, or everybody.
class Attending {
 public:
  explicit Attending(const void* whom)
      : before_(std::exchange(any_, true)), whom_before_(std::exchange(whom_, whom)) {}
  ~Attending() {
    any_ = before_;
    whom_ = whom_before_;
  }
  Attending(const Attending&) = delete;
  Attending& operator=(const Attending&) = delete;
  static bool to(const void* whom) { return any_ && (!whom_ || whom_ == whom); }

 private:
  // Looked at several times for each message: not by way of a call.
  [[gnu::tls_model("initial-exec")]] static inline thread_local bool any_ = false;
  [[gnu::tls_model("initial-exec")]] static inline thread_local const void* whom_ = nullptr;
  const bool before_;
  const void* const whom_before_;
};

class Rail final : public Pollable {
 public:
  static constexpr uint32_t kSlotBytes = 8448;
  static constexpr uint32_t kCredits = 32;  // slots per peer
  static constexpr uint32_t kFrameDepth = 4 * kCredits, kBulkDepth = 160;
  static constexpr uint32_t kMaxSlots = 4096, kImmediates = 4096;
  static constexpr int kLookMs = 20;
  static constexpr uint64_t kEndsNs = 20000000;  // in which a queue pair that fails lets go of its receives

  Rail(const Verbs& verbs, Port port, const Transport& transport);
  ~Rail();
  void start();
  void stop();
  const Port& port() const { return port_; }
  std::string name() const;
  ibv_pd* domain() const { return domain_; }
  uint32_t max_inline() const { return max_inline_; }
  bool up() const { return up_.load(std::memory_order_acquire); }
  const Transport& transport() const { return transport_; }
  // For the event loop to watch; on_ready is what it calls.
  int express_fd() const { return express_channel_ ? express_channel_->fd : -1; }
  void on_ready(uint32_t events) override;

  // The kernel lets go of a removed device only when everything of it has been closed here. Under the token:
  bool gone() const { return gone_.load(std::memory_order_acquire); }
  bool present() const;                              // as far as the kernel's list of devices says
  const std::string& node() const { return node_; }  // its file in /dev/infiniband
  // The device is gone, or good for nothing: its lanes hear that they have failed.
  void leave(const char* why = "the device was removed");
  bool idle_without_device();  // no lane is left
  bool runs_here() const { return std::this_thread::get_id() == poster_.get_id(); }
  void
  retire();  // then, by another thread than its own: closes everything of the device. The rail stays, and is good for nothing.
  std::function<void()> handle;  // has the engine look at what was handed out; told by the poster
  std::function<void(const char* why)> on_gone;    // its device says that it is broken; told by the poller
  std::function<void(const char* why)> on_failed;  // one of its threads ends with an exception; told by that

  // Makes room for one more peer and its queue pairs. Throws LinkFailure.
  QueuePairs open();
  // Takes as long as the network takes to tell where the peer is: without the token. Between queue pairs it looks whether
  // it is given up. Throws LinkFailure.
  void connect(const QueuePairs& pairs, const Address& theirs, const Numbers& numbers,
               const std::atomic<bool>& given_up);
  void add(const QueuePairs& pairs, Completions* lane);
  // Nothing of these queue pairs is heard or touches memory any more when it returns. `posting`: the lane's.
  void remove(QueuePairs& pairs, std::mutex& posting);
  // The same where a thread connects them, and nothing has been posted: that thread discards them when it is told to.
  void ignore(const QueuePairs& pairs);
  void discard(QueuePairs& pairs) { destroy(pairs); }
  void fail(const QueuePairs& pairs);  // what is posted comes back with an error

  int post_frame(const QueuePairs& pairs, Wake wake, const FramePiece& frame);
  // Into the peer's memory, and nobody there is told.
  int write_frame(const QueuePairs& pairs, const FramePiece& frame, uint64_t remote, uint32_t rkey);
  // Posts at once where that takes no time: a frame's size, or by a device whose calls are quick.
  void post_bulk(Work&& work);
  // Stretches of this side's memory that one request is about.
  uint32_t most_pieces(bool read) const { return read ? most_read_pieces_ : most_pieces_; }
  const std::byte* slot(uint32_t index) const;
  void give_back(uint32_t index);  // the slot may be written again
  // Hands out what has completed; returns how much. Any thread; 0 as well if another one is at it.
  int poll();
  void drain();  // the same, and waits for whoever is at it
  void kick();   // wakes the poller

  struct Counters {
    std::atomic<uint64_t> sends{0}, inline_sends{0}, ring_writes{0}, writes{0}, reads{0}, send_completions{0},
        received{0}, immediates{0}, wakeups{0};
  };
  Counters counters;

 private:
  void run(void (Rail::*turns)()) noexcept;
  void run_poller();
  void run_poster();
  void post_now(const Work& work);
  int post_rows(const Work& work, ibv_send_wr last);
  int post_piece(ibv_qp* qp, ibv_send_wr& request, const FramePiece& frame);
  void work_off(std::unique_lock<std::mutex>& lock);
  void arm_bulk();
  int poll_queue(ibv_cq* queue);
  int poll_queues();
  void dispatch(const ibv_wc& wc);
  void read_events();
  bool wait(bool expecting);
  void add_slots(uint32_t count);
  ibv_qp* make_pair(ibv_cq* queue, ibv_srq* receives, uint32_t depth, uint32_t pieces, uint32_t inline_bytes);
  void forget(const QueuePairs& pairs);
  void await_receives(std::vector<uint32_t> numbers);
  void destroy(QueuePairs& pairs);
  void release_all();

  const Verbs& verbs_;
  const Port port_;
  const Transport transport_;
  ibv_context* context_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_comp_channel *channel_ = nullptr, *express_channel_ = nullptr;
  ibv_cq *express_queue_ = nullptr, *frames_queue_ = nullptr, *bulk_queue_ = nullptr;
  ibv_srq *frames_srq_ = nullptr, *bulk_srq_ = nullptr;
  uint32_t most_pieces_ = 1, most_read_pieces_ = 1;
  uint32_t max_inline_ = 512, max_slots_ = kMaxSlots, immediates_ = kImmediates;
  int epoll_ = -1, wake_ = -1;
  std::atomic<bool> up_{true}, stopping_{false}, gone_{false};
  // The bulk queue: the poster looks at it, so that the poller does not; and it is armed for chunks of ours. Each is set
  // before the other is looked at, in total order.
  std::atomic<bool> poster_looks_{false}, armed_{false};
  uint64_t posted_before_ = 0;  // when it was last armed
  std::atomic<uint64_t> posting_ns_{
      1000000};  // what a call that posts a chunk takes; slow until it is measured
  std::string node_;

  struct Slab {
    std::unique_ptr<std::byte, void (*)(void*)> memory{nullptr, nullptr};
    ibv_mr* region = nullptr;
  };
  std::mutex slabs_mutex_;
  // By slot / kCredits; reserved at the start, so that readers need no lock.
  std::vector<Slab> slabs_;
  std::atomic<uint32_t> slab_count_{0};
  uint32_t peers_ = 0;

  std::mutex ended_mutex_;
  std::unordered_set<uint32_t> ended_;  // queue pairs that take no more receives, by number
  bool tells_ended_ = true;             // the device has never failed to say so; under the token

  std::mutex polling_;
  std::unordered_map<uint32_t, Completions*> lanes_;  // by queue pair number
  std::vector<Completions*> all_lanes_;               // each once
  std::vector<Completions*> attended_;                // of the token's holder

  std::mutex queue_;
  std::condition_variable queued_;
  std::deque<Work> work_;

  std::thread poller_, poster_;
};

}  // namespace aiocomm::rdma
