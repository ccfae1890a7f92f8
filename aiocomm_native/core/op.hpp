// One operation in flight, and the table that owns it.
//
// State (changes under the engine's token only; `free` and `ended` belong to the loop's thread):
//
//   free ─submit→ queued ─header posted→ posted ─bytes move→ moving ─→ ended
//                   │                      │                   │
//                   └────── cancel, deadline, lost peer ───────┴→ draining ─last chunk, peer's fin→ ended
//
// A receive is `posted` until it is matched. An op in `draining` has its outcome decided and waits only until nothing
// can touch its buffer any more. Each op ends exactly once.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/device.hpp"
#include "core/ids.hpp"

namespace aiocomm {

struct Channel;

enum class OpKind : uint8_t { send, recv, put, get, serve };
enum class OpState : uint8_t { free, queued, posted, moving, draining, ended };

enum class Code : uint8_t {
  ok,
  cancelled,       // by our own side
  deadline,        // our own deadline
  peer_cancelled,  // the peer gave it up
  peer_lost,
  truncated,
  stale,         // region closed, out of its bounds, or of another incarnation
  out_of_range,  // one-sided access outside the region
  link_failed,
  closed,
  would_block,
  read_only,
  unreachable,  // rows that nobody reaches who could move them: another way is to be tried
};
constexpr Code kLastCode = Code::unreachable;

// Which way a message's bytes went, for statistics.
enum class Path : uint8_t { none, eager, mapped, cma, stream, device, staged, read, write, count };

constexpr size_t kMaxDims = 8;
constexpr uint8_t kNoLink = 0xff;

struct Op {
  OpId id = 0;
  OpKind kind = OpKind::send;
  OpState state = OpState::free;
  Code code = Code::ok;
  Path path = Path::none;
  bool live = false;              // known to the engine: set and cleared under the token
  bool allocate = false;          // receive: the engine allocates the buffer once the size is known
  bool synchronous = false;       // send: ends only when matched, whatever its size
  bool no_wait = false;           // send: fail with would_block rather than queue
  bool cancel_requested = false;  // the caller was promised a cancelled end
  bool matched = false;
  bool in_sched = false;
  bool unreachable = false;  // its source is not reached from here, and is sent
  bool awaits_fin = false;   // the peer holds a reference to our buffer until its `fin`
  bool has_key = false;      // put, get: devices move it, by the key of its region
  bool holding = false;      // `registration` is not there yet: on_held goes on
  bool letting_go =
      false;  // all is said and done, but for a device that lets go of its memory: on_released ends it
  bool listed = false;     // put, get: of many ranges; see listed.hpp
  bool by_rows = false;    // serve: of rows, which only the reader knows
  bool written = false;    // a device of the peer's writes into `data`, until it says that it is done
  bool outlasts = false;   // the peer is gone: that is over at the deadline
  bool owes_word = false;  // the peer is to hear that we have let go of its buffer, once we have
  uint8_t link = 0;
  uint8_t counted_by = kNoLink;  // the link whose counters it belongs to, once that is known
  Rank peer = -1;                // as asked for; kAnySource until matched
  uint32_t channel = 0;          // its id, as asked for
  int32_t error = 0;             // errno or driver code behind link_failed
  Tag tag = 0;
  Channel* scope = nullptr;  // the channel, which is there until the op has ended; null before its start
  std::byte* data = nullptr;
  uint64_t nbytes = 0;  // of the message; for a receive its capacity until matched
  uint64_t capacity = 0;
  uint64_t moved = 0;
  uint32_t inflight = 0;        // chunks that some thread or device is working on
  uint64_t inflight_bytes = 0;  // of those, bytes that devices are to move
  uint64_t remote_op = 0;       // the peer's op of the same message
  uint64_t region = 0;          // one-sided: the region at the peer; serve: ours
  uint64_t offset = 0;          // one-sided: bytes into the region
  // Pull: where the bytes lie at the peer; of device memory that goes to shared memory of the peer's, where they go.
  uint64_t source_address = 0;
  uint32_t source_segment = 0;  // and in which segment; of what the peer pulls, ours
  uint32_t registration = 0;    // of `data` with the link, 0: none
  uint32_t offer = 0;           // receive: the slot in which it is offered to its source, 0: none
  uint32_t immediate = 0;       // send: what its writes into an offer carry
  uint32_t chunks = 0;          // of those, posted
  uint64_t deadline_ns = 0;
  uint64_t submitted_ns = 0, started_ns = 0, ended_ns = 0;
  uint32_t list_bytes = 0;  // listed get: of its list
  uint16_t meta_bytes = 0;
  std::array<std::byte, 16 + 8 * kMaxDims> meta;  // dtype and shape of a message
  std::string notify;
  bool has_notify = false;
  void* cookie = nullptr;  // the binding's object; the core never looks at it
  uint64_t ready = ~0ull;  // bytes that may be read by now; less than all: the rest is being staged
  // put, get: of memory that lies apart on both sides, which this side's device moves, or of host memory the copy threads of
  // whoever writes it; else the op ends as `unreachable`. Its offsets count from `data`, within `extent` bytes, and from
  // `offset`, within `reach`. Of a list in device memory: those between it and the bounce.
  std::shared_ptr<const RowList> rows;
  uint64_t extent = 0, reach = 0;
  std::unique_ptr<DeviceBuffer> gpu;  // device memory; `data` is its address, which only devices may touch
  std::unique_ptr<std::byte[]> own;   // listed: the list that a get sends, or what the region's owner copies
  int16_t allocate_on = -1;           // receive with `allocate`: device, -1: host memory
};

// Whether it is moved as memory of a device, or as rows. A list's message is neither: it lies in host memory.
inline bool is_on_device(const Op& op) { return op.gpu && !op.listed; }
inline bool has_rows(const Op& op) { return op.rows && !op.listed; }

// Bytes from `data` on, and of a region from `offset` on, that an op is about.
inline uint64_t extent_of(const Op& op) { return has_rows(op) ? op.extent : op.nbytes; }
inline uint64_t reach_of(const Op& op) { return has_rows(op) ? op.reach : op.nbytes; }

// What the pair's link moves of an op: its bytes, or host memory in place of device memory that no adapter reaches.
inline std::byte* host_data(const Op& op) { return op.gpu && !op.gpu->direct ? op.gpu->bounce : op.data; }

// Ops have stable addresses and generation-checked ids. Slots are taken and given back by one thread; any thread that
// holds the token may look an id up.
class OpTable {
 public:
  explicit OpTable(uint64_t id_bit = 0) : id_bit_(id_bit) {}
  Op* take();
  void give_back(Op* op);
  Op* find(OpId id) const;
  size_t in_use() const { return in_use_; }
  template <typename F>
  void for_each_live(F&& f) {
    size_t n = chunk_count_.load(std::memory_order_acquire);
    for (size_t c = 0; c < n; ++c)
      for (size_t i = 0; i < kChunk; ++i)
        if (Op& op = chunks_[c].load(std::memory_order_relaxed)[i]; op.live) f(op);
  }
  ~OpTable();

 private:
  static constexpr size_t kChunk = 512, kChunks = 8192;
  const uint64_t id_bit_;
  std::unique_ptr<std::atomic<Op*>[]> chunks_ = std::make_unique<std::atomic<Op*>[]>(kChunks);
  std::atomic<size_t> chunk_count_{0};
  std::vector<uint32_t> free_;
  size_t in_use_ = 0;
};

}  // namespace aiocomm
