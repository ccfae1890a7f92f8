// Memory that the ranks of one group on one host share, for collectives that go through it.
//
// Rules
//   - A call goes this way only if all ranks have agreed to it, in one word: who arrives counts itself; the last to arrive
//     has the call `met`. Whoever will not wait any longer closes the call before that, and then all make it by messages.
//     Compare-and-swap decides between the two, so no two ranks differ.
//   - Who touches the word has ended all of its earlier calls, and knows of all others that they have ended the last call
//     that met (`done`). So whoever waits at a call and finds the word at a later one knows that it was closed.
//   - Each rank writes its stream of chunks into a ring of its own. Counters carry the call's number: those of earlier
//     calls count as 0. A slot is written again only when all have read it, or have nothing to read in it.
//   - What others write is not trusted with anything but the bytes of the result, and with when they come.
//   - A call that has met and fails at some rank breaks the arena for good: the group goes on by messages.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace aiocomm {

class Arena {
 public:
  static constexpr size_t kRanks = 16, kHeader = 192;
  static constexpr uint64_t kChunk = 32 << 10, kSlots = 16;
  static constexpr uint64_t kCountBits = 24;  // of a counter: chunks; above them the number of the call

  // Throws LinkFailure. The other members open it by what is told of it.
  static std::shared_ptr<Arena> create(size_t ranks);
  // Null: it cannot be reached from here.
  static std::shared_ptr<Arena> open(pid_t owner, int fd, uint64_t nonce, size_t ranks);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  int fd() const { return fd_; }
  uint64_t nonce() const;
  size_t ranks() const { return ranks_; }

  enum class Meeting { met, open, closed };
  Meeting arrive(uint64_t call);
  Meeting look(uint64_t call) const;
  Meeting close(uint64_t call);  // unless it has met

  std::byte* header(size_t rank) const { return headers_ + rank * kHeader; }
  std::byte* slot(size_t rank, uint64_t chunk) const {
    return rings_ + (rank * kSlots + chunk % kSlots) * kChunk;
  }

  uint64_t written(size_t rank, uint64_t call) const;
  void wrote(size_t rank, uint64_t call, uint64_t chunks);
  uint64_t read(size_t reader, size_t writer, uint64_t call) const;
  void has_read(size_t reader, size_t writer, uint64_t call, uint64_t chunks);
  bool all_done(uint64_t call) const;
  void set_done(size_t rank, uint64_t call);
  bool broken() const;
  void set_broken();

 private:
  struct Control;
  Arena(void* base, uint64_t nbytes, int fd, size_t ranks);
  static uint64_t bytes_for(size_t ranks);

  std::byte* const base_;
  const uint64_t nbytes_;
  const int fd_;
  const size_t ranks_;
  Control* const control_;
  std::byte *const headers_, *const rings_;
};

}  // namespace aiocomm
