#include "core/match.hpp"

#include <algorithm>
#include <stdexcept>

namespace aiocomm {

namespace {

void check_recv(Rank src) {
  if (src < kAnySource) throw std::invalid_argument("a receive's source is a rank or kAnySource");
}

}  // namespace

uint64_t Matcher::KeyHash::operator()(const Key& key) const noexcept {
  // Murmur3's finaliser: neighbouring channels, ranks and tags must not cluster under linear probing.
  uint64_t h = key.channel * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(key.tag);
  h = (h ^ (h >> 32)) * 0xFF51AFD7ED558CCDull + static_cast<uint32_t>(key.src);
  h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return h ^ (h >> 33);
}

std::optional<uint64_t> Matcher::post_recv(OpId op, ChannelId channel, Rank src, Tag tag) {
  check_recv(src);
  if (ops_.find(op) != nullptr) throw std::invalid_argument("this receive is posted already");
  const Key key{channel, tag, src};
  const unsigned shape = shape_of(src, tag);
  if (unexpected() > 0) {
    if (shape != kExact) index_channel(channel);
    Queue* queue = queues_.find(key);
    if (queue != nullptr && nodes_[queue->head].kind == Kind::kArrival) {
      const uint32_t index = queue->head;
      const uint64_t id = nodes_[index].id;
      remove(index, shape == kExact ? queue : nullptr);
      return id;
    }
  }
  const uint32_t index = allocate(Kind::kRecv, op, key, 0);
  append(queues_.find_or_insert(key), index, shape);
  ops_.find_or_insert(op) = index;
  ++posted_by_shape_[shape];
  if (shape != kExact) ++wildcards_[channel];
  return std::nullopt;
}

std::optional<OpId> Matcher::arrive(const Arrival& arrival) {
  if (arrival.src < 0 || arrival.tag == kAnyTag) {
    throw std::invalid_argument("an arrival has a source and a tag, not wildcards");
  }
  if (arrivals_.find(arrival.id) != nullptr) throw std::invalid_argument("this arrival is queued already");
  const Key key{arrival.channel, arrival.tag, arrival.src};
  uint32_t best = kNil;
  Queue* best_queue = nullptr;
  for (unsigned shape = 0; shape < kShapes; ++shape) {
    if (posted_by_shape_[shape] == 0) continue;
    Queue* queue = queues_.find(widen(key, shape));
    if (queue == nullptr) continue;
    const Node& node = nodes_[queue->head];
    if (node.kind == Kind::kRecv && (best == kNil || node.order < nodes_[best].order)) {
      best = queue->head;
      best_queue = queue;
    }
  }
  if (best != kNil) {
    const OpId op = nodes_[best].id;
    remove(best, best_queue);
    return op;
  }
  const uint32_t index = allocate(Kind::kArrival, arrival.id, key, arrival.nbytes);
  link(index, kExact);
  if (by_channel_) {
    link(index, kAnyBoth);
    if (wild_channels_.find(arrival.channel) != nullptr) {
      link(index, 1);
      link(index, 2);
    }
  }
  arrivals_.find_or_insert(arrival.id) = index;
  unexpected_bytes_ += arrival.nbytes;
  return std::nullopt;
}

bool Matcher::cancel_recv(OpId op) {
  const uint32_t* index = ops_.find(op);
  if (index == nullptr) return false;
  remove(*index);
  return true;
}

bool Matcher::drop_arrival(uint64_t id) {
  const uint32_t* index = arrivals_.find(id);
  if (index == nullptr) return false;
  remove(*index);
  return true;
}

std::optional<Matcher::Arrival> Matcher::peek(ChannelId channel, Rank src, Tag tag) {
  check_recv(src);
  if (unexpected() == 0) return std::nullopt;
  if (shape_of(src, tag) != kExact) index_channel(channel);
  const Queue* queue = queues_.find({channel, tag, src});
  if (queue == nullptr || nodes_[queue->head].kind != Kind::kArrival) return std::nullopt;
  const Node& node = nodes_[queue->head];
  return Arrival{node.id, node.channel, node.src, node.tag, node.nbytes};
}

Matcher::Purged Matcher::remove_source(Rank src, bool drop_arrivals) {
  if (src < 0) throw std::invalid_argument("a source to remove is a rank");
  return purge([src, drop_arrivals](const Node& node) {
    return node.src == src && (node.kind == Kind::kRecv || drop_arrivals);
  });
}

Matcher::Purged Matcher::remove_channel(ChannelId channel) {
  Purged purged = purge([channel](const Node& node) { return node.channel == channel; });
  wild_channels_.erase_key(channel);
  return purged;
}

void Matcher::forget(ChannelId channel) {
  const Queue* queue = queues_.find({channel, kAnyTag, kAnySource});  // of all its arrivals, if it is listed
  if (queue == nullptr || nodes_[queue->head].kind != Kind::kArrival) wild_channels_.erase_key(channel);
}

std::vector<OpId> Matcher::any_source_recvs() const {
  return ops_where([](const Node& node) { return node.src == kAnySource; });
}

std::vector<OpId> Matcher::all_recvs() const {
  return ops_where([](const Node&) { return true; });
}

size_t Matcher::wildcards(ChannelId channel) const {
  auto it = wildcards_.find(channel);
  return it == wildcards_.end() ? 0 : it->second;
}

size_t Matcher::waiting(ChannelId channel, Rank src, Tag tag) const {
  const Queue* queue = queues_.find({channel, tag, src});
  if (queue == nullptr || nodes_[queue->head].kind != Kind::kRecv) return 0;
  size_t n = 0;
  for (uint32_t index = queue->head; index != kNil; index = nodes_[index].links[kExact].next) ++n;
  return n;
}

std::vector<OpId> Matcher::behind(OpId op) const {
  std::vector<OpId> later;
  const uint32_t* index = ops_.find(op);
  if (index == nullptr || nodes_[*index].src == kAnySource || nodes_[*index].tag == kAnyTag) return later;
  for (uint32_t i = nodes_[*index].links[kExact].next; i != kNil; i = nodes_[i].links[kExact].next)
    later.push_back(nodes_[i].id);
  return later;
}

// Wildcards are met on this channel: from now on, and for what is queued already, its arrivals are in all
// queues that a receive could look into. Each arrival is visited at most twice in its life.
void Matcher::index_channel(ChannelId channel) {
  if (!by_channel_) {
    by_channel_ = true;
    for (uint32_t index : select([](const Node& node) { return node.kind == Kind::kArrival; })) {
      link(index, kAnyBoth);
    }
  }
  uint32_t& wild = wild_channels_.find_or_insert(channel);
  if (!is_free(wild)) return;
  wild = 0;
  const Queue* queue = queues_.find({channel, kAnyTag, kAnySource});
  if (queue == nullptr || nodes_[queue->head].kind != Kind::kArrival) return;
  for (uint32_t index = queue->head; index != kNil; index = nodes_[index].links[kAnyBoth].next) {
    link(index, 1);
    link(index, 2);
  }
}

uint32_t Matcher::allocate(Kind kind, uint64_t id, const Key& key, uint64_t nbytes) {
  uint32_t index = free_;
  if (index == kNil) {
    index = static_cast<uint32_t>(nodes_.size());
    nodes_.emplace_back();
  } else {
    free_ = nodes_[index].links[0].next;
  }
  Node& node = nodes_[index];
  node.id = id;
  node.order = order_++;
  node.channel = key.channel;
  node.tag = key.tag;
  node.nbytes = nbytes;
  node.src = key.src;
  node.kind = kind;
  node.linked = 0;
  return index;
}

void Matcher::append(Queue& queue, uint32_t index, unsigned shape) {
  Node& node = nodes_[index];
  node.linked |= static_cast<uint8_t>(1u << shape);
  node.links[shape] = {kNil, kNil};
  if (is_free(queue)) {
    queue.head = index;
  } else {
    node.links[shape].prev = queue.tail;
    nodes_[queue.tail].links[shape].next = index;
  }
  queue.tail = index;
}

void Matcher::link(uint32_t index, unsigned shape) {
  const Node& node = nodes_[index];
  append(queues_.find_or_insert(widen({node.channel, node.tag, node.src}, shape)), index, shape);
}

void Matcher::unlink(uint32_t index, unsigned shape, Queue* queue) {
  const Link at = nodes_[index].links[shape];
  if (at.prev != kNil && at.next != kNil) {  // inside: its queue need not be found
    nodes_[at.prev].links[shape].next = at.next;
    nodes_[at.next].links[shape].prev = at.prev;
    return;
  }
  const Node& node = nodes_[index];
  if (queue == nullptr) queue = queues_.find(widen({node.channel, node.tag, node.src}, shape));
  if (at.prev == kNil && at.next == kNil) {
    queues_.erase(queue);
  } else if (at.prev == kNil) {
    queue->head = at.next;
    nodes_[at.next].links[shape].prev = kNil;
  } else {
    queue->tail = at.prev;
    nodes_[at.prev].links[shape].next = kNil;
  }
}

// `queue`: the node's narrowest queue, where the caller has it at hand.
void Matcher::remove(uint32_t index, Queue* queue) {
  Node& node = nodes_[index];
  if (node.kind == Kind::kRecv) {
    const unsigned shape = shape_of(node.src, node.tag);
    unlink(index, shape, queue);
    --posted_by_shape_[shape];
    if (shape != kExact)
      if (auto it = wildcards_.find(node.channel); --it->second == 0) wildcards_.erase(it);
    ops_.erase_key(node.id);
  } else {
    unlink(index, kExact, queue);
    for (unsigned shape = 1; shape < kShapes; ++shape) {
      if ((node.linked >> shape & 1) != 0) unlink(index, shape, nullptr);
    }
    unexpected_bytes_ -= node.nbytes;
    arrivals_.erase_key(node.id);
  }
  node.kind = Kind::kFree;
  node.links[0].next = free_;
  free_ = index;
}

template <class Predicate>
std::vector<uint32_t> Matcher::select(Predicate predicate) const {
  std::vector<uint32_t> found;
  for (uint32_t index = 0; index < nodes_.size(); ++index) {
    if (nodes_[index].kind != Kind::kFree && predicate(nodes_[index])) found.push_back(index);
  }
  std::sort(found.begin(), found.end(),
            [this](uint32_t a, uint32_t b) { return nodes_[a].order < nodes_[b].order; });
  return found;
}

template <class Predicate>
Matcher::Purged Matcher::purge(Predicate predicate) {
  Purged purged;
  for (uint32_t index : select(predicate)) {
    (nodes_[index].kind == Kind::kRecv ? purged.recvs : purged.arrivals).push_back(nodes_[index].id);
    remove(index);
  }
  return purged;
}

template <class Predicate>
std::vector<OpId> Matcher::ops_where(Predicate predicate) const {
  std::vector<OpId> ops;
  for (uint32_t index : select([&](const Node& n) { return n.kind == Kind::kRecv && predicate(n); })) {
    ops.push_back(nodes_[index].id);
  }
  return ops;
}

}  // namespace aiocomm
