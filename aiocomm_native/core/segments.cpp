#include "core/segments.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <mutex>
#include <string>
#include <unordered_set>

#include "core/link.hpp"

namespace aiocomm {

struct Segments::Impl {
  mutable std::mutex mutex;
  std::map<const std::byte*, std::shared_ptr<Segment>> by_base;
  std::unordered_set<uint32_t> ids;
  uint32_t next_id = 1;
};

Segment::~Segment() {
  if (base) munmap(base, mapped_bytes(nbytes));
  if (fd >= 0) ::close(fd);
}

Segments::Segments() : impl_(new Impl) {}

Segments& Segments::of_process() {
  static Segments* segments = new Segments;
  return *segments;
}

std::shared_ptr<Segment> Segments::allocate(uint64_t nbytes) {
  constexpr uint64_t kMost = 1ull << 47;  // of any address space: what is added to that does not overflow
  if (nbytes > kMost)
    throw LinkFailure(
        "cannot make a shared segment of " + std::to_string(nbytes) + " bytes: no process has as many",
        ENOMEM);
  auto segment = std::make_shared<Segment>();
  const uint64_t pages = std::max<uint64_t>(1, (nbytes + 4095) / 4096),
                 room = Segment::mapped_bytes(pages * 4096);
  segment->fd = memfd_create("aiocomm-array", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (segment->fd < 0) throw LinkFailure("cannot make a shared segment (memfd_create)", errno);
  if (ftruncate(segment->fd, static_cast<off_t>(room)) != 0)
    throw LinkFailure("cannot size a shared segment to " + std::to_string(room) + " bytes", errno);
  // Sealed: a peer cannot shrink it under our feet.
  fcntl(segment->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  void* base = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_SHARED, segment->fd, 0);
  if (base == MAP_FAILED)
    throw LinkFailure("cannot map a shared segment of " + std::to_string(room) + " bytes", errno);
  segment->base = static_cast<std::byte*>(base);
  segment->nbytes = pages * 4096;  // whole ones, as adapters register them
  madvise(base, room, MADV_HUGEPAGE);
  std::lock_guard lock(impl_->mutex);
  segment->id = impl_->next_id++;
  impl_->by_base[segment->base] = segment;
  impl_->ids.insert(segment->id);
  count_.fetch_add(1, std::memory_order_relaxed);
  return segment;
}

void Segments::release(const std::byte* base) {
  std::lock_guard lock(impl_->mutex);
  auto it = impl_->by_base.find(base);
  if (it == impl_->by_base.end()) return;
  const Segment& freed = *it->second;
  Segment::end_of(freed.base, freed.nbytes).freed.store(1, std::memory_order_relaxed);
  impl_->ids.erase(it->second->id);
  impl_->by_base.erase(it);
  count_.fetch_sub(1, std::memory_order_relaxed);
  releases_.fetch_add(1, std::memory_order_release);  // pairs with releases()
}

bool Segments::alive(uint32_t id) const {
  std::lock_guard lock(impl_->mutex);
  return impl_->ids.contains(id);
}

std::shared_ptr<Segment> Segments::find(const std::byte* data, uint64_t nbytes) const {
  if (count_.load(std::memory_order_relaxed) == 0) return nullptr;
  std::lock_guard lock(impl_->mutex);
  auto it = impl_->by_base.upper_bound(data);
  if (it == impl_->by_base.begin()) return nullptr;
  --it;
  const Segment& segment = *it->second;
  auto offset = static_cast<uint64_t>(data - segment.base);
  return offset <= segment.nbytes && nbytes <= segment.nbytes - offset ? it->second : nullptr;
}

}  // namespace aiocomm
