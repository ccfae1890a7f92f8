// The contract of a link: everything that the runtime needs from shared memory, TCP, copy engines or RDMA.
//
// Rules
//  * Every call but `pull` and `pull_rows` is made under the engine's token, and none of them waits or moves much (see
//    Host::leave_token): `post` either takes a frame whole or answers `again` and later calls `FrameSink::on_writable`.
//  * Frames of a pair arrive in posting order, except that `data` frames may travel on other lanes.
//  * `pull` and `pull_rows` are called by copy threads without the token, several at once; they may take as long as their
//    bytes need.
//  * Errors that end the pair are told through `FrameSink::on_lost`, once; nothing else is called after `close`. Whatever a
//    link tells the sink may close the pair it is about, within the call: it is kept alive until no thread is in it, and
//    an event that was on its way to it may still reach Pollable::on_ready.
//  * A link chooses nothing by itself: which thread of the peer to wake is the caller's `Wake`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/doorbell.hpp"
#include "core/frame.hpp"
#include "core/ids.hpp"
#include "core/op.hpp"
#include "core/peer_memory.hpp"
#include "core/rows.hpp"

namespace aiocomm {

enum class Post : uint8_t {
  ok,       // taken; the payload is the caller's again
  pending,  // taken; the payload stays in use until FrameSink::on_sent
  again,    // no room now; on_writable follows
  lost,     // the pair is gone; on_lost was or will be called
};

// What is to be done where EMFILE is an operation's end.
inline constexpr char kOutOfFiles[] =
    "out of file descriptors: raise the limit of open files (ulimit -n, LimitNOFILE= in a unit, --ulimit "
    "nofile= for "
    "a container)";

// A link or device failed; `code` is errno or the driver's.
struct LinkFailure : std::runtime_error {
  LinkFailure(const std::string& what, int error) : std::runtime_error(what), code(error) {}
  int code;
};

// The peer sent something that makes no sense: its pair is closed.
struct ProtocolViolation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who may reach registered memory: this side's devices only, which write it, or only read it, as may be all that its
// pages allow; or peers as well. A region's registration is its own, and of just its bytes: who has its key reaches nothing
// else, and nothing at all once it is released.
enum class Access : uint8_t { local, local_reads, peer_reads, peer_writes, region_reads, region_writes };

// Where a message's bytes lie at their owner.
struct Location {
  uint64_t address = 0;  // in the owner's address space, or an offset into `segment`
  uint32_t segment = 0;  // shared segment or registration of the owner, 0: private memory
};

// Bytes that a device moves between this side's memory and the peer's, without the peer's CPU.
struct RemoteChunk {
  OpId op = 0;
  bool read = false;  // from the peer, else to it
  std::byte* local = nullptr;
  uint32_t registration = 0;  // of `local`, by Link::hold
  Location remote;
  uint64_t nbytes = 0;
  const RowList* rows = nullptr;  // its bytes from `offset` on; `local` and `remote` are where the rows begin
  uint64_t offset = 0;
  uint8_t cls = 0;             // of its channel
  bool has_immediate = false;  // a write that tells the peer so when it is there
  uint32_t immediate = 0;
};

class LinkPeer;
class Link;

// What a link tells the runtime. Called under the token, from LinkPeer::poll or Pollable::on_ready.
class FrameSink {
 public:
  virtual void on_frame(LinkPeer& from, const FrameHeader& header, const std::byte* meta,
                        const std::byte* payload) = 0;
  // Where the payload bytes from `done` on of a data frame go; nullptr: discard them. Ask again for every read. The place
  // stays the operation's, however it ends, until on_data: one such call, with `into`, is owed for each place that was
  // given, also where nothing has come (`nbytes` 0).
  virtual std::byte* data_target(LinkPeer& from, const FrameHeader& header, uint64_t done) = 0;
  // `nbytes` more have come, to the place that was given or, with `into` null, to nowhere.
  virtual void on_data(LinkPeer& from, const FrameHeader& header, uint64_t nbytes, const std::byte* into) = 0;
  virtual void on_sent(LinkPeer& to, OpId sop, uint64_t nbytes) = 0;
  // A chunk of `post_remote` is through; `error`: 0, or why its bytes are not where they should be. `elapsed_ns`: how
  // long the link worked on it, that is, since its posting or the chunk before, whichever was later; 0: unknown.
  virtual void on_remote(LinkPeer& with, OpId op, uint64_t nbytes, int error, uint64_t elapsed_ns) {
    (void)with, (void)op, (void)nbytes, (void)error, (void)elapsed_ns;
  }
  // The peer has written `nbytes` into our memory, and says `value`.
  virtual void on_immediate(LinkPeer& from, uint32_t value, uint64_t nbytes) {
    (void)from, (void)value, (void)nbytes;
  }
  virtual void on_writable(LinkPeer& to) = 0;
  // Memory that was not held yet when Link::hold returned is so now, or (`error`, errno) cannot be.
  virtual void on_held(Link& link, uint32_t id, int error, const std::string& reason) {
    (void)link, (void)id, (void)error, (void)reason;
  }
  // Memory for which Link::release returned false is nobody's any more.
  virtual void on_released(Link& link, uint32_t id) { (void)link, (void)id; }
  // The pair is about to be lost by devices of ours, and whether this frame has reached the peer is not known.
  virtual void on_unsure(LinkPeer& to, const FrameHeader& header) { (void)to, (void)header; }
  virtual void on_lost(LinkPeer& peer, const std::string& reason) = 0;

