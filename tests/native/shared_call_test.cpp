// needs: core/arena.cpp core/cma.cpp core/copy.cpp core/direct_call.cpp core/others_segments.cpp core/reduce.cpp
// needs: core/segments.cpp core/shared_call.cpp core/shared_memory.cpp
//
// Collectives through an arena, as several ranks of one process: in any order of their steps every call ends, with what it
// must, also where some ranks are in the next call already, by rings and from array to array. Whoever arrives, waits or
// gives up: all say the same of a call. And who gives up has its arrays for itself.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "core/cma.hpp"
#include "core/direct_call.hpp"
#include "core/others_segments.hpp"
#include "core/segments.hpp"
#include "core/way_choice.hpp"
#include "seeded.hpp"

using namespace aiocomm;

namespace {

using Kind = SharedCall::Kind;
using Meeting = Arena::Meeting;

std::vector<std::shared_ptr<Arena>> arenas(size_t ranks) {
  std::vector<std::shared_ptr<Arena>> all{Arena::create(ranks)};
  while (all.size() < ranks) {
    all.push_back(Arena::open(getpid(), all[0]->fd(), all[0]->nonce(), ranks));
    CHECK(all.back());
  }
  CHECK(!Arena::open(getpid(), all[0]->fd(), all[0]->nonce() + 1, ranks));
  return all;
}

uint32_t value(size_t call, size_t rank, size_t i) {
  return static_cast<uint32_t>(call * 1000003 + rank * 7919 + i * 31 + i / 4096);
}

// One shape at all ranks, and what they have and must get.
struct Shape {
  Kind kind;
  size_t ranks, root = 0;
  std::vector<uint64_t> sizes;
  std::vector<bool> in_place;  // by rank
  bool direct;
  std::vector<std::unique_ptr<SharedCall>> calls;
  std::vector<std::unique_ptr<DirectCall>> directs;

  Shape(Kind kind, size_t ranks, size_t items, std::vector<std::unique_ptr<OthersSegments>>& segments,
        std::mt19937& random)
      : kind(kind), ranks(ranks) {
    root = random() % ranks;
    direct = kind != Kind::barrier && random() % 2;
    if (kind == Kind::barrier) items = 0;
    if (kind == Kind::all_reduce) {
      for (size_t rank = 0; rank < ranks; ++rank)
        sizes.push_back(4 * (items / ranks + (rank < items % ranks)));
    } else {
      sizes.assign(kind == Kind::barrier || kind == Kind::broadcast ? 1 : ranks, 4 * items);
    }
    for (size_t rank = 0; rank < ranks; ++rank) {
      in_place.push_back((kind == Kind::all_gather || kind == Kind::all_reduce) && random() % 2);
      const auto sum = find_reduction("u4", "sum");
      calls.push_back(std::make_unique<SharedCall>(kind, rank, ranks, root, sizes, in_place[rank], 4, sum));
      directs.push_back(std::make_unique<DirectCall>(kind, rank, ranks, root, sizes, in_place[rank], 4, sum,
                                                     std::vector<pid_t>(ranks, getpid()), *segments[rank]));
    }
  }

  size_t given() const {  // items of a rank's contribution
    uint64_t nbytes = 0;
    for (uint64_t one : sizes) nbytes += one;
    return (kind == Kind::all_gather ? sizes[0] : nbytes) / 4;
  }
};

// Of this process alone, or in a shared segment.
class Array {
 public:
  Array() = default;
  Array(size_t items, bool shared) : own_(shared ? 0 : items) {
    items_ = own_;
    if (!shared) return;
    segment_ = Segments::of_process().allocate(64 + 4 * items);
    items_ = {reinterpret_cast<uint32_t*>(segment_->base + 64), items};
  }
  Array(Array&& other) noexcept = default;
  Array& operator=(Array&& other) noexcept {
    std::swap(own_, other.own_), std::swap(items_, other.items_), std::swap(segment_, other.segment_);
    return *this;
  }
  ~Array() {
    if (segment_) Segments::of_process().release(segment_->base);
  }
  std::span<uint32_t> items() const { return items_; }
  std::byte* bytes() const { return reinterpret_cast<std::byte*>(items_.data()); }
  bool shared() const { return segment_ != nullptr; }

