// The part of the engine's protocol that concerns memory which no CPU reads; device.hpp tells how it moves.
//
// A receive's way:  deliver -> continue_receive (again after every wait) -> pull | pushed | stage_in
// A send's way:     announce -> cts -> continue_send (again after every wait) -> push | stage_out
// Where one end is shared host memory the device's end pulls or pushes, and `written` tells the other that it is being written.
//
// One per engine, whose token guards it all. In six files: what is chosen (device_choose.cpp), shared host memory
// (device_shared.cpp), chunks on their way (device_chunks.cpp), lists (device_listed.cpp), kernels (device_kernel.cpp), and
// ends and progress (device_ends.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/device.hpp"
#include "core/device_queue.hpp"
#include "core/link.hpp"
#include "core/op.hpp"
#include "core/peer.hpp"
#include "core/sched.hpp"

namespace aiocomm {

class Engine;

class DeviceProtocol final : public MoverHost {
 public:
  explicit DeviceProtocol(Engine& engine) : engine_(engine) {}

  // Before any operation: `index` is that of the mover's link.
  void use(Mover* mover, uint8_t index, uint64_t preempt_ns);
  Mover* mover() const { return mover_; }
  uint8_t index() const { return index_; }

  // --- frames of the pair's link, and ops that the engine hands over
  Post announce(Op& op, Peer& peer);
  // Makes the place of an op's memory known to the peer as far as that can be; returns flags for its frame.
  uint8_t describe(Op& op, Peer& peer);
  // Its memory is not reached by the adapters of the pair's link: it is staged.
  void not_direct(Op& op, Peer& peer, const std::string& reason);
  void go_another_way(Op& op, const std::string& reason);  // as it turned out when it was to be registered
  void held(Op& op, Peer& peer) { continue_receive(op, peer); }
  bool wait_for_gate(Op& op);
  void serve(Op& op, Peer& peer);  // answers a get of a region in device memory
  void start_kernel(Op& op);       // again after every wait
  // Makes the place of memory known to a peer for kernels of its own; false: it cannot reach it. Without the token.
  bool share(Rank rank, DeviceBuffer& buffer);
  // A receive has been matched, and its message or its buffer (or both) are device memory.
  void deliver(Op& op, Peer& peer, const FrameHeader& header, const std::byte* place,
               const std::byte* payload);
  void on_cts(Op& op, Peer& peer, const FrameHeader& header, const std::byte* meta);
  void on_moved(Peer& peer, const FrameHeader& header);
  void on_staged(Peer& peer, const FrameHeader& header);
  void on_freed(Peer& peer, const FrameHeader& header);
  void send_moved(Peer& peer, OpId rop, Code code, uint64_t nbytes);
  void stage_in(Op& op, Peer& peer, bool ask);
  // Bytes of a staged message have come to the bounce: on to the device.
  void landing(Op& op, uint64_t offset, uint64_t nbytes);
  void arriving(Op& op, const FrameHeader& header, uint64_t nbytes);
  void pack(Op& op);  // a list of device memory: again after every wait

  // --- the loop's way into and out of sleep
  // A copy ends about then: the loop is woken, or the engine's thread does not sleep before.
  void expect(uint64_t ns, bool by_engine);
  // A long copy that a loop has waited for by spinning is about to end. Meanwhile its core has forgotten what is to be
  // done then, which takes several times as long: an idle turn of the loop brings it back. Once for each copy.
  void want_rehearsal() {
    if (loop_looks()) rehearsal_.store(true, std::memory_order_relaxed);
  }
  bool take_rehearsal() {
    return rehearsal_.load(std::memory_order_relaxed) &&
           rehearsal_.exchange(false, std::memory_order_relaxed);
  }
  void rehearse() {
    if (mover_) mover_->rehearse();
  }
  uint64_t engine_due() const { return engine_due_ns_; }
  void linger();  // by the loop's thread, without the token: waits for what was expected
  void turn() {   // by the loop's thread while it spins, without the token
    if (mover_) mover_->turn();
  }
  bool due() const { return mover_ && mover_->due(); }
  uint64_t take_due();  // when that was expected, once; 0: nothing was

  // --- ends
  void cancel_move(Op& op);
  void settle(Op& op);
  void forget(Peer& peer);              // it is gone
  void forget(const Channel& channel);  // it is over
  void finish_writers();                // peers that write our memory have their word to say
  void stop();                          // without the token

  void declare(uint8_t cls, bool declared);  // whether channels of the class are open

  // --- statistics
  const Scheduler& sched_of(Lane lane, const Scheduler& otherwise) const;
  uint64_t served(const Channel& channel) const;
  size_t flows() const;

  // --- MoverHost
  void moved(MoveJob* jobs, size_t count) override;
  void go_on(const OpId* ops, size_t count, int error = 0) override;
  bool assist() override;
  bool end_assist() override;
  bool loop_looks() const override;
  bool loop_away() const override;
  void ends_soon(OpId op, uint64_t ns) override;
  void prepare_end(OpId op) override;
  bool urgent_lately() const override;
  void freed(const Gone* memory, size_t count) override;
  void failed(const char* why) noexcept override;

 private:
  // device_choose.cpp
  void proceed(Op& op, Peer& peer);
  void continue_receive(Op& op, Peer& peer);
  void continue_send(Op& op, Peer& peer);
  bool prefer_push(const Op& op, Peer& peer) const;
  bool makes_detour(const Op& op, Peer& peer);
  void note_urgent(const Op& op);
  void answer_with_place(Op& op, Peer& peer);
  void staged_because(Peer& peer, const std::string& reason);
  void stage_out(Op& op, Peer& peer);
  void move_rows(Op& op, Peer& peer, Role role);
  bool has_bounce(Op& op, bool may_wait = true);

  // device_shared.cpp
  bool reaches_shared(Op& op, Peer& peer);
  void move_shared(Op& op, Role role);

  // device_chunks.cpp
  DeviceQueue& queue_of(int device, Lane lane);
  void queue_move(Op& op, Lane lane, uint64_t nbytes);
  void pump(DeviceQueue& queue);
  void take_more(DeviceQueue& queue, Scheduler::Chunk& chunk);
  void limit_window(DeviceQueue& queue);

  // device_listed.cpp
  void packed(Op& op);
  void unpack(Op& op);

  // device_kernel.cpp
  void look_for_words(const KernelCall::Part& part);
  bool words_open(Op& op, const KernelCall::Part& part);
  void begin_parts(Op& op);
  void copy_here(Op& op, const KernelCall::Copy& copy);
  void part_moved(Op& op, const MoveJob& job);
  void end_parts(Op& op);
  void post_copies(Op& op, const Scheduler::Chunk& chunk);
  void post_or_keep(Op& op, const MoveJob& job);

  // device_ends.cpp
  void fail(Op& op, int error);

  Engine& engine_;
  Mover* mover_ = nullptr;
  uint8_t index_ = 0;
  uint64_t preempt_ns_ = 100000;
  uint64_t large_urgent_until_ns_ = 0;  // urgent messages too large for a detour are taken to come
  std::atomic<uint64_t> urgent_ns_{0};  // the last urgent message
  std::vector<std::unique_ptr<DeviceQueue>> queues_;
  // By when a copy should have ended for which the loop was woken in advance; 0: none. Written under the token.
  std::atomic<uint64_t> due_ns_{0};
  std::atomic<bool> rehearsal_{false};
  uint64_t engine_due_ns_ = 0;  // the same of an access of a peer, for which the engine's thread stays awake
};

}  // namespace aiocomm
