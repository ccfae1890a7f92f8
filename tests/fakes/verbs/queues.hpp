// What the simulated adapters are made of. One lock guards it all: it proves logic, never speed.
#pragma once

#include <infiniband/verbs.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace fake {

struct Region : ibv_mr {
  int access = 0;
  std::byte* bytes = nullptr;  // where they are in this process: of a dma-buf, its own mapping
  int device = 0;
};

struct Channel : ibv_comp_channel {
  std::deque<ibv_cq*> events;
};

struct Queue : ibv_cq {
  enum class Armed { no, solicited, all } armed = Armed::no;
  std::deque<ibv_wc> done;
};

struct Receive {
  uint64_t id = 0, address = 0;
  uint32_t nbytes = 0, lkey = 0;
};

struct SharedReceives : ibv_srq {
  std::deque<Receive> posted;
};

struct Send {
  uint64_t id = 0, remote = 0;
  uint32_t nbytes = 0, rkey = 0, immediate = 0;
  std::vector<ibv_sge> pieces;  // whose bytes are `nbytes`
  ibv_wr_opcode opcode = IBV_WR_SEND;
  unsigned flags = 0;
  std::vector<std::byte> data;  // of a send: taken when it was posted
};

constexpr size_t kMostReadPieces = 3;  // of one request

struct Pair : ibv_qp {
  ibv_qp_state state = IBV_QPS_RESET;  // what it is; the library's is what it was last told to be
  uint32_t other = 0;
  int device = 0, initiates = 0, answers = 0;  // reads at a time
  bool routed = false;                         // its packets carry GIDs
  size_t most_pieces = 1, depth = 0;
  int unacknowledged = 0;   // events of it
  bool at_receive = false;  // it has failed in the middle of one:
  Receive receive;
  std::deque<Send> posted;  // what waits for a receive of the other side's, and what is behind it
};

constexpr int kMostDevices = 8;

// What a device can, or wants.
struct Limits {
  int initiates = 16, answers = 16;  // reads of a queue pair
  bool routed = false;               // only what carries its GID reaches it
};

// Registrations of `from` bytes and more wait, or fail with `error`.
struct Fault {
  size_t from = ~size_t{0};
  int error = 0;
};

struct Machine {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint32_t, Region*> regions;  // by key: lkey and rkey are the same
  std::map<uint32_t, Pair*> pairs;      // by number
  std::set<Channel*> channels;
  uint32_t next_key = 1, next_pair = 16;
  Fault paused, failing;
  Fault kept;            // deregistrations that wait
  bool stalled = false;  // reads and writes are not done for now
  int held = -1;         // the device whose queue pairs are not connected for now
  int connecting = 0;    // queue pairs that wait for that
  std::map<std::pair<int, std::string>, int>
      lacking;                     // errno of calls that make something, by device and call
  std::map<int, int> unreachable;  // errno of what connects, by device
  bool dma_buf = true;             // adapters take dma-bufs
  int waiting = 0;                 // registrations
  int leaving = 0;                 // deregistrations that wait
  uint64_t registered = 0;
  bool fork_safe = false;
  size_t most_pairs = ~size_t{0};
  std::set<int> vectors;  // by which completion queues tell
  Limits limits[kMostDevices];
  std::multimap<int, ibv_context*> contexts;  // that are open, by device
  std::map<ibv_context*, std::deque<ibv_async_event>> events;
  enum class Last { told, late, silent } last = Last::told;  // of the receives of a queue pair that fails
  std::vector<std::pair<Pair*, int>> ending;  // late ones, and how often that has yet to be asked
  uint64_t requests = 0;                      // that were posted
  std::atomic<const char*> broken{nullptr};   // a thread whose calls throw, by its name
};
Machine& machine();

// --- under the lock
std::byte* reach(uint32_t key, uint64_t address, uint64_t nbytes, int access);  // nullptr: refused
void complete(Queue& queue, const ibv_wc& wc, bool solicited);
void progress(Pair& pair);
void progress_all();
void break_pair(Pair& pair);
void tell(ibv_context* context, const ibv_async_event& event);
void end_receives(Pair& pair);

}  // namespace fake
