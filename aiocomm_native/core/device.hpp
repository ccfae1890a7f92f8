// Memory that no CPU reads: what the core knows of it, and the contract of whoever moves it (links/cuda).
//
// Theory of operation (device_protocol.hpp)
//  * A device message is announced by `rts` over the pair's link with the place of its bytes (kDevice). Once matched,
//    the receiver either has its engine pull them, or answers `cts` with a place of its own, and the sender's engine
//    pushes and says `moved`. Bulk is pushed, so that the other end's engine stays free for what is urgent; that goes
//    by whichever engine has less to do.
//  * Where one end is host memory that it shares (PeerMemory), the device's engine copies from or to it.
//  * Where one end is other host memory, or neither end can map the other's memory, the bytes go through host memory of the
//    device's process (`bounce`): device to bounce, bounce over the pair's link, or the other way, chunk by chunk.
//  * A put is such a message that is matched by its region; the owner of a region answers a get with its place, and the
//    reader goes on as a receiver does.
//  * An access to rows that lie apart (`rows`) is for whoever asks for it to do, with its own engine and both sides'
//    memory mapped, of a device or shared; if that cannot be, it ends as `unreachable`, and lists are put or got.
//  * Lists of ranges (listed.hpp) are packed into and unpacked from the bounce by rows.
//  * A buffer that queued work on the user's stream still uses has a closed gate: nothing is copied before it opens.
//  * Only the process whose engine copies knows when the copy is over. So whoever gives up a transfer that the other
//    side is copying waits for that side's word.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/ids.hpp"
#include "core/rows.hpp"

namespace aiocomm {

class LinkPeer;
struct PeerMemory;
class Scheduler;

enum class Export : uint8_t { none, ipc, descriptor };

// On the wire, behind a message's metadata. Nothing in it is trusted: extents are checked by whoever maps it.
struct DevicePlace {
  uint64_t owner = 0;      // token of the process
  uint64_t address = 0;    // of the message's bytes, in the owner's address space
  uint64_t base = 0;       // of the allocation that holds them
  uint64_t extent = 0;     // bytes of that allocation
  uint64_t buffer_id = 0;  // of that allocation; an address that is allocated anew has another
  uint64_t load = 0;       // bytes that the owner's engine had before it
  std::array<std::byte, 16> uuid{};
  std::array<std::byte, 64> handle{};
  uint16_t device = 0;  // ordinal at the owner
  Export exported = Export::none;
  uint8_t plain = 0;  // by cudaMalloc: GPUs with peer access reach it by its address
  std::array<uint8_t, 4> reserved{};
};
static_assert(sizeof(DevicePlace) == 136);

// Engines of one device that work independently of each other.
enum class Lane : uint8_t { peer, out, in, count };  // device to device, to the host, from the host

enum class Role : uint8_t {
  none,
  pull,       // our engine reads the peer's memory, of a device or shared
  push,       // our engine writes the peer's memory, of a device or shared
  pushed,     // the peer's engine writes ours
  stage_out,  // our engine fills the bounce, which the link sends
  stage_in,   // the link fills the bounce, which our engine empties
};

// A gate is open once the word has reached the value; a stream writes it.
struct Gate {
  const volatile uint32_t* word = nullptr;
  uint32_t value = 0;
  bool open() const {
    return !word || static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
  }
};

// The others of an op on memory of several ranks: nobody touches any of it before all have given their word. Called by
// whoever makes progress.
struct Company {
  virtual ~Company() = default;
  virtual void ready(bool able) = 0;       // our memory may be touched, and we reach theirs; or we do not
  virtual bool able() const = 0;           // all are, once all have given their word
  virtual void moved(uint32_t parts) = 0;  // of the op, so far: their bytes are in place
  std::atomic<bool> over{false};           // the op is gone: nobody waits for their words any more
  std::atomic<bool> hopeless{false};       // nor then: our device is lost, and all that follows fails
};

// One launch over memory of ours and of others, who have agreed to it: its op ends when the kernel has. Or copies from
// memory of ours into theirs, in their order.
struct KernelCall {
  ~KernelCall() {
    if (company) company->over.store(true, std::memory_order_release);
  }
  struct Far {
    Rank owner = -1;
    DevicePlace place;
    uint64_t nbytes = 0;
    size_t at = 0;           // where in `argument` its address belongs, as it is mapped here
    uint64_t alignment = 1;  // that the kernel relies on
    bool reached = false;
    std::shared_ptr<void> mapping;
  };
  uint64_t function = 0;
  uint32_t blocks = 1, threads = 1;
  std::vector<std::byte> argument;  // the only one, by value
  std::vector<Far> far;
  std::vector<Gate> gates;  // it is launched once all are open; the caller keeps what they are of
  bool awaited = false;     // the loop looks for its end from the beginning

