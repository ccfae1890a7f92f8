// One access to many ranges of a region, in one message: their list, and their bytes close together. Pure.
//
//   put: count, then (offset, nbytes) of each range, then the bytes of all, in the order of the list
//   get: (offset, nbytes) of each range; its answer is the bytes of all
//
// A list comes from the peer: it is looked through before a byte moves. Numbers are of 64 bits, and not aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "core/op.hpp"

namespace aiocomm {

constexpr uint64_t kMostListed = 1 << 20;  // bytes of such a message: they are copied under the token
constexpr uint64_t kMostAtOnce = 1 << 30;  // bytes of those of one peer that are being moved
constexpr size_t kMostInGet = 512;         // ranges of a get: its list rides in the frame

// The bytes that a list of ranges has in all; none where it makes no sense.
std::optional<uint64_t> listed_bytes(std::span<const std::byte> list);

// Copies what a put carries to its ranges of `memory`. out_of_range: nothing was copied.
Code spread(std::span<const std::byte> message, std::span<std::byte> memory);

// Copies ranges of `memory` close together. `into` has room for `listed_bytes(list)`.
Code collect(std::span<const std::byte> list, std::span<const std::byte> memory, std::byte* into);

}  // namespace aiocomm
