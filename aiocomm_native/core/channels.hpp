// The channels of one communicator. Pure: no I/O, threads or clock; the owner serialises calls.
//
//   open ─close→ closed ─its last operation has ended→ forgotten
//
// Rules
//   - The two ends of a channel know it by a hash of its name, by which messages are matched. All else belongs to one end,
//     and to one opening: who opens a closed name gets another channel, of whatever class, though operations of the one
//     before may still be ending. Hence nothing that was scheduled for a channel can see its class or weight change.
//   - A channel's id is not given to another one: who has kept it finds nothing that is open (but after 2^32 others).
//   - An operation holds its channel from its start to its end; a closed one is over when nothing holds it.
//   - What comes for a name that is not open waits, since it may be opened; but not where it was closed for good. The last
//     kGone of these are known: later than that comes nothing.
//   - Names of the channels closed last are remembered: peers may have a word about what was sent on them. So is what was
//     served of them, which counts for all others together.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/ids.hpp"
#include "core/registry.hpp"
#include "core/sched.hpp"

namespace aiocomm {

struct Channel {
  const uint32_t id;
  const ChannelId wire;  // to both ends
  const std::string name;
  const uint8_t cls;
  const double weight;
  bool open = true;
  uint32_t holders = 0;          // operations that have not ended
  Tag unread_below = 0;          // of messages with a lower tag, other than 0, nobody here receives any more
  std::vector<uint64_t> served;  // bytes of flows that are gone, by link
};

class Channels {
 public:
  static constexpr size_t kRemembered = 256, kGone = 4096;

  Channels();  // with the one of no name, whose id is 0

  // The open channel of this name, else a new one. Illegal, as std::invalid_argument: it is open with another class or
  // weight, or another name has its hash.
  Channel& open(const std::string& name, uint8_t cls, double weight);
  // `for_good`: nobody here will open its name again.
  void close(Channel& channel, bool for_good = false);
  // It must be over. What has been served of it stays counted.
  void forget(Channel& channel);
  static bool is_over(const Channel& channel) { return !channel.open && channel.holders == 0; }

  Channel* find(uint32_t id) const noexcept { return all_.find(id); }  // open or closed
  Channel* open_at(ChannelId wire) const;
  // That of a peer's access to a region: the open one, else one of the peer's class and weight, which is over with the
  // accesses that hold it.
  Channel& of_access(ChannelId wire, uint8_t cls, double weight);
  Channel& standard() const { return *all_.find(0); }
  std::string name_of(ChannelId wire) const;  // "?" if it is not known
  bool is_gone(ChannelId wire) const { return !gone_.empty() && gone_.contains(wire); }  // for good
  bool is_unread(ChannelId wire, Tag tag) const {
    if (is_gone(wire)) return true;
    const Channel* channel = tag == 0 || !any_unread_ ? nullptr : open_at(wire);
    return channel && tag < channel->unread_below;
  }
  // Nobody here will receive what has a lower tag, but for tag 0.
  void drop_below(Channel& channel, Tag tag) {
    any_unread_ = true;
    channel.unread_below = std::max(channel.unread_below, tag);
  }
  size_t size() const noexcept { return all_.size(); }
  size_t opened(uint8_t cls) const noexcept { return opened_[cls]; }
  bool any_above(uint8_t cls) const noexcept;
  template <class F>
  void each(F&& f) const {
    all_.each(f);
  }
  // Bytes served on a link by name, of channels that were closed long ago as kOthers. `now`: what a channel's flows there
  // have been served.
  template <class F>
  std::map<std::string, uint64_t> served(size_t link, F&& now) const {
    std::map<std::string, uint64_t> bytes;
    auto count = [&](const std::string& name, uint64_t more) {
      if (more) bytes[name] += more;
    };
    all_.each([&](const Channel& channel) { count(channel.name, at(channel.served, link) + now(channel)); });
    for (const Past& past : past_) count(past.name, at(past.served, link));
    count({kOthers, sizeof kOthers - 1}, at(others_, link));
    return bytes;
  }

 private:
  static constexpr char kOthers[] = "\0closed";
  using Served = std::vector<uint64_t>;  // by link
  struct Past {
    ChannelId wire;
    std::string name;
    Served served;
  };
  static uint64_t at(const Served& served, size_t link) { return link < served.size() ? served[link] : 0; }
  static void add(Served& sum, const Served& more);
  void remember(const Channel& channel);

  Registry<Channel> all_;
  uint32_t next_ = 0;
  std::unordered_map<ChannelId, Channel*> open_, of_peers_;
  std::array<size_t, Scheduler::kClasses> opened_{};
  bool any_unread_ = false;
  std::list<Past> past_;  // closed last: at the back
  std::unordered_map<ChannelId, std::list<Past>::iterator> past_by_wire_;
  Served others_;
  std::unordered_set<ChannelId> gone_;
  std::deque<ChannelId> gone_in_order_;
};

}  // namespace aiocomm