 protected:
  ~FrameSink() = default;
};

// One attached pair on one link.
class LinkPeer {
 public:
  virtual ~LinkPeer() = default;
  // Both sides have taken the link: from now on frames are handed over, and a loss is told. Until then the pair
  // may still be dropped without a word, and another link be tried.
  virtual void start() {}
  // Takes the frame with copies of `meta` and `payload`, whole or not at all.
  virtual Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload,
                    Wake wake) = 0;
  // The most bytes that `post` takes in one frame, all in.
  virtual uint64_t frame_limit() const { return ~0ull; }
  // Takes a chunk of a rendezvous (FrameKind::data) on a bulk lane. `cls`: that of its channel, which a link may keep apart
  // from what it has taken of lower ones.
  virtual Post post_data(const FrameHeader& header, const std::byte* payload, uint8_t cls) = 0;
  // How much to hand over so at a time: a pair that drains slowly holds up others with less.
  virtual uint64_t best_chunk() const { return ~0ull; }
  // Payload that it has accepted so and not sent yet.
  virtual uint64_t unsent() const { return 0; }
  // What it has accepted so of this message is copied, and its buffer is not read any more, by the peer neither. False: it
  // cannot be helped.
  virtual bool let_go(OpId sop) {
    (void)sop;
    return false;
  }
  // Hands over what has arrived, at most about `budget` frames; returns how many, and `budget` or more where
  // another look is due.
  virtual int poll(int budget) { return budget * 0; }
  // The same when the pair is about to end: nothing that has come is missed, whoever is looking at it.
  virtual int poll_last(int budget) { return poll(budget); }
  // The same of what is known to have arrived, where threads of the link's own see to that.
  virtual int poll_told(int budget) { return poll(budget); }
  // The same for a loop that spins, and looks again at once: it may leave out what is not urgent.
  virtual int poll_spinning(int budget) { return poll(budget); }
  // Under the token: the loop's thread is about to sleep, and from now on has to be woken.
  virtual void loop_sleeps() {}
  // How this side can read the peer's memory at `where`; Path::none: it cannot, the peer must push.
  virtual Path pull_path(const Location& where) {
    (void)where;
    return Path::none;
  }
  // Reads `nbytes` of the peer's memory; returns 0 or errno. Any thread, no token.
  virtual int pull(const Location& where, std::byte* into, size_t nbytes) {
    (void)where, (void)into, (void)nbytes;
    return 95;  // EOPNOTSUPP
  }
  // The same of bytes [offset, offset + nbytes) of rows, whose offsets count from `where` and `into`.
  virtual int pull_rows(const Location& where, std::byte* into, const RowList& rows, uint64_t offset,
                        uint64_t nbytes);
  // Moves a chunk by the device, for paths `read` and `write`; answers `pending` (on_remote follows), `again` or `lost`.
  virtual Post post_remote(const RemoteChunk& chunk) {
    (void)chunk;
    return Post::lost;
  }
  // Whether it can write into memory of the peer, and tell it so by an immediate.
  virtual bool takes_offers() const { return false; }
  // Whether its devices reach registered regions of the peer, which then takes no part in puts and gets.
  virtual bool reaches_regions() const { return false; }
  // Describes local memory to the peer, making it reachable where the link can.
  virtual Location locate(const std::byte* data, uint64_t nbytes) {
    (void)nbytes;
    return {reinterpret_cast<uint64_t>(data), 0};
  }
  // Memory of the peer that is shared with this process, by the segment of a location; null: it is not mapped here.
  virtual std::shared_ptr<PeerMemory> shared(uint32_t segment) {
    (void)segment;
    return nullptr;
  }
  // The peer's process as the kernel tells it, where it is on this host; -1: elsewhere, or not known.
  virtual int process() const { return -1; }
  virtual WakePage* page() { return nullptr; }  // the peer's, where it is mapped here
  // The last write into a receive has come before others of the same: whoever takes them in is to be woken for each, until
  // as many calls have said that none is due.
  virtual void expect_writes(bool due) { (void)due; }
  // Called once per heartbeat interval while `needs_ticks`; a link that sees a dead peer by other means does not.
  virtual void tick(uint64_t now_ns) { (void)now_ns; }
  virtual bool needs_ticks() const { return false; }
  virtual void close() = 0;

