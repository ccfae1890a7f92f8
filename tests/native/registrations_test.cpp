// needs: links/rdma/registrations.cpp links/rdma/registrar.cpp core/segments.cpp
//
// The registration cache over a verbs library that only counts.

#if __has_include(<infiniband/verbs.h>)

#include "links/rdma/registrations.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/segments.hpp"

using namespace aiocomm;
using namespace aiocomm::rdma;

namespace {

std::mutex g_mutex;  // guards what follows, where a registrar is at work
std::condition_variable g_changed;
bool g_paused = false;
int g_rings = 0;
std::set<ibv_mr*> g_registered;
int g_refuse = 0;
int g_access = 0;

Verbs counting() {
  Verbs verbs{};
  verbs.reg_mr = [](ibv_pd* domain, void* base, size_t nbytes, int access) -> ibv_mr* {
    std::unique_lock lock(g_mutex);
    g_changed.wait(lock, [] { return !g_paused; });
    if (g_refuse) {
      errno = g_refuse;
      return nullptr;
    }
    g_access = access;
    auto* region = new ibv_mr{};
    region->pd = domain;
    region->addr = base;
    region->length = nbytes;
    region->lkey = static_cast<uint32_t>(g_registered.size()) + 1;
    region->rkey = region->lkey + 1000;
    g_registered.insert(region);
    return region;
  };
  verbs.dereg_mr = [](ibv_mr* region) {
    std::lock_guard lock(g_mutex);
    CHECK(g_registered.erase(region) == 1);
    delete region;
    g_changed.notify_all();
    return 0;
  };
  return verbs;
}

void plain_memory_is_registered_for_one_use() {
  Verbs verbs = counting();
  ibv_pd one{}, two{};
  Registrations cache(verbs, {&one, &two}, 1 << 20);
  std::byte buffer[256];
  Registration& first = cache.acquire(buffer, 256, Access::peer_reads);
  CHECK(g_registered.size() == 2);  // on every rail
  CHECK(g_access == IBV_ACCESS_REMOTE_READ);
  CHECK(first.peer().of[0] != first.peer().of[1] && first.peer().of[2] == 0);
  Registration& part = cache.acquire(buffer + 10, 100, Access::peer_reads);
  CHECK(&part == &first && g_registered.size() == 2);
  Registration& writable = cache.acquire(buffer, 256, Access::peer_writes);
  CHECK(&writable != &first && g_registered.size() == 4);  // a key opens no more than its purpose needs
  uint32_t id = first.id;
  cache.release(writable.id);
  cache.release(id);
  CHECK(g_registered.size() == 2);
  cache.release(id);
  CHECK(g_registered.empty() && !cache.get(id));
  CHECK(cache.acquire(buffer, 8, Access::local).id <= 2);  // ids are used again
}

// Its pages may be mapped for reading only. Ours that are kept can be written, and one registration does for both.
void what_is_only_read_is_not_registered_for_writing() {
  Verbs verbs = counting();
  ibv_pd domain{};
  Registrations cache(verbs, {&domain}, 1 << 20);
  std::byte buffer[64];
  const uint32_t read = cache.acquire(buffer, 64, Access::local_reads).id;
  CHECK(g_access == 0);
  const uint32_t written = cache.acquire(buffer, 64, Access::local).id;
  CHECK(g_access == IBV_ACCESS_LOCAL_WRITE && read != written);
  cache.release(read);
  CHECK(cache.acquire(buffer, 64, Access::local_reads).id == written);
  CHECK(cache.acquire(buffer, 64, Access::peer_reads).id != written);
  CHECK(g_access == IBV_ACCESS_REMOTE_READ);
  auto segment = Segments::of_process().allocate(1 << 16);
  const uint32_t kept = cache.acquire(segment->base, 64, Access::local_reads).id;
  CHECK(g_access == IBV_ACCESS_LOCAL_WRITE && cache.acquire(segment->base, 64, Access::local).id == kept);
  Segments::of_process().release(segment->base);
}

void segments_stay_within_the_bound_and_as_long_as_they_live() {
  Verbs verbs = counting();
  ibv_pd domain{};
  Registrations cache(verbs, {&domain}, 3 << 16);
  std::shared_ptr<Segment> segments[4];
  for (auto& segment : segments) segment = Segments::of_process().allocate(1 << 16);
  auto use = [&](int i) {
    uint32_t id = cache.acquire(segments[i]->base + 100, 10, Access::local).id;
    cache.release(id);
  };
  for (int i : {0, 1, 2, 0, 3}) use(i);
  CHECK(g_registered.size() == 3 && cache.counters().evicted == 1);
  uint64_t made = cache.counters().made;
  use(0);
  use(2);
  use(3);
  CHECK(cache.counters().made == made);
  use(1);  // the one that was used least recently had gone
  CHECK(cache.counters().made == made + 1);
  uint32_t held = cache.acquire(segments[2]->base, 10, Access::local).id;
  for (int i : {0, 1, 3}) use(i);
  CHECK(cache.get(held));  // in use: never dropped
  cache.release(held);
  std::byte* base = segments[3]->base;
  segments[3].reset();
  Segments::of_process().release(base);
  std::byte other[64];
  cache.release(cache.acquire(other, 64, Access::local).id);
  for (ibv_mr* region : g_registered) CHECK(region->addr != base);
  for (auto& segment : segments)
    if (segment) Segments::of_process().release(segment->base);
}

void what_a_peer_may_write_is_not_kept() {
  Verbs verbs = counting();
  ibv_pd domain{};
  Registrations cache(verbs, {&domain}, 1 << 20);
  auto segment = Segments::of_process().allocate(1 << 16);
  Registration& exposed = cache.acquire(segment->base + 64, 128, Access::peer_writes);
  CHECK(exposed.base == segment->base + 64 && exposed.nbytes == 128);
  cache.release(exposed.id);
  CHECK(g_registered.empty());
  Segments::of_process().release(segment->base);
}

void refusals_are_explained() {
  Verbs verbs = counting();
  ibv_pd domain{};
  Registrations cache(verbs, {&domain}, 1 << 20);
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  rlimit small{4096, limit.rlim_max};
  CHECK(setrlimit(RLIMIT_MEMLOCK, &small) == 0);
  std::byte buffer[64];
  std::string said;
  int code = 0;
  auto refuse = [&](int error) {
    g_refuse = error;
    try {
      cache.acquire(buffer, 64, Access::local);
    } catch (const LinkFailure& failure) {
      said = failure.what();
      code = failure.code;
    }
    g_refuse = 0;
  };
  refuse(EAGAIN);  // it is not the memory that is counted there
  CHECK(code == EAGAIN && said.find("rdma.max") != std::string::npos);
  CHECK(said.find("ulimit") == std::string::npos);
  refuse(ENOMEM);
  setrlimit(RLIMIT_MEMLOCK, &limit);
  CHECK(code == ENOMEM);
  CHECK(said.find("64 bytes") != std::string::npos && said.find("4 KiB") != std::string::npos);
  CHECK(said.find("ulimit -l") != std::string::npos);
  CHECK(g_registered.empty());
}

void pause(bool paused) {
  std::lock_guard lock(g_mutex);
  g_paused = paused;
  g_changed.notify_all();
}

void await(const std::function<bool()>& condition) {
  std::unique_lock lock(g_mutex);
  g_changed.wait(lock, condition);
}

void ring() {
  std::lock_guard lock(g_mutex);
  ++g_rings;
  g_changed.notify_all();
}

constexpr uint64_t kBlock = 1 << 16;

// What the driver would say of memory at `address` in an allocation of kBlock bytes.
DeviceRange on_device(uint64_t address, uint64_t nbytes, uint64_t buffer_id, int descriptor) {
  DeviceRange range{address, nbytes, address / kBlock * kBlock, kBlock, buffer_id, -1, {}};
  range.open = [descriptor](uint64_t, uint64_t) { return descriptor < 0 ? -1 : dup(descriptor); };
  return range;
}

void device_memory_is_known_by_its_allocation() {
  Verbs verbs = counting();
  static int exported = 0;
  exported = 0;
  verbs.reg_dmabuf_mr = [](ibv_pd* domain, uint64_t, size_t nbytes, uint64_t address, int fd, int access) {
    CHECK(fd >= 0);
    ++exported;
    return counting().reg_mr(domain, reinterpret_cast<void*>(address), nbytes, access);
  };
  ibv_pd domain{};
  g_rings = 0;
  Registrations cache(verbs, {&domain}, 4 * kBlock, false, ring);
  int rings = 0;
  auto use = [&](const DeviceRange& range, bool waits) {
    Registration& one = cache.acquire_device(range, Access::peer_reads);
    CHECK(one.ready != waits);
    if (waits) {
      await([&] { return g_rings > rings; });
      rings = g_rings;
      CHECK(cache.take().size() == 1 && one.ready);
    }
    uint32_t id = one.id;
    cache.release(id);
    return id;
  };
  const uint64_t at = 16 * kBlock;
  uint32_t first = use(on_device(at + 100, 10, 7, 0), true);
  CHECK(exported == 1 && cache.get(first));
  CHECK(use(on_device(at + 300, 1000, 7, 0), false) == first);  // anywhere in the allocation
  CHECK(&cache.acquire(reinterpret_cast<std::byte*>(at + 100), 10, Access::peer_reads) != cache.get(first));
  use(on_device(at + 100, 10, 8, 0), true);  // the address is another allocation's now
  CHECK(exported == 2);
  cache.forget_device(at, 8);
  CHECK(use(on_device(at, 10, 8, 0), true) != 0 && exported == 3);
  for (uint64_t i = 1; i <= 5; ++i) use(on_device(at + i * kBlock, 10, 10 + i, 0), true);
  CHECK(cache.counters().evicted == 2);  // four allocations fit
  Registration& large = cache.acquire_device(
      [&] {
        DeviceRange range = on_device(at + 100, 10, 99, 0);
        range.extent = 8 * kBlock;  // more than may be kept: its pages, for one use
        return range;
      }(),
      Access::peer_reads);
  CHECK(large.nbytes == 4096);
  await([&] { return g_rings > rings; });
  CHECK(cache.take().size() == 1);
  uint32_t id = large.id;
  cache.release(id);
  CHECK(!cache.get(id));
  uint32_t refused = cache.acquire_device(on_device(at + 7 * kBlock, 10, 77, -1), Access::local).id;
  await([&] { return g_rings > rings + 1; });
  auto news = cache.take();
  CHECK(news.size() == 1 && news[0].id == refused && news[0].of_device && news[0].error == EADDRNOTAVAIL);
  cache.release(refused);
}

void what_is_large_is_registered_aside() {
  Verbs verbs = counting();
  ibv_pd one{}, two{};
  g_rings = 0;
  Registrations cache(verbs, {&one, &two}, 1 << 20, false, ring);
  const uint64_t large = Registrations::kAside + 1;
  std::vector<std::byte> memory(large), other(large);
  pause(true);
  Registration& first = cache.acquire(memory.data(), large, Access::local);
  CHECK(!first.ready && first.local().of[0] == 0 && cache.busy());
  Registration& same = cache.acquire(memory.data() + 1, 10, Access::local);
  CHECK(&same == &first);  // found, and waited for
  uint32_t given_up = cache.acquire(other.data(), large, Access::peer_reads).id;
  cache.release(given_up);
  Registration& anew = cache.acquire(other.data(), large, Access::peer_reads);
  CHECK(anew.id != given_up && cache.get(given_up));  // that one is nobody's, and found by nobody
  CHECK(cache.take().empty());
  pause(false);
  await([] { return g_rings == 3; });
  std::set<uint32_t> ready;
  for (const Registered& news : cache.take()) {
    CHECK(news.error == 0);
    ready.insert(news.id);
  }
  CHECK((ready == std::set<uint32_t>{first.id, anew.id}));
  CHECK(first.ready && first.local().of[1] != 0 && !cache.get(given_up));
  cache.release(anew.id);
  cache.release(first.id);
  CHECK(cache.get(first.id));  // there is another user
  cache.release(first.id);
  await([] { return g_registered.empty(); });
  CHECK(cache.counters().aside == 3 && cache.counters().pinned_bytes == 0);
}

void what_a_peer_may_write_is_kept_from_it_before_that_is_told() {
  Verbs verbs = counting();
  ibv_pd domain{};
  g_rings = 0;
  Registrations cache(verbs, {&domain}, 1 << 20, false, ring);
  const uint64_t large = Registrations::kAsideAwaited + 1;
  std::vector<std::byte> memory(large);
  Registration& exposed = cache.acquire(memory.data(), large, Access::peer_writes);
  uint32_t id = exposed.id;
  await([] { return g_rings == 1; });
  CHECK(cache.take().size() == 1 && exposed.ready);
  CHECK(!cache.release(id) && cache.get(id) == &exposed);
  CHECK(cache.acquire(memory.data(), 8, Access::peer_writes).id != id);  // found by nobody
  await([] { return g_rings == 2; });
  CHECK((cache.take_released() == std::vector<uint32_t>{id}) && !cache.get(id));
  CHECK(g_registered.size() == 1);
}

void what_fails_aside_is_told() {
  Verbs verbs = counting();
  ibv_pd domain{};
  g_rings = 0;
  Registrations cache(verbs, {&domain}, 1 << 20, false, ring);
  std::vector<std::byte> memory(2 * Registrations::kAside);
  g_refuse = ENOMEM;
  uint32_t id = cache.acquire(memory.data(), memory.size(), Access::local).id;
  await([] { return g_rings == 1; });
  auto news = cache.take();
  CHECK(news.size() == 1 && news[0].id == id && news[0].error == ENOMEM && !news[0].reason.empty());
  g_refuse = 0;
  Registration& again = cache.acquire(memory.data(), memory.size(), Access::local);
  CHECK(again.id != id);
  cache.release(id);
  CHECK(!cache.get(id));
  await([] { return g_rings == 2; });
  CHECK(cache.take().size() == 1);
  cache.release(again.id);
}

void it_ends_while_memory_is_being_registered() {
  Verbs verbs = counting();
  ibv_pd domain{};
  std::vector<std::byte> memory(2 * Registrations::kAside);
  {
    Registrations cache(verbs, {&domain}, 1 << 20, false, ring);
    for (int i = 0; i < 4; ++i) cache.acquire(memory.data(), memory.size(), Access::region_reads);
  }
  CHECK(g_registered.empty());
}

// A rail whose device has gone is closed only when nothing works with it.
void it_rings_when_it_is_not_busy_any_more() {
  Verbs verbs = counting();
  ibv_pd domain{};
  g_rings = 0;
  Registrations cache(verbs, {&domain}, 1 << 20, false, ring);
  std::vector<std::byte> memory(2 * Registrations::kAside);
  pause(true);
  uint32_t id = cache.acquire(memory.data(), memory.size(), Access::local).id;
  cache.release(id);
  CHECK(cache.busy());
  pause(false);
  await([] { return g_rings == 1; });
  CHECK(cache.take().empty() && !cache.get(id));
  if (cache.busy()) await([] { return g_rings == 2; });
  CHECK(!cache.busy() && g_registered.empty());
}

}  // namespace

int main() {
  plain_memory_is_registered_for_one_use();
  CHECK(g_registered.empty());
  what_is_only_read_is_not_registered_for_writing();
  CHECK(g_registered.empty());
  segments_stay_within_the_bound_and_as_long_as_they_live();
  CHECK(g_registered.empty());
  what_a_peer_may_write_is_not_kept();
  refusals_are_explained();
  what_is_large_is_registered_aside();
  what_a_peer_may_write_is_kept_from_it_before_that_is_told();
  CHECK(g_registered.empty());
  device_memory_is_known_by_its_allocation();
  CHECK(g_registered.empty());
  what_fails_aside_is_told();
  CHECK(g_registered.empty());
  it_ends_while_memory_is_being_registered();
  it_rings_when_it_is_not_busy_any_more();
}

#else

int main() {}

#endif
