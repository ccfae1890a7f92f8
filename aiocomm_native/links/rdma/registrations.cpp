#include "links/rdma/registrations.hpp"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "core/link.hpp"
#include "core/segments.hpp"

namespace aiocomm::rdma {

namespace {

int access_of(Access access) {
  switch (access) {
    case Access::peer_reads:
      return IBV_ACCESS_REMOTE_READ;
    case Access::region_reads:
      return IBV_ACCESS_REMOTE_READ;
    case Access::region_writes:
      return IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
    case Access::peer_writes:
      return IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
    default:
      return IBV_ACCESS_LOCAL_WRITE;
  }
}

std::string explain(uint64_t nbytes, int error) {
  std::string text = "cannot register " + std::to_string(nbytes) + " bytes with the device (" +
                     std::string(strerror(error)) + ")";
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if ((error == ENOMEM || error == EPERM || error == EAGAIN) && limit.rlim_cur != RLIM_INFINITY)
    text += ": registered memory is locked, and this process may lock " +
            std::to_string(limit.rlim_cur >> 10) +
            " KiB; raise it by `ulimit -l unlimited`, or memlock in /etc/security/limits.conf";
  return text;
}

// The page is there: it has been registered.
int node_of(const void* address) {
  constexpr unsigned long kNode = 1, kOfAddress = 2;  // MPOL_F_NODE, MPOL_F_ADDR
  int node = -1;
  return ::syscall(SYS_get_mempolicy, &node, nullptr, 0ul, address, kNode | kOfAddress) == 0 ? node : -1;
}

}  // namespace

Keys Registration::local() const {
  Keys keys;
  for (size_t i = 0; i < regions.size(); ++i) keys.of[i] = regions[i] ? regions[i]->lkey : 0;
  return keys;
}

Keys Registration::peer() const {
  Keys keys;
  for (size_t i = 0; i < regions.size(); ++i) keys.of[i] = regions[i] ? regions[i]->rkey : 0;
  return keys;
}

Registrations::Registrations(const Verbs& verbs, std::vector<ibv_pd*> domains, uint64_t keep_bytes,
                             bool by_node)
    : verbs_(verbs), domains_(std::move(domains)), keep_bytes_(keep_bytes), by_node_(by_node) {}

Registrations::~Registrations() {
  for (auto& slot : slots_)
    if (slot) drop(*slot);
}

Registration& Registrations::acquire(const std::byte* data, uint64_t nbytes, Access access) {
  forget_freed();
  bool of_region = access == Access::region_reads || access == Access::region_writes;
  if (Registration* found = of_region ? nullptr : find(data, nbytes, access)) {
    ++counters_.found;
    ++found->users;
    found->used = ++uses_;
    return *found;
  }
  auto fresh = std::make_unique<Registration>();
  fresh->base = const_cast<std::byte*>(data);
  fresh->nbytes = nbytes;
  // Who may write is told of the very range, and only for the time of one operation; who has a region's key, of the region.
  bool exact = of_region || access == Access::peer_writes;
  auto segment = exact ? nullptr : Segments::of_process().find(data, nbytes);
  if (segment) {
    fresh->base = segment->base;
    fresh->nbytes = nbytes = segment->nbytes;
    fresh->segment = segment->id;
  }
  fresh->access = access;
  fresh->users = 1;
  fresh->used = ++uses_;
  for (size_t i = 0; i < domains_.size(); ++i) {
    if (!domains_[i]) continue;
    fresh->regions[i] = verbs_.reg_mr(domains_[i], fresh->base, nbytes, access_of(access));
    if (fresh->regions[i]) continue;
    int error = errno;
    for (ibv_mr* region : fresh->regions)
      if (region) verbs_.dereg_mr(region);
    throw LinkFailure(explain(nbytes, error), error);
  }
  if (by_node_) fresh->node = node_of(fresh->base);
  uint32_t id;
  if (free_.empty()) {
    slots_.emplace_back();
    id = static_cast<uint32_t>(slots_.size());
  } else {
    id = free_.back();
    free_.pop_back();
  }
  fresh->id = id;
  by_base_.emplace(reinterpret_cast<uintptr_t>(fresh->base), id);
  ++counters_.made;
  counters_.pinned_bytes += nbytes;
  if (fresh->segment) kept_bytes_ += nbytes;
  auto& slot = slots_[id - 1] = std::move(fresh);
  trim();
  return *slot;
}

void Registrations::release(uint32_t id) {
  Registration* registration = get(id);
  if (!registration || --registration->users) return;
  if (!registration->segment)
    drop(*registration);
  else
    trim();
}

Registration* Registrations::find(const std::byte* data, uint64_t nbytes, Access access) {
  auto begin = reinterpret_cast<uintptr_t>(data);
  // Ranges may overlap: those that start nearest before this one are the ones that may hold it.
  int looks = 16;
  for (auto it = by_base_.upper_bound(begin); it != by_base_.begin() && looks; --looks) {
    Registration* found = get((--it)->second);
    if (found->access == access && it->first + found->nbytes >= begin + nbytes) return found;
  }
  return nullptr;
}

void Registrations::forget_rail(size_t rail) {
  domains_[rail] = nullptr;
  for (auto& slot : slots_)
    if (ibv_mr* region = slot ? std::exchange(slot->regions[rail], nullptr) : nullptr)
      verbs_.dereg_mr(region);
}

Registration* Registrations::get(uint32_t id) {
  return id && id <= slots_.size() ? slots_[id - 1].get() : nullptr;
}

// A segment's address may come back with other memory: its registration must not be found by then.
void Registrations::forget_freed() {
  uint64_t releases = Segments::of_process().releases();
  if (releases == releases_) return;
  releases_ = releases;
  for (size_t i = 0; i < slots_.size(); ++i) {
    Registration* registration = slots_[i].get();
    if (registration && registration->segment && registration->users == 0 &&
        !Segments::of_process().alive(registration->segment))
      drop(*registration);
  }
}

void Registrations::drop(Registration& registration) {
  for (ibv_mr* region : registration.regions)
    if (region) verbs_.dereg_mr(region);
  counters_.pinned_bytes -= registration.nbytes;
  if (registration.segment) kept_bytes_ -= registration.nbytes;
  auto [first, last] = by_base_.equal_range(reinterpret_cast<uintptr_t>(registration.base));
  for (auto it = first; it != last; ++it)
    if (it->second == registration.id) {
      by_base_.erase(it);
      break;
    }
  free_.push_back(registration.id);
  slots_[registration.id - 1].reset();
}

void Registrations::trim() {
  while (kept_bytes_ > keep_bytes_) {
    Registration* oldest = nullptr;
    for (auto& slot : slots_)
      if (slot && slot->segment && slot->users == 0 && (!oldest || slot->used < oldest->used))
        oldest = slot.get();
    if (!oldest) return;
    ++counters_.evicted;
    drop(*oldest);
  }
}

}  // namespace aiocomm::rdma
