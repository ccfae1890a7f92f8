// The rdma link of one communicator: its rails, and the memory registered with them.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/link.hpp"
#include "links/rdma/connector.hpp"
#include "links/rdma/rail.hpp"
#include "links/rdma/registrations.hpp"

namespace aiocomm::rdma {

class RdmaLink final : public Link, public Pollable {
 public:
  explicit RdmaLink(Host& host);  // throws LinkFailure
  ~RdmaLink() override;

  std::string_view name() const override { return "rdma"; }
  StreamNeed streams() const override { return {"tcp", 1}; }
  std::string card() override { return encode_card(ports_); }
  bool polled() const override { return true; }
  // Devices reach their rate with requests of 1 MiB; soft-RoCE reads 4 MiB at half the rate, and repeats packets. It also
  // works in the posting call, which nothing interrupts: beside an urgent channel that must be short.
  ChunkLimits chunk_limits() const override { return {16 << 10, 1 << 20, 32 << 10}; }
  std::shared_ptr<LinkPeer> attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                   std::string_view card, bool initiator) override;
  uint32_t hold(const std::byte* data, uint64_t nbytes, Access access) override;
  uint32_t hold_device(const DevicePlace& place, uint64_t nbytes, Access access, Mover& mover) override;
  void forget_device(const Gone& memory) override {
    if (registrations_) registrations_->forget_device(memory.base, memory.buffer_id);
  }
  bool held(uint32_t id) override;
  bool release(uint32_t id) override { return !registrations_ || registrations_->release(id); }
  std::map<std::string, uint64_t> counters() override;
  std::vector<LeftOut> left_out() const override { return left_out_; }  // devices, and "device:port"
  void close() override;

  // Memory that was registered aside, and queue pairs that were connected so; and devices that are removed while they
  // are used: their rails are taken out, and everything of them is closed.
  void on_ready(uint32_t events) override;
  void look_for_devices(uint64_t now_ns);  // now and then: not everywhere does the kernel tell
  void retire_rails();                     // those without a device, once no pair uses them

  Host& host() { return host_; }
  Registrations& registrations() { return *registrations_; }
  Connector& connector() { return *connector_; }
  std::vector<std::unique_ptr<Rail>>& rails() { return rails_; }

  uint64_t resent = 0;  // frames and chunks that went out again over another rail
  uint64_t lanes_failed = 0, lanes_recovered = 0;
  uint64_t repeated = 0;      // frames that had come already
  uint64_t ring_frames = 0;   // that came by a ring
  uint64_t last_done_ns = 0;  // when a chunk was through, of whichever pair

 private:
  std::vector<ibv_pd*> open_rails();
  void see_routes(const std::vector<Address>& theirs);
  void thread_failed(const char* why) noexcept;
  void see_fault();

  Host& host_;
  const Verbs& verbs_;
  std::vector<LeftOut> left_out_;
  std::vector<Port> ports_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::unique_ptr<Registrations> registrations_;
  std::unique_ptr<Connector> connector_;
  int nodes_ = -1;  // inotify of /dev/infiniband
  int news_ =
      -1;  // rung by rails whose devices say that they are broken, by registrar and connector, and by threads that fail
  std::mutex fault_mutex_;
  std::array<char, 128> fault_{};  // why the first thread failed; it needs no memory of its own
  uint64_t looked_ns_ = 0;
  std::unordered_map<int, std::pair<bool, int>>
      gpus_;                   // by ordinal: whether it exports memory, and its NUMA node
  bool takes_dma_buf_ = true;  // no adapter's driver has refused one
};

}  // namespace aiocomm::rdma
