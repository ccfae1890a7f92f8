// Channels that open, close and are over.

#include <utility>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

uint32_t Engine::open_channel(const std::string& name, uint8_t cls, double weight) {
  Token token(*this, true);
  const uint32_t id = channels_.open(name, cls, weight).id;
  declare(cls);
  return id;
}

void Engine::close_channel(uint32_t id, bool for_good) {
  Token token(*this);  // not as the loop's: what ends by that rings, whether or not the caller looks for it
  Channel* channel = channels_.find(id);
  if (!channel || !channel->open) return;
  channels_.close(*channel, for_good);
  declare(channel->cls);
  ++channel->holders;  // until its operations have been told
  std::vector<Op*> live;
  if (channel->holders > 1)
    ops_.for_each_live([&](Op& op) {
      if (op.scope == channel) live.push_back(&op);
    });
  for (Op* op : live)
    if (op->live) end_early(*op, Code::closed);
  if (for_good) drop_unread(*channel);
  leave(*channel);
}

void Engine::drop_below(uint32_t id, Tag tag) {
  Token token(*this, true);
  Channel* channel = channels_.find(id);
  if (!channel || !channel->open) return;
  channels_.drop_below(*channel, tag);
  drop_unread(*channel);
}

void Engine::drop_unread(const Channel& channel) {
  auto unread = [&](const Unexpected& kept) {
    const FrameHeader& header = kept.header;
    return header.channel == channel.wire && channels_.is_unread(header.channel, header.tag) &&
           nobody_waits_for(header);
  };
  for (uint64_t message : unexpected_.select(unread)) drop_unread(message);
}

std::string Engine::name_of_channel(uint32_t id) {
  Token token(*this, true);
  const Channel* channel = channels_.find(id);
  return channel ? channel->name : "?";
}

void Engine::enter(Op& op, Channel& channel) {
  op.scope = &channel;
  ++channel.holders;
}

void Engine::leave(Channel& channel) {
  --channel.holders;
  if (!Channels::is_over(channel)) return;
  for (auto& flows : flows_) flows->end_channel(channel);
  device_.forget(channel);
  if (!channels_.open_at(channel.wire)) matcher_.forget(channel.wire);
  channels_.forget(channel);
}

// More urgent channels bound what may be posted, whether or not they have anything to send now.
void Engine::declare(uint8_t cls) {
  const bool opened = channels_.opened(cls) > 0;
  for (auto& sched : schedulers_) sched->declare(cls, opened);
  device_.declare(cls, opened);
}

}  // namespace aiocomm
