// The wire unit of every link: one 64-byte header, then `meta_bytes` of metadata and `payload_bytes` of payload.
//
// Rules
//  * Frames of one pair arrive whole and in the order in which they were posted.
//  * A message is either `eager` (its bytes ride in the frame) or announced by `rts` and fetched by rendezvous:
//    the receiver pulls it where the link can read the sender's memory, else answers `cts` and the sender pushes
//    `data` frames. Either way the receiver ends it with `fin`.
//  * `put` is a message that is matched by region instead of by tag; `get` asks the owner of a region to serve it.
//    Memory is then only ever written by the process that owns it. Where devices reach it there are no such frames:
//    see protocol_keys.cpp.
//  * Nothing in a header is trusted: ids are looked up, ranges are checked, and a frame that makes no sense closes
//    the pair that sent it.
#pragma once

#include <cstdint>

namespace aiocomm {

enum class FrameKind : uint8_t {
  eager = 1,  // message with its bytes; `sop` nonzero: the sender waits for `fin` (synchronous send)
  rts,        // announcement: `address`/`segment` say where the bytes lie at the sender
  // The receiver (of a put: the owner; of a get: the reader) has a buffer: push to `rop`. Where it lies in shared memory,
  // `address`/`segment` say where, and a device of the sender may write it: then `moved` is owed, however that ends.
  cts,
  data,         // bytes for `rop` at offset `address`
  fin,          // ends the peer's op `sop` (its message) with `code`; `nbytes` moved
  cancel,       // the sender of message `sop` gives it up: answer with `fin`
  stop,         // the receiver `rop` gives up a message that is being pushed: stop pushing `sop`
  put,          // one-sided write with its bytes: region `rop`, offset `tag`; metadata is the notification
  put_rts,      // one-sided write announced
  get,          // one-sided read: region `sop`, offset `tag`, for the reader's op `rop`
  get_ready,    // answer: the bytes lie at `address`/`segment`; end it with `fin` to `sop`
  get_fail,     // answer: refused with `code`
  credit,       // `nbytes` of eager payload were consumed
  undelivered,  // an eager message could not be delivered: `code`, `channel`, `tag`
  heartbeat,
  goodbye,
  offer,  // a posted receive says where to write: `rop`, `address`/`segment`, `nbytes` of room; see offers.hpp
  withdraw,   // drop the offers of this `channel` and `tag`: receive `rop` is given up
  withdrawn,  // answer: done; `sop` is the place of the next message; `code`: one is being written into `rop`
  took,       // a message of `nbytes`, less than offered, is being written into `rop`
  quit,       // nothing more will be written into `rop`; `code` ok: all of the message has been
  link_private,  // consumed by the link itself
  moved,         // device memory: the sender's engine has written `rop`, or will not any more: `code`
  staged,   // device memory: the first `nbytes` of the message for `rop` lie at `address` in the host memory
  key_ask,  // how do devices reach region `rop`?
  key_is,  // answer: `address`/`segment`, `nbytes`, kWritable; `code` stale, or link_failed: its owner serves it
  key_revoke,   // region `rop` closes: begin nothing more; kAgain: this has been said before
  key_revoked,  // answer: nothing of ours is under way there any more; kStillUsed: something still is
  note,  // number `rop` of the notifications that ride on writes: metadata is its payload, `nbytes` those of the put
  soon,  // a copy of device memory ends within about `nbytes` ns: who waits for it is woken in time
  freed,  // device memory at `address` with buffer id `rop` is the sender's no more: mappings of it are to be dropped
  rest,     // the pair is idle here: shall it be closed?
  resting,  // answer: `code` ok, if it is idle there, too
  last_kind = resting,
};

enum FrameFlags : uint8_t {
  kHasNotify = 1,  // put: metadata is a notification's payload
  // rts, cts, get_ready: metadata ends with a DevicePlace; put_rts: the payload is one; get: the reader's memory is a
  // device's, so nothing is sent before it asks
  kDevice = 2,
  kNotYet = 4,     // rts, put_rts, get_ready: the bytes are not there yet; the sender pushes when they are
  kReads = 8,      // cts: the receiver can read the sender's host memory
  kWritable = 16,  // key_is
  kAgain = 1,      // key_revoke
  kOneSided = 1,   // soon: no loop waits for it, but the engine may soon be asked again
  kPrepare = 2,    // soon: to loops that spin, of a long copy
  kStillUsed = 1,  // key_revoked
  kRows = 32,      // put_rts, get: rows of the `address` bytes from the offset on; `nbytes` in all
  kListed = 64,    // put, put_rts, get: of many ranges; see listed.hpp
};

constexpr double kWeightOne = 16;

struct FrameHeader {
  FrameKind kind;
  uint8_t flags;
  uint16_t meta_bytes;
  uint32_t payload_bytes;
  uint64_t channel;
  int64_t tag;
  uint64_t nbytes;
  uint64_t sop;
  uint64_t rop;
  uint64_t address;
  uint32_t segment;
  uint8_t cls;
  uint8_t code;
  uint16_t weight;  // in 1 / kWeightOne
};
static_assert(sizeof(FrameHeader) == 64);

constexpr uint16_t kMaxMeta = 4096;  // metadata of a message (dtype and shape) or a notification's payload

}  // namespace aiocomm
