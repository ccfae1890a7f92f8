// What two processes know of one another's regions where devices reach into them: keys held, and notifications due.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "core/ids.hpp"
#include "core/notes.hpp"

namespace aiocomm {

// A region of the peer, as its owner has described it.
struct RegionKey {
  // by_owner: devices cannot reach it, so its owner serves it, as on other links.
  enum class State : uint8_t { asked, held, by_owner };
  State state = State::asked;
  bool writable = false;
  bool revoked = false;  // the owner closes it: nothing new begins
  uint64_t address = 0;
  uint64_t nbytes = 0;
  uint32_t registration = 0;  // the owner's
  uint32_t uses = 0;          // operations that have it
  std::vector<OpId> waiting;  // for the answer
};

struct OneSided {
  std::unordered_map<uint64_t, RegionKey> keys;  // by the peer's region
  uint32_t announced = 0;                        // number of our next notification
  NotesDue due;                                  // the peer's
};

}  // namespace aiocomm