  struct Copy {
    int64_t far = -1;     // whose memory is written, of `far`; -1: ours
    uint64_t offset = 0;  // there; the address, if it is ours
    uint64_t from = 0, nbytes = 0;
  };
  // Copies that begin together, once the words are open: of the company, and of what others have put in place.
  struct Part {
    std::vector<Copy> copies;
    std::vector<Gate> words;
    uint64_t away = 0;  // bytes that go to others
  };
  std::vector<Part> parts;  // instead of a launch, or with the words that it waits for
  std::shared_ptr<Company> company;
  bool spoken = false;           // our word is given
  size_t begun = 0;              // parts
  bool begins = false;           // a part, just now
  std::vector<uint64_t> landed;  // of each part, bytes that are in place at others
  size_t in_place = 0;           // parts
};

// A kernel for rows that no copy engine takes as one: it copies what a table in the device's memory lists.
struct Gather {
  uint64_t function = 0;
  uint32_t blocks = 1, threads = 1;
};

// The device memory of one operation. Made by Mover::bind, dropped with the op.
struct DeviceBuffer {
  virtual ~DeviceBuffer() = default;
  DevicePlace place;
  DevicePlace theirs;
  int device = 0;
  Gate gate;
  Role role = Role::none;
  bool in_sched = false;     // of the device's lane
  bool from_device = false;  // the message's bytes are device memory, too: `theirs`
  bool not_yet = false;      // the sender's gate was closed when it announced the message
  bool owes_moved = false;   // push: the peer waits for our word
  bool owes_fin = false;     // pull: the peer's buffer is let go when our last chunk is over
  uint8_t fin_code = 0;
  bool waiting = false;    // for a gate, a mapping or memory
  bool can_pull = false;   // stage_out: the peer reads the bounce by itself
  bool packing = false;    // a list is being brought to the bounce: the peer has no part in it
  bool on_demand = false;  // serve: its bytes go once the reader asks for them
  Lane lane = Lane::peer;
  uint32_t inflight = 0;  // chunks with the device
  uint64_t landed = 0;    // stage_in: bytes in device memory
  uint64_t remote = 0;    // the peer's memory, as mapped here
  std::shared_ptr<void> mapping;
  uint64_t pinned_from = 0;  // that is host memory, in whose blocks from here on it is pinned
  std::byte* bounce = nullptr;
  bool direct = false;                 // the adapters of the pair's link reach it
  bool not_direct = false;             // they were tried, and do not
  bool allocates = false;              // a receive whose memory is made once the message's size is known
  std::unique_ptr<KernelCall> kernel;  // instead of a copy; the op moves no bytes for anybody else
  std::unique_ptr<Gather> gather;      // of `rows`, if multiprocessors may take part
  bool by_rows = false;                // the peer's op has rows of this memory
  uint64_t relay = 0;  // pushed: device memory of ours that the peer can write, where `data` is not
  std::vector<std::pair<uint64_t, uint64_t>> partial;  // stage_in: chunks that are arriving, offset and bytes
};

struct MoveJob {
  OpId op = 0;
  uint64_t to = 0, from = 0, nbytes = 0, offset = 0;
  uint64_t posted_ns = 0, issued_ns = 0, ended_ns = 0;
  uint64_t order = 0;  // in which the device was given it
  uint8_t device = 0, cls = 0;
  uint64_t other = 0;  // of two devices, by its UUID
  Lane lane = Lane::peer;
  int error = 0;                  // the driver's
  bool early = false;             // loops are woken while it runs: it takes no longer than waking up
  bool local = false;             // within one device: by none of the engines between devices
  bool joint = false;             // of an op with copies to several devices, which share the streams
  uint32_t part = 0;              // of the op's copies
  bool more = false;              // of those come at once, and tell its end, too
  bool followed = false;          // by others to the same memory, which its end must not hold up
  bool unscheduled = false;       // no scheduler has given it room
  uint64_t pinned_from = 0;       // its host memory is pinned in blocks from here on: see links/cuda/pins.hpp
  const RowList* rows = nullptr;  // of the op: offsets count from `to` and `from`; else these are the chunk's
  KernelCall* kernel = nullptr;   // of the op: it is launched
  const Gather* gather = nullptr;  // of the op, for its rows
  void* table = nullptr;           // of rows that are being gathered: its mover's
  uint64_t slow_ns = 0;            // that it takes longer than one copy of its size
};

// An allocation that others may have mapped, and that its owner has freed.
struct Gone {
  uint64_t base = 0, buffer_id = 0;
};

struct Reach {
  enum class State : uint8_t { ready, opening, refused } state = State::refused;
  uint64_t base = 0;  // where `theirs.base` is mapped here
  std::shared_ptr<void> mapping;
  std::string reason;  // of `refused`
  bool direct = true;  // of `ready`: kernels reach it, too; else copies do, by a detour
};

// What the engine offers to a mover. None of it is called with the token held.
class MoverHost {
 public:
  virtual void moved(MoveJob* jobs, size_t count) = 0;  // by copy threads, in the order of completion
  // What they waited for has come, or will not. `error`: the driver's, of a device that is lost while its work is waited for.
  virtual void go_on(const OpId* ops, size_t count, int error = 0) = 0;
  // Progress on behalf of the engine's thread, which sleeps meanwhile: peers need not ring from the first call to the end.
  // True: something was done.
  virtual bool assist() = 0;
  virtual bool end_assist() = 0;
  virtual bool loop_looks() const = 0;  // the loop spins, and has the mover work by turn() meanwhile
  virtual bool loop_away() const = 0;   // the loop sleeps, or spins only now and then: it is not relied on
  // Its copy ends in about `ns`: the loops that wait for it, ours and the peer's, are woken in time.
  virtual void ends_soon(OpId op, uint64_t ns) = 0;
  // Its copy has taken long, and ends within a tenth of a millisecond: loops that spin meanwhile prepare for it.
  virtual void prepare_end(OpId op) = 0;
  virtual bool urgent_lately()
      const = 0;  // messages of urgent channels have come or gone. Any thread, without locks
  virtual void freed(const Gone* memory, size_t count) = 0;  // of this process: peers are told
  virtual void failed(const char* why) noexcept = 0;         // as Host::failed

