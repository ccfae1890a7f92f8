#include "core/sched.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace aiocomm {

namespace {

// Costs are bytes / weight in units of 2^-20: at the greatest weight still exact to 0.05 %.
constexpr double kCostOne = 1 << 20;
constexpr uint64_t kGreatestChunk = uint64_t{1} << 32;  // keeps costs and owed bytes within 64 bits

void require(bool legal, const char* what) {
  if (!legal) throw std::invalid_argument(what);
}

const SchedConfig& checked(const SchedConfig& config) {
  require(config.min_chunk >= 1 && config.min_chunk <= config.max_chunk, "need 1 <= min_chunk <= max_chunk");
  require(config.max_chunk <= kGreatestChunk, "max_chunk is limited to 4 GiB");
  require(config.min_window <= config.max_window, "need min_window <= max_window");
  require(config.max_chunk <= config.max_window, "need max_chunk <= max_window");
  require(std::isfinite(config.initial_rate) && config.initial_rate > 0, "initial_rate must be positive");
  require(config.min_share >= 0 && config.min_share <= 0.5, "min_share must lie in [0, 0.5]");
  return config;
}

}  // namespace

struct Scheduler::Group : FairNode {
  Group(uint64_t group, uint64_t ordinal, uint8_t cls_) : FairNode(ordinal), id(group), cls(cls_) {}
  uint64_t cost(uint64_t nbytes) const { return charged(nbytes) * cost_per_byte; }

  uint64_t id;
  uint8_t cls;
  uint64_t cost_per_byte = 0;
  uint64_t served = 0;
  size_t members = 0;
  FairQueue flows;  // the backlogged ones
};

struct Scheduler::Flow : FairNode {
  Flow(FlowId flow, Group& group_, uint64_t serial) : FairNode(flow), id(flow), born(serial), group(group_) {}
  bool empty() const { return headers.head == kNil && data.head == kNil; }
  uint32_t front() const { return headers.head != kNil ? headers.head : data.head; }

  FlowId id;
  uint64_t born;  // chunks with a smaller serial are of an earlier flow of this id
  Group& group;
  bool ready = true;
  uint64_t greatest = kGreatestChunk;
  uint64_t backlog = 0;
  Fifo headers, data;
};

