// Regions; put and get where no device reaches them. Memory is then written only by the process that owns it: a put is
// pulled (or received) by the owner of the region, a get by the reader, so that closing a region is a local decision.
// protocol_keys.cpp has the rest.

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/engine.hpp"
#include "core/listed.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {

// Our own peers have a few of them at a time; this stops one that has them without end.
void count_list(Peer& peer, uint64_t nbytes) {
  if (peer.listed + nbytes > kMostAtOnce)
    throw ProtocolViolation("more lists than any process moves at once");
  peer.listed += nbytes;
}

std::unique_ptr<std::byte[]> room_for_list(Peer& peer, uint64_t nbytes) {
  count_list(peer, nbytes);
  return std::make_unique_for_overwrite<std::byte[]>(nbytes);
}

// Whether the peer can move rows of it: by its device's engines (`on_device`), or by copy threads, which `pulls` says.
bool shares(const RegionInfo& region, const Peer& peer, uint64_t offset, uint64_t nbytes, bool on_device,
            bool pulls) {
  if (on_device ? region.gpu != nullptr : !region.gpu && pulls) return true;
  return !region.gpu && peer.link->locate(region.base + offset, nbytes).segment != 0;
}

// Whether we can fetch rows of its memory.
bool reads(LinkPeer& peer, const FrameHeader& header) {
  const Path path = peer.pull_path({header.address, header.segment});
  return path != Path::none && path != Path::read;
}

}  // namespace

uint64_t Engine::add_region(std::byte* base, uint64_t nbytes, bool writable,
                            std::unique_ptr<DeviceBuffer> gpu) {
  Token token(*this, true);
  uint64_t id = next_region_++;
  RegionInfo& region = regions_[id];
  region.base = base;
  region.nbytes = nbytes;
  region.writable = writable;
  region.gpu = std::move(gpu);
  return id;
}

bool Engine::close_region(uint64_t id) {
  Token token(*this, true);
  auto it = regions_.find(id);
  if (it == regions_.end()) return true;
  if (std::exchange(it->second.closing, true)) return false;
  answer_askers(id, 0, {});  // it is stale
  revoke(id, 0);
  return free_region(id);
}

// Once nobody uses it any more.
bool Engine::free_region(uint64_t id) {
  auto it = regions_.find(id);
  RegionInfo& region = it->second;
  if (region.active || !region.holders.empty() || region.letting_go) return false;
  timers_.cancel(kRegionTimer | id);
  region.letting_go =
      region.registration && !links_[region.link]->release(region.registration) && fault_.empty();
  if (region.letting_go) return false;
  regions_.erase(it);
  return true;
}

void Engine::region_idle(uint64_t id) {
  auto it = regions_.find(id);
  if (it == regions_.end() || --it->second.active || !it->second.closing || !free_region(id)) return;
  emit({EngineEvent::Kind::region_free, rank_, id, {}, {}});
}

Code Engine::check_region(uint64_t id, uint64_t offset, uint64_t nbytes, bool write, RegionInfo** out) {
  auto it = regions_.find(id);
  if (it == regions_.end() || it->second.closing) return Code::stale;
  RegionInfo& region = it->second;
  if (offset > region.nbytes || nbytes > region.nbytes - offset) return Code::out_of_range;
  if (write && !region.writable) return Code::read_only;
  *out = &region;
  return Code::ok;
}

void Engine::notify(Rank source, const std::byte* payload, size_t payload_bytes, uint64_t nbytes) {
  emit({EngineEvent::Kind::notification,
        source,
        nbytes,
        std::string(reinterpret_cast<const char*>(payload), payload_bytes),
        {}});
}

