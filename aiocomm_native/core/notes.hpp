// Notifications that ride on a device's last write into a region: which of them may be told, and when. Pure.
//
// Rules
//   - The writer numbers its notifications. The frame with one's payload and the write's immediate carry the number;
//     they come by different ways, in any order, and the immediate perhaps twice (its rail failed before it was
//     acknowledged). A notification is told once, when both are there.
//   - Frames come in the order of their numbers; an immediate may come before its frame.
//   - The notifications of one channel are told in the order of their numbers; no channel waits for another.
//   - The writer posts the write that carries an immediate only when all others of the same put are acknowledged, so
//     that one immediate stands for all bytes, whatever order the rails keep.
//   - An illegal call throws std::invalid_argument and changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/ids.hpp"

namespace aiocomm {

struct Note {
  ChannelId channel = 0;
  uint64_t nbytes = 0;  // of the put
  std::string payload;
};

// One writer's, as the owner of the regions knows them.
class NotesDue {
 public:
  static constexpr uint32_t kNumbers = 1u << 20;
  static constexpr size_t kPending = 1 << 14;  // more than any writer's lanes have chunks

  // Both return what can be told now, in order.
  // Illegal: another number than the next, or more than kPending that wait for their write.
  std::vector<Note> announced(uint32_t number, Note note);
  // A repetition does nothing. Illegal: more than kPending that wait for their frame.
  std::vector<Note> written(uint32_t number);
  size_t pending() const { return pending_.size() + early_.size(); }

 private:
  struct Pending {
    Note note;
    bool written = false;
  };
  std::vector<Note> ready(ChannelId channel);

  uint32_t next_ = 0;  // of the frame that comes next
  std::unordered_map<uint32_t, Pending> pending_;
  std::unordered_map<ChannelId, std::deque<uint32_t>> order_;  // of pending_
  std::unordered_set<uint32_t> early_;                         // written, their frames not yet here
};

// Immediates of notifications: all bits of an offer's slot, which no offer uses, then the number.
constexpr uint32_t kNoteMark = 0xfffu << 20;
constexpr bool is_note(uint32_t immediate) { return (immediate & kNoteMark) == kNoteMark; }
constexpr uint32_t note_of(uint32_t immediate) { return immediate & (NotesDue::kNumbers - 1); }

}  // namespace aiocomm
