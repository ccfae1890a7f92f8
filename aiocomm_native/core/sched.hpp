// Chunk scheduling of one link executor, pure: no I/O, threads or clock. Not thread-safe: the owner
// serialises calls.
//
// Rules
//   - A flow is (channel, peer). Its items leave in order, headers before data; data items leave in chunks.
//   - Between classes: strict priority, 3 most urgent. While a class and lower ones are both backlogged, the
//     lower ones together get at least `min_share` of the bytes; credit does not outlive the backlog.
//   - Between the groups (channels) of a class: start-time fair queueing by bytes / weight. Between the flows
//     of a group: the same with equal weights. An item of no bytes is charged as one byte.
//   - A flow that is not ready, or has nothing queued, is not backlogged: it keeps its items and earns no
//     credit. One that becomes ready again keeps its place (FairQueue::resume).
//   - Window: an urgent chunk waits for the less urgent bytes posted before it. Therefore, where flows of
//     class u are registered (backlogged or not) or the class is declared, the classes below u keep at most
//     rate * preempt_ns(u) bytes in flight together, and their chunks are half of that. Where none is, chunks
//     are max_chunk and the window max_window. What a flow's peer drains slowly goes in smaller chunks (set_chunk).
//   - In flight are at most max_window bytes; but a class with nothing in flight in it or above it may always
//     post one chunk. So neither a small window nor less urgent bytes can lock anybody out.
//   - An illegal call throws std::invalid_argument and changes nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/fair_queue.hpp"
#include "core/flat_map.hpp"
#include "core/rate.hpp"
#include "core/registry.hpp"

namespace aiocomm {

using FlowId = uint32_t;

// Sizes in bytes, rate in bytes per ns.
struct SchedConfig {
  uint64_t min_chunk = 64 << 10;
  uint64_t max_chunk = 4 << 20;
  uint64_t min_window = 256 << 10;
  uint64_t max_window = 8 << 20;
  double initial_rate = 8.0;
  double min_share = 0.05;  // 0 to 0.5
};

class Scheduler {
 public:
  static constexpr unsigned kClasses = 4;
  static constexpr double kMinWeight = 1.0 / 1024, kMaxWeight = 1024;

  // Bytes [offset, offset + nbytes) of an item; `last` if nothing of the item remains.
  struct Chunk {
    uint64_t item = 0;
    uint64_t offset = 0;
    uint64_t nbytes = 0;
    bool last = false;
    bool header = false;  // as it was pushed
    uint8_t cls = 0;      // for complete()
    FlowId flow = 0;
    uint64_t serial = 0;  // this and the next for unget()
    uint64_t order = 0;
  };

  explicit Scheduler(const SchedConfig& config = {});
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Flows of one group share its class and weight; the weight given last holds. A new flow is ready.
  // Illegal: a known flow, a class other than the group's, a class > 3, a weight outside [kMinWeight,
  // kMaxWeight].
  void add_flow(FlowId flow, uint8_t cls, double weight, uint64_t group);
  // Returns the items dropped, in the order in which they would have left. Chunks in flight are still
  // completed.
  std::vector<uint64_t> remove_flow(FlowId flow);
  void set_weight(uint64_t group, double weight);
  // The greatest chunk of a flow's data from now on. Illegal: no bytes.
  void set_chunk(FlowId flow, uint64_t nbytes);
  // A flow whose peer can take no more now is passed over until it is ready again.
  void set_ready(FlowId flow, bool ready);
  void set_preempt(uint8_t cls, uint64_t ns);
  // Whether more of this class may come at any time, flows or not.
  void declare(uint8_t cls, bool declared);
  // Other limits for what is posted from now on. Illegal: as for the configuration.
  void set_limits(uint64_t max_chunk, uint64_t max_window);

  // A header is indivisible. Illegal: unknown flow, an item that is queued, a header beyond max_chunk.
  void push(FlowId flow, uint64_t item, uint64_t nbytes, bool header);
  // The chunk to post now, which counts as in flight; nullopt: nothing is ready, or the window is full.
  std::optional<Chunk> next();
  // Gives back a chunk that could not be posted. For the latest next(), then the one before it, up to 16,
  // this restores the state exactly; for an older chunk, its bytes and its fair share. Illegal: a chunk that
  // is not the newest of its item, a removed flow, an item cancelled meanwhile (complete() such a chunk
  // instead).
  void unget(const Chunk& chunk);
  // Bytes of class `cls` are no longer in flight. `elapsed_ns`: how long the link worked on them, that is,
  // since their posting or the completion before, whichever was later; 0: unknown. Only pieces of min_chunk
  // and more feed the rate: smaller ones tell the latency. Illegal: more than is in flight.
  void complete(uint64_t nbytes, uint64_t elapsed_ns, uint8_t cls);
  // Removes what is queued of an item and returns its bytes; nullopt: unknown, or handed out entirely.
  std::optional<uint64_t> cancel(uint64_t item);

