// The cuda link: GPU memory on one host, moved by copy engines beside the pairs' own links.
#pragma once

#include <unistd.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "core/link.hpp"
#include "links/cuda/device.hpp"
#include "links/cuda/exports.hpp"
#include "links/cuda/mappings.hpp"
#include "links/cuda/memory.hpp"
#include "links/cuda/pins.hpp"

namespace aiocomm::cuda {

// What outlives the link while a transfer still has a buffer of it.
class State {
 public:
  State(const Driver& driver, Host& host);
  ~State();

  // Started on first use. Throws LinkFailure. Any thread.
  Device& device(int ordinal);
  Device* started(int ordinal) const {
    return devices_[static_cast<size_t>(ordinal)].load(std::memory_order_acquire);
  }
  void turn();       // of the devices that are started, by the loop's thread
  bool due() const;  // of any of them
  void stop();
  // After stop(): pinned memory and the like. Returns the number of the last of the tasks of the reaper.
  uint64_t give_up();

  const Driver& driver;
  MoverHost& host;
  const uint64_t process;  // token
  std::atomic<uint64_t> described =
      0;  // messages' memory so far: where there are some, memory may be freed, too
  std::atomic<bool> pinning = false;  // host memory, that nobody waits for
  Helper helper;
  std::mutex made_mutex;
  std::unordered_map<OpId, uint64_t>
      made;  // memory that the helper has allocated for a receive; 0: it could not
  Mappings mappings;
  Exports exports;
  Bounces bounces;
  Relays relays;
  PinnedMemory pinned;

 private:
  int look_for_freed();

  static constexpr size_t kDevices = WakePage::kDevices;
  const uint64_t spin_ns_;
  uint64_t described_then_ = 0;  // the helper's, as the next
  int pause_ms_ = 0;
  std::chrono::steady_clock::time_point looked_{};
  std::mutex mutex_;
  bool stopped_ = false;
  std::array<std::atomic<Device*>, kDevices> devices_{};
};

struct CudaBuffer final : DeviceBuffer {
  explicit CudaBuffer(std::shared_ptr<State> owner) : state(std::move(owner)) {}
  ~CudaBuffer() override;
  std::shared_ptr<State> state;
  uint64_t nbytes = 0;
  bool ipc = false;
  bool borrows_gate = false;  // of the whole that it is part of
  uint64_t relay_size = 0;
  uint64_t own = 0;  // memory of an array that a receive has made
};

class CudaLink final : public Link, public Mover {
 public:
  explicit CudaLink(Host& host) : host_(host) {}
  std::string_view name() const override { return "cuda"; }
  StreamNeed streams() const override { return {}; }
  Mover* mover() override { return this; }
  std::shared_ptr<LinkPeer> attach(Rank, uint64_t, const std::vector<int>& fds, std::string_view,
                                   bool) override;

  std::unique_ptr<DeviceBuffer> bind(uint64_t address, uint64_t nbytes, int device, uint64_t stream) override;
  std::unique_ptr<DeviceBuffer> part(const DeviceBuffer& whole, uint64_t offset, uint64_t nbytes) override;
  std::unique_ptr<DeviceBuffer> reserve(int device) override;
  Reach::State allocate(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) override;
  int devices() const override;
  Reach reach(int device, const DevicePlace& theirs, LinkPeer& peer, OpId waiter) override;
  bool reach_shared(int device, const std::shared_ptr<PeerMemory>& memory, uint64_t offset, uint64_t nbytes,
                    const RowList* rows, bool outgoing) override;
  void offer(DeviceBuffer& buffer, LinkPeer& peer) override;
  bool post(const MoveJob& job) override;
  void await_gate(const Gate& gate, int device, OpId waiter, std::shared_ptr<Company> company) override;
  void turn() override;
  bool due() const override;
  void rehearse() override;
  void hold(int device) override { state_->started(device)->hold(); }
  void let_go(int device) override { state_->started(device)->let_go(); }
  Reach::State take_bounce(DeviceBuffer& buffer, uint64_t nbytes, OpId waiter) override;
  Reach::State take_relay(DeviceBuffer& buffer, uint64_t nbytes, LinkPeer& peer, OpId waiter) override;
  uint64_t load(int device) const override;
  void forget(uint64_t owner) override;
  void forget(uint64_t owner, const Gone& memory) override;
  void stop() override;
  std::string describe(int error) const override;
  bool exports(int device) override;
  int export_pages(int device, uint64_t address, uint64_t nbytes) override;
  int node(int device) override;
  void flush(int device) override;
  std::map<std::string, uint64_t> counters() override;

 private:
  State& state();  // loads the driver on first use; throws LinkFailure
  Reach within_process(int device, const DevicePlace& theirs, OpId waiter);

  // By address, what bind() has seen: as long as the buffer id is the same, nothing else needs to be asked.
  struct Known {
    uint64_t address = 0;
    Allocation allocation;
  };
  Allocation look_up_known(const Driver& driver, uint64_t address, uint64_t nbytes);
  std::array<Known, 256> known_{};  // the loop's thread only

  Host& host_;
  const int pid_ = ::getpid();  // asked for with every message
  std::mutex mutex_;
  std::shared_ptr<State> state_;
  std::atomic<State*> turning_{nullptr};  // the same, for turn()
  enum class Peering : uint8_t { opening, direct, detour };
  std::unordered_map<uint64_t, Peering> peered_;  // pairs of devices
};

}  // namespace aiocomm::cuda
