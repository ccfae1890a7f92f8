// Copies between mappings that are too large for the caches.
#pragma once

#include <cstddef>

namespace aiocomm::shm {

void copy_large(std::byte* to, const std::byte* from, size_t nbytes);

}  // namespace aiocomm::shm