Scheduler::Scheduler(const SchedConfig& config)
    : config_(checked(config)),
      share_(std::llround(config.min_share * kShareOne)),
      rate_(kRateMemory, kRateMemory, kRateMemory / config.initial_rate) {
  preempt_ns_.fill(100'000);
}

Scheduler::~Scheduler() = default;

void Scheduler::set_limits(uint64_t max_chunk, uint64_t max_window) {
  SchedConfig changed = config_;
  changed.max_chunk = max_chunk;
  changed.max_window = max_window;
  config_ = checked(changed);
}

void Scheduler::add_flow(FlowId flow, uint8_t cls, double weight, uint64_t group) {
  require(flows_.find(flow) == nullptr, "this flow exists already");
  require(cls < kClasses, "classes are 0 to 3");
  require(weight >= kMinWeight && weight <= kMaxWeight, "a weight must lie in [1/1024, 1024]");
  Group* owner = groups_.find(group);
  require(owner == nullptr || owner->cls == cls, "the group is of another class");
  if (owner == nullptr) owner = &groups_.add(std::make_unique<Group>(group, groups_made_++, cls));
  flows_.add(std::make_unique<Flow>(flow, *owner, serial_));
  ++owner->members;
  ++registered_[cls];
  set_weight(group, weight);
}

std::vector<uint64_t> Scheduler::remove_flow(FlowId id) {
  Flow& flow = flow_at(id);
  std::vector<uint64_t> dropped;
  while (!flow.empty()) {
    dropped.push_back(item_pool_[flow.front()].id);
    remove_item(flow.front());
  }
  refresh(flow, Entry::starts);
  Group& group = flow.group;
  --registered_[group.cls];
  flows_.remove(flow);
  if (--group.members == 0) groups_.remove(group);
  return dropped;
}

void Scheduler::set_weight(uint64_t group, double weight) {
  require(weight >= kMinWeight && weight <= kMaxWeight, "a weight must lie in [1/1024, 1024]");
  Group& changed = group_at(group);
  changed.cost_per_byte = static_cast<uint64_t>(std::llround(kCostOne / weight));
  dearest_[changed.cls] = std::max(dearest_[changed.cls], changed.cost_per_byte);
}

void Scheduler::set_ready(FlowId id, bool ready) {
  Flow& flow = flow_at(id);
  flow.ready = ready;
  refresh(flow, Entry::resumes);
}

void Scheduler::set_chunk(FlowId id, uint64_t nbytes) {
  require(nbytes > 0, "a chunk has a byte at least");
  flow_at(id).greatest = nbytes;
}

void Scheduler::set_preempt(uint8_t cls, uint64_t ns) {
  require(cls < kClasses, "classes are 0 to 3");
  preempt_ns_[cls] = ns;
}

void Scheduler::push(FlowId id, uint64_t item, uint64_t nbytes, bool header) {
  Flow& flow = flow_at(id);
  require(items_.find(item) == nullptr, "this item is queued already");
  require(!header || nbytes <= config_.max_chunk, "a header is at most max_chunk long");
  insert_item({.id = item, .nbytes = nbytes, .order = order_++, .flow = &flow, .header = header});
  refresh(flow, Entry::starts);
}

std::optional<Scheduler::Chunk> Scheduler::next() {
  const unsigned classes = backlogged();
  if (classes == 0) return std::nullopt;
  const Owed owed_before = owed_;
  const unsigned cls = choose_class(classes);
  const uint64_t nbytes = front_bytes(cls);
  if (admit(cls, nbytes) != Admission::kYes) return std::nullopt;

  undo_[undo_top_++ % kUndoDepth] = {serial_, owed_before};
  undo_depth_ = std::min(undo_depth_ + 1, kUndoDepth);
  account_share(cls, nbytes, classes);
  Item& item = front_item(cls);
  Flow& flow = *item.flow;
  Group& group = flow.group;
  const Chunk chunk{.item = item.id,
                    .offset = item.offset,
                    .nbytes = nbytes,
                    .last = item.offset + nbytes == item.nbytes,
                    .header = item.header,
                    .cls = static_cast<uint8_t>(cls),
                    .flow = flow.id,
                    .serial = serial_++,
                    .order = item.order};
  in_flight_[cls] += nbytes;
  group.served += nbytes;
  group.flows.charge(flow, charged(nbytes));
  classes_[cls].charge(group, group.cost(nbytes));
  item.offset += nbytes;
  flow.backlog -= nbytes;
  if (chunk.last) {
    remove_item(flow.front());
    refresh(flow, Entry::starts);
  }
  return chunk;
}

void Scheduler::unget(const Chunk& chunk) {
  Flow& flow = flow_at(chunk.flow);
  Group& group = flow.group;
  uint32_t* const index = items_.find(chunk.item);
  require(group.cls == chunk.cls && in_flight_[group.cls] >= chunk.nbytes && chunk.serial < serial_,
          "this chunk is not in flight");
  require(chunk.serial >= flow.born, "the chunk's flow was removed");
  if (chunk.last) {
    require(index == nullptr, "the item is queued again");
    insert_item({.id = chunk.item,
                 .offset = chunk.offset,
                 .nbytes = chunk.offset + chunk.nbytes,
                 .order = chunk.order,
                 .flow = &flow,
                 .header = chunk.header});
  } else {
    require(index != nullptr, "the item was cancelled: complete() the chunk");
    Item& item = item_pool_[*index];
    require(item.flow == &flow && item.offset == chunk.offset + chunk.nbytes,
            "not the newest chunk of its item");
    item.offset = chunk.offset;
    flow.backlog += chunk.nbytes;
  }
  in_flight_[group.cls] -= chunk.nbytes;
  group.served -= chunk.nbytes;
  group.flows.refund(flow, charged(chunk.nbytes));
  classes_[group.cls].refund(group, group.cost(chunk.nbytes));
  refresh(flow, Entry::refunded);
  if (undo_depth_ > 0 && undo_[(undo_top_ - 1) % kUndoDepth].serial == chunk.serial) {
    --undo_depth_;
    owed_ = undo_[--undo_top_ % kUndoDepth].owed;
  }
}

std::optional<uint64_t> Scheduler::cancel(uint64_t id) {
  const uint32_t* index = items_.find(id);
  if (index == nullptr) return std::nullopt;
  const Item& item = item_pool_[*index];
  Flow& flow = *item.flow;
  const uint64_t remaining = item.nbytes - item.offset;
  remove_item(*index);
  refresh(flow, Entry::starts);
  return remaining;
}

bool Scheduler::runnable() const noexcept { return backlogged() != 0; }

uint64_t Scheduler::backlog(FlowId flow) const { return flow_at(flow).backlog; }

uint64_t Scheduler::served(uint64_t group) const { return group_at(group).served; }

Scheduler::Flow& Scheduler::flow_at(FlowId id) const {
  Flow* flow = flows_.find(id);
  require(flow != nullptr, "no such flow");
  return *flow;
}

Scheduler::Group& Scheduler::group_at(uint64_t id) const {
  Group* group = groups_.find(id);
  require(group != nullptr, "no such group");
  return *group;
}

Scheduler::Item& Scheduler::front_item(unsigned cls) noexcept {
  const auto& group = static_cast<const Group&>(*classes_[cls].top());
  const auto& flow = static_cast<const Flow&>(*group.flows.top());
  return item_pool_[flow.front()];
}

uint64_t Scheduler::front_bytes(unsigned cls) noexcept {
  const Item& item = front_item(cls);
  const uint64_t remaining = item.nbytes - item.offset;
  // Most items are smaller than the smallest chunk: no need to look at the window.
  if (item.header) return remaining;
  const uint64_t wanted = std::min(remaining, item.flow->greatest);
  return wanted <= config_.min_chunk ? wanted : std::min(wanted, chunk_size(static_cast<uint8_t>(cls)));
}

unsigned Scheduler::backlogged() const noexcept {
  unsigned classes = 0;
  for (unsigned cls = 0; cls < kClasses; ++cls)
    classes |= static_cast<unsigned>(!classes_[cls].empty()) << cls;
  return classes;
}

// Enters the flow and its group into the fair queues, or takes them out, as its items and readiness demand.
void Scheduler::refresh(Flow& flow, Entry entry) {
  const bool active = flow.ready && !flow.empty();
  if (active == flow.queued()) return;
  Group& group = flow.group;
  FairQueue& groups = classes_[group.cls];
  if (!active) {
    group.flows.leave(flow);
    if (group.flows.empty()) groups.leave(group);
    return;
  }
  auto into = [entry](FairQueue& queue, FairNode& node, uint64_t credit) {
    switch (entry) {
      case Entry::starts:
        return queue.enter(node);
      case Entry::resumes:
        return queue.resume(node, credit);
      case Entry::refunded:
        return queue.re_enter(node);
    }
  };
  // As far as a whole chunk of any other can have put it behind, and one more that was given back.
  into(group.flows, flow, 2 * config_.max_chunk);
  if (!group.queued()) into(groups, group, 2 * config_.max_chunk * dearest_[group.cls]);
}

void Scheduler::insert_item(const Item& item) {
  uint32_t index = free_item_;
  if (index == kNil) {
    index = static_cast<uint32_t>(item_pool_.size());
    item_pool_.push_back(item);
  } else {
    free_item_ = item_pool_[index].next;
    item_pool_[index] = item;
  }
  items_.find_or_insert(item.id) = index;
  Flow& flow = *item.flow;
  Fifo& fifo = item.header ? flow.headers : flow.data;
  flow.backlog += item.nbytes - item.offset;
  uint32_t prev = fifo.tail, next = kNil;
  if (prev != kNil && item.order < item_pool_[prev].order) {  // given back: before all that came after it
    for (prev = kNil, next = fifo.head; item_pool_[next].order < item.order;) {
      prev = next;
      next = item_pool_[next].next;
    }
  }
  item_pool_[index].prev = prev;
  item_pool_[index].next = next;
  (prev == kNil ? fifo.head : item_pool_[prev].next) = index;
  (next == kNil ? fifo.tail : item_pool_[next].prev) = index;
}

void Scheduler::remove_item(uint32_t index) {
  Item& item = item_pool_[index];
  Fifo& fifo = item.header ? item.flow->headers : item.flow->data;
  item.flow->backlog -= item.nbytes - item.offset;
  (item.prev == kNil ? fifo.head : item_pool_[item.prev].next) = item.next;
  (item.next == kNil ? fifo.tail : item_pool_[item.next].prev) = item.prev;
  items_.erase_key(item.id);
  item.next = free_item_;
  free_item_ = index;
}

}  // namespace aiocomm
