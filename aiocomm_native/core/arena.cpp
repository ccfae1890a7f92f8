#include "core/arena.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <ctime>
#include <new>
#include <string>

#include "core/cma.hpp"
#include "core/link.hpp"
#include "core/shared_memory.hpp"

namespace aiocomm {

// Alone on its lines is what one rank writes and others look at.
struct Arena::Control {
  struct alignas(64) Counter {
    std::atomic<uint64_t> value{0};  // its writer releases, the others acquire
  };
  struct alignas(64) Row {
    std::atomic<uint64_t> of[kRanks] = {};
  };
  struct alignas(64) Told {
    Arrays arrays;
    std::atomic<uint64_t> took{0};
    std::atomic<uint32_t> way{0};
  };
  struct alignas(64) Process {
    std::atomic<uint64_t> probe{0};
    std::atomic<uint32_t> reaches{0};
  };
  struct alignas(64) Words {
    std::atomic<uint32_t> ready{0}, unable{0}, parts{0};
  };
  struct alignas(64) Lent {
    Places places;
  };
  struct alignas(64) Waiting {
    std::atomic<uint32_t> rung{0}, sleepers{0};
  };
  uint64_t nonce = 0;
  std::atomic<uint32_t> broken{0}, crowded{0};
  Waiting bells[2];
  std::atomic<uint32_t> places[kRanks] = {};  // seldom written
  Counter words[2];  // the number of a call, whether it is closed, how many have arrived
  Counter done[kRanks], written[2][kRanks], entered[kRanks];
  Row read[kRanks];                     // by reader
  Row claimed[kRanks], pushed[kRanks];  // by writer
  Told told[2][kRanks];
  Process processes[kRanks];
  Words device_words[kRanks];
  Lent lent[kRanks];
};

namespace {

constexpr uint64_t kClosed = 1 << 7, kArrived = kClosed - 1, kCallShift = 8;
constexpr uint64_t kControlBytes = 32768;

uint64_t of_call(uint64_t counter, uint64_t call) {
  return counter >> Arena::kCountBits == call ? counter & ((1ull << Arena::kCountBits) - 1) : 0;
}

uint64_t counter_of(uint64_t call, uint64_t chunks) { return call << Arena::kCountBits | chunks; }

}  // namespace

uint64_t Arena::bytes_for(size_t ranks) { return kControlBytes + ranks * (kSlots + 2) * kChunk; }

Arena::Arena(void* base, uint64_t nbytes, int fd, size_t ranks)
    : base_(static_cast<std::byte*>(base)),
      nbytes_(nbytes),
      fd_(fd),
      ranks_(ranks),
      control_(static_cast<Control*>(base)),
      headers_(base_ + sizeof(Control)),
      rings_(base_ + kControlBytes) {
  static_assert(sizeof(Control) % 64 == 0 && sizeof(Control) + 2 * kRanks * kHeader <= kControlBytes);
  static_assert(std::atomic<uint64_t>::is_always_lock_free);
}

Arena::~Arena() {
  munmap(base_, nbytes_);
  if (fd_ >= 0) ::close(fd_);
}

std::shared_ptr<Arena> Arena::create(size_t ranks) {
  const uint64_t nbytes = bytes_for(ranks);
  const int fd = memfd_create("aiocomm-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw LinkFailure("cannot make shared memory for collectives (memfd_create)", errno);
  void* base = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(nbytes)) == 0 &&
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
    base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  uint64_t nonce = 0;
  if (base == MAP_FAILED || getrandom(&nonce, sizeof nonce, 0) != sizeof nonce) {
    const int error = errno;
    if (base != MAP_FAILED) munmap(base, nbytes);
    ::close(fd);
    throw LinkFailure("cannot make " + std::to_string(nbytes) + " bytes of shared memory for collectives",
                      error);
  }
  (new (base) Control)->nonce = nonce;
  return std::shared_ptr<Arena>(new Arena(base, nbytes, fd, ranks));
}

std::shared_ptr<Arena> Arena::open(pid_t owner, int fd, uint64_t nonce, size_t ranks) {
  const uint64_t nbytes = bytes_for(ranks);
  void* base = map_of_process(owner, fd, nbytes);
  if (!base) return nullptr;
  std::shared_ptr<Arena> found(new Arena(base, nbytes, -1, ranks));
  return found->nonce() == nonce ? found : nullptr;  // else that process's descriptor is another's by now
}

uint64_t Arena::nonce() const { return control_->nonce; }

Arena::Meeting Arena::look(uint64_t call) const {
  const auto& word_of_call = control_->words[call % 2];
  const uint64_t word = word_of_call.value.load(std::memory_order_acquire);
  if (word >> kCallShift != call || word & kClosed) return Meeting::closed;
  return (word & kArrived) == ranks_ ? Meeting::met : Meeting::open;
}

Arena::Meeting Arena::arrive(uint64_t call) {
  auto& word_of_call = control_->words[call % 2];
  uint64_t word = word_of_call.value.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t at = word >> kCallShift;
    if (at > call || (at == call && word & kClosed)) return Meeting::closed;
    const uint64_t next = at < call ? call << kCallShift | 1 : word + 1;
    if ((next & kArrived) > ranks_) return Meeting::closed;
    // Releases what this rank has written, and acquires what those have that came before.
    if (word_of_call.value.compare_exchange_weak(word, next, std::memory_order_acq_rel,
                                                 std::memory_order_acquire)) {
      if ((next & kArrived) != ranks_) return Meeting::open;
      ring(Bell::begins);
      return Meeting::met;
    }
  }
}

