// needs: core/offers.cpp core/match.cpp
//
// Random histories of a sender and a receiver: frames in order each way, writes at any time. Whatever happens, each
// message reaches one receive, in MPI's order (but for what was on its way to a receive that was given up), and what fits
// is matched in the end.

#include "core/offers.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "core/match.hpp"
#include "seeded.hpp"

using namespace aiocomm;

namespace {

constexpr Rank kSource = 0;

struct Receive {
  Tag tag;
  bool large;
  enum { waiting, withdrawing, done, cancelled } state = waiting;
  uint32_t slot = 0;
  int message = -1;
  bool taken = false;  // its message is being written into it
};
struct Message {
  MessageKey key;
  int received_by = -1;
  bool refused = false;
};
struct Frame {
  enum { message, offer, withdraw, withdrawn } kind;
  MessageKey key;
  int which = 0;  // message, or receive
  Place place;
  Offer offered;
  bool start = false, writing = false;
  uint64_t seen = 0;
};
struct Write {
  int message;
  uint32_t immediate;
};

// What the engine does with the two classes, in small.
struct World {
  explicit World(unsigned seed) : random(seed) {}
  std::mt19937 random;
  OffersHeld held;
  OffersMade made;
  Matcher matcher;
  std::deque<Frame> to_receiver, to_sender;
  std::vector<Write> writes;
  std::deque<OpId> registering;
  int late = 0;  // offers of receives that were not the last
  std::vector<Receive> receives;
  std::vector<Message> messages;
  std::map<uint64_t, int> unexpected;
  uint64_t next_arrival = 1;

  int pick(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }
  Receive& at(OpId op) { return receives[op - 1]; }

  void got(Receive& receive, int message) {
    CHECK(receive.message < 0 && messages[message].received_by < 0);
    receive.message = message;
    receive.state = Receive::done;
    messages[message].received_by = static_cast<int>(&receive - receives.data());
  }

  void post(Tag tag, bool large) {
    receives.push_back({tag, large});
    OpId op = receives.size();
    if (auto arrival = matcher.post_recv(op, 1, kSource, tag)) {
      got(receives.back(), unexpected.at(*arrival));
      return;
    }
    if (tag == kAnyTag) return;
    MessageKey key{1, tag};
    made.posted(key);
    if (large && pick(2))
      registering.push_back(op);
    else if (large)
      offer(op, key);
  }

  // It may wait for its memory, and others be posted meanwhile: it is offered if none of those is.
  void offer(OpId op, const MessageKey& key) {
    if (matcher.wildcards(1) || !made.possible(key)) return;
    std::vector<OpId> later = matcher.behind(op);
    for (OpId other : later)
      if (at(other).slot) return;
    auto behind = static_cast<uint32_t>(later.size());
    auto ahead = static_cast<uint32_t>(matcher.waiting(1, kSource, key.tag)) - 1 - behind;
    auto m = made.offer(key, op, 1, ahead, behind);
    late += behind != 0;
    at(op).slot = slot_of(m.immediate);
    to_sender.push_back({Frame::offer,
                         key,
                         static_cast<int>(op),
                         {},
                         {m.place, op, 0, 1, 1, m.immediate},
                         m.start,
                         false,
                         made.seen});
  }

  void registered() {
    OpId op = registering.front();
    registering.pop_front();
    if (at(op).state == Receive::waiting && !at(op).taken) offer(op, {1, at(op).tag});
  }

  void send(Tag tag, bool large) {
    MessageKey key{1, tag};
    int number = static_cast<int>(messages.size());
    messages.push_back({key});
    if (const Offer* offer = large ? held.next(key, 1) : nullptr) {
      writes.push_back({number, offer->immediate});
      held.take(key);
      return;
    }
    to_receiver.push_back({Frame::message, key, number, held.place(key)});
    held.sent(key);
  }

  void cancel(size_t index) {
    Receive& receive = receives[index];
    if (receive.state != Receive::waiting || receive.taken) return;
    OpId op = index + 1;
    MessageKey key{1, receive.tag};
    if (receive.tag != kAnyTag && made.offers(key, 0)) {
      made.withdraw(key);
      receive.state = Receive::withdrawing;
      to_sender.push_back({Frame::withdraw, key, static_cast<int>(op)});
      return;
    }
    if (receive.tag != kAnyTag) made.unposted(key);
    CHECK(matcher.cancel_recv(op));
    receive.state = Receive::cancelled;
  }

  void taken(OpId op) {
    CHECK(matcher.cancel_recv(op));
    at(op).taken = true;
  }
  void free_slot(Receive& receive) {
    if (receive.slot) made.release(std::exchange(receive.slot, 0));
  }

