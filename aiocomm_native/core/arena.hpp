// Memory that the ranks of one group on one host share, for collectives that go through it.
//
// Rules
//   - A call goes this way only if all ranks have agreed to it, in one word: who arrives counts itself; the last to arrive
//     has the call `met`. Whoever will not wait any longer closes the call before that, and then all make it by messages.
//     Compare-and-swap decides between the two, so no two ranks differ.
//   - There are two words, and two of all that is told before a call has met: calls take them in turn, by their numbers, so
//     that a rank arrives while others are still in the call before, with all of its stream where that is one chunk. Who
//     touches a word has ended all of its earlier calls, and knows of all others that they have ended the last call that met
//     by that word (`done`). So whoever waits at a call and finds its word at a later one knows that it was closed.
//   - Counters carry the call's number: those of earlier calls count as 0.
//   - Bytes go by rings, or from array to array, as rank 0 has chosen before it arrived. In the ring of its own each rank
//     writes its stream of chunks; a slot is written again only when all have read it, or have nothing to read in it.
//     From array to array the writer pushes chunks and the reader pulls them, by cross-memory attach: whoever claims one
//     first. Who touches another's arrays has entered; who gives a call up waits until all have left.
//   - What others write is not trusted with anything but the bytes of the result, and with when they come. Where arrays
//     are is believed for the process that the link knows the rank by, and for no other.
//   - Of device memory only its places go through the arena, and words of 32 bits: by which copy threads see that a rank's
//     memory may be touched (`ready`), or that it cannot take part after all (`unable`), and what it has moved (`parts`).
//     The upper bits of a word count such calls, which all ranks have begun alike.
//   - A call that has met and fails at some rank breaks the arena for good: the group goes on by messages.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/device.hpp"

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

  std::byte* header(size_t rank, uint64_t call) const {
    return headers_ + (call % 2 * kRanks + rank) * kHeader;
  }
  std::byte* slot(size_t rank, uint64_t chunk) const {
    return rings_ + (rank * kSlots + chunk % kSlots) * kChunk;
  }
  std::byte* early(size_t rank, uint64_t call) const {  // of a stream of one chunk
    return rings_ + (ranks_ * kSlots + call % 2 * ranks_ + rank) * kChunk;
  }

  enum class Way : uint32_t { rings, direct };
  void choose(uint64_t call, Way way);  // rank 0, before it arrives
  Way way(uint64_t call) const;         // once the call has met, until this rank has ended it

  // By rings.
  uint64_t written(size_t rank, uint64_t call) const;
  void wrote(size_t rank, uint64_t call, uint64_t chunks);
  uint64_t read(size_t reader, size_t writer, uint64_t call) const;
  void has_read(size_t reader, size_t writer, uint64_t call, uint64_t chunks);

  // From array to array. `probe`: the address of a word of the rank's process that has the arena's nonce.
  struct Holder {     // a shared segment in which an array is
    uint32_t id = 0;  // 0: it is in none
    int fd = -1;      // of the rank's process, which keeps it until the call has ended
    uint64_t base = 0, nbytes = 0;
  };
  struct Arrays {
    uint64_t given = 0, out = 0;
    Holder given_in = {}, out_in = {};
    uint64_t releases = 0;  // of shared segments by the rank's process
  };
  void tell(size_t rank, uint64_t call, const Arrays& arrays);  // before it arrives
  Arrays told(size_t rank, uint64_t call) const;                // once the call has met
  bool all_told(uint64_t call) const;
  bool all_shared(uint64_t call) const;  // arrays are in shared segments
  void set_probe(size_t rank, uint64_t address);
  uint64_t probe(size_t rank) const;               // 0: not told
  bool is_rank(size_t rank, pid_t process) const;  // it lives, and its memory can be read
  void set_reaches(size_t rank);                   // the arrays of all others
  bool all_reach() const;
  // The next chunk of what `writer` has for `reader`, which nobody else has claimed; `chunks`: there is none.
  uint64_t claim(size_t writer, size_t reader, uint64_t call, uint64_t chunks);
  uint64_t pushed(size_t writer, size_t reader, uint64_t call) const;  // chunks, by the writer
  void has_pushed(size_t writer, size_t reader, uint64_t call, uint64_t chunks);
  bool enter(size_t rank);  // false: the arena is broken
  void leave(size_t rank);
  bool entered(size_t rank) const;

  // Of device memory. A call has fewer than kParts parts.
  static constexpr uint32_t kParts = 64;
  struct Places {
    DevicePlace in, out;   // without an owner: there is none
    bool willing = false;  // that others reach them
  };
  void lend(size_t rank, const Places& places);  // before it arrives, once all have ended all earlier calls
  Places lent(size_t rank) const;                // once a call has met
  static uint32_t word_of(uint64_t call, uint32_t parts) {
    return static_cast<uint32_t>(call) * kParts + parts;
  }
  void set_ready(size_t rank, uint64_t call, bool able);
  Gate ready(size_t rank, uint64_t call) const;
  bool unable(size_t rank, uint64_t call) const;
  void set_parts(size_t rank, uint64_t call, uint32_t parts);
  Gate parts(size_t rank, uint64_t call, uint32_t parts) const;

  // How long its part of the call took, in ns: before it is done.
  void set_took(size_t rank, uint64_t call, uint64_t ns);
  uint64_t longest(uint64_t call) const;

  // Where ranks outnumber the cores, who waits sleeps until a bell rings: `begins` once all have arrived, or have ended a
  // call, or it was closed, all by themselves; `moves` when a rank has done what it can for now in a call that has met.
  enum class Bell : uint32_t { begins, moves };
  void set_crowded();
  uint32_t rung(Bell bell) const;                            // before looking for what may have happened
  void sleep(Bell bell, uint32_t since, uint64_t ns) const;  // unless it has rung since
  void ring(Bell bell);

  // On which processor a rank runs, and one; 0: not known. A hint.
  void set_place(size_t rank, uint32_t place);
  uint32_t place(size_t rank) const;

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
