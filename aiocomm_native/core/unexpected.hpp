// Messages that came before their receive: headers, and the bytes of those that were eager.
//
// Bounded: a sender stops sending bytes at its credit and only announces; the engine closes a pair that goes on.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/frame.hpp"
#include "core/ids.hpp"

namespace aiocomm {

// A header with its metadata and, if it was eager, its payload. Small ones lie in the object itself: where ten
// thousand wait, each allocation more is a cache miss more.
class Unexpected {
 public:
  FrameHeader header{};
  Rank source = -1;  // -1: an empty slot
  uint64_t generation = 0;

  // Copies what belongs to `header`, which is set.
  void keep(const std::byte* meta, const std::byte* payload) {
    const size_t payload_bytes = payload == nullptr ? 0 : header.payload_bytes;
    const size_t total = header.meta_bytes + payload_bytes;
    if (total > inside_.size()) outside_ = std::make_unique_for_overwrite<std::byte[]>(total);
    std::byte* at = bytes();
    if (header.meta_bytes != 0) std::memcpy(at, meta, header.meta_bytes);
    if (payload_bytes != 0) std::memcpy(at + header.meta_bytes, payload, payload_bytes);
  }

  const std::byte* meta() const { return const_cast<Unexpected*>(this)->bytes(); }
  const std::byte* payload() const { return meta() + header.meta_bytes; }

 private:
  std::byte* bytes() { return outside_ ? outside_.get() : inside_.data(); }

  std::unique_ptr<std::byte[]> outside_;
  std::array<std::byte, 104> inside_;  // dtype and shape, and a few words
};

// Its sender is done with it, and hears no more of it.
inline bool nobody_waits_for(const FrameHeader& header) {
  return header.kind == FrameKind::eager && !header.sop;
}

class UnexpectedStore {
 public:
  // The id under which the next put() stores.
  uint64_t next_id() {
    if (free_.empty()) {
      free_.push_back(static_cast<uint32_t>(slots_.size()));
      slots_.emplace_back();
    }
    return free_.back();
  }

  void put(Unexpected message) {
    uint64_t id = next_id();
    free_.pop_back();
    if (message.header.sop) announced_[key(message.source, message.header.sop)] = id;
    slots_[id] = std::move(message);
  }

  Unexpected take(uint64_t id) {
    Unexpected message = std::move(slots_[id]);
    slots_[id].source = -1;
    if (message.header.sop) announced_.erase(key(message.source, message.header.sop));
    free_.push_back(static_cast<uint32_t>(id));
    if (free_.size() == slots_.size() && slots_.size() > kKeptSlots) {
      slots_.clear();
      free_.clear();
    }
    return message;
  }

  // The message that a peer announced as its op `sop`.
  std::optional<uint64_t> find(Rank source, OpId sop) const {
    auto it = announced_.find(key(source, sop));
    return it == announced_.end() ? std::nullopt : std::optional(it->second);
  }

  template <typename F>
  void each(F&& f) {
    for (Unexpected& message : slots_)
      if (message.source >= 0) f(message);
  }

  template <typename Predicate>
  std::vector<uint64_t> select(Predicate&& predicate) const {
    std::vector<uint64_t> ids;
    for (size_t id = 0; id < slots_.size(); ++id)
      if (slots_[id].source >= 0 && predicate(slots_[id])) ids.push_back(id);
    return ids;
  }

 private:
  static constexpr size_t kKeptSlots = 16384;  // a flood's memory is given back once it has been taken in

  struct Hash {
    size_t operator()(const std::pair<Rank, OpId>& k) const {
      return (k.second ^ static_cast<uint64_t>(k.first) << 40) * 0x9e3779b97f4a7c15ull >> 7;
    }
  };
  static std::pair<Rank, OpId> key(Rank source, OpId sop) { return {source, sop}; }

  std::deque<Unexpected> slots_;
  std::vector<uint32_t> free_;
  std::unordered_map<std::pair<Rank, OpId>, uint64_t, Hash> announced_;
};

}  // namespace aiocomm
