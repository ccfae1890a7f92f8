// Shared segments of this process: memory made by `aiocomm.empty()`, which peers on the host can map.
//
// A segment is an anonymous memfd, so nothing is left behind by a crash. Ids are never reused, hence a peer's mapping
// of a freed segment is stale but never wrong. Peers are told of freed ones when next there is something to tell them;
// whoever has one mapped sees it at the end of its memory, too.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace aiocomm {

struct Segment {
  struct End {  // behind the bytes
    std::atomic<uint32_t> freed{0};
  };
  static End& end_of(std::byte* base, uint64_t nbytes) { return *reinterpret_cast<End*>(base + nbytes); }
  static uint64_t mapped_bytes(uint64_t nbytes) { return nbytes + sizeof(End); }

  uint32_t id = 0;
  int fd = -1;
  std::byte* base = nullptr;
  uint64_t nbytes = 0;
  ~Segment();
};

class Segments {
 public:
  static Segments& of_process();
  std::shared_ptr<Segment> allocate(uint64_t nbytes);  // throws LinkFailure
  void release(const std::byte* base);
  // Grows with every release: a reason to ask `alive` again.
  uint64_t releases() const { return releases_.load(std::memory_order_acquire); }
  bool alive(uint32_t id) const;
  // The segment that holds all of [data, data + nbytes), or null. Cheap while no segment exists.
  std::shared_ptr<Segment> find(const std::byte* data, uint64_t nbytes) const;

 private:
  struct Impl;
  Segments();
  Impl* impl_;  // never freed: segments may outlive static destruction
  std::atomic<uint32_t> count_{0};
  std::atomic<uint64_t> releases_{0};
};

}  // namespace aiocomm
