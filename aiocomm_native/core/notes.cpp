#include "core/notes.hpp"

#include <stdexcept>
#include <utility>

namespace aiocomm {

std::vector<Note> NotesDue::announced(uint32_t number, Note note) {
  if (number != next_) throw std::invalid_argument("a notification out of order");
  if (pending_.size() >= kPending) throw std::invalid_argument("more notifications than there are writes");
  next_ = (next_ + 1) % kNumbers;
  ChannelId channel = note.channel;
  pending_[number] = {std::move(note), early_.erase(number) != 0};
  order_[channel].push_back(number);
  return ready(channel);
}

std::vector<Note> NotesDue::written(uint32_t number) {
  uint32_t ahead = (number - next_) % kNumbers;
  if (ahead < kNumbers / 2) {
    if (early_.size() >= kPending) throw std::invalid_argument("writes that nobody announced");
    early_.insert(number);
    return {};
  }
  auto it = pending_.find(number);
  if (it == pending_.end()) return {};  // told: its write came twice
  it->second.written = true;
  return ready(it->second.note.channel);
}

std::vector<Note> NotesDue::ready(ChannelId channel) {
  std::vector<Note> told;
  auto queue = order_.find(channel);
  while (!queue->second.empty()) {
    auto first = pending_.find(queue->second.front());
    if (!first->second.written) break;
    told.push_back(std::move(first->second.note));
    pending_.erase(first);
    queue->second.pop_front();
  }
  if (queue->second.empty()) order_.erase(queue);
  return told;
}

}  // namespace aiocomm
