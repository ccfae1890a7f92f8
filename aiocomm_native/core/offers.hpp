// Offers: a posted receive tells its sender where to write, so that a large message needs no rendezvous. Pure.
//
// Rules
//   - A key is (channel, tag) between two processes. An offer says "this buffer takes message number `index` of the
//     key", counted from an origin on which both sides agree: the receiver starts a count, numbers it, and says how
//     many messages (of any key) it had seen by then. What the sender has sent since counts as the first ones.
//   - The receiver offers only a receive whose message is certain: exact source and tag, no earlier wildcard receive
//     that could take it. Its index is what has come plus what is pending before it.
//   - Every message of the key counts, written into an offer or sent as a frame. Frames carry their place in the
//     count, so that the receiver learns from them which offers before them have been taken, whatever order the wire keeps.
//   - A receive that is given up while its message is on its way leaves that message to a later receive, also where one
//     after it has been written into already.
//   - Each side may forget a count at any time. An offer that the sender cannot place is ignored, and its receive is
//     served by rendezvous; the receiver counts anew once it has no offer pending.
//   - An illegal call throws std::invalid_argument and changes nothing.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>
#include <unordered_map>
#include <vector>

#include "core/ids.hpp"

namespace aiocomm {

struct MessageKey {
  ChannelId channel = 0;
  Tag tag = 0;
  bool operator==(const MessageKey&) const = default;
};
struct MessageKeyHash {
  size_t operator()(const MessageKey& key) const noexcept {
    uint64_t h = key.channel * 0x9E3779B97F4A7C15ull + static_cast<uint64_t>(key.tag);
    return static_cast<size_t>((h ^ (h >> 32)) * 0xFF51AFD7ED558CCDull);
  }
};

// A message's place among those of its key; count 0: nobody counts.
struct Place {
  uint32_t count = 0;
  uint32_t index = 0;
  bool operator==(const Place&) const = default;
  uint64_t packed() const { return static_cast<uint64_t>(count) << 32 | index; }
  static Place unpacked(uint64_t value) {
    return {static_cast<uint32_t>(value >> 32), static_cast<uint32_t>(value)};
  }
};

struct Offer {
  Place place;
  OpId receive = 0;  // the receiver's op
  uint64_t address = 0;
  uint32_t segment = 0;
  uint64_t capacity = 0;
  uint32_t immediate = 0;  // what every write into it carries, with its number in the lower bits
};

// The sender's side, for one peer.
class OffersHeld {
 public:
  static constexpr size_t kLog = 256;      // messages that may be unseen: more than any link has credits
  static constexpr size_t kCounts = 1024;  // keys without offers that are remembered
  static constexpr size_t kOffers = 4096;  // at once

  // `start`: a count begins at what the receiver had `seen`, in messages of any key that were sent as frames.
  // Illegal: offers out of order or beyond kOffers, more seen than sent.
  void offered(const MessageKey& key, bool start, uint64_t seen, const Offer& offer);
  // The offer that the next message of the key goes into, or nullptr: it goes as a frame.
  const Offer* next(const MessageKey& key, uint64_t nbytes) const;
  // The next message of the key is written into next(). Illegal: there is none.
  Offer take(const MessageKey& key);
  // The next message of the key has left as a frame.
  void sent(const MessageKey& key);
  // Where the next message of the key is in its count.
  Place place(const MessageKey& key) const;
  // Drops the offers of the key that have not been taken.
  void withdraw(const MessageKey& key);
  size_t counts() const { return counts_.size(); }
  size_t offers() const { return offers_; }

 private:
  struct Count {
    Place next;
    std::deque<Offer> offers;  // by index
    std::list<MessageKey>::iterator idle;
    bool is_idle = false;
  };
  void went(Count& count, const MessageKey& key);
  void rest(Count& count, const MessageKey& key);

