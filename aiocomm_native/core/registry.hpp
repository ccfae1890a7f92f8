// Owned objects by id, with stable addresses and lookup in a few ns. T has a member `id`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/flat_map.hpp"

namespace aiocomm {

template <class T>
class Registry {
 public:
  T* find(uint64_t id) const noexcept {
    const uint32_t* slot = slots_.find(id);
    return slot == nullptr ? nullptr : all_[*slot].get();
  }

  // The id must be new.
  T& add(std::unique_ptr<T> object) {
    T& added = *all_.emplace_back(std::move(object));
    slots_.find_or_insert(added.id) = static_cast<uint32_t>(all_.size() - 1);
    return added;
  }

  // The object must be here.
  void remove(const T& object) {
    uint32_t* slot = slots_.find(object.id);
    const uint32_t hole = *slot;
    slots_.erase(slot);
    if (hole + 1 != all_.size()) {
      all_[hole] = std::move(all_.back());
      *slots_.find(all_[hole]->id) = hole;
    }
    all_.pop_back();
  }

  size_t size() const noexcept { return all_.size(); }
  template <class F>
  void each(F&& f) const {
    for (const auto& object : all_) f(*object);
  }

 private:
  std::vector<std::unique_ptr<T>> all_;
  IdMap<uint32_t> slots_;
};

}  // namespace aiocomm
