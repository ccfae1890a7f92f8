// Frames of a pair: numbered, kept until acknowledged, counted by credits, handed over in order.

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/doorbell.hpp"
#include "links/rdma/clock.hpp"
#include "links/rdma/link.hpp"
#include "links/rdma/peer.hpp"
#include "links/rdma/wire.hpp"

namespace aiocomm::rdma {

namespace {
constexpr uint32_t kMaxRegistrations = 1 << 20;
}

// ---------------------------------------------------------------- out

Post RdmaPeer::post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) {
  if (dead_) return Post::lost;
  if (open_) offer_ring();
  if (!open_ || !has_credit(kReserve)) {
    blocked_ = true;
    starved_.store(open_, std::memory_order_release);
    if (open_) lanes_[active_]->rail.kick();
    if (has_inbox_.load(std::memory_order_acquire) || (ring_ && Ring::waits(ring_slot())))
      ring(host_.wake_page().engine, host_.engine_fd());
    return Post::again;
  }
  emit(header, meta, payload, wake);
  return Post::ok;
}

Post RdmaPeer::post_data(const FrameHeader& header, const std::byte* payload, uint8_t) {
  if (dead_) return Post::lost;
  if (!open_ || streamed_.payload) {
    remote_blocked_ = true;
    return Post::again;
  }
  streamed_ = {header, payload, 0};
  stream();
  return streamed_.payload ? Post::pending : Post::ok;
}

void RdmaPeer::stream() {
  Streamed& chunk = streamed_;
  while (chunk.payload && has_credit(kReserve)) {
    FrameHeader part = chunk.header;
    part.address += chunk.done;
    part.payload_bytes =
        static_cast<uint32_t>(std::min<uint64_t>(4096, chunk.header.payload_bytes - chunk.done));
    emit(part, nullptr, chunk.payload + chunk.done, Wake::engine);
    chunk.done += part.payload_bytes;
    if (chunk.done == chunk.header.payload_bytes) chunk.payload = nullptr;
  }
}

void RdmaPeer::emit(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake,
                    bool upgrades) {
  uint32_t seq = sent_++;
  // A loop that computes gives no credits back, nor sees those that it gets: the engine does.
  if (upgrades && (sent_ - consumed_there_ > Rail::kCredits / 2 || expected_ - told_ >= Rail::kCredits / 2))
    wake = Wake::engine;
  Head head;
  head.prefix.seq = seq;
  head.prefix.consumed = told_ = expected_;
  head.prefix.wake = static_cast<uint8_t>(wake);
  head.prefix.looks = promises();
  head.header = header;
  if (Registration* named = header.segment ? link_.registrations().get(header.segment) : nullptr) {
    head.prefix.keys = static_cast<uint8_t>(lanes_.size());
    head.keys = named->peer();
  }
  std::byte* at = frame_slot(seq);
  size_t nbytes = pack(head, at);
  if (header.meta_bytes) std::memcpy(at + nbytes, meta, header.meta_bytes);
  nbytes += header.meta_bytes;
  if (header.payload_bytes) std::memcpy(at + nbytes, payload, header.payload_bytes);
  frame_bytes_[seq % Rail::kCredits] = static_cast<uint32_t>(nbytes + header.payload_bytes);
  if (due_.load(std::memory_order_relaxed) == acks_.all_before())
    lanes_[active_]->last_sign_ns.store(tick_ns(), std::memory_order_relaxed);
  due_.store(sent_, std::memory_order_release);
  if (wake != Wake::loop || !write_to_ring(seq)) transmit(seq);
}

void RdmaPeer::transmit(uint32_t seq) {
  Lane& lane = *lanes_[active_];
  if (lane.state != Lane::State::up) return;  // goes out once one is
  Prefix prefix;
  std::memcpy(&prefix, frame_slot(seq), sizeof prefix);
  auto post = [&] {
    return lane.rail.post_frame(lane.pairs, static_cast<Wake>(prefix.wake),
                                frame_piece(lane, seq, frame_bytes_[seq % Rail::kCredits]));
  };
  int error = post();
  if (error == ENOMEM) {  // the peer has given credits back for frames whose completions nobody has looked at
    lane.rail.drain();
    error = post();
  }
  if (error) lane.failed(lane.rail.name() + ": posting failed: " + strerror(error));
}

void RdmaPeer::tell_credit() {
  if (expected_ - told_ < Rail::kCredits / 2 || !open_ || !has_credit(0)) return;
  emit_word(Wake::engine);
}

