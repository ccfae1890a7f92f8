// Host memory that a peer shares (segments.hpp), mapped here whole. Whoever is last to use it unmaps it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace aiocomm {

struct PeerMemory {
  // What devices have to undo before it is unmapped.
  struct Pins {
    virtual ~Pins() = default;
    virtual void undo(std::function<void()> then) = 0;  // any thread; `then` may be called later, by another
  };

  PeerMemory(void* at, uint64_t size) : base(static_cast<std::byte*>(at)), nbytes(size) {}
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;
  ~PeerMemory() {
    auto unmap = [at = base, size = nbytes] { munmap(at, size); };
    pins ? pins->undo(unmap) : unmap();
  }
  bool holds(uint64_t offset, uint64_t size) const { return offset <= nbytes && size <= nbytes - offset; }

  std::byte* const base;
  const uint64_t nbytes;
  std::shared_ptr<Pins> pins;  // its mover's; set under the token, once
};

}  // namespace aiocomm
