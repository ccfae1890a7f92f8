// Kernels that read and write memory of several ranks, and copies into memory of several. All of them have agreed to that,
// by messages of their own, before one begins, and hear from each other afterwards that they are over; here is only what
// one rank does. In company (Company) the last word before it is given here: that this rank's memory may be touched, and
// that it reaches the others'.

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/engine.hpp"
#include "core/relax.hpp"
#include "core/token.hpp"

namespace aiocomm {

namespace {
// That a kernel takes beside its bytes, and bytes per ns of the fastest: an end is looked for rather too early than too late.
constexpr uint64_t kLaunchNs = 5000, kKernelRate = 2000;
constexpr uint64_t kMomentNs = 5000;       // for which it is not worth to look at anything else
constexpr uint64_t kStagedNs = 100000000;  // after memory that was not reached, for which none is offered
constexpr uint64_t kFewBytes =
    256 << 10;  // of a copy that goes along with others, rather than at the same time
}  // namespace

bool DeviceProtocol::share(Rank rank, DeviceBuffer& buffer) {
  Engine::Token token(engine_, true);
  Peer* peer = engine_.find_peer(rank);
  if (!peer || peer->state != Peer::State::up || !peer->link) return false;
  if (peer->staged_ns && engine_.now() < peer->staged_ns + kStagedNs) return false;
  mover_->offer(buffer, *peer->link);
  return buffer.place.exported == Export::ipc;
}

void DeviceProtocol::start_kernel(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  KernelCall& kernel = *gpu.kernel;
  if (op.state == OpState::queued) {
    op.state = OpState::moving;
    op.started_ns = engine_.now();
    engine_.count_submitted(op, index_);
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
    if (reach.state == Reach::State::refused || (kernel.function && !reach.direct)) {
      staged_because(*peer, reach.direct ? reach.reason : "the GPUs have no access to each other's memory");
      op.peer = far.owner;
      if (kernel.company) kernel.company->ready(false);
      return engine_.end_early(op, Code::unreachable);
    }
    far.mapping = std::move(reach.mapping);
    far.reached = true;
    const uint64_t address = reach.base + within;
    std::memcpy(kernel.argument.data() + far.at, &address, sizeof address);
  }
  if (kernel.company && !std::exchange(kernel.spoken, true)) {
    kernel.company->ready(true);
    if (kernel.awaited) look_for_words(kernel.parts[0]);
  }
  if (!kernel.function) return begin_parts(op);
  if (kernel.company && !words_open(op, kernel.parts[0])) return;
  MoveJob job;
  job.op = op.id;
  job.device = static_cast<uint8_t>(gpu.device);
  job.cls = op.scope->cls;
  job.posted_ns = engine_.now();
  job.kernel = &kernel;
  job.local = job.unscheduled = true;
  job.early = !kernel.awaited;
  job.slow_ns = kLaunchNs + op.nbytes / kKernelRate;
  post_or_keep(op, job);
}

void DeviceProtocol::post_or_keep(Op& op, const MoveJob& job) {
  ++op.gpu->inflight;
  DeviceQueue& queue = queue_of(op.gpu->device, job.lane);
  if (!queue.overflow.empty() || !mover_->post(job)) queue.overflow.push_back(job);
}

// The others have met this rank just now: their words are a moment away.
void DeviceProtocol::look_for_words(const KernelCall::Part& part) {
  const uint64_t until = engine_.now() + kMomentNs;
  auto open = [](const Gate& word) { return word.open(); };
  while (!std::all_of(part.words.begin(), part.words.end(), open) && engine_.now() < until) relax();
}

// False: one of them is awaited, or the op has ended since somebody cannot take part.
bool DeviceProtocol::words_open(Op& op, const KernelCall::Part& part) {
  for (const Gate& word : part.words) {
    if (word.open() || op.gpu->kernel->company->hopeless.load(std::memory_order_acquire)) continue;
    op.gpu->waiting = true;
    mover_->await_gate(word, op.gpu->device, op.id, op.gpu->kernel->company);
    return false;
  }
  if (op.gpu->kernel->company->able()) return true;
  engine_.end_early(op, Code::unreachable);
  return false;
}

// What goes to others takes its turn with all that goes there, a part at a time; what stays goes by other engines.
void DeviceProtocol::begin_parts(Op& op) {
  DeviceBuffer& gpu = *op.gpu;
  KernelCall& call = *gpu.kernel;
  gpu.role = Role::push;
  op.path = Path::device;
  call.begins = true;
  call.landed.resize(call.parts.size());
  while (call.begun < call.parts.size() && !gpu.in_sched) {
    const KernelCall::Part& part = call.parts[call.begun];
    if (!words_open(op, part)) break;
    ++call.begun;
    if (part.away) queue_move(op, Lane::peer, part.away);
    for (const KernelCall::Copy& copy : part.copies)
      if (copy.far < 0) copy_here(op, copy);
  }
  call.begins = false;
  if (op.nbytes == 0 && call.begun == call.parts.size()) end_parts(op);
}

void DeviceProtocol::copy_here(Op& op, const KernelCall::Copy& copy) {
  MoveJob job;
  job.op = op.id;
  job.to = copy.offset;
  job.from = copy.from;
  job.nbytes = copy.nbytes;
  job.device = static_cast<uint8_t>(op.gpu->device);
  job.cls = op.scope->cls;
  job.posted_ns = engine_.now();
  job.local = job.unscheduled = true;
  job.joint = copy.nbytes <= kFewBytes;
  post_or_keep(op, job);
}

// A job of an op in company has ended.
void DeviceProtocol::part_moved(Op& op, const MoveJob& job) {
  KernelCall& call = *op.gpu->kernel;
  if (!job.unscheduled) {
    call.landed[job.part] += job.nbytes;
    if (!job.local) engine_.counters_[index_].bytes_sent += job.nbytes;
  }
  op.moved += job.nbytes;
  if (op.moved == op.nbytes) return end_parts(op);
  const size_t before = call.in_place;
  while (call.in_place < call.begun && call.landed[call.in_place] == call.parts[call.in_place].away)
    ++call.in_place;
  if (call.in_place != before && call.in_place < call.parts.size())
    call.company->moved(static_cast<uint32_t>(call.in_place));
}

void DeviceProtocol::end_parts(Op& op) {
  const KernelCall& call = *op.gpu->kernel;
  if (call.company) call.company->moved(static_cast<uint32_t>(call.parts.size()));
  engine_.finish(op, Code::ok);
}

// Of the bytes that go to others, those that a chunk has.
void DeviceProtocol::post_copies(Op& op, const Scheduler::Chunk& chunk) {
  const KernelCall& call = *op.gpu->kernel;
  uint64_t at = 0;  // where a copy begins
  for (const KernelCall::Copy& copy : call.parts[call.begun - 1].copies) {
    if (copy.far < 0) continue;
    const uint64_t begin = std::max(at, chunk.offset),
                   end = std::min(at + copy.nbytes, chunk.offset + chunk.nbytes);
    if (begin < end) {
      const KernelCall::Far& far = call.far[static_cast<size_t>(copy.far)];
      uint64_t address;
      std::memcpy(&address, call.argument.data() + far.at, sizeof address);
      MoveJob job;
      job.op = op.id;
      job.to = address + copy.offset + (begin - at);
      job.from = copy.from + (begin - at);
      job.nbytes = end - begin;
      job.offset = begin;
      job.device = static_cast<uint8_t>(op.gpu->device);
      std::memcpy(&job.other, far.place.uuid.data(), sizeof job.other);
      job.cls = chunk.cls;
      job.posted_ns = engine_.now();
      job.joint = true;
      job.part = static_cast<uint32_t>(call.begun - 1);
      job.more = end < chunk.offset + chunk.nbytes;
      job.followed = chunk.last && call.begun < call.parts.size() && call.far.size() == 1;
      job.local = far.place.owner == op.gpu->place.owner && far.place.device == op.gpu->device;
      if (!job.local) engine_.page_->load[op.gpu->device].fetch_add(job.nbytes, std::memory_order_relaxed);
      post_or_keep(op, job);
    }
    at += copy.nbytes;
  }
  if (!chunk.last) return;
  op.gpu->in_sched = false;
  if (!op.gpu->kernel->begins) begin_parts(op);
}

}  // namespace aiocomm
