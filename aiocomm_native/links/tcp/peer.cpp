#include "links/tcp/peer.hpp"

#include <cerrno>
#include <cstdio>

namespace aiocomm::tcp {

namespace {
constexpr uint32_t kMaxPayload = 1 << 20, kMaxData = 1 << 30;
constexpr uint64_t kLinger = 1000000000;  // ns
constexpr uint64_t kApartNs = 200000000;  // after a chunk of a lower class: until the kernel has none of it
constexpr uint8_t kNormal = 1;            // class of channels that ask for none
}  // namespace

TcpPeer::TcpPeer(Host& host, Rank rank, uint64_t generation, std::vector<std::unique_ptr<Stream>> streams)
    : host_(host),
      heartbeat_ns_(static_cast<uint64_t>(host.setting("heartbeat_s", 1.0) * 1e9)),
      same_host_(within_host(streams[0]->fd())),
      heard_ns_(host.now()),
      said_ns_(heard_ns_),
      ticked_ns_(heard_ns_),
      pace_(same_host_),
      express_(*this, std::move(streams[0]), true),
      engine_(*this, std::move(streams[1]), false) {
  this->rank = rank;
  this->generation = generation;
  const std::string mode = host.text_setting("tcp_splice");
  const Splice splice = mode == "off" ? Splice::never : mode == "on" ? Splice::always : Splice::where_it_pays;
  for (size_t i = 2; i < streams.size(); ++i)
    bulk_.push_back(std::make_unique<BulkLane>(*this, std::move(streams[i]), splice));
  shared_ = bulk_.size() - 1;
}

void TcpPeer::start() {
  each_lane([](Lane& lane) { lane.start(); });
}

// ---------------------------------------------------------------- out

uint64_t TcpPeer::frame_limit() const { return sizeof(FrameHeader) + kMaxMeta + kMaxPayload; }

Post TcpPeer::post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) {
  if (dead_ || ending_) return Post::lost;
  if (!express_.idle()) {
    express_blocked_ = true;
    return Post::again;
  }
  if (!express_.send(header, meta, payload)) return Post::lost;
  if (wake == Wake::engine) poke();
  return Post::ok;
}

Post TcpPeer::post_data(const FrameHeader& header, const std::byte* payload, uint8_t cls) {
  if (dead_ || ending_) return Post::lost;
  // What the kernel has taken of lower classes may be megabytes, behind which a lane's next chunk waits.
  const bool above = cls > kNormal;
  if (!above) lower_ns_ = host_.now();
  const size_t first = above && host_.now() - lower_ns_ < kApartNs ? shared_ : 0;
  const size_t last = above ? bulk_.size() : shared_;
  BulkLane* best = nullptr;
  for (size_t i = first; i < last; ++i)
    if (!bulk_[i]->full() && (!best || bulk_[i]->queued() < best->queued())) best = bulk_[i].get();
  if (!best) {
    bulk_blocked_ = true;
    return Post::again;
  }
  return best->post(header, payload);
}

uint64_t TcpPeer::unsent() const {
  uint64_t nbytes = 0;
  for (const auto& lane : bulk_) nbytes += lane->queued();
  return nbytes;
}

bool TcpPeer::let_go(OpId sop) {
  bool all = true;
  for (auto& lane : bulk_) all = lane->let_go(sop) && all;
  return all;
}

void TcpPeer::poke() {
  poke_owed_ = !engine_.idle();  // one poke tells of everything before it
  if (poke_owed_) return;
  FrameHeader header{};
  header.kind = FrameKind::link_private;
  header.address = express_.sent();
  if (engine_.send(header, nullptr, nullptr)) said();
}

void TcpPeer::drained(FrameLane& lane) {
  if (&lane == &engine_) {
    if (poke_owed_) poke();
  } else if (express_blocked_) {
    express_blocked_ = false;
    sink().on_writable(*this);
  }
}

void TcpPeer::bulk_room() {
  if (!bulk_blocked_) return;
  bulk_blocked_ = false;
  sink().on_writable(*this);
}

