// Between a device and host memory that the other end's process shares: the device's engine copies, and nothing is staged.

#include "core/engine.hpp"

namespace aiocomm {

bool DeviceProtocol::reaches_shared(Op& op, Peer& peer) {
  DeviceBuffer& gpu = *op.gpu;
  if (!op.source_segment || op.listed || gpu.bounce) return false;
  const std::shared_ptr<PeerMemory> memory = peer.link->shared(op.source_segment);
  if (!memory || !memory->holds(op.source_address, reach_of(op))) return false;
  const bool outgoing = gpu.role == Role::stage_out;
  if (!mover_->reach_shared(gpu.device, memory, op.source_address, reach_of(op), op.rows.get(), outgoing))
    return false;
  gpu.pinned_from = reinterpret_cast<uint64_t>(memory->base);
  gpu.remote = gpu.pinned_from + op.source_address;
  gpu.mapping = memory;
  return true;
}

void DeviceProtocol::move_shared(Op& op, Role role) {
  op.gpu->role = role;
  op.path = Path::device;
  queue_move(op, role == Role::pull ? Lane::in : Lane::out, op.nbytes);
}

}  // namespace aiocomm
