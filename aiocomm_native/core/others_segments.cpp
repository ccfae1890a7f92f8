#include "core/others_segments.hpp"

#include <sys/mman.h>

#include <utility>

#include "core/segments.hpp"
#include "core/shared_memory.hpp"

namespace aiocomm {

OthersSegments::~OthersSegments() {
  for (const Owner& owner : of_)
    for (const auto& [id, mapping] : owner.mappings) unmap(mapping);
}

void OthersSegments::unmap(const Mapping& mapping) {
  if (mapping.base) munmap(mapping.base, Segment::mapped_bytes(mapping.nbytes));
}

std::byte* OthersSegments::find(size_t rank, pid_t process, const Arena::Holder& holder, uint64_t address,
                                uint64_t nbytes) {
  if (!holder.id) return nullptr;
  auto& mappings = of_[rank].mappings;
  auto it = mappings.find(holder.id);
  if (it == mappings.end()) {
    constexpr uint64_t kMost = 1ull << 47;  // of any address space: what is said of it may not be so
    void* base = holder.nbytes < kMost
                     ? map_of_process(process, holder.fd, Segment::mapped_bytes(holder.nbytes))
                     : nullptr;
    it = mappings.emplace(holder.id, Mapping{static_cast<std::byte*>(base), holder.nbytes}).first;
  }
  const Mapping& mapping = it->second;
  const uint64_t at = address - holder.base;
  if (!mapping.base || at > mapping.nbytes || nbytes > mapping.nbytes - at) return nullptr;
  return mapping.base + at;
}

void OthersSegments::forget_freed(size_t rank, uint64_t releases) {
  Owner& owner = of_[rank];
  if (std::exchange(owner.releases, releases) == releases) return;
  std::erase_if(owner.mappings, [](const auto& one) {
    const Mapping& mapping = one.second;
    const bool over = !mapping.base || Segment::end_of(mapping.base, mapping.nbytes).freed.load();
    if (over) unmap(mapping);
    return over;
  });
}

}  // namespace aiocomm
