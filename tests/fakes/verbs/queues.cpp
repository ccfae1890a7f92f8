// Queue pairs of reliable connections: what is posted is done at once, in order, and completed.

#include "queues.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <utility>

namespace fake {

Machine& machine() {
  static auto* one = new Machine;  // threads of the test may outlive static objects
  return *one;
}

std::byte* reach(uint32_t key, uint64_t address, uint64_t nbytes, int access) {
  auto found = machine().regions.find(key);
  if (found == machine().regions.end()) return nullptr;
  Region* region = found->second;
  auto base = reinterpret_cast<uint64_t>(region->addr);
  bool within = address >= base && nbytes <= region->length && address - base <= region->length - nbytes;
  return within && (region->access & access) == access ? region->bytes + (address - base) : nullptr;
}

void complete(Queue& queue, const ibv_wc& wc, bool solicited) {
  queue.done.push_back(wc);
  bool tells = queue.armed == Queue::Armed::all ||
               (queue.armed == Queue::Armed::solicited && (solicited || wc.status != IBV_WC_SUCCESS));
  if (!tells || !queue.channel) return;
  queue.armed = Queue::Armed::no;
  auto& channel = *static_cast<Channel*>(queue.channel);
  channel.events.push_back(&queue);
  uint64_t one = 1;
  if (::write(channel.fd, &one, sizeof one) != sizeof one) return;  // the counter is full: it is readable
}

namespace {

constexpr int kLate = 3;

Queue& sends_of(Pair& pair) { return *static_cast<Queue*>(pair.send_cq); }

void end(Pair& pair, const Send& send, ibv_wc_status status) {
  ibv_wc wc{};
  wc.wr_id = send.id;
  wc.status = status;
  wc.qp_num = pair.qp_num;
  wc.opcode = send.opcode == IBV_WR_RDMA_READ ? IBV_WC_RDMA_READ
              : send.opcode == IBV_WR_SEND    ? IBV_WC_SEND
                                              : IBV_WC_RDMA_WRITE;
  wc.byte_len = send.nbytes;
  if (status != IBV_WC_SUCCESS || send.flags & IBV_SEND_SIGNALED) complete(sends_of(pair), wc, false);
}

// The receive that an incoming message takes.
bool take_receive(Pair& at, Receive& receive) {
  auto& posted = static_cast<SharedReceives*>(at.srq)->posted;
  if (posted.empty()) return false;
  receive = posted.front();
  posted.pop_front();
  return true;
}

void tell_receiver(Pair& at, const Send& send, const Receive& receive, ibv_wc_opcode opcode) {
  ibv_wc wc{};
  wc.wr_id = receive.id;
  wc.status = IBV_WC_SUCCESS;
  wc.opcode = opcode;
  wc.byte_len = send.nbytes;
  wc.qp_num = at.qp_num;
  if (opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
    wc.imm_data = send.immediate;
    wc.wc_flags = IBV_WC_WITH_IMM;
  }
  complete(*static_cast<Queue*>(at.recv_cq), wc, send.flags & IBV_SEND_SOLICITED);
}

// False: the other side has no receive for it, and it waits.
bool execute(Pair& other, int initiates, const Send& send, ibv_wc_status& status) {
  status = IBV_WC_SUCCESS;
  bool read = send.opcode == IBV_WR_RDMA_READ;
  if (read && initiates > other.answers) {  // as many as there may be could be under way
    status = IBV_WC_REM_INV_REQ_ERR;
    return true;
  }
  if (send.opcode == IBV_WR_SEND) {
    Receive receive;
    if (!take_receive(other, receive)) return false;
    std::byte* into = reach(receive.lkey, receive.address, send.nbytes, IBV_ACCESS_LOCAL_WRITE);
    if (send.nbytes > receive.nbytes || !into) {
      status = IBV_WC_REM_INV_REQ_ERR;
      return true;
    }
    std::memcpy(into, send.data.data(), send.nbytes);
    tell_receiver(other, send, receive, IBV_WC_RECV);
    return true;
  }
  std::byte* remote = nullptr;
  std::vector<std::pair<std::byte*, size_t>> local;
  if (send.flags & IBV_SEND_INLINE) local.emplace_back(const_cast<std::byte*>(send.data.data()), send.nbytes);
  for (const ibv_sge& piece : send.pieces)
    local.emplace_back(reach(piece.lkey, piece.addr, piece.length, read ? IBV_ACCESS_LOCAL_WRITE : 0),
                       piece.length);
  for (const auto& [bytes, length] : local)
    if (!bytes) status = IBV_WC_LOC_PROT_ERR;
  if (send.nbytes && status == IBV_WC_SUCCESS) {
    remote =
        reach(send.rkey, send.remote, send.nbytes, read ? IBV_ACCESS_REMOTE_READ : IBV_ACCESS_REMOTE_WRITE);
    if (!remote) status = IBV_WC_REM_ACCESS_ERR;
  }
  if (status != IBV_WC_SUCCESS) return true;
  Receive receive;
  bool immediate = send.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
  if (immediate && !take_receive(other, receive)) return false;
  for (const auto& [bytes, length] : local) {
    std::memcpy(read ? bytes : remote, read ? remote : bytes, length);
    remote += length;
  }
  if (immediate) tell_receiver(other, send, receive, IBV_WC_RECV_RDMA_WITH_IMM);
  return true;
}

}  // namespace

void progress(Pair& pair) {
  while (!pair.posted.empty() && pair.state == IBV_QPS_RTS) {
    const Send& next = pair.posted.front();
    if (machine().stalled && next.opcode != IBV_WR_SEND && !(next.flags & IBV_SEND_INLINE)) return;
    auto found = machine().pairs.find(pair.other);
    Pair* other = found == machine().pairs.end() ? nullptr : found->second;
    ibv_wc_status status = IBV_WC_RETRY_EXC_ERR;
    bool reachable = other && (other->state == IBV_QPS_RTS || other->state == IBV_QPS_RTR) &&
                     (pair.routed || !machine().limits[other->device].routed);
    if (reachable && !execute(*other, pair.initiates, pair.posted.front(), status)) return;
    Send send = std::move(pair.posted.front());
    pair.posted.pop_front();
    end(pair, send, status);
    if (status == IBV_WC_SUCCESS) continue;
    break_pair(pair);
    if (status == IBV_WC_REM_ACCESS_ERR) break_pair(*other);
  }
}

void progress_all() {
  std::vector<uint32_t> numbers;
  for (auto& [number, pair] : machine().pairs) numbers.push_back(number);
  for (uint32_t number : numbers)
    if (auto found = machine().pairs.find(number); found != machine().pairs.end()) progress(*found->second);
}

void break_pair(Pair& pair) {
  const ibv_qp_state before = std::exchange(pair.state, IBV_QPS_ERR);
  for (const Send& send : std::exchange(pair.posted, {})) end(pair, send, IBV_WC_WR_FLUSH_ERR);
  if (before != IBV_QPS_RTR && before != IBV_QPS_RTS) return;
  if (machine().last == Machine::Last::told) return end_receives(pair);
  pair.at_receive = take_receive(pair, pair.receive);
  if (machine().last == Machine::Last::late) machine().ending.emplace_back(&pair, kLate);
}

void tell(ibv_context* context, const ibv_async_event& event) {
  machine().events[context].push_back(event);
  uint64_t one = 1;
  if (::write(context->async_fd, &one, sizeof one) != sizeof one) std::abort();
}

// It takes no more from its shared receives, and what it was at has completed.
void end_receives(Pair& pair) {
  if (std::exchange(pair.at_receive, false)) {
    ibv_wc wc{};
    wc.wr_id = pair.receive.id;
    wc.status = IBV_WC_WR_FLUSH_ERR;
    wc.qp_num = pair.qp_num;
    complete(*static_cast<Queue*>(pair.recv_cq), wc, false);
  }
  ibv_async_event event{};
  event.event_type = IBV_EVENT_QP_LAST_WQE_REACHED;
  event.element.qp = &pair;
  tell(pair.context, event);
}

}  // namespace fake
