// Small frames for a loop that spins: they are written into a ring of its own, where it sees them without a completion.
//
//   whose loop spins                                the peer
//   offers its ring, once       ── place, keys ──►  keeps them
//   each frame says: it looks   ── looks ──►        writes small frames for the loop into the ring
//   about to sleep              ── looks not ──►    sends from now on; sends a word at once if it has written
//                               ◄── (a word) ──     what had not been taken in by then
//   is woken by that, looks
//
// Numbers and credits are those of all frames: a slot is written again only once its frame has been taken in. What was
// written over a lane that fails is sent over another; the ring rests until both ends of the failed lane are closed, as
// what is still on its way could be written over what came later.

#include "links/rdma/ring.hpp"

#include <cstdlib>
#include <cstring>

#include "links/rdma/clock.hpp"
#include "links/rdma/link.hpp"
#include "links/rdma/peer.hpp"
#include "links/rdma/wire.hpp"

namespace aiocomm::rdma {

// Under the token, before a frame goes out.
void RdmaPeer::offer_ring() {
  if (ring_ || !host_.loop_looks() || !has_credit(kReserve)) return;
  constexpr size_t room = Rail::kCredits * Ring::kSlotBytes;
  ring_ = {static_cast<std::byte*>(std::aligned_alloc(4096, room)), std::free};
  if (!ring_) return;
  std::memset(ring_.get(), 0, room);
  try {
    ring_registration_ = link_.registrations().acquire(ring_.get(), room, Access::peer_writes).id;
  } catch (const LinkFailure&) {
    return;  // frames are sent as ever
  }
  FrameHeader header{};
  header.kind = FrameKind::link_private;
  header.segment = ring_registration_;
  header.address = reinterpret_cast<uint64_t>(ring_.get());
  emit(header, nullptr, nullptr, Wake::engine);
}

// A promise that is taken back costs a frame: a loop that has slept of late gives none.
bool RdmaPeer::promises() {
  looks_told_ = ring_registration_ && host_.loop_looks() && expected_ - slept_at_ >= kAwakeFor &&
                has_credit(kReserve);  // so that one is left for the word that it looks no more
  return looks_told_;
}

// False: it is to be sent.
bool RdmaPeer::write_to_ring(uint32_t seq) {
  const size_t nbytes = frame_bytes_[seq % Rail::kCredits];
  Lane& lane = *lanes_[active_];
  if (!ring_there_.looks || nbytes > Ring::kMostBytes) return false;
  if (lane.state != Lane::State::up || dark_ns_) return false;
  for (auto& other : lanes_)
    if (other->state == Lane::State::failed && other->reachable) return false;
  std::byte* frame = frame_slot(seq);
  const Ring::Mark mark = Ring::mark(seq, frame, nbytes);
  std::memcpy(frame + nbytes, &mark, sizeof mark);
  uint64_t into = ring_there_.address + Ring::offset(seq, Rail::kCredits, nbytes);
  if (lane.rail.write_frame(lane.pairs, frame_piece(lane, seq, nbytes + sizeof mark), into,
                            ring_there_.keys.of[lane.index]))
    return false;
  ring_there_.written = seq + 1;
  return true;
}

int RdmaPeer::take_from_ring() {
  if (!ring_) return 0;
  int done = 0;
  std::byte frame[Ring::kSlotBytes];
  while (!dead_ && done < static_cast<int>(Rail::kCredits)) {  // who keeps to his credits writes no more
    size_t nbytes = Ring::take(ring_slot(), expected_, frame);
    if (!nbytes) break;
    heard_ns_ = tick_ns();
    ++link_.ring_frames;
    ++done;
    if (deliver(frame, nbytes)) advance();
  }
  return done;
}

// What the peer's loop says of itself.
void RdmaPeer::heard_of_ring(const Head& head) {
  const bool looked = ring_there_.looks;
  if (head.header.kind == FrameKind::link_private && head.header.segment && head.prefix.keys) {
    ring_there_.address = head.header.address;
    ring_there_.keys = head.keys;
  }
  ring_there_.looks = head.prefix.looks && ring_there_.address;
  if (looked && !ring_there_.looks && static_cast<int32_t>(ring_there_.written - head.prefix.consumed) > 0)
    ring_there_.word_due = true;
}

// The loop's thread is about to sleep: what comes from now on has to wake it.
void RdmaPeer::loop_sleeps() {
  slept_at_ = expected_;
  if (!looks_told_ || dead_) return;
  emit_word(Wake::engine);
}

// As credits allow. By the queue pair that what was written went by, so that it comes after that.
void RdmaPeer::tell_of_ring() {
  if (!ring_there_.word_due || !open_ || dead_ || !has_credit(0)) return;
  ring_there_.word_due = false;
  emit_word(Wake::loop, false);
}

}  // namespace aiocomm::rdma
