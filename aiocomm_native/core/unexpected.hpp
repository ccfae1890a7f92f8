// Messages that came before their receive: headers, and the bytes of those that were eager.
//
// Bounded: a sender stops sending bytes at its credit and only announces; the engine closes a pair that goes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/frame.hpp"
#include "core/ids.hpp"

namespace aiocomm {

struct Unexpected {
  FrameHeader header;
  Rank source = -1;
  uint64_t generation = 0;
  std::vector<std::byte> meta;
  std::vector<std::byte> payload;
};

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

  void put(std::unique_ptr<Unexpected> message) {
    uint64_t id = next_id();
    free_.pop_back();
    if (message->header.sop) announced_[key(message->source, message->header.sop)] = id;
    slots_[id] = std::move(message);
  }

  std::unique_ptr<Unexpected> take(uint64_t id) {
    std::unique_ptr<Unexpected> message = std::move(slots_[id]);
    if (message->header.sop) announced_.erase(key(message->source, message->header.sop));
    free_.push_back(static_cast<uint32_t>(id));
    return message;
  }

  // The message that a peer announced as its op `sop`.
  std::optional<uint64_t> find(Rank source, OpId sop) const {
    auto it = announced_.find(key(source, sop));
    return it == announced_.end() ? std::nullopt : std::optional(it->second);
  }

  template <typename Predicate>
  std::vector<uint64_t> select(Predicate&& predicate) const {
    std::vector<uint64_t> ids;
    for (size_t id = 0; id < slots_.size(); ++id)
      if (slots_[id] && predicate(*slots_[id])) ids.push_back(id);
    return ids;
  }

 private:
  struct Hash {
    size_t operator()(const std::pair<Rank, OpId>& k) const {
      return (k.second ^ static_cast<uint64_t>(k.first) << 40) * 0x9e3779b97f4a7c15ull >> 7;
    }
  };
  static std::pair<Rank, OpId> key(Rank source, OpId sop) { return {source, sop}; }

  std::vector<std::unique_ptr<Unexpected>> slots_;
  std::vector<uint32_t> free_;
  std::unordered_map<std::pair<Rank, OpId>, uint64_t, Hash> announced_;
};

}  // namespace aiocomm
