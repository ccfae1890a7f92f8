// Open-addressing hash map for the data path: linear probing, at most half full, deletion by backward shift,
// so that there are no tombstones and a table through which 10^7 keys have passed is as small as its fullest
// moment.
//
// A slot is free iff is_free(value): there is no separate state byte. A value written into a slot must
// therefore not be free. Pointers into the table hold until the next insertion or erasure.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace aiocomm {

template <class T>
concept Word = std::same_as<T, uint32_t> || std::same_as<T, uint64_t>;

// Where values are plain words, the greatest marks a free slot.
template <Word V>
constexpr bool is_free(V value) {
  return value == std::numeric_limits<V>::max();
}

template <Word V>
constexpr void set_free(V& value) {
  value = std::numeric_limits<V>::max();
}

// Sequential ids, and ids with a packed upper half (rank << 32 | n), both spread over the top bits.
struct IdHash {
  uint64_t operator()(uint64_t id) const noexcept { return (id ^ (id >> 32)) * 0x9E3779B97F4A7C15ull; }
};

template <class Key, class Value, class Hash = IdHash>
class FlatMap {
 public:
  FlatMap() { allocate(4); }

  size_t size() const noexcept { return size_; }
  size_t capacity() const noexcept { return slots_.size(); }

  Value* find(const Key& key) noexcept {
    for (size_t i = home(key);; i = (i + 1) & mask_) {
      if (is_free(slots_[i].value)) return nullptr;
      if (slots_[i].key == key) return &slots_[i].value;
    }
  }
  const Value* find(const Key& key) const noexcept { return const_cast<FlatMap*>(this)->find(key); }

  // The key's value, or a new slot whose value is free: the caller fills it before any other call.
  Value& find_or_insert(const Key& key) {
    if ((size_ + 1) * 2 > slots_.size()) grow();
    size_t i = home(key);
    while (!is_free(slots_[i].value)) {
      if (slots_[i].key == key) return slots_[i].value;
      i = (i + 1) & mask_;
    }
    slots_[i].key = key;
    ++size_;
    return slots_[i].value;
  }

  // `value` points into this table.
  void erase(Value* value) noexcept {
    size_t hole = static_cast<size_t>(reinterpret_cast<Slot*>(value) - slots_.data());  // its first member
    for (size_t i = (hole + 1) & mask_; !is_free(slots_[i].value); i = (i + 1) & mask_) {
      // An entry may move back into the hole unless its home lies (cyclically) after the hole.
      if (((i - home(slots_[i].key)) & mask_) >= ((i - hole) & mask_)) {
        slots_[hole] = slots_[i];
        hole = i;
      }
    }
    set_free(slots_[hole].value);
    --size_;
  }

  bool erase_key(const Key& key) noexcept {
    Value* value = find(key);
    if (value == nullptr) return false;
    erase(value);
    return true;
  }

 private:
  struct Slot {
    Value value;
    Key key;
  };

  size_t home(const Key& key) const noexcept { return static_cast<size_t>(Hash{}(key) >> shift_); }

  void allocate(unsigned bits) {
    Slot empty{};
    set_free(empty.value);
    slots_.assign(size_t{1} << bits, empty);
    mask_ = slots_.size() - 1;
    shift_ = 64 - bits;
    size_ = 0;
  }

  void grow() {
    std::vector<Slot> old;
    old.swap(slots_);
    allocate(64 - shift_ + 1);
    for (const Slot& slot : old) {
      if (!is_free(slot.value)) find_or_insert(slot.key) = slot.value;
    }
  }

  std::vector<Slot> slots_;
  size_t mask_ = 0;
  size_t size_ = 0;
  unsigned shift_ = 64;
};

template <Word V>
using IdMap = FlatMap<uint64_t, V, IdHash>;

}  // namespace aiocomm
