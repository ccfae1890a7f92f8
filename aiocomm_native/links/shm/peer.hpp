// One pair on the shm link.
//
// Data's way: frames go through a ring in a shared segment, made with memfd by the initiator and passed over the pair's
// Unix socket. Large messages are pulled by the receiver: from a segment of `aiocomm.empty()` that both map, or by
// cross-memory attach (process_vm_readv); where neither is possible they are streamed through the ring as well.
//
// The Unix socket stays open: it carries descriptors of segments, and its hang-up is how a dead peer is seen.
#pragma once

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "core/link.hpp"
#include "links/shm/ring.hpp"

namespace aiocomm::shm {

// Sent once each way over the Unix socket, with descriptors: wake page, loop's and engine's eventfd, and from the
// initiator the segment. Later messages are SegmentNote, with the segment's descriptor.
struct Hello {
  uint32_t magic;
  uint32_t version;
  uint64_t ring_bytes;
  uint64_t probe_address;  // of a word in the sender's memory that holds `probe_value`
  uint64_t probe_value;
};

struct SegmentNote {
  uint32_t id;
  uint32_t error;   // not 0, and the rest is: the sender cannot take the pair, and has taken no frame in
  uint64_t nbytes;  // 0, and no descriptor: the segment was freed
  uint64_t base;    // in the owner's address space
};

class ShmPeer final : public LinkPeer, public Pollable {
 public:
  ShmPeer(Host& host, int socket, bool initiator);
  ~ShmPeer() override;

  Post post(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake) override;
  Post post_data(const FrameHeader& header, const std::byte* payload, uint8_t cls) override;
  uint64_t unsent() const override { return data_ ? data_->payload_bytes - data_done_ : 0; }
  // Not known before the greeting, when `post` takes nothing.
  uint64_t frame_limit() const override { return ring_bytes_ ? ring_bytes_ / 4 : ~0ull; }
  void start() override;
  int poll(int budget) override;
  Path pull_path(const Location& where) override;
  int pull(const Location& where, std::byte* into, size_t nbytes) override;
  int pull_rows(const Location& where, std::byte* into, const RowList& rows, uint64_t offset,
                uint64_t nbytes) override;
  int process() const override { return pid_; }
  WakePage* page() override { return peer_page_; }
  Location locate(const std::byte* data, uint64_t nbytes) override;
  std::shared_ptr<PeerMemory> shared(uint32_t segment) override;
  void on_ready(uint32_t events) override;
  void close() override;

 private:
  void make_segment();
  void map_segment(int fd);
  void unmap();
  void greet();
  void read_socket();
  void on_hello(const Hello& hello, std::vector<int>& fds);
  void on_segment(const SegmentNote& note, std::vector<int>& fds);
  bool copy_record(const FrameHeader& header, const std::byte* meta, const std::byte* payload, Wake wake);
  void continue_data();
  void tell_freed_segments();
  std::shared_ptr<PeerMemory> mapped(uint32_t segment);
  void wake_peer(Wake wake);
  void lost(const std::string& reason);
  void give_up(int error, const std::string& reason);
  void refused(int error);

  Host& host_;
  int socket_;
  const bool initiator_;
  bool ready_ = false, closed_ = false, watched_ = false, polling_ = false, blocked_ = false, cma_ = false;
  pid_t pid_ = -1;

  int segment_fd_ = -1;
  std::byte* segment_ = nullptr;
  uint64_t segment_bytes_ = 0, ring_bytes_ = 0;
  Producer out_;
  Consumer in_;
  WakePage* peer_page_ = nullptr;
  int peer_loop_fd_ = -1, peer_engine_fd_ = -1;

  // The chunk that is being streamed through the ring.
  std::optional<FrameHeader> data_;
  const std::byte* data_payload_ = nullptr;
  uint64_t data_done_ = 0;

  std::mutex mappings_mutex_;  // copy threads read, the token's holder writes
  // A copy thread or a device may be at it when its owner frees the segment or the pair is closed.
  std::unordered_map<uint32_t, std::shared_ptr<PeerMemory>> mappings_;
  std::unordered_set<uint32_t> announced_;  // our segments that the peer has
  uint64_t releases_seen_ = 0;
};

}  // namespace aiocomm::shm
