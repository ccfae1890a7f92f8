// Put and get by devices: who has a region's key writes into it and reads from it, and its owner's CPU moves nothing.
//
//   initiator                                   owner
//   first use of a region     ── key_ask ──►    registers it, once for all peers
//                             ◄── key_is ──     where it is, how large, whether it may be written
//   checks every access by that; a put           ══ write, write, … ══►
//   with a notification       ── note ──►  ══ write with immediate ══►   told when both are there
//   a get                     ◄══ read, read, … ══
//
//                             ◄── key_revoke ── closes the region
//   begins nothing more; what has begun ends
//                             ── key_revoked ──► with the last peer's word: deregisters, the memory is free
//
// A peer that ends has no queue pairs any more: its word is not needed. One that falls silent ends by its heartbeats. One
// that only does not answer is asked once per `drain_timeout`: it says at least that it is busy, or its pair is closed.

#include <algorithm>
#include <cerrno>
#include <set>
#include <utility>

#include "core/engine.hpp"

namespace aiocomm {

namespace {

constexpr uint64_t kMaxRegion = 1ull << 56;
constexpr char kServed[] = "put and get served by the region's owner";

FrameHeader about(FrameKind kind, uint64_t region) {
  FrameHeader h{};
  h.kind = kind;
  h.rop = region;
  return h;
}

KeyHolder* holder_of(RegionInfo& region, Rank rank) {
  auto found = std::find_if(region.holders.begin(), region.holders.end(),
                            [&](const KeyHolder& holder) { return holder.rank == rank; });
  return found == region.holders.end() ? nullptr : &*found;
}

}  // namespace

// ---------------------------------------------------------------- the initiator's side

// Whether the devices move this op's bytes, as far as is known.
bool Engine::by_key(const Op& op, const Peer& peer) const {
  if (!peer.onesided || op.listed || (op.gpu && !op.gpu->direct)) return false;
  auto it = peer.onesided->keys.find(op.region);
  return it == peer.onesided->keys.end() || it->second.state != RegionKey::State::by_owner;
}

Post Engine::access(Op& op, Peer& peer) {
  auto& keys = peer.onesided->keys;
  auto it = keys.find(op.region);
  if (it == keys.end()) {
    Post posted = peer.link->post(about(FrameKind::key_ask, op.region), nullptr, nullptr, Wake::engine);
    if (posted != Post::ok) return posted;
    ++counters_[op.link].frames_sent;
    it = keys.try_emplace(op.region).first;
  }
  if (it->second.state == RegionKey::State::held) {
    begin_access(op, peer, it->second);
  } else {
    op.state = OpState::posted;
    it->second.waiting.push_back(op.id);
  }
  return Post::ok;
}

void Engine::begin_access(Op& op, Peer& peer, RegionKey& key) {
  bool write = op.kind == OpKind::put;
  if (key.revoked) return finish(op, Code::stale);
  if (op.offset > key.nbytes || reach_of(op) > key.nbytes - op.offset) return finish(op, Code::out_of_range);
  if (write && !key.writable) return finish(op, Code::read_only);
  op.path = write ? Path::write : Path::read;
  if (op.nbytes == 0 && !op.has_notify) return finish(op, Code::ok);
  op.source_address = key.address + op.offset;
  op.source_segment = key.registration;
  op.has_key = true;
  ++key.uses;
  op.state = OpState::posted;
  if (hold(op, write ? Access::local_reads : Access::local) == Hold::ready) queue_data(op, peer, false);
}

void Engine::end_access(Op& op) {
  op.has_key = false;
  drop_held_back(op);
  Peer* peer = find_peer(op.peer);
  if (!peer || !peer->onesided) return;
  auto it = peer->onesided->keys.find(op.region);
  if (it == peer->onesided->keys.end() || --it->second.uses || !it->second.revoked) return;
  peer->onesided->keys.erase(it);
  send_control(*peer, about(FrameKind::key_revoked, op.region), Wake::engine);
}

void Engine::on_key(Peer& peer, const FrameHeader& header) {
  if (!peer.onesided) throw ProtocolViolation("a key where devices reach nothing");
  auto it = peer.onesided->keys.find(header.rop);
  if (it == peer.onesided->keys.end() || it->second.state != RegionKey::State::asked)
    throw ProtocolViolation("a key that nobody asked for");
  auto code = static_cast<Code>(header.code);
  if (code != Code::ok && code != Code::stale && code != Code::link_failed)
    throw ProtocolViolation("unknown outcome");
  if (code == Code::ok && (header.nbytes > kMaxRegion || (header.nbytes && !header.segment)))
    throw ProtocolViolation("a key to no memory");
  std::vector<OpId> waiting = std::exchange(it->second.waiting, {});
  if (code == Code::stale) {
    peer.onesided->keys.erase(it);
  } else {
    RegionKey& key = it->second;
    key.state = code == Code::ok ? RegionKey::State::held : RegionKey::State::by_owner;
    key.address = header.address;
    key.nbytes = header.nbytes;
    key.registration = header.segment;
    key.writable = header.flags & kWritable;
  }
  for (OpId id : waiting) {
    Op* op = find(id);
    if (!op || op->state != OpState::posted) continue;  // given up meanwhile
    if (code == Code::ok) {
      begin_access(*op, peer, it->second);
    } else if (code == Code::stale) {
      finish(*op, Code::stale);
    } else {
      op->state = OpState::queued;
      if (send_header(*op, peer) != Post::again) continue;
      if (!op->holding) peer.blocked = true;
      queue_header(*op, peer);
    }
  }
  pump(peer.link_index);
}

void Engine::on_key_revoke(Peer& peer, const FrameHeader& header) {
  if (!peer.onesided) throw ProtocolViolation("a key where devices reach nothing");
  uint64_t region = header.rop;
  auto it = peer.onesided->keys.find(region);
  if (it == peer.onesided->keys.end() || it->second.state != RegionKey::State::held) {
    if (header.flags & kAgain) return;  // our word is on its way
    throw ProtocolViolation("a key is revoked that was never given");
  }
  it->second.revoked = true;
  ++it->second.uses;  // ours, while we look
  std::vector<Op*> idle;
  ops_.for_each_live([&](Op& op) {
    if (op.has_key && op.peer == peer.rank && op.region == region && !op.moved && !op.inflight)
      idle.push_back(&op);
  });
  for (Op* op : idle) end_early(*op, Code::stale);
  FrameHeader answer = about(FrameKind::key_revoked, region);
  if (--it->second.uses)
    answer.flags = kStillUsed;
  else
    peer.onesided->keys.erase(it);
  send_control(peer, answer, Wake::engine);
}

// The write that carries a notification waits until all others of its put are acknowledged.
bool Engine::hold_back(const Op& op, const Scheduler::Chunk& chunk) {
  if (!op.has_notify || !chunk.last || op.inflight == 0) return false;
  held_back_.emplace(op.id, chunk);
  return true;
}

void Engine::release_held_back(const Op& op) {
  if (auto it = held_back_.find(op.id); it != held_back_.end()) {
    schedulers_[op.link]->unget(it->second);
    held_back_.erase(it);
  }
}

void Engine::drop_held_back(const Op& op) {
  if (auto it = held_back_.find(op.id); it != held_back_.end()) {
    schedulers_[op.link]->complete(it->second.nbytes, 0, it->second.cls);
    held_back_.erase(it);
  }
}

void Engine::announce(const Op& op, Peer& peer) {
  FrameHeader h = about(FrameKind::note, peer.onesided->announced);
  peer.onesided->announced = (peer.onesided->announced + 1) % NotesDue::kNumbers;
  h.channel = op.scope->wire;
  h.nbytes = op.nbytes;
  send_control(peer, h, Wake::loop, op.notify.data(), op.notify.size());
}

// ---------------------------------------------------------------- the owner's side

void Engine::on_key_ask(Peer& peer, const FrameHeader& header) {
  if (!peer.onesided) throw ProtocolViolation("a key where devices reach nothing");
  give_key(peer, header.rop);
}

void Engine::give_key(Peer& peer, uint64_t id) {
  RegionInfo* region = nullptr;
  Code code = check_region(id, 0, 0, false, &region);
  FrameHeader reply = about(FrameKind::key_is, id);
  if (code == Code::ok && region->nbytes) {
    Link& link = *links_[peer.link_index];
    Access access = region->writable ? Access::region_writes : Access::region_reads;
    try {
      if (!region->registration) {
        region->registration = region->gpu
                                   ? link.hold_device(region->gpu->place, region->nbytes, access, *mover())
                                   : link.hold(region->base, region->nbytes, access);
        region->link = peer.link_index;
      }
      if (!link.held(region->registration)) {
        if (std::find(region->asking.begin(), region->asking.end(), peer.rank) == region->asking.end())
          region->asking.push_back(peer.rank);
        return;
      }
    } catch (const LinkFailure& failure) {
      fallback(peer.rank, kServed, failure.what());
      code = Code::link_failed;
    }
  }
  reply.code = static_cast<uint8_t>(code);
  if (code == Code::ok) {
    reply.address = reinterpret_cast<uint64_t>(region->base);
    reply.nbytes = region->nbytes;
    reply.segment = region->registration;
    reply.flags = region->writable ? kWritable : 0;
    if (!holder_of(*region, peer.rank)) region->holders.push_back({peer.rank});
  }
  send_control(peer, reply, Wake::engine);
}

// Its registration has been made, or (`error`) cannot be; or the region was closed meanwhile.
void Engine::answer_askers(uint64_t id, int error, const std::string& reason) {
  RegionInfo& region = regions_.at(id);
  std::vector<Rank> asking = std::exchange(region.asking, {});
  if (error) links_[region.link]->release(std::exchange(region.registration, 0));
  for (Rank rank : asking) {
    Peer* peer = find_peer(rank);
    if (!error) {
      give_key(*peer, id);
      continue;
    }
    FrameHeader reply = about(FrameKind::key_is, id);
    fallback(rank, kServed, reason);
    reply.code = static_cast<uint8_t>(Code::link_failed);
    send_control(*peer, reply, Wake::engine);
  }
}

void Engine::on_key_revoked(Peer& peer, const FrameHeader& header) {
  auto it = regions_.find(header.rop);
  KeyHolder* holder = it == regions_.end() ? nullptr : holder_of(it->second, peer.rank);
  if (!holder || !it->second.closing) throw ProtocolViolation("a key is given back unasked");
  if (header.flags & kStillUsed)
    holder->owes_word = false;
  else
    forget_holder(header.rop, peer.rank);
}

// Its region closes: every holder of its key is asked for it.
void Engine::revoke(uint64_t id, uint8_t flags) {
  FrameHeader h = about(FrameKind::key_revoke, id);
  h.flags = flags;
  std::vector<KeyHolder>& holders = regions_.at(id).holders;
  if (holders.empty()) return;
  for (KeyHolder& holder : holders) {
    holder.owes_word = true;
    send_control(*find_peer(holder.rank), h, Wake::engine);
  }
  start_timer(kRegionTimer | id, now() + drain_ns_);
}

void Engine::ask_again(uint64_t id) {
  auto it = regions_.find(id);
  if (it == regions_.end()) return;  // freed just now, with the pair that was closed for another
  std::vector<Rank> silent;
  for (const KeyHolder& holder : it->second.holders)
    if (holder.owes_word) silent.push_back(holder.rank);
  for (Rank rank : silent)
    tear_down(*find_peer(rank), "the key of a closed region was not given back within drain_timeout");
  if (regions_.contains(id)) revoke(id, kAgain);  // else they were the last
}

void Engine::forget_holder(uint64_t id, Rank rank) {
  RegionInfo& region = regions_.at(id);
  auto of_rank = [&](const KeyHolder& holder) { return holder.rank == rank; };
  if (std::erase_if(region.holders, of_rank) && region.closing && free_region(id))
    emit({EngineEvent::Kind::region_free, rank_, id, {}, {}});
}

// The pair has ended: nothing of the peer's reaches our memory any more.
void Engine::forget_holder(Rank rank) {
  std::vector<uint64_t> ids;
  for (auto& [id, region] : regions_) {
    std::erase(region.asking, rank);
    if (holder_of(region, rank)) ids.push_back(id);
  }
  for (uint64_t id : ids) forget_holder(id, rank);
}

void Engine::on_note(Peer& peer, const FrameHeader& header, const std::byte* payload) {
  if (!peer.onesided) throw ProtocolViolation("a notification where devices reach nothing");
  Note note{header.channel, header.nbytes,
            std::string(reinterpret_cast<const char*>(payload), header.meta_bytes)};
  if (header.rop >= NotesDue::kNumbers) throw ProtocolViolation("a notification without a number");
  try {
    tell(peer, peer.onesided->due.announced(static_cast<uint32_t>(header.rop), std::move(note)));
  } catch (const std::invalid_argument& illegal) {
    throw ProtocolViolation(illegal.what());
  }
}

void Engine::tell(Peer& peer, const std::vector<Note>& notes) {
  // What an adapter has written into a GPU is seen there only then; a note does not say into which region.
  std::set<int> devices;
  for (auto& [id, region] : regions_)
    if (region.gpu && region.registration && !notes.empty() && devices.insert(region.gpu->device).second)
      mover()->flush(region.gpu->device);
  for (const Note& note : notes)
    notify(peer.rank, reinterpret_cast<const std::byte*>(note.payload.data()), note.payload.size(),
           note.nbytes);
}

}  // namespace aiocomm
