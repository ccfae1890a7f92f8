// One GPU of this process: its streams, and the thread that has them copy.
//
// Rules
//  * The thread works in the device's primary context, the one that torch and CuPy use, and on streams of its own.
//  * A stream writes a number to pinned host memory behind the copies that it was given, and the thread reads it:
//    while it waits it calls no driver function, so it takes no lock from a thread that launches kernels. Only a copy
//    that is long overdue is asked for by cuStreamQuery, since a stream that has failed writes nothing. So is the context
//    where a user's stream is waited for: what fails there ends everything in it.
//  * A loop that spins works in the thread's place (turn()), which stands back: what is handed over, and what has ended,
//    need not be told from one thread to the other. Standing back, the thread looks at next to nothing: what it reads
//    the loop's core would have to fetch again. It works all the same when the loop looks no more, or asks it to.
//  * What is handed over goes through lock-free queues; a sleeping thread is rung awake. It spins for a moment after
//    it was active, drives the engine meanwhile (MoverHost::assist), and sleeps without a time limit when nothing is
//    under way.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/clock.hpp"
#include "core/device.hpp"
#include "core/doorbell.hpp"
#include "core/mpsc.hpp"
#include "links/cuda/aside.hpp"
#include "links/cuda/driver.hpp"
#include "links/cuda/row_copies.hpp"

namespace aiocomm::cuda {

struct GateWait {
  Gate gate;
  OpId op = 0;
  uint64_t since_ns = 0;             // when it came to the copy thread
  std::shared_ptr<Company> company;  // that gives the word, unless it is over
};

// Where the time of small copies between devices has gone, sums in ns. Written by the copy thread.
struct SmallCopies {
  std::atomic<uint64_t> by_loop{0};  // issued by a loop that spins, of all copies
  std::atomic<uint64_t> count{0}, handed{0}, issued{0}, seen{0}, told{0};
};

class Device {
 public:
  // Retains the primary context and starts the thread. Throws LinkFailure.
  Device(const Driver& driver, int ordinal, MoverHost& host, uint64_t spin_ns);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  bool post(const MoveJob& job);
  void await_gate(const GateWait& wait);
  void turn();  // by a loop that spins, in place of the thread, to which it leaves what may take long
  bool due() const { return !jobs_.empty(); }  // any thread
  void rehearse();  // by such a loop: what turn() does of the driver's, on a stream that has nothing to do
  // Between the two, posting does not wake the thread: let_go() issues first what it can, as turn() does.
  void hold() { held_.fetch_add(1, std::memory_order_seq_cst); }
  void let_go();
  void stop();  // waits for what was posted
  // After stop(): what gives back its streams and its pinned memory, to be called in its context. Nothing works any more.
  std::function<void()> give_up();

  // A gate that opens when the work that `stream` has now is done. Throws LinkFailure.
  Gate gate_behind(CUstream stream);
  void give_back(const Gate& gate);

  // Makes the context current for its scope, and keeps what is called in it apart from graphs that other threads
  // capture: by default a capture forbids every thread of the process to allocate, and breaks if one does.
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();

   private:
    const Device& device_;
    CUcontext before_ = nullptr;
    int capture_mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  };

  const Driver& driver;
  const int ordinal;
  CUcontext context = nullptr;
  std::array<std::byte, 16> uuid{};
  SmallCopies small;

 private:
  // Some for bulk and one for what is urgent between devices, to and from the host, within the device, kernels.
  static constexpr size_t kBulkStreams = 4, kUrgent = kBulkStreams, kPeerStreams = kUrgent + 1,
                          kOut = kPeerStreams, kIn = kOut + 1, kLocal = kIn + 1, kKernels = kLocal + 1,
                          kStreams = kKernels + 1;
  static constexpr uint64_t kLong = 32 << 20;  // bytes of a copy whose end is announced
  static constexpr size_t kLine = 16;          // words, of each stream's number
  static constexpr uint64_t kOverdueNs = 20000000, kLookNs = 10000000;  // until the driver is asked; and then
  struct Stream {
    CUstream handle = nullptr;
    uint32_t issued = 0;  // numbers given to copies
    uint32_t told = 0;    // of the last copy behind which a write was put
    bool untold = false;  // a loop could not have it written: the thread tries again
    uint64_t looked_ns = 0;
    uint64_t done_ns = 0;  // when its last copy ended
    std::deque<std::pair<uint32_t, MoveJob>> inflight;
  };

