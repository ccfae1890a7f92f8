// Work request ids: what it was, and which.
#pragma once

#include <cstdint>

namespace aiocomm::rdma {

enum class What : uint64_t { frame = 1, chunk, slot, immediate };
inline uint64_t id_of(What what, uint32_t which) { return static_cast<uint64_t>(what) << 32 | which; }
inline What what_of(uint64_t id) { return static_cast<What>(id >> 32); }

}  // namespace aiocomm::rdma
