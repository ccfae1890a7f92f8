#include "bindings/combining.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace aiocomm::py {

namespace {

constexpr uint64_t kLine = 128;      // blocks begin at whole lines, so that they are moved by whole vectors
constexpr uint64_t kPerThread = 16;  // bytes

// As in aiocomm/collectives/kernels.py.
struct Argument {
  uint64_t in[kMostTogether] = {}, out[kMostTogether] = {};
  uint64_t count = 0;
  uint32_t size = 0, by = 0;
};

}  // namespace

std::unique_ptr<DeviceBuffer> combination(Engine& engine, const Combining& how, const std::vector<int>& ranks,
                                          size_t rank, uint64_t in, const DeviceBuffer& out, uint64_t nbytes,
                                          const std::vector<Arena::Places>& places) {
  const uint64_t size = ranks.size();
  const uint64_t share = ((nbytes + size - 1) / size + kLine - 1) / kLine * kLine;
  const uint64_t start = std::min(nbytes, rank * share), block = std::min(nbytes, start + share) - start;
  if (!block) return nullptr;
  auto kernel = std::make_unique<KernelCall>();
  Argument argument;
  argument.in[rank] = in + start;
  argument.out[rank] = out.place.address + start;
  argument.count = block / how.item;
  argument.size = static_cast<uint32_t>(size);
  argument.by = how.divide_by;
  for (size_t peer = 0; peer < size; ++peer) {
    if (peer == rank) continue;
    const DevicePlace &theirs = places[peer].out, &given = places[peer].in.owner ? places[peer].in : theirs;
    KernelCall::Far far;
    far.owner = ranks[peer];
    far.nbytes = block;
    for (auto [place, first] : {std::pair{&given, &argument.in}, {&theirs, &argument.out}}) {
      far.place = *place;
      far.place.address += start;
      const auto* field = reinterpret_cast<const std::byte*>(&(*first)[peer]);
      far.at = static_cast<size_t>(field - reinterpret_cast<const std::byte*>(&argument));
      kernel->far.push_back(far);
    }
  }
  const auto* bytes = reinterpret_cast<const std::byte*>(&argument);
  kernel->argument.assign(bytes, bytes + sizeof argument);
  kernel->function = how.function;
  kernel->threads = how.threads;
  const uint64_t wanted = (block + kPerThread * how.threads - 1) / (kPerThread * how.threads);
  kernel->blocks = static_cast<uint32_t>(std::clamp<uint64_t>(wanted, 1, how.most_blocks));
  std::unique_ptr<DeviceBuffer> gpu = engine.mover()->part(out, start, block);
  gpu->gate = {};
  gpu->kernel = std::move(kernel);
  return gpu;
}

}  // namespace aiocomm::py
