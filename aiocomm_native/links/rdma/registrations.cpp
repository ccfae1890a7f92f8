#include "links/rdma/registrations.hpp"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "core/link.hpp"
#include "core/segments.hpp"
#include "links/rdma/gpu.hpp"

namespace aiocomm::rdma {

namespace {

int access_of(Access access) {
  switch (access) {
    case Access::local_reads:
      return 0;
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

bool of_region(Access access) { return access == Access::region_reads || access == Access::region_writes; }

// What this side's devices may write, they may read.
bool serves(Access found, Access wanted) {
  return found == wanted || (found == Access::local && wanted == Access::local_reads);
}

// Who may write is told of the very range, and only for the time of one operation; who has a region's key, of the region.
bool exact(Access access) { return of_region(access) || access == Access::peer_writes; }

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
                             bool by_node, std::function<void()> ring,
                             std::function<void(const char* why)> failed)
    : verbs_(verbs),
      domains_(std::move(domains)),
      keep_bytes_(keep_bytes),
      by_node_(by_node),
      registrar_(verbs, std::move(ring), std::move(failed)) {}

Registrations::~Registrations() {
  for (auto& slot : slots_)
    if (slot && slot->ready && !slot->failed && !slot->leaving)
      drop(*slot);  // the others are the registrar's
}

Registration& Registrations::acquire(const std::byte* data, uint64_t nbytes, Access access) {
  forget_freed();
  if (Registration* found = of_region(access) ? nullptr : find(data, nbytes, access)) {
    ++counters_.found;
    ++found->users;
    found->used = ++uses_;
    return *found;
  }
  std::shared_ptr<Segment> segment = exact(access) ? nullptr : Segments::of_process().find(data, nbytes);
  // It is kept, and can be written: one registration does for both.
  if (segment && access == Access::local_reads) access = Access::local;
  Registering job = job_for(const_cast<std::byte*>(data), nbytes, access);
  job.segment = std::move(segment);
  auto fresh = std::make_unique<Registration>();
  if (job.segment) {
    job.base = job.segment->base;
    job.nbytes = job.segment->nbytes;
    fresh->segment = job.segment->id;
    fresh->kept = true;
  }
  fresh->access = access;
  return add(std::move(fresh), std::move(job));
}

// The whole allocation, where it may be kept: to export and map it takes long. Else the pages of the range are exported.
Registration& Registrations::acquire_device(const DeviceRange& range, Access access) {
  auto data = reinterpret_cast<std::byte*>(range.address);
  if (Registration* found = of_region(access) ? nullptr : find(data, range.nbytes, access, range.buffer_id)) {
    ++counters_.found;
    ++found->users;
    found->used = ++uses_;
    return *found;
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    Registration* other = slots_[i].get();
    if (!other || !other->buffer_id || other->buffer_id == range.buffer_id) continue;
    auto at = reinterpret_cast<uint64_t>(other->base);
    if (at < range.base + range.extent && range.base < at + other->nbytes)
      forget_device(other->of_base, other->buffer_id);
  }
  static const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  bool whole = range.extent <= keep_bytes_ && !exact(access);
  auto [from, to] = gpu_pages(whole ? range.base : range.address, whole ? range.extent : range.nbytes, page);
  Registering job = exact(access) ? job_for(data, range.nbytes, access)
                                  : job_for(reinterpret_cast<std::byte*>(from), to - from, access);
  job.offset = reinterpret_cast<uint64_t>(job.base) - from;
  job.by_node = false;
  job.node = range.node;
  if (range.open)
    job.open = [open = range.open, from = from, nbytes = to - from] { return open(from, nbytes); };
  auto fresh = std::make_unique<Registration>();
  fresh->access = access;
  fresh->buffer_id = range.buffer_id;
  fresh->of_base = range.base;
  fresh->kept = whole;
  ++counters_.of_devices;
  return add(std::move(fresh), std::move(job));
}

void Registrations::forget_device(uint64_t base, uint64_t buffer_id) {
  for (auto& slot : slots_) {
    Registration* found = slot.get();
    if (!found || found->leaving || found->buffer_id != buffer_id || found->of_base != base) continue;
    unlist(*found);
    if (std::exchange(found->kept, false)) kept_bytes_ -= found->nbytes;
    if (found->ready && !found->users) drop(*found);
  }
}

Registering Registrations::job_for(std::byte* base, uint64_t nbytes, Access access) {
  Registering job;
  job.base = base;
  job.nbytes = nbytes;
  job.access = access_of(access);
  std::copy(domains_.begin(), domains_.end(), job.domains.begin());
  job.by_node = by_node_;
  return job;
}

Registration& Registrations::add(std::unique_ptr<Registration> fresh, Registering job) {
  fresh->base = job.base;
  fresh->nbytes = job.nbytes;
  fresh->users = 1;
  fresh->used = ++uses_;
  fresh->ready = job.nbytes <= kAside && !job.open;
  if (fresh->ready) {
    register_now(verbs_, job);
    if (job.error) throw LinkFailure(job.reason, job.error);
    fresh->regions = job.regions;
    fresh->node = job.node;
  }
  uint32_t id;
  if (free_.empty()) {
    slots_.emplace_back();
    id = static_cast<uint32_t>(slots_.size());
  } else {
    id = free_.back();
    free_.pop_back();
  }
  job.id = fresh->id = id;
  by_base_.emplace(reinterpret_cast<uintptr_t>(fresh->base), id);
  ++counters_.made;
  counters_.pinned_bytes += fresh->nbytes;
  if (fresh->kept) kept_bytes_ += fresh->nbytes;
  Registration& registration = *(slots_[id - 1] = std::move(fresh));
  if (!registration.ready) {
    ++counters_.aside;
    registrar_.submit(std::move(job));
  }
  trim();
  return registration;
}

std::vector<Registered> Registrations::take() {
  std::vector<Registered> news;
  for (Registering& job : registrar_.take()) {
    Registration& registration = *slots_[job.id - 1];  // not dropped before it is ready
    registration.ready = true;
    registration.regions = job.regions;
    registration.node = job.node;
    registration.failed = job.error != 0;
    if (!registration.users) {
      registrar_.give_back(registration.regions);
      free_slot(registration);
      continue;
    }
    if (registration.failed) unlist(registration);
    news.push_back({job.id, job.error, std::move(job.reason), registration.buffer_id != 0});
  }
  return news;
}

bool Registrations::release(uint32_t id) {
  Registration* registration = get(id);
  if (!registration || --registration->users) return true;
  if (!registration->ready)
    unlist(
        *registration);  // its memory may be freed before it is ready, and its address come back with other memory
  else if (registration->failed)
    free_slot(*registration);
  else if (!registration->kept)
    return drop(*registration);
  else
    trim();
  return true;
}

std::vector<uint32_t> Registrations::take_released() {
  std::vector<uint32_t> ids = registrar_.take_given_back();
  for (uint32_t id : ids) free_slot(*slots_[id - 1]);
  return ids;
}

Registration* Registrations::find(const std::byte* data, uint64_t nbytes, Access access, uint64_t buffer_id) {
  auto begin = reinterpret_cast<uintptr_t>(data);
  // Ranges may overlap: those that start nearest before this one are the ones that may hold it.
  int looks = 16;
  for (auto it = by_base_.upper_bound(begin); it != by_base_.begin() && looks; --looks) {
    Registration* found = get((--it)->second);
    if (serves(found->access, access) && found->buffer_id == buffer_id &&
        it->first + found->nbytes >= begin + nbytes)
      return found;
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
    if (registration && registration->segment && registration->ready && registration->users == 0 &&
        !Segments::of_process().alive(registration->segment))
      drop(*registration);
  }
}

bool Registrations::drop(Registration& registration) {
  // A peer that may write is kept out before its operation ends.
  bool exposed = exact(registration.access);
  unlist(registration);
  if (exposed && registration.nbytes > kAsideAwaited) {
    registration.leaving = true;
    registrar_.give_back(registration.regions, registration.id);
    return false;
  }
  if (registration.nbytes > kAside && !exposed) {
    registrar_.give_back(registration.regions);
  } else {
    deregister(verbs_, registration.regions);
  }
  free_slot(registration);
  return true;
}

void Registrations::unlist(const Registration& registration) {
  auto [first, last] = by_base_.equal_range(reinterpret_cast<uintptr_t>(registration.base));
  for (auto it = first; it != last; ++it)
    if (it->second == registration.id) {
      by_base_.erase(it);
      return;
    }
}

void Registrations::free_slot(Registration& registration) {
  counters_.pinned_bytes -= registration.nbytes;
  if (registration.kept) kept_bytes_ -= registration.nbytes;
  free_.push_back(registration.id);
  slots_[registration.id - 1].reset();
}

void Registrations::trim() {
  while (kept_bytes_ > keep_bytes_) {
    Registration* oldest = nullptr;
    for (auto& slot : slots_)
      if (slot && slot->kept && slot->ready && slot->users == 0 && (!oldest || slot->used < oldest->used))
        oldest = slot.get();
    if (!oldest) return;
    ++counters_.evicted;
    drop(*oldest);
  }
}

}  // namespace aiocomm::rdma