  std::unordered_map<MessageKey, Count, MessageKeyHash> counts_;
  std::list<MessageKey> idle_;  // keys without offers, least recently used first
  std::array<MessageKey, kLog> log_{};
  uint64_t messages_ = 0;
  size_t offers_ = 0;
};

// The receiver's side, for one peer.
class OffersMade {
 public:
  static constexpr uint32_t kSlots =
      4094;  // offers pending at once; the slot of all bits is another's (notes.hpp)
  static constexpr uint32_t kWindow = 512;  // chunks of a message that may overtake one another

  struct Made {
    Place place;
    uint32_t immediate = 0;
    bool start = false;
  };
  struct Slot {
    OpId receive = 0;  // 0: free
    MessageKey key;
    uint32_t index = 0;
    uint64_t bytes = 0;           // that have come
    uint64_t total = 0;           // that the message has
    uint32_t base = 0;            // all chunks below have come
    std::bitset<kWindow> window;  // of those from `base` on
    uint8_t generation = 0;
    bool pending = false;    // nothing of its message has been noticed
    bool overtaken = false;  // its last chunk has come before others
    bool expected = false;   // which the link knows
  };

  // A receive of this key was posted and waits.
  void posted(const MessageKey& key);
  // Whether a receive can be offered: the one that was posted last, or one after which none has been offered.
  bool possible(const MessageKey& key) const;
  // Offers it; `ahead`: receives of its key that wait before it, `behind`: after it. Illegal: not possible().
  Made offer(const MessageKey& key, OpId receive, uint64_t capacity, uint32_t ahead, uint32_t behind = 0);
  // A frame has come: the receives before its place, into which messages have been written. This call notices them.
  std::vector<OpId> arrived(const MessageKey& key, Place place);
  // It went to a receive of just this key, or to another one (or to none).
  void matched(const MessageKey& key, bool exact);
  // A chunk has come; nullptr: for a slot that is in use no more, or a repetition. Illegal: no such slot or chunk.
  Slot* chunk(uint32_t immediate, uint64_t nbytes);
  Slot& slot(uint32_t number);
  // The first sign of a message that is written into the slot; false: it was noticed before.
  bool noticed(uint32_t number);
  // Its receive has ended, or is not offered any more.
  void release(uint32_t number);
  // The sender is asked to drop what is pending of the key: nothing is offered until `withdrawn`.
  void withdraw(const MessageKey& key);
  struct Withdrawn {
    std::vector<OpId> taken, dropped;  // noticed, and released, by this call
  };
  // `next`: of the sender's count. If it has forgotten that, what is pending stays so: nothing will be written into it.
  Withdrawn withdrawn(const MessageKey& key, Place next);
  // Whether a receive of the key is offered, but for this slot (0: any).
  bool offers(const MessageKey& key, uint32_t but) const;
  // A receive of the key has gone without a message.
  void unposted(const MessageKey& key);
  size_t counts() const { return counts_.size(); }
  uint64_t seen = 0;  // messages that have come as frames

 private:
  struct Count {
    uint32_t number = 0;
    uint32_t arrived = 0;
    uint32_t next = 0;     // arrived + pending
    uint32_t offered = 0;  // slots that are pending
    uint32_t withdrawing = 0;
  };
  template <class F>
  void each_pending(const MessageKey& key, F&& f);
  void settle(const MessageKey& key);

  std::unordered_map<MessageKey, Count, MessageKeyHash> counts_;
  std::vector<Slot> slots_ = std::vector<Slot>(1);  // the first is never used
  std::vector<uint32_t> free_;
  uint32_t last_count_ = 0;
};

struct Offers {
  OffersHeld held;
  OffersMade made;
};

// Immediates: slot (12 bits), its generation (3), whether it is the last chunk (1), number of the chunk (16).
constexpr uint32_t kLastChunk = 1u << 16;
constexpr uint32_t slot_of(uint32_t immediate) { return immediate >> 20; }
constexpr uint32_t generation_of(uint32_t immediate) { return immediate >> 17 & 7; }

}  // namespace aiocomm
