// Peers that come and go: known, attached to a link, started, lost.

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

void Engine::add_peer(Rank rank, uint64_t generation) {
  Token token(*this);
  if (rank < 0 || rank >= (1 << 20)) throw std::invalid_argument("rank out of range");
  if (peers_.size() <= static_cast<size_t>(rank)) peers_.resize(rank + 1);
  auto& slot = peers_[rank];
  if (slot && slot->generation == generation) return;
  if (slot && slot->state != Peer::State::lost) end_peer(*slot, "replaced by a new incarnation");
  slot = std::make_unique<Peer>();
  slot->rank = rank;
  slot->generation = generation;
}

void Engine::attach(Rank rank, uint64_t generation, const std::string& name, const std::vector<int>& fds,
                    const std::string& card, bool initiator) {
  Token token(*this);
  auto refuse = [&](const std::string& why, int error) {
    for (int fd : fds) ::close(fd);
    throw LinkFailure(why, error);
  };
  Peer* peer = find_peer(rank);
  if (closed_) refuse("the communicator is closed", ESHUTDOWN);
  if (!peer || peer->generation != generation || peer->state == Peer::State::lost)
    refuse("rank " + std::to_string(rank) + " is not (or no longer) known", ESTALE);
  if (peer->state == Peer::State::up)
    refuse("rank " + std::to_string(rank) + " is connected already", EISCONN);
  auto it = std::find(link_names_.begin(), link_names_.end(), name);
  if (it == link_names_.end()) refuse("link '" + name + "' is not enabled", ENODEV);
  auto index = static_cast<uint8_t>(it - link_names_.begin());
  drop_attached(*peer);  // of a call that broke off
  peer->link = links_[index]->attach(rank, generation, fds, card, initiator);
  peer->link->rank = rank;
  peer->link->generation = generation;
  peer->link_index = index;
}

void Engine::start_pair(Rank rank, uint64_t generation) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (!peer || peer->generation != generation || peer->state == Peer::State::up || !peer->link ||
      peer->state == Peer::State::lost)
    return;  // it died meanwhile
  peer->offers = peer->link->takes_offers() ? std::make_unique<Offers>() : nullptr;
  peer->onesided = peer->link->reaches_regions() ? std::make_unique<OneSided>() : nullptr;
  peer->state = Peer::State::up;
  if (links_[peer->link_index]->polled()) polled_.push_back(peer->link.get());
  if (rank != rank_) emit({EngineEvent::Kind::link_up, rank, 0, link_names_[peer->link_index], {}});
  peer->link->start();
  peer->rested = peer->resting = false;
  peer->used = true;
  begin_waiting(*peer);
  ring_engine();  // heartbeats and whatever came with the first bytes
}

void Engine::detach(Rank rank, uint64_t generation) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (peer && peer->generation == generation) drop_attached(*peer);
}

void Engine::drop_attached(Peer& peer) {
  if (!peer.link || peer.state == Peer::State::up || peer.state == Peer::State::lost) return;
  peer.link->close();
  retired_.push_back(std::move(peer.link));
  peer.link.reset();
}

void Engine::lose_peer(Rank rank, uint64_t generation, const std::string& reason) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (peer && peer->generation == generation) end_peer(*peer, reason);
}

void Engine::leave_peer(Rank rank, uint64_t generation) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (!peer || peer->generation != generation) return;
  peer->leaving = true;
  if (peer->state != Peer::State::up) end_peer(*peer, kLeft);
}

std::string Engine::pair_state(Rank rank, uint64_t generation) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (!peer || peer->generation != generation) return "failed";
  return peer->state == Peer::State::up ? "up" : peer->rested ? "rested" : "failed";
}

void Engine::fail_connect(Rank rank, const std::string& reason) {
  Token token(*this);
  Peer* peer = find_peer(rank);
  if (!peer || peer->state == Peer::State::up || peer->state == Peer::State::lost) return;
  drop_attached(*peer);
  peer->state = Peer::State::known;  // the next operation tries again
  peer->lost_reason = reason;
  emit({EngineEvent::Kind::link_down, rank, 0, "none", reason});
  std::vector<Op*> waiting;
  ops_.for_each_live([&](Op& op) {
    if (op.peer == rank) waiting.push_back(&op);
  });
  peer->waiting.clear();
  for (Op* op : waiting)
    if (op->live) end_early(*op, Code::peer_lost);
}

}  // namespace aiocomm