  Rank rank = -1;
  uint64_t generation = 0;
  int failure = 0;  // errno: the pair ended by devices, not by the peer, which may be met by another link
};

// Something with a file descriptor in one of the engine's two epoll sets.
class Pollable {
 public:
  virtual ~Pollable() = default;
  virtual void on_ready(uint32_t events) = 0;  // under the token
};

// What the engine offers to links.
class Host {
 public:
  // `loop`: the user's event loop wakes for this descriptor; else the engine's thread does.
  virtual void watch(int fd, uint32_t events, Pollable* target, bool loop) = 0;
  virtual void rewatch(int fd, uint32_t events, Pollable* target, bool loop) = 0;
  virtual void unwatch(int fd, bool loop) = 0;
  // For the user's event loop, and told by LinkPeer::poll as well: whoever polls need not look at it.
  virtual void watch_polled(int fd, Pollable* target) { watch(fd, 1 /* EPOLLIN */, target, true); }
  virtual void unwatch_polled(int fd) { unwatch(fd, true); }
  virtual uint64_t now() const = 0;  // monotonic, ns
  virtual double setting(std::string_view name, double fallback) const = 0;
  virtual std::string text_setting(std::string_view name) const = 0;
  virtual WakePage& wake_page() = 0;
  // The loop's thread spins before it sleeps, and does not sleep: it sees at once what is written to memory. Before it
  // sleeps, each peer hears of it (LinkPeer::loop_sleeps). Under the token.
  virtual bool loop_looks() { return false; }
  virtual int wake_page_fd() const = 0;
  virtual int loop_fd() const = 0;
  virtual int engine_fd() const = 0;
  // For what no poll shows: the engine's thread goes round once more before it sleeps.
  virtual void ring_engine() = 0;
  virtual FrameSink& sink() = 0;
  // Polls the links once, as the engine's thread would; called without the token. False: whoever holds it may have looked
  // before, so the engine has to be rung.
  virtual bool look() { return false; }
  // For the engine's thread within Pollable::on_ready: lets go of the token for a call that moves bytes. Anything may have
  // happened when it is taken again. By way of Outside.
  virtual void leave_token() = 0;
  virtual void enter_token() = 0;
  virtual MoverHost& mover_host() = 0;
  // By a thread of a link's own that ends with an exception; without the token. The engine ends, and says why.
  virtual void failed(const char* why) noexcept { (void)why; }
  virtual void fallback(Rank rank, const std::string& path,
                        const std::string& reason) = 0;  // counted, evented, once
  // A part of a pair's link (a rail) is gone, or there again; the rest goes on.
  virtual void part_down(Rank rank, const std::string& part, const std::string& reason) = 0;
  virtual void part_up(Rank rank, const std::string& part) = 0;