// ---------------------------------------------------------------- in

const char* TcpPeer::check(const FrameLane& lane, const FrameHeader& header) const {
  bool ours = header.kind == FrameKind::link_private || header.kind == FrameKind::heartbeat;
  if (header.kind < FrameKind::eager || header.kind > FrameKind::last_kind) return "unknown frame kind";
  if (header.kind == FrameKind::data) return "payload off its lane";
  if (ours != (&lane == &engine_)) return "frame on the wrong lane";
  if (header.meta_bytes > kMaxMeta) return "metadata too long";
  if (header.payload_bytes > (ours ? 0 : kMaxPayload)) return "frame too long";
  return nullptr;
}

const char* TcpPeer::check_data(const FrameHeader& header) const {
  if (header.kind != FrameKind::data) return "not a payload on a payload's lane";
  if (header.meta_bytes != 0) return "metadata with a payload";
  if (header.payload_bytes > kMaxData) return "payload too long";
  return nullptr;
}

void TcpPeer::frame(FrameLane& lane, const FrameHeader& header, const std::byte* meta,
                    const std::byte* payload) {
  if (&lane == &express_) return sink().on_frame(*this, header, meta, payload);
  if (header.kind == FrameKind::link_private) express_.chase(header.address);
}

// ---------------------------------------------------------------- signs of life

void TcpPeer::tick(uint64_t now_ns) {
  if (dead_) return;
  if (ending_) {
    if (now_ns - ending_ns_ >= kLinger) lose(ending_reason_);
    return;
  }
  if (!heartbeat_ns_) return;
  // Whoever was away himself (suspended, stopped) has not listened: the peer gets its full time again.
  if (now_ns > ticked_ns_ + 2 * heartbeat_ns_) heard_ns_ = now_ns;
  ticked_ns_ = now_ns;
  if (now_ns > heard_ns_ + 3 * heartbeat_ns_) {
    engine_.read();
    if (dead_ || ending_) return;
  }
  if (now_ns > heard_ns_ + 3 * heartbeat_ns_) {
    char text[64];
    std::snprintf(text, sizeof text, "no sign of life for %.3g s",
                  static_cast<double>(now_ns - heard_ns_) / 1e9);
    return lose(text);
  }
  if (now_ns - said_ns_ >= heartbeat_ns_ / 2 && engine_.idle()) {
    FrameHeader header{};
    header.kind = FrameKind::heartbeat;
    if (engine_.send(header, nullptr, nullptr)) said_ns_ = now_ns;
  }
}

// ---------------------------------------------------------------- the end

void TcpPeer::ended(Lane& lane, int error, bool reading) {
  if (dead_) return;
  std::string reason = lane.reason(error);
  const bool closed = is_end(error);
  // Who refuses a handshake says why on one lane, and closes all of them: which is seen first is chance.
  if (closed)
    if (std::string why = refusal(lane); !why.empty()) return lose(why);
  if (&lane == &express_ && (reading || !lane.open()))
    return lose(ending_ && closed ? ending_reason_ : reason);
  if (&lane != &express_) lane.stop();
  if (!ending_) {
    ending_ = true;
    ending_ns_ = host_.now();
    ending_reason_ = reason;
    host_.ring_engine();  // it ticks until the express lane has ended, too
  }
  express_.chase_end();
  if (!closed && !dead_) lose(reason);
}

std::string TcpPeer::refusal(const Lane& but) {
  std::string why;
  each_lane([&](Lane& lane) {
    if (why.empty() && &lane != &but) why = lane.refusal();
  });
  return why;
}

void TcpPeer::lose(const std::string& reason) {
  if (dead_) return;
  shut();
  sink().on_lost(*this, reason);
}

void TcpPeer::close() {
  if (!dead_ && !ending_) express_.part();
  shut();
}

void TcpPeer::shut() {
  if (dead_) return;
  dead_ = true;
  each_lane([](Lane& lane) { lane.close(); });
}

}  // namespace aiocomm::tcp
