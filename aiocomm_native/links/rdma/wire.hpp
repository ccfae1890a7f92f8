// How a frame stands on the wire: a prefix, keys, the header's words that are not zero, metadata, payload.
//
// Most of a header's eight words are zero: an eager message of 8 bytes takes 52 in all, so that it goes inline with its
// work request, and in one packet that is cheap to check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/frame.hpp"
#include "links/rdma/rail.hpp"
#include "links/rdma/registrations.hpp"

namespace aiocomm::rdma {

struct Prefix {
  uint32_t seq;
  uint32_t consumed;  // frames of the receiver's that the sender has handed over
  uint8_t wake;       // Wake
  uint8_t keys;   // how many of these follow, for the registration that the header names: one for each rail
  uint8_t words;  // bit i: word i of the header follows; the others are zero
  uint8_t looks;  // 1: the sender's loop spins and looks into its ring (ring.cpp)
};
static_assert(sizeof(Prefix) == 12);

constexpr size_t kHeaderWords = sizeof(FrameHeader) / sizeof(uint64_t);
static_assert(kHeaderWords == 8);
constexpr size_t kMaxHead = sizeof(Prefix) + kMaxRails * sizeof(uint32_t) + sizeof(FrameHeader);
static_assert(kMaxHead + kMaxMeta + 4096 <= Rail::kSlotBytes);

struct Head {
  Prefix prefix{};
  Keys keys;
  FrameHeader header{};
};

// Returns the bytes written, at most kMaxHead. Which words follow is found here.
inline size_t pack(const Head& head, std::byte* out) {
  uint64_t words[kHeaderWords];
  std::memcpy(words, &head.header, sizeof words);
  size_t at = sizeof(Prefix) + head.prefix.keys * sizeof(uint32_t);
  Prefix prefix = head.prefix;
  prefix.words = 0;
  for (size_t i = 0; i < kHeaderWords; ++i) {
    if (!words[i]) continue;
    prefix.words |= static_cast<uint8_t>(1u << i);
    std::memcpy(out + at, &words[i], sizeof words[i]);
    at += sizeof words[i];
  }
  std::memcpy(out, &prefix, sizeof prefix);
  std::memcpy(out + sizeof prefix, head.keys.of.data(), prefix.keys * sizeof(uint32_t));
  return at;
}

// Returns the bytes read; 0: that is no head.
inline size_t unpack(const std::byte* data, size_t nbytes, Head& head) {
  if (nbytes < sizeof(Prefix)) return 0;
  std::memcpy(&head.prefix, data, sizeof(Prefix));
  size_t at = sizeof(Prefix) + head.prefix.keys * sizeof(uint32_t);
  size_t words = static_cast<size_t>(__builtin_popcount(head.prefix.words));
  if (head.prefix.keys > kMaxRails || nbytes < at + words * sizeof(uint64_t)) return 0;
  std::memcpy(head.keys.of.data(), data + sizeof(Prefix), head.prefix.keys * sizeof(uint32_t));
  uint64_t word[kHeaderWords] = {};
  for (size_t i = 0; i < kHeaderWords; ++i) {
    if (!(head.prefix.words >> i & 1)) continue;
    std::memcpy(&word[i], data + at, sizeof word[i]);
    at += sizeof word[i];
  }
  std::memcpy(&head.header, word, sizeof word);
  return at;
}

}  // namespace aiocomm::rdma