Arena::Meeting Arena::close(uint64_t call) {
  auto& word_of_call = control_->words[call % 2];
  uint64_t word = word_of_call.value.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t at = word >> kCallShift;
    if (at > call || (at == call && word & kClosed)) return Meeting::closed;
    if (at == call && (word & kArrived) == ranks_) return Meeting::met;
    const uint64_t next = (at < call ? call << kCallShift : word) | kClosed;
    if (word_of_call.value.compare_exchange_weak(word, next, std::memory_order_acq_rel,
                                                 std::memory_order_acquire)) {
      ring(Bell::begins);
      return Meeting::closed;
    }
  }
}

uint64_t Arena::written(size_t rank, uint64_t call) const {
  return of_call(control_->written[call % 2][rank].value.load(std::memory_order_acquire), call);
}

void Arena::wrote(size_t rank, uint64_t call, uint64_t chunks) {
  control_->written[call % 2][rank].value.store(counter_of(call, chunks), std::memory_order_release);
}

uint64_t Arena::read(size_t reader, size_t writer, uint64_t call) const {
  return of_call(control_->read[reader].of[writer].load(std::memory_order_acquire), call);
}

void Arena::has_read(size_t reader, size_t writer, uint64_t call, uint64_t chunks) {
  control_->read[reader].of[writer].store(counter_of(call, chunks), std::memory_order_release);
}

bool Arena::all_done(uint64_t call) const {
  for (size_t rank = 0; rank < ranks_; ++rank)
    if (control_->done[rank].value.load(std::memory_order_acquire) < call) return false;
  return true;
}

void Arena::set_done(size_t rank, uint64_t call) {
  control_->done[rank].value.store(call, std::memory_order_release);
  if (!control_->crowded.load(std::memory_order_relaxed)) return;
  // Of two that end at once, one sees both.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (all_done(call)) ring(Bell::begins);
}

void Arena::set_crowded() { control_->crowded.store(1, std::memory_order_relaxed); }

void Arena::set_place(size_t rank, uint32_t place) {
  control_->places[rank].store(place, std::memory_order_relaxed);
}

uint32_t Arena::place(size_t rank) const { return control_->places[rank].load(std::memory_order_relaxed); }

uint32_t Arena::rung(Bell bell) const {
  return control_->bells[static_cast<size_t>(bell)].rung.load(std::memory_order_acquire);
}

