// Message matching, pure: no I/O, threads or clock. Not thread-safe: the owner serialises calls.
//
// Rules
//   - MPI's non-overtaking rule: per (channel, source, tag), arrivals match receives in the order both came.
//   - A receive takes the oldest arrival that fits it; an arrival goes to the earliest posted receive that
//     fits.
//   - Channels are independent. Wildcards range over one channel.
//   - An illegal call throws std::invalid_argument and changes nothing.
//
// How
//   One hash table holds a queue per pattern (channel, source, tag), where source or tag may be the wildcard.
//   A receive waits in the queue of its own pattern, hence an arrival looks into at most four queues, and
//   only into the shapes for which a receive is posted at all. An unexpected arrival waits in its exact
//   queue; only where wildcards have been used is it in the queues of its three wider patterns as well.
//   Invariant: a queue never holds receives and arrivals at once (they would have matched).
//   Costs: O(1) for exact patterns, amortised O(1) with wildcards (each arrival is indexed at most once).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/flat_map.hpp"
#include "core/ids.hpp"

namespace aiocomm {

class Matcher {
 public:
  // A message's header that has come. `nbytes`: payload bytes buffered here for it, 0 if they wait at the
  // sender.
  struct Arrival {
    uint64_t id = 0;
    ChannelId channel = 0;
    Rank src = 0;
    Tag tag = 0;
    uint64_t nbytes = 0;
  };

  // What a removal took out, each in the order in which it was queued.
  struct Purged {
    std::vector<OpId> recvs;
    std::vector<uint64_t> arrivals;
  };

  // The oldest unexpected arrival that fits, which is removed; or nullopt: the receive is queued.
  // Illegal: an op that is queued already, a source below kAnySource.
  std::optional<uint64_t> post_recv(OpId op, ChannelId channel, Rank src, Tag tag);

  // The earliest posted receive that fits, which is removed; or nullopt: the arrival is queued as unexpected.
  // Illegal: an id that is queued already, a wildcard tag, a negative source.
  std::optional<OpId> arrive(const Arrival& arrival);

  // False if it is not queued here (any more). O(1).
  bool cancel_recv(OpId op);
  bool drop_arrival(uint64_t id);

  // The arrival that a receive posted now would get; it stays.
  std::optional<Arrival> peek(ChannelId channel, Rank src, Tag tag);

  // Takes out the receives that name this source (any-source receives stay) and, if asked, its unexpected
  // arrivals.
  Purged remove_source(Rank src, bool drop_arrivals);
  Purged remove_channel(ChannelId channel);
  // Nobody receives on this channel: what was kept to serve wildcards faster goes, unless arrivals wait.
  void forget(ChannelId channel);

  // Posted receives of the channel with a wildcard. O(1).
  size_t wildcards(ChannelId channel) const;
  // Posted receives of just this pattern, which must have no wildcard. O(those).
  size_t waiting(ChannelId channel, Rank src, Tag tag) const;
  // Of those, the ones posted after this one. O(those).
  std::vector<OpId> behind(OpId op) const;

  // In posting order. O(everything queued).
  std::vector<OpId> any_source_recvs() const;
  std::vector<OpId> all_recvs() const;

  size_t posted() const noexcept { return ops_.size(); }
  size_t unexpected() const noexcept { return arrivals_.size(); }
  uint64_t unexpected_bytes() const noexcept { return unexpected_bytes_; }  // the sum of Arrival::nbytes
  // Slots held, for tests of reclamation.
  size_t capacity() const noexcept { return nodes_.size() + queues_.capacity() + wild_channels_.capacity(); }

 private:
  static constexpr uint32_t kNil = UINT32_MAX;
  // A pattern's shape: bit 0, any source; bit 1, any tag.
  static constexpr unsigned kShapes = 4;
  static constexpr unsigned kExact = 0, kAnyBoth = 3;

  struct Key {
    ChannelId channel;
    Tag tag;
    Rank src;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    uint64_t operator()(const Key& key) const noexcept;
  };
  struct Queue {
    uint32_t head = kNil;
    uint32_t tail = kNil;
    friend bool is_free(const Queue& queue) { return queue.head == UINT32_MAX; }
    friend void set_free(Queue& queue) { queue.head = UINT32_MAX; }
  };
  enum class Kind : uint8_t { kFree, kRecv, kArrival };
  struct Link {
    uint32_t prev, next;
  };
  // A receive or an arrival. `linked` has a bit per shape: the queues it is in; links[shape] are its
  // neighbours.
  struct Node {
    uint64_t id;
    uint64_t order;
    ChannelId channel;
    Tag tag;
    uint64_t nbytes;
    Rank src;
    Kind kind;
    uint8_t linked;
    std::array<Link, kShapes> links;  // links[0].next chains free nodes
  };

  static unsigned shape_of(Rank src, Tag tag) noexcept {
    return static_cast<unsigned>(src == kAnySource) | static_cast<unsigned>(tag == kAnyTag) << 1;
  }
  static Key widen(const Key& key, unsigned shape) noexcept {
    return {key.channel, (shape & 2) != 0 ? kAnyTag : key.tag, (shape & 1) != 0 ? kAnySource : key.src};
  }

  uint32_t allocate(Kind kind, uint64_t id, const Key& key, uint64_t nbytes);
  void append(Queue& queue, uint32_t index, unsigned shape);
  void link(uint32_t index, unsigned shape);
  void unlink(uint32_t index, unsigned shape, Queue* queue);
  void remove(uint32_t index, Queue* exact = nullptr);
  void index_channel(ChannelId channel);
  template <class Predicate>
  std::vector<uint32_t> select(Predicate predicate) const;
  template <class Predicate>
  Purged purge(Predicate predicate);
  template <class Predicate>
  std::vector<OpId> ops_where(Predicate predicate) const;

  std::vector<Node> nodes_;
  uint32_t free_ = kNil;
  uint64_t order_ = 0;
  uint64_t unexpected_bytes_ = 0;
  std::array<size_t, kShapes> posted_by_shape_{};
  std::unordered_map<ChannelId, size_t> wildcards_;
  FlatMap<Key, Queue, KeyHash> queues_;
  IdMap<uint32_t> ops_;
  IdMap<uint32_t> arrivals_;
  // Lazy indexing. Once any wildcard has met unexpected arrivals, arrivals are in their channel's queue too;
  // in the channels listed here, in the two half-wild queues as well.
  bool by_channel_ = false;
  IdMap<uint32_t> wild_channels_;
};

}  // namespace aiocomm
