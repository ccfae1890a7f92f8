// needs: core/channels.cpp core/flows.cpp core/sched.cpp core/sched_window.cpp core/fair_queue.cpp
//
// Random lives of channels: what is known of them is what is open or held, and nothing that was counted is lost.

#include "core/channels.hpp"

#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/flows.hpp"

using namespace aiocomm;

namespace {

template <class F>
bool refused(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void a_name_is_another_channel_each_time() {
  Channels channels;
  CHECK(channels.size() == 1 && channels.standard().id == 0 && channels.find(0)->name.empty());
  Channel& first = channels.open("x", 1, 1.0);
  const uint32_t id = first.id;
  const ChannelId wire = first.wire;
  CHECK(&channels.open("x", 1, 1.0) == &first);
  CHECK(refused([&] { channels.open("x", 2, 1.0); }));
  CHECK(refused([&] { channels.open("x", 1, 2.0); }));
  CHECK(refused([&] { channels.open("y", 4, 1.0); }));
  ++first.holders;
  channels.close(first);
  CHECK(channels.find(id) == &first && !channels.open_at(wire) && channels.name_of(wire) == "x");
  Channel& second = channels.open("x", 3, 2.0);  // while the one before is still held
  CHECK(second.id != id && second.wire == wire && channels.open_at(wire) == &second);
  CHECK(channels.any_above(2) && !channels.any_above(3) && channels.opened(1) == 1);
  --first.holders;
  CHECK(Channels::is_over(first) && !Channels::is_over(second));
  channels.forget(first);
  CHECK(!channels.find(id) && channels.open_at(wire) == &second && channels.name_of(wire) == "x");
  CHECK(channels.name_of(1) == "?");
}

void accesses_have_the_channel_of_whoever_asks() {
  Channels channels;
  const Channel& open = channels.open("x", 2, 4.0);
  CHECK(&channels.of_access(open.wire, 3, 1.0) == &open);
  Channel& lent = channels.of_access(7, 3, 2.0);
  CHECK(lent.cls == 3 && lent.weight == 2.0 && Channels::is_over(lent) && !channels.any_above(2));
  ++lent.holders;
  CHECK(&channels.of_access(7, 1, 1.0) == &lent && !channels.open_at(7) && !Channels::is_over(lent));
  --lent.holders;
  channels.forget(lent);
  Channel& odd = channels.of_access(7, 200, 0);  // from a peer that makes no sense
  CHECK(odd.cls == 3 && odd.weight == Scheduler::kMinWeight);
  channels.forget(odd);
  CHECK(channels.size() == 2);
}

void what_is_closed_for_good_is_known_for_a_while() {
  Channels channels;
  auto closed = [&](int number, bool for_good) {
    Channel& channel = channels.open(std::to_string(number), 1, 1.0);
    const ChannelId wire = channel.wire;
    channels.close(channel, for_good);
    CHECK(channels.is_gone(wire) == for_good);
    channels.forget(channel);
    return wire;
  };
  const ChannelId first = closed(-1, true);
  for (int number = 0; number < 100000; ++number) closed(number, number % 2);
  CHECK(!channels.is_gone(first));
  const ChannelId again = closed(0, true);
  Channel& reopened = channels.open("0", 2, 1.0);
  CHECK(reopened.wire == again && !channels.is_gone(again));
}

void what_nobody_receives_is_known_by_its_tag() {
  Channels channels;
  Channel& one = channels.open("one", 1, 1.0);
  const ChannelId wire = one.wire, other = channels.open("other", 1, 1.0).wire;
  CHECK(!channels.is_unread(wire, 1));
  channels.drop_below(one, 5);
  channels.drop_below(one, 3);  // it only rises
  CHECK(channels.is_unread(wire, 1) && channels.is_unread(wire, 4));
  CHECK(!channels.is_unread(wire, 5) && !channels.is_unread(wire, 0));
  CHECK(!channels.is_unread(other, 1));
  channels.close(one);
  CHECK(!channels.is_unread(channels.open("one", 1, 1.0).wire, 1));  // another one
}

void what_was_served_stays_counted() {
  Channels channels;
  Scheduler sched;
  Flows flows(sched, 2);
  uint64_t total = 0, item = 0;
  for (int turn = 0; turn < 2000; ++turn) {
    Channel& channel = channels.open("r" + std::to_string(turn % 700), static_cast<uint8_t>(turn % 4), 1.0);
    for (Rank rank = 0; rank < turn % 4; ++rank) {
      sched.push(flows.of(channel, rank).id, ++item, 1000, false);
      total += 1000;
    }
    while (auto chunk = sched.next()) sched.complete(chunk->nbytes, 0, chunk->cls);
    if (turn % 3) flows.end_peer(1);
    channels.close(channel);
    flows.end_channel(channel);
    channels.forget(channel);
    CHECK(flows.size() == 0 && channels.size() == 1);
  }
  uint64_t counted = 0;
  auto served = channels.served(2, [&](const Channel& channel) { return flows.served(channel); });
  for (auto& [name, nbytes] : served) counted += nbytes;
  CHECK(counted == total && served.size() <= Channels::kRemembered + 1);
  CHECK(channels.served(0, [](const Channel&) { return 0; }).empty());
}

void flows_are_those_of_a_model() {
  std::mt19937_64 random(7);
  auto below = [&](uint64_t n) { return random() % n; };
  Channels channels;
  Scheduler sched;
  Flows flows(sched, 0);
  std::vector<Channel*> open;
  std::map<std::pair<uint32_t, Rank>, uint32_t> headers;
  for (int turn = 0; turn < 50000; ++turn) {
    const auto rank = static_cast<Rank>(below(5));
    switch (open.empty() ? 0 : below(6)) {
      case 0:
        if (open.size() < 40)
          open.push_back(&channels.open(std::to_string(turn), static_cast<uint8_t>(below(4)), 1.0));
        break;
      case 1:
        if (below(8) == 0) {
          flows.end_peer(rank);
          std::erase_if(headers, [&](const auto& one) { return one.first.second == rank; });
        }
        break;
      case 2: {
        std::swap(open[below(open.size())], open.back());
        Channel* gone = open.back();
        open.pop_back();
        channels.close(*gone);
        flows.end_channel(*gone);
        std::erase_if(headers, [&](const auto& one) { return one.first.first == gone->id; });
        channels.forget(*gone);
        break;
      }
      default: {
        Channel& channel = *open[below(open.size())];
        Flow& flow = flows.of(channel, rank);
        CHECK(flow.headers == headers[std::pair(channel.id, rank)]++);
        ++flow.headers;
      }
    }
    CHECK(flows.size() == headers.size() && channels.size() == open.size() + 1);
    size_t of_rank = 0, expected = 0;
    flows.each_of(rank, [&](const Flow& flow) { of_rank += flow.rank == rank; });
    for (auto& [key, count] : headers) {
      expected += key.second == rank;
      const Flow* flow = flows.find(*channels.find(key.first), key.second);
      CHECK(flow && flow->headers == count && flow == &flows.at(flow->id));
    }
    CHECK(of_rank == expected);
  }
}

}  // namespace

int main() {
  a_name_is_another_channel_each_time();
  accesses_have_the_channel_of_whoever_asks();
  what_is_closed_for_good_is_known_for_a_while();
  what_nobody_receives_is_known_by_its_tag();
  what_was_served_stays_counted();
  flows_are_those_of_a_model();
}
