// Lists of device memory (listed.hpp). Their messages lie in host memory, the bounce: packed there before they go like
// any other, and unpacked once all of one has come.

#include <cstring>

#include "core/engine.hpp"
#include "core/listed.hpp"

namespace aiocomm {

// A put's, before anything is sent, or the answer to a get. Again after every wait.
void DeviceProtocol::pack(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  op.state = OpState::moving;
  gpu.packing = true;
  if (wait_for_gate(op) || !has_bounce(op)) return;
  gpu.role = Role::stage_out;
  if (op.list_bytes) std::memcpy(gpu.bounce, op.own.get(), op.list_bytes);
  if (!op.rows->nbytes()) return packed(op);
  queue_move(op, Lane::out, op.rows->nbytes());
}

void DeviceProtocol::packed(Op& op) {
  op.gpu->packing = false;
  if (op.kind == OpKind::serve) return engine_.answer_get(op, *engine_.find_peer(op.peer));
  op.state = OpState::queued;
  engine_.go(op);
}

// All of a message is in the bounce: what a put has brought, or the answer to our get.
void DeviceProtocol::unpack(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  if (op.kind == OpKind::recv)
    op.rows = rows_to_spread({gpu.bounce, op.nbytes}, engine_.regions_.at(op.region).nbytes);
  if (!op.rows) {
    if (Peer* peer = engine_.find_peer(op.peer)) engine_.send_fin(*peer, op.remote_op, Code::out_of_range, 0);
    return engine_.finish(op, Code::out_of_range);
  }
  const uint64_t nbytes = op.rows->nbytes();
  gpu.landed = op.nbytes - nbytes;
  if (!nbytes) return engine_.received(op);
  MoveJob job;
  job.op = op.id;
  job.nbytes = nbytes;
  job.device = static_cast<uint8_t>(gpu.device);
  job.lane = Lane::in;
  job.unscheduled = true;
  job.cls = op.scope->cls;
  job.posted_ns = engine_.now();
  job.rows = op.rows.get();
  job.to = reinterpret_cast<uint64_t>(op.data);
  job.from = reinterpret_cast<uint64_t>(gpu.bounce);
  post_or_keep(op, job);
}

}  // namespace aiocomm