 private:
  std::vector<uint32_t> own_;
  std::shared_ptr<Segment> segment_;
  std::span<uint32_t> items_;
};

struct Rank {
  size_t next = 0;  // call
  bool begun = false, met = false;
  Array in, out;
};

void check(const Shape& shape, size_t call, size_t rank, std::span<const uint32_t> out) {
  const size_t per = shape.sizes[0] / 4;
  for (size_t i = 0; i < out.size(); ++i) {
    uint32_t must = 0;
    switch (shape.kind) {
      case Kind::barrier:
        break;
      case Kind::broadcast:
        must = value(call, shape.root, i);
        break;
      case Kind::all_gather:
        must = value(call, i / per, i % per);
        break;
      case Kind::all_to_all:
        must = value(call, i / per, rank * per + i % per);
        break;
      case Kind::all_reduce:
        for (size_t other = 0; other < shape.ranks; ++other) must += value(call, other, i);
    }
    CHECK(out[i] == must);
  }
}

void history(size_t ranks) {
  std::mt19937 random(g_seed);
  auto all = arenas(ranks);
  std::vector<std::unique_ptr<OthersSegments>> segments;
  for (size_t rank = 0; rank < ranks; ++rank) segments.push_back(std::make_unique<OthersSegments>(ranks));
  constexpr size_t kCalls = 12;
  const bool all_shared = random() % 2;
  std::vector<Shape> shapes;
  for (size_t call = 0; call < kCalls; ++call) {
    const size_t most = random() % 3   ? 3000
                        : random() % 4 ? 8192 * 24
                                       : 8192 * 64 * ranks;  // many chunks of either way
    shapes.emplace_back(static_cast<Kind>(random() % 5), ranks, 1 + random() % (most / ranks), segments,
                        random);
  }
  std::vector<Rank> at(ranks);
  size_t ended = 0;
  uint64_t idle = 0;
  while (ended < ranks) {
    const size_t rank = random() % ranks;
    Rank& one = at[rank];
    if (one.next == kCalls) continue;
    Shape& shape = shapes[one.next];
    SharedCall& call = *shape.calls[rank];
    DirectCall& direct = *shape.directs[rank];
    Arena& arena = *all[rank];
    CHECK(++idle < 1000000);  // else it is a deadlock
    if (!one.begun) {
      if (!arena.all_done(one.next ? one.next - 1 : 0)) continue;  // others may be in the call before
      const size_t given = shape.given(), out = call.out_bytes() / 4;
      if (one.in.items().size() != given || random() % 4 == 0)  // else the one of the call before
        one.in = Array(given, all_shared || random() % 2);
      if (one.out.items().size() != out || random() % 4 == 0)
        one.out = Array(out, all_shared || random() % 2);
      for (size_t i = 0; i < given; ++i) one.in.items()[i] = value(one.next, rank, i);
      std::ranges::fill(one.out.items(), 0xdeadbeef);
      if (shape.kind == Kind::broadcast ? rank == shape.root : shape.in_place[rank])
        std::ranges::copy(one.in.items(),
                          one.out.items().begin() + (shape.kind == Kind::all_gather ? rank * given : 0));
      CHECK(call.in_bytes() == 0 || call.in_bytes() == 4 * given);
      std::byte *in = one.in.bytes(), *into = one.out.bytes();
      if (rank == 0) arena.choose(one.next + 1, shape.direct ? Arena::Way::direct : Arena::Way::rings);
      call.begin(arena, one.next + 1, in, into);
      direct.begin(arena, one.next + 1, in, into);
      one.begun = true;
      one.met = arena.arrive(one.next + 1) == Meeting::met;
      continue;
    }
    if (!one.met) {
      const Meeting state = arena.look(one.next + 1);
      CHECK(state != Meeting::closed);
      one.met = state == Meeting::met;
      continue;
    }
    const bool by_arrays = arena.way(one.next + 1) == Arena::Way::direct;
    auto over = [&] { return by_arrays ? direct.ended(arena) : call.ended(); };
    for (size_t steps = random() % 20; steps && !over(); --steps)
      if (by_arrays ? direct.advance(arena) : call.advance(arena)) idle = 0;
    CHECK(direct.error() == 0);
    if (!over()) continue;
    idle = 0;
    arena.set_done(rank, one.next + 1);
    check(shape, one.next, rank, one.out.items());
    CHECK(!by_arrays || !all_shared || !direct.attached());
    for (Array* own : {&one.in, &one.out})
      std::ranges::fill(own->items(), 0xbad);  // nobody reads them any more
    one.begun = one.met = false;
    if (++one.next == kCalls) ++ended;
  }
}

// Threads arrive at one call after another; some give up at once, some after a while. Between calls they wait for all, as
// ranks that make a call by messages do.
void agreement(size_t ranks) {
  auto all = arenas(ranks);
  constexpr size_t kCalls = 300;
  std::vector<std::atomic<int>> met(kCalls + 1), over(kCalls + 1);
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < ranks; ++rank)
    threads.emplace_back([&, rank] {
      std::mt19937 random(g_seed * 31 + static_cast<unsigned>(rank));
      Arena& arena = *all[rank];
      for (size_t call = 1; call <= kCalls; ++call) {
        Meeting state = Meeting::closed;
        if (random() % 16) {
          state = arena.arrive(call);
          for (size_t looks = random() % 200; looks && state == Meeting::open; --looks) {
            state = arena.look(call);
            std::this_thread::yield();
          }
          if (state == Meeting::open) state = arena.close(call);
        } else {
          state = arena.close(call);
        }
        CHECK(state != Meeting::open);
        met[call] += state == Meeting::met;
        ++over[call];
        while (over[call] < static_cast<int>(ranks)) std::this_thread::yield();
        CHECK(met[call] == 0 || met[call] == static_cast<int>(ranks));
      }
    });
  for (auto& thread : threads) thread.join();
}

