#include "core/channels.hpp"

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace aiocomm {

namespace {
uint64_t hash_of(const std::string& name) {  // FNV-1a
  uint64_t hash = 1469598103934665603ull;
  for (unsigned char c : name) hash = (hash ^ c) * 1099511628211ull;
  return hash;
}
}  // namespace

Channels::Channels() { open("", 1, 1.0); }

Channel& Channels::open(const std::string& name, uint8_t cls, double weight) {
  if (cls >= Scheduler::kClasses) throw std::invalid_argument("classes are 0 to 3");
  const ChannelId wire = hash_of(name);
  if (Channel* known = open_at(wire)) {
    if (known->name != name) throw std::invalid_argument("channel '" + name + "': choose another name");
    if (known->cls != cls || known->weight != weight)
      throw std::invalid_argument("channel '" + name + "' is open with another priority or weight");
    return *known;
  }
  while (all_.find(next_)) ++next_;
  Channel& made = all_.add(std::unique_ptr<Channel>(new Channel{next_++, wire, name, cls, weight}));
  open_[wire] = &made;
  if (gone_.erase(wire)) std::erase(gone_in_order_, wire);  // all the same
  ++opened_[cls];
  return made;
}

Channel* Channels::open_at(ChannelId wire) const {
  auto it = open_.find(wire);
  return it == open_.end() ? nullptr : it->second;
}

Channel& Channels::of_access(ChannelId wire, uint8_t cls, double weight) {
  if (Channel* open = open_at(wire)) return *open;
  if (auto it = of_peers_.find(wire); it != of_peers_.end()) return *it->second;
  cls = std::min<uint8_t>(cls, Scheduler::kClasses - 1);  // what a peer says
  weight = std::clamp(weight, Scheduler::kMinWeight, Scheduler::kMaxWeight);
  while (all_.find(next_)) ++next_;
  const std::string name{kOthers, sizeof kOthers - 1};
  Channel& made = all_.add(std::unique_ptr<Channel>(new Channel{next_++, wire, name, cls, weight, false}));
  return *(of_peers_[wire] = &made);
}

void Channels::close(Channel& channel, bool for_good) {
  channel.open = false;
  if (for_good && gone_.insert(channel.wire).second) {
    gone_in_order_.push_back(channel.wire);
    if (gone_in_order_.size() > kGone) {
      gone_.erase(gone_in_order_.front());
      gone_in_order_.pop_front();
    }
  }
  open_.erase(channel.wire);
  --opened_[channel.cls];
  remember(channel);
}

void Channels::remember(const Channel& channel) {
  if (auto it = past_by_wire_.find(channel.wire); it != past_by_wire_.end()) {
    past_.splice(past_.end(), past_, it->second);
    return;
  }
  past_by_wire_[channel.wire] = past_.insert(past_.end(), {channel.wire, channel.name, {}});
  if (past_.size() <= kRemembered) return;
  add(others_, past_.front().served);
  past_by_wire_.erase(past_.front().wire);
  past_.pop_front();
}

void Channels::forget(Channel& channel) {
  if (auto it = of_peers_.find(channel.wire); it != of_peers_.end() && it->second == &channel)
    of_peers_.erase(it);
  auto it = past_by_wire_.find(channel.wire);
  add(it == past_by_wire_.end() ? others_ : it->second->served, channel.served);
  all_.remove(channel);
}

void Channels::add(Served& sum, const Served& more) {
  sum.resize(std::max(sum.size(), more.size()));
  for (size_t link = 0; link < more.size(); ++link) sum[link] += more[link];
}

std::string Channels::name_of(ChannelId wire) const {
  if (const Channel* channel = open_at(wire)) return channel->name;
  auto it = past_by_wire_.find(wire);
  return it == past_by_wire_.end() ? "?" : it->second->name;
}

bool Channels::any_above(uint8_t cls) const noexcept {
  return std::any_of(opened_.begin() + cls + 1, opened_.end(), [](size_t opened) { return opened > 0; });
}

}  // namespace aiocomm