  void arrives(const Frame& frame) {
    for (OpId op : made.arrived(frame.key, frame.place)) taken(op);
    for (;;) {
      uint64_t id = next_arrival++;
      auto op = matcher.arrive({id, 1, kSource, frame.key.tag, 0});
      if (!op) {
        made.matched(frame.key, false);
        unexpected[id] = frame.which;
        return;
      }
      Receive& receive = at(*op);
      if (receive.state != Receive::withdrawing) {
        made.matched(frame.key, receive.tag != kAnyTag);
        free_slot(receive);
        return got(receive, frame.which);
      }
      bool others = made.offers(frame.key, receive.slot);
      made.unposted(frame.key);
      free_slot(receive);
      receive.state = Receive::cancelled;
      if (!others) continue;
      made.matched(frame.key, false);
      messages[frame.which].refused = true;
      return;
    }
  }

  void receiver_reads() {
    Frame frame = to_receiver.front();
    to_receiver.pop_front();
    if (frame.kind == Frame::message) return arrives(frame);
    auto all = made.withdrawn(frame.key, frame.place);
    for (OpId op : all.taken) taken(op);
    for (OpId op : all.dropped) at(op).slot = 0;
    Receive& receive = at(static_cast<OpId>(frame.which));
    if (receive.state != Receive::withdrawing) return;
    bool matched =
        std::find(all.taken.begin(), all.taken.end(), static_cast<OpId>(frame.which)) != all.taken.end();
    if (!matched && matcher.cancel_recv(static_cast<OpId>(frame.which))) made.unposted(frame.key);
    if (frame.writing) return;  // the write comes, and is counted
    free_slot(receive);
    receive.state = Receive::cancelled;
  }

  void sender_reads() {
    Frame frame = to_sender.front();
    to_sender.pop_front();
    if (frame.kind == Frame::offer) return held.offered(frame.key, frame.start, frame.seen, frame.offered);
    held.withdraw(frame.key);
    bool writing = std::any_of(writes.begin(), writes.end(), [&](const Write& write) {
      return slot_of(write.immediate) == at(static_cast<OpId>(frame.which)).slot;
    });
    to_receiver.push_back(
        {Frame::withdrawn, frame.key, frame.which, held.place(frame.key), {}, false, writing});
  }

  void write(size_t index) {
    Write write = writes[index];
    writes.erase(writes.begin() + static_cast<long>(index));
    OffersMade::Slot* slot = made.chunk(write.immediate, 1);
    CHECK(slot);
    CHECK(!made.chunk(write.immediate, 1));  // a repetition
    OpId op = slot->receive;
    if (made.noticed(slot_of(write.immediate))) taken(op);
    free_slot(at(op));
    bool cancelled = at(op).state == Receive::withdrawing;
    got(at(op), write.message);
    if (cancelled) at(op).state = Receive::cancelled;
  }

  bool step(bool quiet) {
    switch (pick(quiet ? 4 : 10)) {
      case 0:
        if (!to_receiver.empty()) receiver_reads();
        break;
      case 1:
        if (!to_sender.empty()) sender_reads();
        break;
      case 2:
        if (!writes.empty()) write(static_cast<size_t>(pick(static_cast<int>(writes.size()))));
        break;
      case 3:
        if (!registering.empty()) registered();
        break;
      case 4:
      case 5:
        post(pick(12) == 0 ? kAnyTag : pick(3), pick(4) != 0);
        break;
      case 6:
      case 7:
      case 8:
        send(pick(3), pick(4) != 0);
        break;
      default:
        if (!receives.empty() && pick(3) == 0)
          cancel(static_cast<size_t>(pick(static_cast<int>(receives.size()))));
    }
    return !to_receiver.empty() || !to_sender.empty() || !writes.empty() || !registering.empty();
  }

  void verify() {
    std::set<int> taken;
    for (const Receive& receive : receives) {
      CHECK(receive.state != Receive::withdrawing);
      if (receive.message >= 0) CHECK(taken.insert(receive.message).second);
    }
    for (size_t i = 0; i < messages.size(); ++i)
      for (size_t j = i + 1; j < messages.size(); ++j) {
        if (!(messages[i].key == messages[j].key) || messages[j].received_by < 0 ||
            messages[i].received_by < 0)
          continue;
        const Receive &first = receives[messages[i].received_by], &second = receives[messages[j].received_by];
        bool both = true;
        for (const Receive* receive : {&first, &second})
          both = both && (receive->tag == kAnyTag || receive->tag == messages[i].key.tag);
        for (int k = 0; k < messages[j].received_by;
             ++k)  // its message was on its way: it went to a later one
          both = both && receives[static_cast<size_t>(k)].state != Receive::cancelled;
        if (both) CHECK(messages[i].received_by < messages[j].received_by);
      }
    for (const Message& message : messages)
      for (const Receive& receive : receives)
        CHECK(message.received_by >= 0 || message.refused || receive.state != Receive::waiting ||
              (receive.tag != kAnyTag && receive.tag != message.key.tag));
    CHECK(made.counts() <= 3);
  }
};

}  // namespace

int main() {
  int late = 0;
  for (g_seed = 1; g_seed <= 3000; ++g_seed) {
    World world(g_seed);
    for (int i = 0; i < 120; ++i) world.step(false);
    while (world.step(true)) {
    }
    world.verify();
    late += world.late;
  }
  CHECK(late > 1000);
  std::puts("ok");
}
