// Reading the engine's counters.

#include <algorithm>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

uint8_t Engine::link_index(const std::string& link) const {
  for (size_t i = 0; i < link_names_.size(); ++i)
    if (link_names_[i] == link) return static_cast<uint8_t>(i);
  throw std::invalid_argument("no link named '" + link + "' is enabled");
}

void LinkCounters::ended(const Op& op) {
  if (op.code != Code::ok) {
    ++(op.code == Code::cancelled ? cancelled : failed);
    if (op.code == Code::would_block) ++would_block;
    return;
  }
  ++completed;
  const uint64_t began = op.started_ns ? op.started_ns : op.ended_ns;
  queued.add(began - std::min(began, op.submitted_ns));
  moved.add(op.ended_ns - std::min(op.ended_ns, began));
}

void Engine::count_submitted(Op& op, uint8_t link) {
  if (op.counted_by != kNoLink) return;
  op.counted_by = link;
  ++counters_[link].submitted;
}

// The link that an operation with this rank will use; of any rank, or one that was never connected, the first.
uint8_t Engine::usual_link(Rank rank) {
  Peer* peer = find_peer(rank);
  if (rank == rank_ || (peer && peer->link_index)) return peer ? peer->link_index : 0;
  return links_.size() > 1 ? 1 : 0;  // "self" comes first
}

uint8_t Engine::likely_link(Rank rank) {
  Token token(*this, true);
  return usual_link(rank);
}

bool Engine::takes_rows(Rank rank) {
  const uint8_t likely = likely_link(rank);
  Token token(*this, true);
  Peer* peer = find_peer(rank);
  return peer && peer->state == Peer::State::up ? peer->onesided != nullptr : link_names_[likely] == "rdma";
}

std::string Engine::why_lost(Rank rank) {
  Token token(*this, true);
  if (!fault_.empty()) return fault_;
  Peer* peer = find_peer(rank);
  return peer && peer->state != Peer::State::up ? peer->lost_reason : std::string();
}

std::string Engine::link_of(Rank rank) {
  Token token(*this, true);
  Peer* peer = find_peer(rank);
  return peer && peer->state == Peer::State::up ? link_names_[peer->link_index] : std::string();
}

int Engine::process_of(Rank rank) {
  Token token(*this, true);
  Peer* peer = find_peer(rank);
  if (!peer || peer->state != Peer::State::up || !peer->link) return -1;
  return peer->link->pull_path(Location{}) == Path::cma ? peer->link->process() : -1;
}

std::vector<Op*> Engine::outgoing() {
  Token token(*this, true);
  std::vector<Op*> out;
  ops_.for_each_live([&](Op& op) {
    if (op.kind == OpKind::send || op.kind == OpKind::put) out.push_back(&op);
  });
  return out;
}

LinkCounters Engine::counters(const std::string& link) {
  Token token(*this, true);
  size_t i = link_index(link);
  LinkCounters all = counters_[i];
  if (!closed_) all.device = links_[i]->counters();
  return all;
}

std::map<std::string, double> Engine::gauges(const std::string& link) {
  Token token(*this, true);
  size_t i = link_index(link);
  const bool device = device_.mover() && i == device_.index();
  Scheduler none;
  const Scheduler& sched = !device ? *schedulers_[i] : device_.sched_of(Lane::peer, none);
  size_t peers = 0;
  uint64_t unsent = 0;
  for (auto& peer : peers_) {
    if (!peer || peer->state != Peer::State::up) continue;
    const bool here = peer->link_index == i;
    peers += device ? peer->device_owner != 0 : here;
    if (here && peer->link) unsent += peer->link->unsent();
  }
  return {{"queued", static_cast<double>(sched.items())},
          {"in_flight_bytes", static_cast<double>(sched.in_flight() + unsent)},
          {"rate_bytes_per_s", sched.rate() * 1e9},
          {"window_bytes", static_cast<double>(sched.window(1))},
          {"chunk_bytes", static_cast<double>(sched.chunk_size(1))},
          {"peers", static_cast<double>(peers)},
          {"posted_receives", static_cast<double>(matcher_.posted())},
          {"unexpected_messages", static_cast<double>(matcher_.unexpected())},
          {"unexpected_bytes", static_cast<double>(matcher_.unexpected_bytes())},
          {"channels", static_cast<double>(channels_.size())},
          {"flows", static_cast<double>(device ? device_.flows() : flows_[i]->size())},
          {"in_flight", static_cast<double>(ops_.in_use())}};
}

std::map<std::string, uint64_t> Engine::served_by_channel(const std::string& link) {
  Token token(*this, true);
  const size_t i = link_index(link);
  const bool device = device_.mover() && i == device_.index();
  return channels_.served(i, [&](const Channel& channel) {
    return device ? device_.served(channel) : flows_[i]->served(channel);
  });
}

}  // namespace aiocomm
