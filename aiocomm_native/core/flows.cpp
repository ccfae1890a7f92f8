#include "core/flows.hpp"

#include <algorithm>
#include <utility>

namespace aiocomm {

namespace {

// What was made last goes first, mostly.
template <class Key>
void take_out(std::unordered_map<Key, std::vector<FlowId>>& lists, Key key, FlowId id) {
  auto it = lists.find(key);
  std::vector<FlowId>& ids = it->second;
  *std::find(ids.rbegin(), ids.rend(), id) = ids.back();
  ids.pop_back();
  if (ids.empty()) lists.erase(it);
}

}  // namespace

Flow* Flows::find(const Channel& channel, Rank rank) {
  const uint32_t* id = by_key_.find(key(channel, rank));
  return id ? &flows_[*id] : nullptr;
}

Flow& Flows::of(Channel& channel, Rank rank) {
  if (Flow* flow = find(channel, rank)) return *flow;
  const auto id = free_.empty() ? static_cast<FlowId>(flows_.size()) : free_.back();
  sched_.add_flow(id, channel.cls, channel.weight, channel.id);
  if (free_.empty())
    flows_.emplace_back();
  else
    free_.pop_back();
  by_key_.find_or_insert(key(channel, rank)) = id;
  of_peer_[rank].push_back(id);
  of_channel_[channel.id].push_back(id);
  return flows_[id] = Flow{.id = id, .channel = &channel, .rank = rank};
}

void Flows::end_peer(Rank rank) {
  for (auto it = of_peer_.find(rank); it != of_peer_.end(); it = of_peer_.find(rank)) end(it->second.back());
}

void Flows::end_channel(const Channel& channel) {
  for (auto it = of_channel_.find(channel.id); it != of_channel_.end(); it = of_channel_.find(channel.id))
    end(it->second.back());
}

void Flows::end(FlowId id) {
  Flow& flow = flows_[id];
  Channel& channel = *std::exchange(flow.channel, nullptr);
  by_key_.erase_key(key(channel, flow.rank));
  take_out(of_peer_, flow.rank, id);
  const bool last = of_channel_.at(channel.id).size() == 1;
  take_out(of_channel_, channel.id, id);
  if (last) {  // its group ends with it
    if (channel.served.size() <= link_) channel.served.resize(link_ + 1);
    channel.served[link_] += sched_.served(channel.id);
  }
  sched_.remove_flow(id);
  free_.push_back(id);
}

uint64_t Flows::served(const Channel& channel) const {
  return of_channel_.contains(channel.id) ? sched_.served(channel.id) : 0;
}

}  // namespace aiocomm
