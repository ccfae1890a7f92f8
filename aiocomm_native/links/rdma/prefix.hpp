// What comes before every frame on the wire.
#pragma once

#include <cstdint>

#include "core/frame.hpp"
#include "links/rdma/rail.hpp"

namespace aiocomm::rdma {

struct Prefix {
  uint32_t seq;
  uint32_t consumed;  // frames of the receiver's that the sender has handed over
  uint8_t wake;       // Wake
  uint8_t keys;       // how many of these follow from `key`, for the registration that the header names
  uint16_t reserved;
  uint32_t key[kMaxRails];
  uint32_t reserved2;
};
static_assert(sizeof(Prefix) == 32);
static_assert(sizeof(Prefix) + sizeof(FrameHeader) + kMaxMeta + 4096 <= Rail::kSlotBytes);

}  // namespace aiocomm::rdma