  void run();
  bool issue(bool by_thread);
  bool work(bool by_thread);
  void take_turn();
  bool stands_back(uint64_t now);
  void plan_full_turn(uint64_t now);
  void ask();
  int copy(MoveJob& job, Stream& stream);
  void send_joined();
  bool launched(const KernelCall& kernel) const;
  void tell(Stream& stream, bool by_thread);
  bool tell_aside(Stream& stream);
  bool collect(uint64_t now, bool by_thread);
  uint32_t told_aside(uint32_t done, bool by_thread);
  bool open_gates();
  void watch(Stream& stream, uint64_t now);
  void watch_gates(uint64_t now);
  void fail(Stream& stream, int error);
  void finish();
  void fail_all() noexcept;
  bool idle() const;
  void sleep(uint64_t now);
  bool ends_soon(uint64_t now) const;
  void announce_end(uint64_t now);
  const MoveJob* first_between() const;
  uint64_t takes(const MoveJob& job) const;  // between devices, in ns
  uint64_t expected_end(const MoveJob& job) const;
  uint64_t expected_end() const;
  void rate(const MoveJob& job);
  uint64_t margin() const;
  uint64_t newest_gate() const;  // when it came
  void late_by(uint64_t ns);
  size_t stream_of(const MoveJob& job);
  size_t bulk_stream(const MoveJob& job);
  size_t bulk_ = 0;                              // the stream of the last bulk copy
  std::array<uint64_t, kBulkStreams> others_{};  // the devices that each is for
  size_t known_others_ = 0;
  volatile uint32_t& word(size_t index) { return words_[index]; }

  MoverHost& host_;
  const uint64_t spin_ns_;

  struct alignas(64) Looks {
    std::atomic<uint32_t> count{0};   // of the loop's turns
    std::atomic<uint32_t> useful{0};  // those in which it did something
    std::atomic<bool> asks{false};    // it has left something to the thread
  };
  Looks looks_;
  uint32_t seen_looks_ = 0;  // the thread's, as the next
  uint64_t looked_ns_ = 0;   // when it last saw another one
  uint64_t full_ns_ = 0;     // when it looks for itself, whatever the loop does

  // Whoever has it works: the thread, or the loop. Never waited for; all down to the gates is guarded by it.
  alignas(64) std::mutex turn_;
  std::deque<MoveJob> left_;  // taken from the queue, for the thread to issue
  std::array<Stream, kStreams> streams_;
  uint64_t issued_ = 0;                        // copies so far
  std::array<uint64_t, 3> announced_{};        // of those the last that was announced: see announce_end()
  uint64_t peer_done_ns_ = 0;                  // when the last copy between devices ended
  uint64_t run_began_ns_ = 0, run_bytes_ = 0;  // of copies between devices that followed each other at once
  double peer_rate_;                           // bytes per ns that is expected of long ones
  uint64_t late_ns_ = 0;                       // by which timers have been late
  std::vector<OpId> early_;                    // issued in this turn: loops are woken for them
  int lost_ = 0;                               // the driver's code, once the device is lost
  volatile uint32_t* words_ = nullptr;
  CUdeviceptr words_at_ = 0;
  RowCopies row_copies_;
  Aside aside_;                     // for the first stream
  std::vector<uint64_t> launched_;  // functions
  Stream* joined_ = nullptr;        // that copies were collected for, in this turn
  std::vector<MoveJob> finished_;
  std::vector<GateWait> gates_;
  uint64_t gates_looked_ns_ = 0;
  std::atomic<bool> waits_{false};  // for some of them, which the thread looks at also where a loop spins

  std::mutex gate_mutex_;
  std::vector<uint32_t> free_gates_;
  std::vector<Gate> shut_gates_;  // given back before they opened

  BoundedQueue<MoveJob> jobs_;
  BoundedQueue<GateWait> gate_queue_;
  WakeWord wake_;
  int bell_ = -1;
  // Posts while it is held leave a mark, which pairs with let_go(): whoever comes second rings.
  std::atomic<uint32_t> held_{0};
  std::atomic<bool> unrung_{false};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace aiocomm::cuda