// Nothing but its prefix, which tells credits and whether the loop looks.
void RdmaPeer::emit_word(Wake wake, bool upgrades) {
  FrameHeader header{};
  header.kind = FrameKind::link_private;
  emit(header, nullptr, nullptr, wake, upgrades);
}

FramePiece RdmaPeer::frame_piece(const Lane& lane, uint32_t seq, size_t nbytes) {
  uint32_t lkey = link_.registrations().get(frames_registration_)->local().of[lane.index];
  return {seq, frame_slot(seq), static_cast<uint32_t>(nbytes), lkey};
}

// ---------------------------------------------------------------- in

void RdmaPeer::frame(const Arrived& from) {
  Rail& rail = lanes_[from.lane]->rail;
  if (dead_) return rail.give_back(from.slot);
  heard_ns_ = tick_ns();
  Prefix prefix;
  if (from.nbytes < sizeof prefix) {
    rail.give_back(from.slot);
    return violated("a frame that is too short");
  }
  std::memcpy(&prefix, rail.slot(from.slot), sizeof prefix);
  auto ahead = static_cast<int32_t>(prefix.seq - expected_);
  if (ahead < 0 ||
      early_.contains(prefix.seq)) {  // it came over a lane that failed before its word came back
    ++link_.repeated;
    return rail.give_back(from.slot);
  }
  if (ahead >= static_cast<int32_t>(Rail::kCredits)) {
    rail.give_back(from.slot);
    return violated("a frame beyond its credits");
  }
  if (ahead > 0) {
    early_[prefix.seq] = from;
    return;
  }
  if (deliver_slot(from)) advance();
}

// Frames that came before their turn. Of those that stand in the ring as well, the other copy may have been taken.
void RdmaPeer::advance() {
  for (auto it = early_.find(expected_); it != early_.end(); it = early_.find(expected_)) {
    Arrived next = it->second;
    early_.erase(it);
    if (!deliver_slot(next)) return;
  }
  std::erase_if(early_, [this](const auto& one) {
    if (static_cast<int32_t>(one.first - expected_) >= 0) return false;
    lanes_[one.second.lane]->rail.give_back(one.second.slot);
    return true;
  });
}

bool RdmaPeer::deliver_slot(const Arrived& from) {
  Rail& rail = lanes_[from.lane]->rail;
  const bool goes_on = deliver(rail.slot(from.slot), from.nbytes);
  rail.give_back(from.slot);
  return goes_on;
}

bool RdmaPeer::deliver(const std::byte* data, size_t length) {
  Head head;
  const size_t nbytes = unpack(data, length, head);
  const Prefix& prefix = head.prefix;
  const FrameHeader& header = head.header;
  const char* wrong = nullptr;
  if (!nbytes)
    wrong = "a frame without a whole header";
  else if (header.kind < FrameKind::eager || header.kind > FrameKind::last_kind)
    wrong = "unknown frame kind";
  else if (header.kind == FrameKind::heartbeat || (header.kind == FrameKind::data && header.meta_bytes))
    wrong = "a frame that does not belong here";
  else if (header.meta_bytes > kMaxMeta || header.meta_bytes + header.payload_bytes > kMaxMeta + 4096 ||
           length != nbytes + header.meta_bytes + header.payload_bytes)
    wrong = "a frame of another length than it says";
  else if (prefix.consumed - consumed_there_ > sent_ - consumed_there_)
    wrong = "credit for frames that were never sent";
  else if (prefix.keys && header.segment > kMaxRegistrations)
    wrong = "keys of more memory than there can be";
  ++expected_;
  if (!wrong) {
    consumed_there_ = prefix.consumed;
    acks_.before(consumed_there_);
    if (prefix.keys && header.segment) remote_keys_[header.segment] = head.keys;
    heard_of_ring(head);
    if (header.kind == FrameKind::data) {
      std::byte* into = host_.sink().data_target(*this, header, 0);
      if (into) std::memcpy(into, data + nbytes, header.payload_bytes);
      host_.sink().on_data(*this, header, header.payload_bytes, into);
    } else if (header.kind != FrameKind::link_private)
      host_.sink().on_frame(*this, header, data + nbytes, data + nbytes + header.meta_bytes);
  }
  if (wrong && !dead_) violated(wrong);
  return !dead_;
}

}  // namespace aiocomm::rdma
