// Kernels that read and write memory of several ranks. All of them have agreed to that, by messages of their own, before
// one is launched, and hear from each other afterwards that they are over; here is only how one rank launches its own.

#include <cstring>
#include <utility>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
// That a kernel takes beside its bytes, and bytes per ns of the fastest: an end is looked for rather too early than too late.
constexpr uint64_t kLaunchNs = 5000, kKernelRate = 2000;
}  // namespace

bool DeviceProtocol::share(Rank rank, DeviceBuffer& buffer) {
  Engine::Token token(engine_, true);
  Peer* peer = engine_.find_peer(rank);
  if (!peer || peer->state != Peer::State::up || !peer->link || peer->told_staged) return false;
  mover_->offer(buffer, *peer->link);
  return buffer.place.exported == Export::ipc;
}

void DeviceProtocol::start_kernel(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  KernelCall& kernel = *gpu.kernel;
  if (op.state == OpState::queued) {
    op.state = OpState::moving;
    op.started_ns = engine_.now();
    ++engine_.counters_[index_].submitted;
  }
  for (const Gate& gate : kernel.gates) {
    if (gate.open()) continue;
    gpu.waiting = true;
    return mover_->await_gate(gate, gpu.device, op.id);
  }
  for (KernelCall::Far& far : kernel.far) {
    if (far.reached) continue;
    Peer* peer = engine_.find_peer(far.owner);
    if (!peer || peer->state != Peer::State::up) {
      op.peer = far.owner;  // who is named
      return engine_.end_early(op, Code::peer_lost);
    }
    const uint64_t within = far.place.address - far.place.base;
    const bool inside = within <= far.place.extent && far.nbytes <= far.place.extent - within;
    if (!inside || far.place.base % far.alignment || within % far.alignment) {
      engine_.tear_down(*peer, inside ? "protocol violation: a place that is not aligned"
                                      : "protocol violation: a place outside its allocation");
      op.peer = far.owner;
      return engine_.end_early(op, Code::peer_lost);
    }
    peer->device_owner = far.place.owner;
    Reach reach = mover_->reach(gpu.device, far.place, *peer->link, op.id);
    if (reach.state == Reach::State::opening) {
      gpu.waiting = true;
      return;
    }
    if (reach.state == Reach::State::refused || !reach.direct) {
      staged_because(*peer, reach.direct ? reach.reason : "the GPUs have no access to each other's memory");
      op.peer = far.owner;
      return engine_.end_early(op, Code::unreachable);
    }
    far.mapping = std::move(reach.mapping);
    far.reached = true;
    const uint64_t address = reach.base + within;
    std::memcpy(kernel.argument.data() + far.at, &address, sizeof address);
  }
  MoveJob job;
  job.op = op.id;
  job.device = static_cast<uint8_t>(gpu.device);
  job.cls = engine_.channels_[op.channel].cls;
  job.posted_ns = engine_.now();
  job.kernel = &kernel;
  job.local = true;
  job.early = !kernel.awaited;
  job.slow_ns = kLaunchNs + op.nbytes / kKernelRate;
  ++gpu.inflight;
  DeviceQueue& queue = queue_of(gpu.device, Lane::peer);
  if (!queue.overflow.empty() || !mover_->post(job)) queue.overflow.push_back(job);
}

}  // namespace aiocomm
