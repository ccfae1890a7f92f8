// Lanes that fail, and come back.
//
//   one side                                        the other
//   a lane fails: closes it, frames go on
//   over another              ── failed ──►         closes its end: nothing of it can be written any more
//                             ◄── closed ──
//   its chunks go out again
//   …
//   caller, each heartbeat, while the port is up:
//   new queue pairs           ── again(numbers) ──► new queue pairs, connected
//                             ◄── there(numbers) ──
//   connects; probes; uses    ── go ──►             probes; uses
//
//   the last lane fails       ── no rail ──►        both ends of the pair end by their link, not by the peer
//
//   its queue pairs break, by an access that the other device refuses: the path is as good as before
//                             ── broken ──►         as for `failed`, but a last lane is made anew at once, and what there
//                                                   is to send waits for it
//
// Each side sends over a lane once an empty write over it has been acknowledged.

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "links/rdma/link.hpp"
#include "links/rdma/peer.hpp"
#include "links/rdma/wire.hpp"

namespace aiocomm::rdma {

namespace {

struct LaneWord {
  char what;
  uint32_t lane;
  Numbers numbers{};
};
constexpr size_t kShort = 5, kLong = kShort + sizeof(Numbers);

std::string encode(const LaneWord& word, bool numbers) {
  std::string text(1, word.what);
  text.append(reinterpret_cast<const char*>(&word.lane), 4);
  if (!numbers) return text;
  text.append(reinterpret_cast<const char*>(word.numbers.data()), sizeof word.numbers);
  return text;
}

}  // namespace

Lane* RdmaPeer::another_lane(const Lane& but) {
  for (auto& lane : lanes_)
    if (lane.get() != &but && lane->state == Lane::State::up) return lane.get();
  return nullptr;
}

void RdmaPeer::connect(Lane& lane, const Numbers& numbers, bool answers) {
  lane.connecting = std::make_shared<Connecting>(lane, lane.rail, lane.pairs, lane.theirs, numbers, answers);
  link_.connector().submit(lane.connecting);
}

void RdmaPeer::connected(const Connecting& job) {
  Lane& lane = job.lane;
  lane.connecting.reset();
  if (!ready_told_) {
    if (job.failure.empty())
      lane.state = Lane::State::up;
    else
      leave_out(lane, job.failure);
    return get_ready();
  }
  if (!job.failure.empty()) return lane_failed(lane, job.failure);
  std::string word = encode({job.answers ? kThere : kGo, lane.index, lane.pairs.numbers()}, job.answers);
  say(word.data(), word.size());
  if (!job.answers) probe(lane);
}

// Nothing of it is heard or touches memory any more.
void RdmaPeer::close_lane(Lane& lane) {
  if (auto job = std::exchange(lane.connecting, nullptr)) {
    lane.rail.ignore(lane.pairs);  // afterwards they may be gone
    if (!link_.connector().give_up(job)) lane.pairs = {};
  }
  lane.rail.remove(lane.pairs, lane.posting);
}

// The pair is made without it.
void RdmaPeer::leave_out(Lane& lane, const std::string& reason) {
  lane.state = Lane::State::failed;
  lane.reachable = false;
  lane.lacks = reason;
  close_lane(lane);
}

void RdmaPeer::lane_failed(Lane& lane, const std::string& reason, Loss loss) {
  if (lane.state == Lane::State::failed || lane.state == Lane::State::down) return;
  if (!ready_told_) {  // the handshake tells the peer
    leave_out(lane, reason);
    link_.retire_rails();
    if (greeted_) get_ready();
    return;
  }
  bool was_up = lane.state == Lane::State::up;
  if (!was_up) loss = Loss::path;  // it was tried, and that was in vain
  Lane* next = another_lane(lane);
  if (!next && loss == Loss::path && (was_up || !dark_ns_)) return no_rail(reason);
  lane.state = Lane::State::failed;
  close_lane(lane);
  link_.retire_rails();
  lane.outstanding.store(0);
  lane.requests = 0;
  lane.bytes = 0;
  for (Chunk& chunk : chunks_)
    if (chunk.busy && chunk.lane == lane.index) chunk.parked = true;
  tell_failed(lane, loss);
  if (!was_up) return;
  ++link_.lanes_failed;
  host_.part_down(rank, lane.name(), reason);
  if (!next) dark_ns_ = host_.now();
  if (!next || active_ != lane.index) return;
  active_ = next->index;
  resend_frames();
}

void RdmaPeer::tell_failed(const Lane& lane, Loss loss) {
  std::string word = encode({loss == Loss::path ? kFailed : kBroken, lane.index}, false);
  say(word.data(), word.size());
}

void RdmaPeer::no_rail(const std::string& reason) {
  std::string word = encode({kNoRail, expected_}, false);
  say(word.data(), word.size());
  give_up("no rail is left: " + reason);
}

// Nothing reaches the peer any more, though it may live. Its frames that are here are taken in by nobody.
void RdmaPeer::give_up(const std::string& reason) {
  failure = ENETDOWN;
  for (uint32_t seq = consumed_there_; seq != sent_; ++seq) {
    Head head;
    unpack(frame_slot(seq), kMaxHead, head);
    host_.sink().on_unsure(*this, head.header);
  }
  lose(reason);
}

void RdmaPeer::resend_frames() {
  lanes_[active_]->last_sign_ns.store(host_.now(), std::memory_order_relaxed);
  for (uint32_t seq = acks_.all_before(); seq != sent_; ++seq) {
    ++link_.resent;
    transmit(seq);
  }
}

void RdmaPeer::lane_closed(Lane& lane) {
  if (lane.state != Lane::State::failed || !lane.reachable) return;
  lane.state = Lane::State::down;
  refuse(lane);
  if (dead_) return;
  if (!dark_ns_) return relaunch(lane);
  if (initiator_) try_again(lane);
}

// A process that is killed loses its memory first and its connection after that: only one that has answered has
// refused an access.
void RdmaPeer::refuse(const Lane& lane) {
  for (uint32_t i = 0; i < chunks_.size() && !dead_; ++i)
    if (chunks_[i].busy && chunks_[i].refused && chunks_[i].lane == lane.index) finish(i, EACCES, 0);
}

void RdmaPeer::relaunch(Lane& lane) {
  for (uint32_t i = 0; i < chunks_.size(); ++i) {
    if (!chunks_[i].busy || !chunks_[i].parked || chunks_[i].lane != lane.index) continue;
    ++link_.resent;
    launch(i, *lanes_[active_]);
  }
}

// The peer has new queue pairs ahead of it: it is told of ours.
void RdmaPeer::try_again(Lane& lane) {
  try {
    lane.pairs = lane.rail.open();
  } catch (const LinkFailure&) {
    return;  // with the next heartbeat
  }
  lane.state = Lane::State::connecting;
  lane.rail.add(lane.pairs, &lane);
  std::string word = encode({kAgain, lane.index, lane.pairs.numbers()}, true);
  say(word.data(), word.size());
}

void RdmaPeer::reopen(Lane& lane, const Numbers& numbers, bool answer) {
  try {
    if (answer) {
      lane.pairs = lane.rail.open();
      lane.rail.add(lane.pairs, &lane);
    }
  } catch (const LinkFailure& failure) {
    lane.state = Lane::State::connecting;
    return lane_failed(lane, failure.what());
  }
  lane.state = Lane::State::connecting;
  connect(lane, numbers, answer);
}

void RdmaPeer::probe(Lane& lane) {
  lane.state = Lane::State::probing;
  lane.stalled.store(false);
  lane.last_sign_ns.store(host_.now(), std::memory_order_relaxed);
  lane.outstanding.fetch_add(1, std::memory_order_relaxed);
  Work work;
  work.lane = &lane;
  work.qp = lane.pairs.bulk(0);
  work.posting = &lane.posting;
  work.opcode = IBV_WR_RDMA_WRITE;
  work.chunk = kProbe;
  lane.rail.post_bulk(std::move(work));
}

void RdmaPeer::probed(Lane& lane, int error) {
  if (lane.state != Lane::State::probing) return;
  if (error) return lane_failed(lane, lane.rail.name() + ": still no way through");
  lane.state = Lane::State::up;
  ++link_.lanes_recovered;
  host_.part_up(rank, lane.name());
  if (std::exchange(dark_ns_, 0)) {
    active_ = lane.index;
    resend_frames();
    for (auto& other : lanes_)
      if (other->state != Lane::State::failed) relaunch(*other);
  }
  unblock();
}

size_t RdmaPeer::word(const std::byte* data, size_t nbytes) {
  LaneWord word{static_cast<char>(data[0]), 0};
  if (word.what == kAlive) return 1;
  if (word.what == kReady) {
    ready_heard_ = true;
    return 1;
  }
  size_t length = word.what == kAgain || word.what == kThere ? kLong : kShort;
  bool known = std::string_view("fbcotgn").find(word.what) != std::string_view::npos;
  if (known && nbytes < length) return 0;
  if (known) std::memcpy(&word.lane, data + 1, 4);
  if (word.what == kNoRail) {  // and how many of our frames it has taken in
    if (word.lane - consumed_there_ <= sent_ - consumed_there_) consumed_there_ = word.lane;
    while (!dead_ && poll_last(1 << 20) > 0) {  // what it had sent has come, or is lost
    }
    if (!dead_) give_up("no rail is left, as the peer says");
    return length;
  }
  if (!known || word.lane >= lanes_.size()) {
    violated("unknown word on the pair's connection");
    return 1;
  }
  if (length == kLong) std::memcpy(word.numbers.data(), data + kShort, sizeof word.numbers);
  Lane& lane = *lanes_[word.lane];
  switch (word.what) {
    case kFailed:
    case kBroken: {
      const bool reachable = lane.reachable;  // that is what its own try has shown
      lane_failed(lane, lane.rail.name() + ": the peer's end failed",
                  word.what == kFailed ? Loss::path : Loss::pairs);
      lane.reachable = reachable;
      if (dead_) return length;
      std::string reply = encode({kClosed, lane.index}, false);
      say(reply.data(), reply.size());
      break;
    }
    case kClosed:
      lane_closed(lane);
      break;
    case kAgain:
      if (lane.state == Lane::State::down) reopen(lane, word.numbers, true);
      break;
    case kThere:
      if (lane.state == Lane::State::connecting && !lane.connecting) reopen(lane, word.numbers, false);
      break;
    default:
      if (lane.state == Lane::State::connecting && !lane.connecting) probe(lane);
  }
  return length;
}

}  // namespace aiocomm::rdma