void Engine::on_put(Peer& peer, const FrameHeader& header, const std::byte* meta, const std::byte* payload) {
  RegionInfo* region = nullptr;
  auto offset = static_cast<uint64_t>(header.tag);
  const bool from_device = header.flags & kDevice;
  if (header.kind == FrameKind::put && header.payload_bytes != header.nbytes)
    throw ProtocolViolation("put without all of its bytes");
  if (from_device && (header.kind != FrameKind::put_rts || header.payload_bytes != sizeof(DevicePlace) ||
                      header.nbytes == 0))
    throw ProtocolViolation("device memory without its place");
  const bool by_rows = header.flags & kRows, listed = header.flags & kListed;
  if (listed && (from_device || header.nbytes > kMostListed || offset))
    throw ProtocolViolation("a list that makes no sense");
  if (header.kind == FrameKind::put) counters_[peer.link_index].bytes_received += header.payload_bytes;
  const bool fetched_rows = by_rows && !from_device;  // by us: they are in the payload
  const uint64_t reach = listed || fetched_rows ? 0 : by_rows ? header.address : header.nbytes;
  if (by_rows && (listed || header.kind != FrameKind::put_rts || (from_device && header.nbytes > reach)))
    throw ProtocolViolation("rows that make no sense");
  Code code = check_region(header.rop, offset, reach, true, &region);
  std::optional<RowList> rows;
  if (code == Code::ok && fetched_rows) {
    rows = RowList::taken({payload, header.payload_bytes}, header.nbytes, region->nbytes - offset);
    code = !rows ? Code::out_of_range : region->gpu || !reads(*peer.link, header) ? Code::unreachable : code;
    if (peer.state != Peer::State::up) return;  // looking for the segment found it dead
  } else if (code == Code::ok && by_rows && !shares(*region, peer, offset, reach, true, false)) {
    code = Code::unreachable;
  }
  if (code == Code::ok && listed && header.kind == FrameKind::put && !region->gpu)
    code = spread({payload, header.payload_bytes}, {region->base, region->nbytes});
  if (code != Code::ok) return send_fin(peer, header.sop, code, 0);
  if (header.kind == FrameKind::put && (!region->gpu || header.nbytes == 0)) {
    if (header.payload_bytes && !listed) std::memcpy(region->base + offset, payload, header.payload_bytes);
    counters_[peer.link_index].came(Path::eager, header.nbytes);
    if (header.flags & kHasNotify) notify(peer.rank, meta, header.meta_bytes, header.nbytes);
    return send_fin(peer, header.sop, Code::ok, header.nbytes);
  }
  std::unique_ptr<std::byte[]> own;
  if (listed && region->gpu)
    count_list(peer, header.nbytes);
  else if (listed)
    own = room_for_list(peer, header.nbytes);
  Op* op = served_.take();
  op->live = true;
  op->kind = OpKind::recv;
  op->matched = true;
  op->peer = peer.rank;
  op->link = peer.link_index;
  enter(*op, channels_.of_access(header.channel, header.cls, header.weight / kWeightOne));
  op->data = region->base + offset;
  op->nbytes = op->capacity = header.nbytes;
  op->remote_op = header.sop;
  op->region = header.rop;
  op->listed = listed;
  if (own) {
    op->own = std::move(own);
    op->data = op->own.get();
  }
  op->has_notify = header.flags & kHasNotify;
  op->notify.assign(reinterpret_cast<const char*>(meta), header.meta_bytes);
  if (rows) op->rows = std::make_shared<const RowList>(std::move(*rows));
  ++region->active;
  if (region->gpu && op->nbytes) {
    op->gpu = mover()->part(*region->gpu, offset, listed ? region->nbytes : reach);
    op->gpu->by_rows = by_rows;
  }
  if (op->gpu || from_device)
    return device_.deliver(*op, peer, header, from_device ? payload : nullptr, payload);
  start_rendezvous(*op, peer, header, true);
}

void Engine::on_get(Peer& peer, const FrameHeader& header, const std::byte* payload) {
  RegionInfo* region = nullptr;
  auto offset = static_cast<uint64_t>(header.tag);
  const bool by_rows = header.flags & kRows, listed = header.flags & kListed;
  const auto list = listed ? Ranges::taken({payload, header.payload_bytes}) : std::nullopt;
  if (listed &&
      (by_rows || header.nbytes > kMostListed || !list || list->nbytes() != header.nbytes || offset))
    throw ProtocolViolation("a list that makes no sense");
  const uint64_t reach = listed ? 0 : by_rows ? header.address : header.nbytes;
  const bool pulls = header.code != static_cast<uint8_t>(Path::none), on_device = header.flags & kDevice;
  Code code = check_region(header.sop, offset, reach, false, &region);
  if (code == Code::ok && by_rows && !shares(*region, peer, offset, reach, on_device, pulls))
    code = Code::unreachable;
  std::unique_ptr<std::byte[]> own;
  std::shared_ptr<const RowList> rows;
  if (code == Code::ok && listed && region->gpu) {
    rows = rows_to_collect(*list, region->nbytes);
    rows ? count_list(peer, header.nbytes) : void(code = Code::out_of_range);
  } else if (code == Code::ok && listed) {
    own = room_for_list(peer, header.nbytes);
    code = collect(*list, {region->base, region->nbytes}, own.get());
    if (code != Code::ok) peer.listed -= header.nbytes;
  }
  FrameHeader reply{};
  reply.rop = header.rop;
  if (code != Code::ok) {
    reply.kind = FrameKind::get_fail;
    reply.code = static_cast<uint8_t>(code);
    return send_control(peer, reply, Wake::loop);
  }
  Op* op = served_.take();
  op->live = true;
  op->kind = OpKind::serve;
  op->state = OpState::posted;
  op->matched = true;
  op->peer = peer.rank;
  op->link = peer.link_index;
  enter(*op, channels_.of_access(header.channel, header.cls, header.weight / kWeightOne));
  op->listed = listed;
  op->own = std::move(own);
  op->data = op->own ? op->own.get() : region->base + offset;
  op->nbytes = op->capacity = header.nbytes;
  op->reach = reach;
  op->by_rows = by_rows;
  op->rows = std::move(rows);
  op->remote_op = header.rop;
  op->region = header.sop;
  op->awaits_fin = true;
  ++region->active;
  if (region->gpu && op->nbytes) {
    op->gpu = mover()->part(*region->gpu, offset, listed ? region->nbytes : reach);
    op->gpu->by_rows = by_rows;
    op->gpu->can_pull = pulls;
    op->gpu->on_demand = on_device;
    return listed ? device_.pack(*op) : device_.serve(*op, peer);
  }
  if (hold(*op, Access::peer_reads) == Hold::ready) get_ready(*op, peer, pulls, on_device);
}