 protected:
  ~Host() = default;
};

class Outside {
 public:
  explicit Outside(Host& host) : host_(host) { host_.leave_token(); }
  ~Outside() { host_.enter_token(); }
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;

 private:
  Host& host_;
};

struct StreamNeed {
  std::string kind;  // "unix", "tcp" or "" (none)
  int count = 0;
};

// Of what is posted to a link at a time, in bytes; settings may say less. The smaller ones bound what an urgent message
// waits for where the link is slow.
struct ChunkLimits {
  uint64_t min_chunk = 64 << 10;
  uint64_t max_chunk = ~0ull;
  uint64_t min_window = 256 << 10;
};

// A device of this machine that a link does without.
struct LeftOut {
  std::string name, reason;
};

class Link {
 public:
  virtual ~Link() = default;
  virtual std::string_view name() const = 0;
  virtual StreamNeed streams() const = 0;
  virtual std::string card() { return {}; }
  virtual ChunkLimits chunk_limits() const { return {}; }
  virtual bool polled() const { return false; }  // its peers must be polled; else descriptors tell
  // Memory that a device of this link is to reach is held, that is registered, until it is released. Returns its id,
  // and 0 where the link needs no such thing. Throws LinkFailure. What takes long goes on aside: then `held` is false, the
  // id is good for nothing but `release`, and FrameSink::on_held follows, for all that hold it and have not let go.
  virtual uint32_t hold(const std::byte* data, uint64_t nbytes, Access access) {
    (void)data, (void)nbytes, (void)access;
    return 0;
  }
  // The same for device memory, at `place`: 0, or LinkFailure, where no device of this link reaches it.
  virtual uint32_t hold_device(const DevicePlace& place, uint64_t nbytes, Access access, Mover& mover) {
    (void)place, (void)nbytes, (void)access, (void)mover;
    return 0;
  }
  // That device memory has been freed.
  virtual void forget_device(const Gone& memory) { (void)memory; }
  virtual bool held(uint32_t id) {
    (void)id;
    return true;
  }
  // False: peers can write into it, and to keep them out takes long; FrameSink::on_released follows when it is done.
  virtual bool release(uint32_t id) {
    (void)id;
    return true;
  }
  // Counters of its own, by name.
  virtual std::map<std::string, uint64_t> counters() { return {}; }
  // Where others will do; where none does there is no link.
  virtual std::vector<LeftOut> left_out() const { return {}; }
  // Ends its threads and gives back what it holds of the machine; its peers are closed.
  virtual void close() {}
  virtual Mover* mover() {
    return nullptr;
  }  // it moves device memory beside the pairs' links, and joins none
  // Takes the descriptors over, also when it throws LinkFailure.
  virtual std::shared_ptr<LinkPeer> attach(Rank rank, uint64_t generation, const std::vector<int>& fds,
                                           std::string_view card, bool initiator) = 0;
};

using LinkFactory = std::unique_ptr<Link> (*)(Host&);  // null: this machine has nothing for it

// A link makes itself known by one static object in its own folder. Lower `cost` is preferred.
struct LinkRegistration {
  // `by_name`: used only where it is asked for. Once a pair has taken it there is no way back to another link.
  LinkRegistration(const char* name, int cost, LinkFactory factory, bool by_name = false);
};
struct LinkEntry {
  std::string name;
  int cost;
  LinkFactory factory;
  bool by_name;
};
const std::vector<LinkEntry>& link_registry();  // cheapest first

}  // namespace aiocomm
