#include "core/offers.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace aiocomm {

// ---------------------------------------------------------------- the sender's side

void OffersHeld::offered(const MessageKey& key, bool start, uint64_t seen, const Offer& offer) {
  if (seen > messages_) throw std::invalid_argument("an offer after messages that were never sent");
  if (offers_ >= kOffers) throw std::invalid_argument("more offers than there can be");
  auto it = counts_.find(key);
  if (!start && (it == counts_.end() || it->second.next.count != offer.place.count))
    return;  // forgotten: its receive is served by rendezvous
  if (!start && !it->second.offers.empty() && offer.place.index <= it->second.offers.back().place.index)
    throw std::invalid_argument("an offer out of order");
  if (start) {
    if (messages_ - seen > kLog) return;
    Count& count = counts_[key];
    offers_ -= count.offers.size();
    count.offers.clear();
    count.next = {offer.place.count, 0};
    for (uint64_t i = seen; i < messages_; ++i) count.next.index += log_[i % kLog] == key;
    it = counts_.find(key);
  }
  Count& count = it->second;
  if (offer.place.index >= count.next.index) {
    count.offers.push_back(offer);
    ++offers_;
  }
  rest(count, key);
}

const Offer* OffersHeld::next(const MessageKey& key, uint64_t nbytes) const {
  auto it = counts_.find(key);
  if (it == counts_.end() || it->second.offers.empty()) return nullptr;
  const Offer& offer = it->second.offers.front();
  return offer.place == it->second.next && offer.capacity >= nbytes ? &offer : nullptr;
}

Offer OffersHeld::take(const MessageKey& key) {
  if (!next(key, 0)) throw std::invalid_argument("no offer to take");
  Count& count = counts_.find(key)->second;
  Offer offer = count.offers.front();
  went(count, key);
  return offer;
}

Place OffersHeld::place(const MessageKey& key) const {
  auto it = counts_.find(key);
  return it == counts_.end() ? Place{} : it->second.next;
}

void OffersHeld::sent(const MessageKey& key) {
  log_[messages_++ % kLog] = key;
  if (auto it = counts_.find(key); it != counts_.end()) went(it->second, key);
}

void OffersHeld::went(Count& count, const MessageKey& key) {
  if (!count.offers.empty() && count.offers.front().place == count.next) {
    count.offers.pop_front();
    --offers_;
  }
  ++count.next.index;
  rest(count, key);
}

void OffersHeld::withdraw(const MessageKey& key) {
  auto it = counts_.find(key);
  if (it == counts_.end()) return;
  offers_ -= it->second.offers.size();
  it->second.offers.clear();
  rest(it->second, key);
}

// Counts without offers are kept for a while: the next offer may go on from them.
void OffersHeld::rest(Count& count, const MessageKey& key) {
  if (count.is_idle) idle_.erase(count.idle);
  count.is_idle = count.offers.empty();
  if (!count.is_idle) return;
  count.idle = idle_.insert(idle_.end(), key);
  if (idle_.size() <= kCounts) return;
  MessageKey oldest = idle_.front();
  idle_.pop_front();
  counts_.erase(oldest);
}

// ---------------------------------------------------------------- the receiver's side

void OffersMade::posted(const MessageKey& key) {
  if (auto it = counts_.find(key); it != counts_.end()) ++it->second.next;
}

bool OffersMade::possible(const MessageKey& key) const {
  if (free_.empty() && slots_.size() > kSlots) return false;
  auto it = counts_.find(key);
  return it == counts_.end() || it->second.withdrawing == 0;
}

OffersMade::Made OffersMade::offer(const MessageKey& key, OpId receive, uint64_t capacity, uint32_t ahead,
                                   uint32_t behind) {
  if (!possible(key)) throw std::invalid_argument("nothing can be offered now");
  auto [it, start] = counts_.try_emplace(key);
  Count& count = it->second;
  if (start) {
    if (++last_count_ == 0) ++last_count_;
    count.number = last_count_;
    count.next = ahead + 1 + behind;
  }
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  uint32_t number = free_.back();
  free_.pop_back();
  Slot& slot = slots_[number];
  uint8_t generation = slot.generation;
  slot = Slot{};
  slot.receive = receive;
  slot.key = key;
  slot.index = count.next - 1 - behind;
  slot.total = capacity;
  slot.generation = generation;
  slot.pending = true;
  ++count.offered;
  return {{count.number, slot.index}, number << 20 | static_cast<uint32_t>(generation) << 17, start};
}