  size_t items() const noexcept { return items_.size(); }  // queued, ready or not
  bool runnable() const noexcept;                          // a ready flow has something queued, window or not
  uint64_t backlog(FlowId flow) const;                     // bytes queued
  uint64_t served(uint64_t group) const;                   // bytes handed out since the group has had flows
  uint64_t in_flight() const noexcept;                     // bytes
  uint64_t in_flight(uint8_t cls) const;
  uint64_t window(uint8_t cls) const;      // bytes that this and the less urgent classes may have in flight
  uint64_t chunk_size(uint8_t cls) const;  // bytes
  uint64_t max_chunk() const noexcept { return config_.max_chunk; }
  bool has_urgent() const noexcept;  // flows there are have some class above that bounds them
  bool has_rivals() const noexcept;  // two groups of one class are backlogged
  double rate() const noexcept { return rate_.bytes() / rate_.ns(); }

 private:
  struct Group;
  struct Flow;
  static constexpr uint32_t kNil = UINT32_MAX;
  struct Item {
    uint64_t id;
    uint64_t offset = 0;
    uint64_t nbytes;
    uint64_t order;  // of pushing: a queue is sorted by it
    Flow* flow;
    uint32_t prev = kNil, next = kNil;
    bool header;
  };
  struct Fifo {
    uint32_t head = kNil, tail = kNil;
  };
  enum class Admission : uint8_t { kYes, kLinkFull, kOwnWindowFull };
  using Owed = std::array<int64_t, kClasses>;

  Flow& flow_at(FlowId flow) const;
  Group& group_at(uint64_t group) const;
  Item& front_item(unsigned cls) noexcept;
  uint64_t front_bytes(unsigned cls) noexcept;
  Admission admit(unsigned cls, uint64_t nbytes) const noexcept;
  unsigned backlogged() const noexcept;
  unsigned choose_class(unsigned backlogged) noexcept;
  void account_share(unsigned cls, uint64_t nbytes, unsigned backlogged) noexcept;
  uint64_t preempt_window(unsigned cls) const noexcept;
  bool bounds(unsigned cls) const noexcept { return declared_[cls] || registered_[cls] > 0; }
  enum class Entry : uint8_t { starts, resumes, refunded };
  void refresh(Flow& flow, Entry entry);
  void insert_item(const Item& item);
  void remove_item(uint32_t index);

  static constexpr unsigned kUndoDepth = 16;
  static constexpr int64_t kShareOne = 1 << 16;
  // The rate is that of about the last MiB: one odd chunk must not move it much.
  static constexpr double kRateMemory = 1 << 20;
  // Nothing is free: else a flood of empty items would hold the turn for ever.
  static constexpr uint64_t charged(uint64_t nbytes) { return nbytes == 0 ? 1 : nbytes; }

  SchedConfig config_;
  const int64_t share_;  // min_share in units of 1 / kShareOne
  std::array<FairQueue, kClasses> classes_;
  std::array<size_t, kClasses> registered_{};  // flows
  std::array<bool, kClasses> declared_{};
  std::array<uint64_t, kClasses> dearest_{};  // the greatest cost of a byte that a group has had
  std::array<uint64_t, kClasses> preempt_ns_;
  std::array<uint64_t, kClasses> in_flight_{};
  // owed_[c]: what the classes below c are owed of the bytes that c took while both were backlogged.
  Owed owed_{};
  struct Undo {
    uint64_t serial;
    Owed owed;
  };
  std::array<Undo, kUndoDepth> undo_{};  // owed_ before the latest chunks: a stack that forgets its bottom
  unsigned undo_top_ = 0;
  unsigned undo_depth_ = 0;
  uint64_t serial_ = 0;  // chunks handed out
  uint64_t order_ = 0;   // items pushed
  Rate rate_;

  std::vector<Item> item_pool_;
  uint32_t free_item_ = kNil;
  IdMap<uint32_t> items_;
  Registry<Flow> flows_;
  Registry<Group> groups_;
  uint64_t groups_made_ = 0;
};

}  // namespace aiocomm