// One rank touches another's array for as long as it may; the other gives up at some moment. Once nobody is in there any
// more nothing is written.
void leaving() {
  for (int turn = 0; turn < 200; ++turn) {
    auto all = arenas(2);
    std::vector<std::byte> array(64);
    std::atomic<bool> begun{false};
    std::thread other([&] {
      for (unsigned i = 1; all[1]->enter(1); ++i) {
        const auto value = static_cast<std::byte>(i % 250);
        std::vector<std::byte> from(array.size(), value);
        CHECK(write_process(getpid(), reinterpret_cast<uint64_t>(array.data()), from.data(), from.size()) ==
              0);
        all[1]->leave(1);
        begun = true;
      }
    });
    while (!begun) std::this_thread::yield();
    all[0]->set_broken();
    while (all[0]->entered(1)) std::this_thread::yield();
    std::fill(array.begin(), array.end(), std::byte{255});
    other.join();
    CHECK(std::count(array.begin(), array.end(), std::byte{255}) == 64);
  }
}

// Chunks are claimed once, by either side; those of a call that has ended by nobody.
void claims() {
  auto all = arenas(2);
  constexpr uint64_t kChunks = 2000;
  std::vector<std::atomic<int>> of(kChunks);
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      for (uint64_t next; (next = all[rank]->claim(0, 1, 7, kChunks)) < kChunks;) ++of[next];
    });
  for (auto& thread : threads) thread.join();
  for (auto& one : of) CHECK(one == 1);
  CHECK(all[0]->claim(1, 0, 7, 3) == 0 && all[1]->claim(1, 0, 7, 3) == 1);  // of another pair
  CHECK(all[0]->claim(0, 1, 8, 3) == 0);
  CHECK(all[0]->claim(0, 1, 7, kChunks) == kChunks);
}

// What a rank cannot get from one that has ended is not there, and nothing is touched.
void gone() {
  auto all = arenas(2);
  std::vector<uint32_t> x(100000, 7);
  for (size_t rank = 0; rank < 2; ++rank) all[rank]->tell(rank, 1, {.given = 1 << 20, .out = 1 << 20});
  OthersSegments segments(2);
  DirectCall call(Kind::broadcast, 1, 2, 0, {4 * x.size()}, false, 4, nullptr, {1 << 30, getpid()}, segments);
  call.begin(*all[1], 1, nullptr, reinterpret_cast<std::byte*>(x.data()));
  CHECK(all[0]->arrive(1) == Meeting::open && all[1]->arrive(1) == Meeting::met);
  for (int turn = 0; turn < 3; ++turn) {
    CHECK(!call.advance(*all[1]) && call.error() == ESRCH && !call.ended(*all[1]));
    CHECK(!all[0]->entered(1));
  }
  all[0]->set_broken();
  CHECK(!call.advance(*all[1]));
  CHECK(std::count(x.begin(), x.end(), 7u) == 100000);
}

// Who sleeps is woken by whatever happens after it has looked: else this takes for ever.
void bells() {
  using Bell = Arena::Bell;
  auto all = arenas(2);
  constexpr uint64_t kForever = uint64_t{1} << 50;
  constexpr uint32_t kTurns = 3000;
  all[0]->ring(Bell::moves);
  CHECK(all[1]->rung(Bell::moves) == 0);  // nobody lacks a core
  all[1]->set_crowded();
  std::atomic<uint32_t> turn{0};
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      for (uint32_t next = rank; next < kTurns; next += 2) {
        for (;;) {
          const uint32_t rung = all[rank]->rung(Bell::moves);
          if (turn == next) break;
          all[rank]->sleep(Bell::moves, rung, kForever);
        }
        ++turn;
        all[rank]->ring(Bell::moves);
      }
    });
  for (auto& thread : threads) thread.join();
  // The same of those that ring by themselves.
  threads.clear();
  for (size_t rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      Arena& arena = *all[rank];
      auto await = [&](auto over) {
        for (uint32_t rung = arena.rung(Bell::begins); !over(); rung = arena.rung(Bell::begins))
          arena.sleep(Bell::begins, rung, kForever);
      };
      for (uint64_t call = 1; call <= kTurns; ++call) {
        CHECK(arena.arrive(call) != Meeting::closed);
        await([&] { return arena.look(call) == Meeting::met; });
        arena.set_done(rank, call);
        await([&] { return arena.all_done(call); });
      }
      // The last one is closed by one of them, for whom the other waits.
      if (rank == 0) CHECK(arena.arrive(kTurns + 1) != Meeting::met);
      if (rank == 0) await([&] { return arena.look(kTurns + 1) == Meeting::closed; });
      if (rank == 1) CHECK(arena.close(kTurns + 1) == Meeting::closed);
    });
  for (auto& thread : threads) thread.join();
}

