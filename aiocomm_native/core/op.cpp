#include "core/op.hpp"

#include <new>

namespace aiocomm {

namespace {
constexpr uint64_t kSlotMask = 0xffffffff;
constexpr uint64_t kGenerationMask = 0x3fffffff;  // bits 62 and 63 of an id are the tables'
}  // namespace

Op* OpTable::take() {
  if (free_.empty()) {
    size_t c = chunk_count_.load(std::memory_order_relaxed);
    if (c == kChunks) throw std::bad_alloc();
    Op* ops = new Op[kChunk];
    for (size_t i = kChunk; i-- > 0;) {
      ops[i].id = id_bit_ | (c * kChunk + i);
      free_.push_back(static_cast<uint32_t>(c * kChunk + i));
    }
    chunks_[c].store(ops, std::memory_order_relaxed);
    chunk_count_.store(c + 1, std::memory_order_release);  // pairs with find() and for_each_live()
  }
  uint32_t slot = free_.back();
  free_.pop_back();
  ++in_use_;
  Op* op = chunks_[slot / kChunk].load(std::memory_order_relaxed) + slot % kChunk;
  uint64_t generation = ((op->id >> 32) & kGenerationMask) + 1;
  OpId id = id_bit_ | ((generation & kGenerationMask) << 32) | slot;
  op->id = id;
  op->state = OpState::queued;
  op->code = Code::ok;
  op->path = Path::none;
  op->unreachable = op->allocate = op->synchronous = op->no_wait = op->cancel_requested = op->matched =
      op->in_sched = false;
  op->listed = op->by_rows = op->awaits_fin = op->written = op->outlasts = op->owes_word = op->has_notify =
      op->has_key = op->holding = false;
  op->error = 0;
  op->counted_by = kNoLink;
  op->rows.reset();
  op->extent = op->reach = 0;
  op->registration = op->offer = op->immediate = op->chunks = 0;
  op->data = nullptr;
  op->nbytes = op->capacity = op->moved = 0;
  op->inflight = 0;
  op->inflight_bytes = 0;
  op->remote_op = op->region = op->offset = op->source_address = 0;
  op->source_segment = 0;
  op->deadline_ns = op->submitted_ns = op->started_ns = op->ended_ns = 0;
  op->meta_bytes = 0;
  op->notify.clear();
  op->cookie = nullptr;
  op->scope = nullptr;
  op->ready = ~0ull;
  op->allocate_on = -1;
  return op;
}

void OpTable::give_back(Op* op) {
  op->state = OpState::free;
  op->gpu.reset();
  op->own.reset();
  --in_use_;
  free_.push_back(static_cast<uint32_t>(op->id & kSlotMask));
}

Op* OpTable::find(OpId id) const {
  if ((id & (3ull << 62)) != id_bit_) return nullptr;
  uint64_t slot = id & kSlotMask;
  if (slot / kChunk >= chunk_count_.load(std::memory_order_acquire)) return nullptr;
  Op* op = chunks_[slot / kChunk].load(std::memory_order_relaxed) + slot % kChunk;
  return op->live && op->id == id ? op : nullptr;
}

OpTable::~OpTable() {
  for (size_t c = 0, n = chunk_count_.load(); c < n; ++c) delete[] chunks_[c].load();
}

}  // namespace aiocomm
