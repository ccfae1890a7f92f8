#include "links/rdma/registrations.hpp"

#include <algorithm>
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
                             bool by_node, std::function<void()> ring)
    : verbs_(verbs),
      domains_(std::move(domains)),
      keep_bytes_(keep_bytes),
      by_node_(by_node),
      registrar_(verbs, std::move(ring)) {}

Registrations::~Registrations() {
  for (auto& slot : slots_)
    if (slot && slot->ready && !slot->failed) drop(*slot);  // what is not ready is the registrar's
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
  Registering job;
  job.base = const_cast<std::byte*>(data);
  job.nbytes = nbytes;
  job.access = access_of(access);
  std::copy(domains_.begin(), domains_.end(), job.domains.begin());
  job.by_node = by_node_;
  // Who may write is told of the very range, and only for the time of one operation; who has a region's key, of the region.
  bool exact = of_region || access == Access::peer_writes;
  job.segment = exact ? nullptr : Segments::of_process().find(data, nbytes);
  if (job.segment) {
    job.base = job.segment->base;
    job.nbytes = job.segment->nbytes;
  }
  auto fresh = std::make_unique<Registration>();
  fresh->base = job.base;
  fresh->nbytes = job.nbytes;
  fresh->segment = job.segment ? job.segment->id : 0;
  fresh->access = access;
  fresh->users = 1;
  fresh->used = ++uses_;
  fresh->ready = job.nbytes <= kAside;
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
  if (fresh->segment) kept_bytes_ += fresh->nbytes;
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
    news.push_back({job.id, job.error, std::move(job.reason)});
  }
  return news;
}

void Registrations::release(uint32_t id) {
  Registration* registration = get(id);
  if (!registration || --registration->users) return;
  if (!registration->ready)
    unlist(
        *registration);  // its memory may be freed before it is ready, and its address come back with other memory
  else if (registration->failed)
    free_slot(*registration);
  else if (!registration->segment)
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
    if (registration && registration->segment && registration->ready && registration->users == 0 &&
        !Segments::of_process().alive(registration->segment))
      drop(*registration);
  }
}

void Registrations::drop(Registration& registration) {
  // A peer that may write is kept out before its operation ends.
  bool exposed = registration.access != Access::local && registration.access != Access::peer_reads;
  if (registration.nbytes > kAside && !exposed) {
    registrar_.give_back(registration.regions);
  } else {
    for (ibv_mr* region : registration.regions)
      if (region) verbs_.dereg_mr(region);
  }
  unlist(registration);
  free_slot(registration);
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
  if (registration.segment) kept_bytes_ -= registration.nbytes;
  free_.push_back(registration.id);
  slots_[registration.id - 1].reset();
}

void Registrations::trim() {
  while (kept_bytes_ > keep_bytes_) {
    Registration* oldest = nullptr;
    for (auto& slot : slots_)
      if (slot && slot->segment && slot->ready && slot->users == 0 && (!oldest || slot->used < oldest->used))
        oldest = slot.get();
    if (!oldest) return;
    ++counters_.evicted;
    drop(*oldest);
  }
}

}  // namespace aiocomm::rdma