// A process that has no such memory, or that there is not.
void failures() {
  std::vector<std::byte> fine(3 << 20);
  CHECK(readable(fine.data() + 100, fine.size() - 100));
  CHECK(!readable(reinterpret_cast<const std::byte*>(4096), 10));
  std::byte byte{};
  CHECK(read_process(getpid(), 8, &byte, 1) == EFAULT);
  CHECK(write_process(getpid(), 8, &byte, 1) == EFAULT);
  CHECK(read_process(1 << 30, 8, &byte, 1) == ESRCH);
}

// Of another's segments what is in them is found, until they are freed and that is told; nothing else is.
void segments() {
  auto mapped = [](const void* at) {  // there, in this process
    unsigned char page;
    return mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(at) / 4096 * 4096), 1, &page) == 0;
  };
  Segments& own = Segments::of_process();
  auto segment = own.allocate(3 << 20);
  const auto base = reinterpret_cast<uint64_t>(segment->base);
  const Arena::Holder holder{segment->id, segment->fd, base, segment->nbytes};
  OthersSegments others(2);
  CHECK(!others.find(1, getpid(), {}, base, 1));
  std::byte* there = others.find(1, getpid(), holder, base + 5, 100);
  CHECK(there && there != segment->base + 5 && mapped(there));
  segment->base[5] = std::byte{42};
  CHECK(there[0] == std::byte{42} && others.find(1, getpid(), holder, base, 1) == there - 5);
  CHECK(others.find(1, getpid(), holder, base, segment->nbytes) == there - 5);
  CHECK(!others.find(1, getpid(), holder, base, segment->nbytes + 1));
  CHECK(!others.find(1, getpid(), holder, base + segment->nbytes + 1, 0));
  CHECK(!others.find(1, getpid(), holder, base - 1, 1) && !others.find(1, getpid(), holder, base + 1, ~0ull));
  // What is said to be there is not: no descriptor, a smaller one, one that may shrink, and no process.
  CHECK(!others.find(1, getpid(), {1001, 99999, base, 4096}, base, 1));
  CHECK(!others.find(1, getpid(), {1002, segment->fd, base, uint64_t{1} << 40}, base, 1));
  CHECK(!others.find(1, getpid(), {1003, segment->fd, base, ~0ull}, base, 1));
  const int other = memfd_create("may shrink", MFD_CLOEXEC);
  CHECK(other >= 0 && ftruncate(other, 1 << 20) == 0);
  CHECK(!others.find(1, getpid(), {1004, other, base, 4096}, base, 1));
  close(other);
  CHECK(!others.find(0, 1 << 30, holder, base, 1));
  others.forget_freed(1, 7);  // something else
  CHECK(mapped(there));
  own.release(segment->base);
  others.forget_freed(1, 7);
  CHECK(mapped(there));  // it is not said yet that something was freed
  others.forget_freed(1, 8);
  CHECK(!mapped(there));
}

void choices() {
  WayChoice choice;
  std::vector<size_t> tried;
  for (int call = 0; call < 12; ++call) {
    tried.push_back(choice.next());
    choice.took(tried.back(), tried.back() ? 100 : 900);
  }
  CHECK((tried == std::vector<size_t>{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1}));
  int better = 0;
  for (int call = 0; call < 1000; ++call) {
    const size_t way = choice.next();
    better += way == 1;
    choice.took(way, way ? 100 + call % 7 * 50 : 900);  // one that is taken away now and then
  }
  CHECK(better > 980 && better < 1000);
  for (int call = 0; call < 1000; ++call) {
    const size_t way = choice.next();
    choice.took(way, way ? 2000 : 900);  // it has become the slower one
    better -= way == 1;
  }
  CHECK(better > 600);
}

}  // namespace

int main() {
  leaving();
  claims();
  bells();
  gone();
  failures();
  segments();
  choices();
  for (g_seed = 1; g_seed <= 40; ++g_seed) history(2 + g_seed % 5);
  for (g_seed = 41; g_seed <= 44; ++g_seed) history(16);
  for (g_seed = 1; g_seed <= 3; ++g_seed) agreement(1 + g_seed);
  std::puts("ok");
}