 protected:
  ~MoverHost() = default;
};

// Moves device memory. Calls are made under the engine's token and do not wait, unless said otherwise.
class Mover {
 public:
  virtual ~Mover() = default;
  static constexpr uint64_t kNoStream = ~0ull;
  // Describes an operation's memory, and makes it wait for the work that `stream` has now (kNoStream: for none).
  // Without the token. `device` -1: wherever the memory is. Throws LinkFailure, or std::invalid_argument where the
  // caller has erred.
  virtual std::unique_ptr<DeviceBuffer> bind(uint64_t address, uint64_t nbytes, int device,
                                             uint64_t stream) = 0;
  // Part of memory that bind() has described, which outlives it: for one access to a region. Does not fail.
  virtual std::unique_ptr<DeviceBuffer> part(const DeviceBuffer& whole, uint64_t offset, uint64_t nbytes) = 0;
  // A receive's memory that is made once its size is known: see allocate(). Without the token; throws as bind() does.
  virtual std::unique_ptr<DeviceBuffer> reserve(int device) = 0;
  virtual int devices() const = 0;  // loads the driver; throws LinkFailure
  // Asks the peer's memory to be mapped for `device`; `waiter` hears by go_on where the answer is `opening`.
  virtual Reach reach(int device, const DevicePlace& theirs, LinkPeer& peer, OpId waiter) = 0;
  // Whether the device's engines copy from and to these bytes that a peer shares; where they do not yet, they may for later
  // messages: pinning is not waited for.
  // `rows`: of them, those that are written (`outgoing`) or read.
  virtual bool reach_shared(int device, const std::shared_ptr<PeerMemory>& memory, uint64_t offset,
                            uint64_t nbytes, const RowList* rows, bool outgoing) = 0;
  // Makes memory of ours reachable for the peer as far as it can be; called before a place is sent.
  virtual void offer(DeviceBuffer& buffer, LinkPeer& peer) = 0;
  virtual bool post(const MoveJob& job) = 0;  // false: no room now
  // `company`: whose word it is, and who keep it; it is awaited until they are over.
  virtual void await_gate(const Gate& gate, int device, OpId waiter,
                          std::shared_ptr<Company> company = nullptr) = 0;
  // By a loop that spins, without the token: what copy threads would do now, sooner than they would come to it.
  virtual void turn() = 0;
  virtual bool due() const = 0;  // something is posted that turn() would issue. Any thread
  // By the same loop, before a long copy ends: calls the driver as it will then, to no effect.
  virtual void rehearse() = 0;
  // By the loop's thread, without the token, around a submission for a device that was bound: what is posted in between
  // is issued by let_go() here and now, as by turn(), and the copy thread is woken after that: which takes longer.
  virtual void hold(int device) = 0;
  virtual void let_go(int device) = 0;
  // Host memory for the message: `buffer.bounce`. `waiter` 0: now or never.
  virtual Reach::State take_bounce(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) = 0;
  // The memory of a reserved buffer: its place is filled in. It goes back with the buffer.
  virtual Reach::State allocate(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) = 0;
  // Device memory of ours that any peer on this host can write, in place of the op's own: `buffer.relay` and a place
  // for it. Refused: too large, or no memory is left.
  virtual Reach::State take_relay(DeviceBuffer& buffer, uint64_t nbytes, LinkPeer& peer, OpId waiter) = 0;
  virtual uint64_t load(int device) const = 0;  // bytes that its peer lane has posted
  virtual void forget(uint64_t owner) = 0;      // a process is gone
  virtual void forget(uint64_t owner, const Gone& memory) = 0;
  virtual void stop() = 0;  // without the token: waits for what is posted, ends the threads
  virtual std::string describe(int error) const = 0;

  // --- for links whose adapters reach device memory
  virtual bool exports(int device) = 0;  // the driver exports memory of this device as a dma-buf
  // Exports whole pages: a descriptor, the caller's to close; -1: the driver refuses. Any thread, without the token.
  virtual int export_pages(int device, uint64_t address, uint64_t nbytes) = 0;
  virtual int node(int device) = 0;  // of NUMA, where it is; -1: not told
  // What adapters have written so far is visible to work that is launched on the device from now on.
  virtual void flush(int device) = 0;
};

}  // namespace aiocomm
