// What the engine knows of one other process (or of itself, for messages to one's own rank).
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/ids.hpp"
#include "core/keys.hpp"
#include "core/link.hpp"
#include "core/offers.hpp"

namespace aiocomm {

// How reasons begin where a pair was closed for what its peer sent.
inline constexpr std::string_view kViolation = "protocol violation";
inline constexpr char kLeft[] = "left";  // why a peer that said goodbye is gone

struct ControlFrame {
  FrameHeader header;
  std::vector<std::byte> meta;
  Wake wake;
};

struct Peer {
  enum class State : uint8_t { known, connecting, up, lost };

  Rank rank = -1;
  uint64_t generation = 0;
  State state = State::known;
  bool leaving = false;  // it said goodbye to the group: a hang-up is not a death
  bool blocked = false;  // the link answered `again`; on_writable clears it
  bool used = false;     // since it was looked at whether the pair is idle
  bool resting = false;  // it is about to be closed as idle: operations wait
  bool rested = false;   // it was closed so, and not connected since
  uint64_t used_ns = 0;  // when about it was last used, or began to rest
  uint8_t link_index = 0;
  std::shared_ptr<LinkPeer> link;
  std::unique_ptr<Offers> offers;      // where the link takes them
  std::unique_ptr<OneSided> onesided;  // where devices reach regions
  std::string lost_reason;
  std::vector<OpId> waiting;         // submitted before the pair was connected, in order
  std::deque<ControlFrame> control;  // frames that must go out, before any message
  uint64_t eager_unconsumed = 0;     // eager bytes sent for which no credit has come back
  uint64_t held = 0;                 // unexpected bytes of this peer that are kept here, headers counted
  uint64_t listed = 0;               // bytes of lists of its that are being moved
  bool told_staged = false;          // that GPU memory goes a slower way
  uint64_t staged_ns = 0;            // when it did so last
  uint64_t device_owner = 0;         // its process, as its device memory names it; 0: not seen
  uint64_t credit_owed = 0;          // eager bytes consumed here and not yet told
};

}  // namespace aiocomm