// In one order: either who rings sees the sleeper, or the kernel finds that it has rung and does not let it sleep.
void Arena::sleep(Bell which, uint32_t since, uint64_t ns) const {
  Control::Waiting& bell = control_->bells[static_cast<size_t>(which)];
  const timespec longest{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  bell.sleepers.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &bell.rung, FUTEX_WAIT, since, &longest, nullptr, 0);
  bell.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void Arena::ring(Bell which) {
  if (!control_->crowded.load(std::memory_order_relaxed)) return;
  Control::Waiting& bell = control_->bells[static_cast<size_t>(which)];
  bell.rung.fetch_add(1, std::memory_order_seq_cst);
  if (bell.sleepers.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, &bell.rung, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Between `arrive` and `done`, which release and acquire.
void Arena::choose(uint64_t call, Way way) {
  control_->told[call % 2][0].way.store(static_cast<uint32_t>(way), std::memory_order_relaxed);
}

Arena::Way Arena::way(uint64_t call) const {
  return control_->told[call % 2][0].way.load(std::memory_order_relaxed) ? Way::direct : Way::rings;
}

void Arena::tell(size_t rank, uint64_t call, const Arrays& arrays) {
  control_->told[call % 2][rank].arrays = arrays;
}

Arena::Arrays Arena::told(size_t rank, uint64_t call) const { return control_->told[call % 2][rank].arrays; }

bool Arena::all_told(uint64_t call) const {
  for (size_t rank = 0; rank < ranks_; ++rank)
    if (!control_->told[call % 2][rank].arrays.out) return false;
  return true;
}

bool Arena::all_shared(uint64_t call) const {
  for (size_t rank = 0; rank < ranks_; ++rank) {
    const Arrays& arrays = control_->told[call % 2][rank].arrays;
    if (!arrays.given_in.id || !arrays.out_in.id) return false;
  }
  return true;
}

void Arena::set_probe(size_t rank, uint64_t address) {
  control_->processes[rank].probe.store(address, std::memory_order_release);
}

uint64_t Arena::probe(size_t rank) const {
  return control_->processes[rank].probe.load(std::memory_order_acquire);
}

bool Arena::is_rank(size_t rank, pid_t process) const {
  uint64_t word = 0;
  return read_process(process, probe(rank), reinterpret_cast<std::byte*>(&word), sizeof word) == 0 &&
         word == nonce();
}

void Arena::set_reaches(size_t rank) {
  control_->processes[rank].reaches.store(1, std::memory_order_release);
}

bool Arena::all_reach() const {
  for (size_t rank = 0; rank < ranks_; ++rank)
    if (!control_->processes[rank].reaches.load(std::memory_order_acquire)) return false;
  return true;
}

uint64_t Arena::claim(size_t writer, size_t reader, uint64_t call, uint64_t chunks) {
  std::atomic<uint64_t>& claimed = control_->claimed[writer].of[reader];
  uint64_t value = claimed.load(std::memory_order_relaxed);
  for (;;) {
    if (value >> kCountBits > call) return chunks;  // nobody honest is in a later call
    const uint64_t next = of_call(value, call);
    if (next >= chunks) return chunks;
    // Relaxed: who claims a chunk learns nothing of it that the meeting has not told.
    if (claimed.compare_exchange_weak(value, counter_of(call, next + 1), std::memory_order_relaxed))
      return next;
  }
}

uint64_t Arena::pushed(size_t writer, size_t reader, uint64_t call) const {
  return of_call(control_->pushed[writer].of[reader].load(std::memory_order_acquire), call);
}

void Arena::has_pushed(size_t writer, size_t reader, uint64_t call, uint64_t chunks) {
  control_->pushed[writer].of[reader].store(counter_of(call, chunks), std::memory_order_release);
}

// In one order with `set_broken`: either this rank sees that the arena is broken, or who broke it sees it in there.
bool Arena::enter(size_t rank) {
  control_->entered[rank].value.store(1, std::memory_order_seq_cst);
  if (!control_->broken.load(std::memory_order_seq_cst)) return true;
  leave(rank);
  return false;
}

void Arena::leave(size_t rank) { control_->entered[rank].value.store(0, std::memory_order_release); }

bool Arena::entered(size_t rank) const {
  return control_->entered[rank].value.load(std::memory_order_seq_cst) != 0;
}

void Arena::lend(size_t rank, const Places& places) { control_->lent[rank].places = places; }

Arena::Places Arena::lent(size_t rank) const { return control_->lent[rank].places; }

namespace {
// What copy threads look at is one word in memory, like any other gate.
Gate gate_of(const std::atomic<uint32_t>& word, uint32_t value) {
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
  return {reinterpret_cast<const volatile uint32_t*>(&word), value};
}
}  // namespace

void Arena::set_ready(size_t rank, uint64_t call, bool able) {
  if (!able) control_->device_words[rank].unable.store(word_of(call, 1), std::memory_order_relaxed);
  control_->device_words[rank].ready.store(word_of(call, 1), std::memory_order_release);
}

Gate Arena::ready(size_t rank, uint64_t call) const {
  return gate_of(control_->device_words[rank].ready, word_of(call, 1));
}

bool Arena::unable(size_t rank, uint64_t call) const {
  return control_->device_words[rank].unable.load(std::memory_order_acquire) == word_of(call, 1);
}

void Arena::set_parts(size_t rank, uint64_t call, uint32_t parts) {
  control_->device_words[rank].parts.store(word_of(call, parts), std::memory_order_release);
}

Gate Arena::parts(size_t rank, uint64_t call, uint32_t parts) const {
  return gate_of(control_->device_words[rank].parts, word_of(call, parts));
}

void Arena::set_took(size_t rank, uint64_t call, uint64_t ns) {
  control_->told[call % 2][rank].took.store(ns, std::memory_order_relaxed);
}

uint64_t Arena::longest(uint64_t call) const {
  uint64_t longest = 0;
  for (size_t rank = 0; rank < ranks_; ++rank)
    longest = std::max(longest, control_->told[call % 2][rank].took.load(std::memory_order_relaxed));
  return longest;
}

bool Arena::broken() const { return control_->broken.load(std::memory_order_acquire) != 0; }

void Arena::set_broken() {
  control_->broken.store(1, std::memory_order_seq_cst);
  ring(Bell::begins);
  ring(Bell::moves);
}

}  // namespace aiocomm
