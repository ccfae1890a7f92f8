// The simulated GPUs of this process: contexts, streams, events, and the engines that execute what streams queue.
//
// Time works as on the real thing, as far as the link can tell:
//  * A stream executes in order. An operation is ready when those before it in its stream have ended.
//  * Each device has one thread per engine (host to device, device to host, to a peer, local, host functions). It takes
//    the ready operation that was *submitted* first, of whatever stream: a copy queued later never overtakes.
//  * Everything else (events, values written and waited for) happens the moment it is ready.
//  * What gives memory back waits for all that is queued in its context, and meanwhile no thread can queue a copy, a fill, a
//    kernel or an event there (seen on driver 580; values can be written).
//  * An operation that touches what is not mapped breaks its context: nothing more executes, every call says so.
// One lock guards all; engines drop it while they move bytes.
#pragma once

#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "abi.hpp"
#include "condition.hpp"
#include "faults.hpp"
#include "memory.hpp"

namespace fake {

using Lock = std::unique_lock<std::mutex>;

enum class EngineKind { to_device, to_host, peer, local, host, count };
constexpr size_t kEngines = static_cast<size_t>(EngineKind::count);

struct Context;

struct Event {
  CUevent handle = nullptr;
  Context* context = nullptr;
  unsigned flags = 0;
  EventCell own;
  EventCell* cell = &own;
  int32_t slot = -1;
  std::shared_ptr<Backing> peer;  // whose control page holds the cell
  uint64_t generation = 0;
  bool captured = false;
};
using EventPtr = std::shared_ptr<Event>;

// A reduction of whose source a module was "loaded"; see modules.cpp.
struct Kernel {
  std::string dtype, op;
  size_t item = 0;
  unsigned by = 0;  // divide by this instead
  // Of `combine_all`: the arrays of all ranks, which are combined in their order and written back to all.
  std::vector<uint64_t> in, out;
  uint64_t rows = 0, count = 0;  // of `gather`: a table in device memory of what is copied where
  void run(std::byte* out, const std::byte* left, const std::byte* right, size_t nbytes) const;
};

struct Stream;
using StreamPtr = std::shared_ptr<Stream>;

struct Op {
  enum class Kind {
    copy,
    fill,
    kernel,
    host_function,
    record,
    wait_event,
    write_value,
    wait_value,
    free_memory
  };
  explicit Op(Kind what, EngineKind where = EngineKind::local) : kind(what), engine(where) {}
  Kind kind;
  EngineKind engine;
  uint64_t sequence = 0;
  uint64_t to = 0, from = 0;
  size_t width = 0, height = 1, to_pitch = 0, from_pitch = 0;
  uint64_t value = 0;
  int nbytes = 1;  // of a value
  unsigned flags = 0;
  EventPtr event;
  uint64_t ticket = 0;
  CUhostFn function = nullptr;
  void* argument = nullptr;
  std::shared_ptr<const Kernel> kernel;  // `to` = `from` (op) `second`
  uint64_t second = 0;
  std::vector<std::pair<StreamPtr, uint64_t>> after;
  std::vector<RangePtr> uses;
};

struct Stream {
  CUstream handle;
  Context* context;
  bool blocking;
  int priority;
  std::deque<Op> queue;
  uint64_t submitted = 0, completed = 0;
  bool offered = false;  // its front is in an engine
  CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
  int capture_mode = 0;
};

struct Context {
  CUcontext handle;
  int device;
  int references = 0;
  CUresult error = CUDA_SUCCESS;
  int giving_back = 0;  // calls that give memory back, and wait for all that is queued
  std::set<int> peers;
  StreamPtr legacy;
  std::map<std::thread::id, StreamPtr> per_thread;
};

struct EngineState {
  std::map<uint64_t, StreamPtr> ready;  // by sequence
  bool started = false, paused = false, halfway = false, busy = false;
  uint64_t steps = 0, executed = 0;
};

struct Device {
  Context context;
  std::array<EngineState, kEngines> engines;
  std::unique_ptr<Pool> default_pool;
  int physical;  // its number before CUDA_VISIBLE_DEVICES
};

class Sim {
 public:
  Sim();

  std::mutex mutex;
  Condition changed;
  std::atomic<pid_t> initialised{
      0};  // by this process; a child that is forked after that cannot use any of it
  bool forked() const { return initialised && initialised != getpid(); }
  std::vector<std::unique_ptr<Device>> devices;
  std::unique_ptr<Memory> memory;
  std::map<CUstream, StreamPtr> streams;  // live handles
  std::map<CUevent, EventPtr> events;
  std::map<uint64_t, std::shared_ptr<Physical>> physicals;
  std::map<CUmemoryPool, std::unique_ptr<Pool>> pools;
  std::vector<int32_t> event_slots;
  std::map<CUmodule, Kernel> modules;
  std::map<CUfunction, std::pair<CUmodule, std::string>> functions;
  int version;
  bool peers_allowed;

  uint64_t fresh_handle() { return handles_ += 16; }  // never reused: a stale one is always found out
  CUresult health(const Context& context) const;
  Context* context_of(CUcontext handle);

  StreamPtr make_stream(Context& context, bool blocking, int priority);
  CUresult submit(Lock& lock, const StreamPtr& stream, Op op);
  CUresult wait(Lock& lock, const StreamPtr& stream, uint64_t until);
  CUresult wait_all(Lock& lock, Context& context);
  CUresult come_to_rest(Lock& lock, Context& context);  // before memory is given back
  bool is_done(const StreamPtr& stream) const;          // the legacy one waits for all blocking ones
  void heal(Lock& lock);
  // Completes what can be, hands the rest to engines. To be called after every change.
  void pump();

 private:
  bool advance(const StreamPtr& stream);
  bool ready(const Op& op);
  void finish(Stream& stream);
  void complete_at_once(Stream& stream, Op& op);
  void run_engine(int device, EngineKind kind);
  CUresult perform(Lock& lock, Device& device, EngineState& engine, Op& op);
  CUresult compute(Lock& lock, Device& device, Op& op);
  CUresult compute_all(Lock& lock, Device& device, Op& op);
  CUresult gather(Lock& lock, Device& device, const Kernel& kernel);
  CUresult translate(Device& device, uint64_t address, size_t nbytes, std::vector<Piece>& out, bool& stale);
  void poll();

  uint64_t handles_ = 0x5100'0000'0000;
  uint64_t sequence_ = 0;
  std::vector<StreamPtr> active_;  // with a queue
  bool poller_started_ = false, polled_ = false;
};

Sim& sim();

}  // namespace fake
