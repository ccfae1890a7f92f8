// What this process's copy threads have fetched from a peer's memory.

#include <cerrno>

#include "core/engine.hpp"
#include "core/token.hpp"

namespace aiocomm {

// Not all memory of a process is reached by others: that of a device is not, nor what is kept secret. The sender reads it.
void Engine::stream_instead(Op& op, Peer& peer) {
  op.unreachable = true;
  if (op.in_sched) schedulers_[op.link]->cancel(op.id);
  op.in_sched = false;
  if (op.inflight) return;  // more is being tried
  counters_[op.link].bytes_received -= op.moved;
  op.moved = 0;
  op.path = Path::stream;
  ask_for(op, peer, op.remote_op);
}

void Engine::job_done(CopyJob& job) {
  Token token(*this);
  --jobs_;
  Op* op = find(job.op);  // its chunk in flight has kept it from ending
  Peer* peer = find_peer(op->peer);
  uint8_t link_index = op->link;
  schedulers_[link_index]->complete(job.nbytes, now() - job.posted_ns, job.cls);
  --op->inflight;
  const bool hidden = job.error == EFAULT && op->path == Path::cma && !op->gpu && !op->has_key;
  const bool unreachable = op->unreachable || (hidden && op->kind == OpKind::recv && !has_rows(*op));
  if (unreachable && op->state == OpState::moving && peer) {
    stream_instead(*op, *peer);
  } else if (job.error && op->state != OpState::draining) {
    op->error = job.error;
    const Code code = hidden && has_rows(*op) ? Code::unreachable : Code::link_failed;
    if (peer) send_fin(*peer, op->remote_op, code, op->moved);
    end_early(*op, job.error == ESRCH ? Code::peer_lost : code);
  } else {
    const uint64_t moved = job.error ? 0 : job.nbytes;
    op->moved += moved;
    counters_[link_index].bytes_received += moved;
    if (op->state == OpState::draining)
      settle(*op);
    else if (op->gpu)
      device_.landing(*op, static_cast<uint64_t>(job.into - op->gpu->bounce), job.nbytes);
    else if (op->moved == op->nbytes)
      received(*op);
  }
  // The threads are all links': a chunk of another may have been refused one. This link comes last, else it would keep
  // them to itself.
  const size_t count = schedulers_.size();
  for (size_t away = 1; away <= count; ++away) pump(static_cast<uint8_t>((link_index + away) % count));
}

}  // namespace aiocomm
