// Copies between mappings that are too large for the caches.
#pragma once

#include <cstddef>

namespace aiocomm {

void copy_large(std::byte* to, const std::byte* from, size_t nbytes);
// What is written will be read soon.
void copy_in_caches(std::byte* to, const std::byte* from, size_t nbytes);
// For parts of what is too large for the caches: what is written will not be read soon.
void copy_past_caches(std::byte* to, const std::byte* from, size_t nbytes);

}  // namespace aiocomm