template <class F>
void OffersMade::each_pending(const MessageKey& key, F&& f) {
  std::vector<uint32_t> found;
  for (uint32_t i = 1; i < slots_.size(); ++i)
    if (slots_[i].receive && slots_[i].pending && slots_[i].key == key) found.push_back(i);
  std::sort(found.begin(), found.end(),
            [&](uint32_t a, uint32_t b) { return slots_[a].index < slots_[b].index; });
  for (uint32_t number : found) f(number, slots_[number]);
}

std::vector<OpId> OffersMade::arrived(const MessageKey& key, Place place) {
  ++seen;
  std::vector<OpId> before;
  auto it = counts_.find(key);
  if (it == counts_.end() || place.count != it->second.number || it->second.offered == 0) return before;
  each_pending(key, [&](uint32_t number, Slot& slot) {
    if (slot.index >= place.index) return;
    before.push_back(slot.receive);
    noticed(number);
  });
  return before;
}

void OffersMade::matched(const MessageKey& key, bool exact) {
  auto it = counts_.find(key);
  if (it == counts_.end()) return;
  ++it->second.arrived;
  if (!exact) ++it->second.next;
}

OffersMade::Slot* OffersMade::chunk(uint32_t immediate, uint64_t nbytes) {
  uint32_t number = slot_of(immediate);
  if (number == 0 || number >= slots_.size()) throw std::invalid_argument("an immediate for no offer");
  Slot& slot = slots_[number];
  if (!slot.receive || slot.generation != generation_of(immediate)) return nullptr;
  auto ahead = static_cast<int16_t>(static_cast<uint16_t>(immediate) - static_cast<uint16_t>(slot.base));
  if (ahead >= static_cast<int>(kWindow)) throw std::invalid_argument("a chunk far out of order");
  if (ahead < 0 || slot.window[static_cast<size_t>(ahead)]) return nullptr;
  if (nbytes > slot.total - slot.bytes) throw std::invalid_argument("more bytes than the message has");
  slot.window[static_cast<size_t>(ahead)] = true;
  while (slot.window[0]) {
    slot.window >>= 1;
    ++slot.base;
  }
  slot.bytes += nbytes;
  bool before_others =
      static_cast<int16_t>(static_cast<uint16_t>(immediate) - static_cast<uint16_t>(slot.base)) >= 0;
  if (immediate & kLastChunk && before_others) slot.overtaken = true;
  return &slot;
}

OffersMade::Slot& OffersMade::slot(uint32_t number) {
  if (number == 0 || number >= slots_.size() || !slots_[number].receive)
    throw std::invalid_argument("no such offer");
  return slots_[number];
}

bool OffersMade::noticed(uint32_t number) {
  Slot& found = slot(number);
  if (!std::exchange(found.pending, false)) return false;
  Count& count = counts_.find(found.key)->second;
  --count.offered;
  ++count.arrived;
  settle(found.key);
  return true;
}

void OffersMade::release(uint32_t number) {
  Slot& found = slot(number);
  MessageKey key = found.key;
  bool pending = found.pending;
  found.receive = 0;
  found.pending = false;
  found.generation = (found.generation + 1) & 7;
  free_.push_back(number);
  if (!pending) return;
  --counts_.find(key)->second.offered;
  settle(key);
}

void OffersMade::withdraw(const MessageKey& key) {
  if (auto it = counts_.find(key); it != counts_.end()) ++it->second.withdrawing;
}

OffersMade::Withdrawn OffersMade::withdrawn(const MessageKey& key, Place next) {
  Withdrawn all;
  auto it = counts_.find(key);
  if (it == counts_.end() || it->second.withdrawing == 0)
    throw std::invalid_argument("an answer to no question");
  bool known = next.count == it->second.number;
  each_pending(key, [&](uint32_t number, Slot& slot) {
    if (!known) return;
    bool taken = slot.index < next.index;
    (taken ? all.taken : all.dropped).push_back(slot.receive);
    if (taken)
      noticed(number);
    else
      release(number);
  });
  --it->second.withdrawing;
  settle(key);
  return all;
}

bool OffersMade::offers(const MessageKey& key, uint32_t but) const {
  auto it = counts_.find(key);
  if (it == counts_.end()) return false;
  bool own =
      but && but < slots_.size() && slots_[but].receive && slots_[but].pending && slots_[but].key == key;
  return it->second.offered > (own ? 1u : 0u);
}

void OffersMade::unposted(const MessageKey& key) {
  if (auto it = counts_.find(key); it != counts_.end()) --it->second.next;
}

// Without an offer pending the count is not needed: the next offer starts another one.
void OffersMade::settle(const MessageKey& key) {
  auto it = counts_.find(key);
  if (it != counts_.end() && it->second.offered == 0 && it->second.withdrawing == 0) counts_.erase(it);
}

}  // namespace aiocomm
