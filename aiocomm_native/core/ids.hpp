// Names of things, shared by the pure classes and the engine.
#pragma once

#include <cstdint>

namespace aiocomm {

using OpId = uint64_t;
using ChannelId = uint64_t;
using Rank = int32_t;  // >= 0
using Tag = int64_t;   // anything but kAnyTag

constexpr Rank kAnySource = -1;
constexpr Tag kAnyTag = -1;

}  // namespace aiocomm