// A list of device memory is packed.
void Engine::answer_get(Op& op, Peer& peer) {
  op.state = OpState::posted;
  if (hold(op, Access::peer_reads) == Hold::ready) get_ready(op, peer, op.gpu->can_pull, op.gpu->on_demand);
}

// Our get, of which the region's owner has been asked by a frame, and has not answered.
bool Engine::asked_for(const Op& op, const Peer& peer) const {
  return op.kind == OpKind::get && op.state == OpState::posted && !op.has_key && !by_key(op, peer);
}

// `pulls`: the reader reads the memory by itself. `on_device`: it has its bytes pushed only once it asks.
void Engine::get_ready(Op& op, Peer& peer, bool pulls, bool on_device) {
  Location at = peer.link->locate(host_data(op), std::max(op.nbytes, op.reach));
  pulls = pulls || at.segment != 0;
  FrameHeader reply{};
  reply.kind = FrameKind::get_ready;
  reply.rop = op.remote_op;
  reply.sop = op.id;
  reply.nbytes = op.nbytes;
  reply.address = at.address;
  reply.segment = op.registration ? op.registration : at.segment;
  op.source_segment = at.segment;
  reply.code = pulls;
  send_control(peer, reply, Wake::engine);
  if (pulls || !op.live || !op.nbytes || on_device) return;
  op.path = Path::stream;
  queue_data(op, peer);
}

void Engine::on_get_ready(Peer& peer, const FrameHeader& header, const std::byte* meta) {
  const bool on_device = header.flags & kDevice;
  if (header.meta_bytes != (on_device ? sizeof(DevicePlace) : 0))
    throw ProtocolViolation("device memory without its place");
  Op* op = ops_.find(header.rop);
  const bool overtaken = op && op->state == OpState::moving && op->path == Path::stream;
  if (!op || op->kind != OpKind::get || op->peer != peer.rank ||
      (op->state != OpState::posted && !overtaken)) {
    FrameHeader h{};  // we gave up meanwhile: let the owner's memory go
    h.kind = FrameKind::stop;
    h.sop = header.sop;
    return send_control(peer, h, Wake::engine);
  }
  if (header.nbytes != op->nbytes) throw ProtocolViolation("answer to a get of another size");
  if (!overtaken && !asked_for(*op, peer)) throw ProtocolViolation("an answer to no question");
  op->remote_op = header.sop;
  if (overtaken) return;  // by its first bytes
  if (has_rows(*op) && op->gpu && !on_device && !header.segment)
    throw ProtocolViolation("rows of private host memory");
  if (has_rows(*op) && !op->gpu && (on_device || !header.code))
    throw ProtocolViolation("rows that nobody reads");
  if ((op->gpu || on_device) && op->nbytes)
    return device_.deliver(*op, peer, header, on_device ? meta : nullptr, nullptr);
  if (has_rows(*op) && !op->gpu && !reads(*peer.link, header))
    return op->live && peer.state == Peer::State::up ? end_early(*op, Code::unreachable) : void();
  if (header.code) return start_rendezvous(*op, peer, header, true);
  op->path = op->nbytes ? Path::stream : Path::eager;
  op->started_ns = now();
  op->state = OpState::moving;
  if (op->nbytes == 0) received(*op);
}

void Engine::on_get_fail(Peer& peer, const FrameHeader& header) {
  Op* op = ops_.find(header.rop);
  if (!op || op->kind != OpKind::get || op->peer != peer.rank || op->state == OpState::draining) return;
  auto code = static_cast<Code>(header.code);
  if (code == Code::ok || code > kLastCode) throw ProtocolViolation("unknown outcome");
  // Once its bytes are coming, somebody works on its buffer.
  if (!asked_for(*op, peer))
    throw ProtocolViolation("a get is refused that nobody asked, or that has been answered");
  finish(*op, code);
}

}  // namespace aiocomm
