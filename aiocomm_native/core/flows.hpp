// The flows of one scheduler, by channel and peer. Pure, as the scheduler is.
//
// A flow comes with the first thing that a channel has to queue for a peer, and goes with either of the two. Its id may be
// given to another one then. What its group was served stays with the channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "core/channels.hpp"
#include "core/flat_map.hpp"
#include "core/ids.hpp"
#include "core/sched.hpp"

namespace aiocomm {

struct Flow {
  FlowId id = 0;
  Channel* channel = nullptr;  // null: it is gone
  Rank rank = -1;
  uint32_t headers = 0;        // queued headers: later ones must queue behind them
  uint16_t remote_device = 0;  // on a device's engine: where the other end's memory was last
};

class Flows {
 public:
  // `link`: whose statistics count what is served.
  Flows(Scheduler& sched, size_t link) : sched_(sched), link_(link) {}

  // References hold until the next call of of().
  Flow& of(Channel& channel, Rank rank);  // made if there is none
  Flow* find(const Channel& channel, Rank rank);
  Flow& at(FlowId id) { return flows_[id]; }
  template <class F>
  void each(F&& f) const {
    for (const Flow& flow : flows_)
      if (flow.channel) f(flow);
  }
  template <class F>
  void each_of(Rank rank, F&& f) const {
    if (auto it = of_peer_.find(rank); it != of_peer_.end())
      for (FlowId id : it->second) f(flows_[id]);
  }
  void end_peer(Rank rank);
  void end_channel(const Channel& channel);
  uint64_t served(const Channel& channel) const;  // of the flows that there are
  size_t size() const noexcept { return flows_.size() - free_.size(); }

 private:
  static uint64_t key(const Channel& channel, Rank rank) {
    return static_cast<uint64_t>(channel.id) << 32 | static_cast<uint32_t>(rank);
  }
  void end(FlowId id);

  Scheduler& sched_;
  const size_t link_;
  std::vector<Flow> flows_;
  std::vector<FlowId> free_;
  IdMap<uint32_t> by_key_;
  std::unordered_map<Rank, std::vector<FlowId>> of_peer_;
  std::unordered_map<uint32_t, std::vector<FlowId>> of_channel_;
};

}  // namespace aiocomm
