// A rail at work: what it posts, what has completed, and its two threads. rail.hpp has the theory.

#include <arpa/inet.h>
#include <pthread.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "core/doorbell.hpp"
#include "core/link.hpp"
#include "links/rdma/clock.hpp"
#include "links/rdma/rail.hpp"
#include "links/rdma/work_id.hpp"

namespace aiocomm::rdma {
namespace {
constexpr int kBatch = 32;
constexpr uint64_t kQuickNs = 20000;
}  // namespace

// ---------------------------------------------------------------- out

int Rail::post_frame(const QueuePairs& pairs, Wake wake, const FramePiece& frame) {
  ibv_send_wr request{};
  request.opcode = IBV_WR_SEND;
  if (wake != Wake::none) request.send_flags = IBV_SEND_SOLICITED;
  counters.sends.fetch_add(1, std::memory_order_relaxed);
  if (frame.nbytes <= max_inline_) counters.inline_sends.fetch_add(1, std::memory_order_relaxed);
  return post_piece(pairs.frames(wake), request, frame);
}

int Rail::write_frame(const QueuePairs& pairs, const FramePiece& frame, uint64_t remote, uint32_t rkey) {
  ibv_send_wr request{};
  request.opcode = IBV_WR_RDMA_WRITE;
  request.wr.rdma.remote_addr = remote;
  request.wr.rdma.rkey = rkey;
  counters.ring_writes.fetch_add(1, std::memory_order_relaxed);
  return post_piece(pairs.frames(Wake::loop), request, frame);
}

int Rail::post_piece(ibv_qp* qp, ibv_send_wr& request, const FramePiece& frame) {
  ibv_sge piece{reinterpret_cast<uint64_t>(frame.data), frame.nbytes, frame.lkey};
  ibv_send_wr* bad;
  request.wr_id = id_of(What::frame, frame.seq);
  request.sg_list = &piece;
  request.num_sge = 1;
  request.send_flags |= IBV_SEND_SIGNALED | (frame.nbytes <= max_inline_ ? IBV_SEND_INLINE : 0);
  return ibv_post_send(qp, &request, &bad);
}

void Rail::post_bulk(Work&& work) {
  if (work.nbytes <= kSlotBytes || posting_ns_.load(std::memory_order_relaxed) <= kQuickNs)
    if (std::unique_lock posting(*work.posting, std::try_to_lock); posting) {
      post_now(work);
      if (!armed_.load() && !poster_looks_.load()) kick();
      return;
    }
  {
    std::lock_guard lock(queue_);
    auto before =
        std::find_if(work_.begin(), work_.end(), [&](const Work& other) { return other.cls < work.cls; });
    work_.insert(before, std::move(work));
  }
  queued_.notify_one();
}

void Rail::run_poster() {
  pthread_setname_np(pthread_self(), "aiocomm-post");
  std::unique_lock lock(queue_);
  for (;;) {
    queued_.wait(lock, [this] { return stopping_.load(std::memory_order_relaxed) || !work_.empty(); });
    if (work_.empty()) return;
    work_off(lock);
  }
}

void Rail::work_off(std::unique_lock<std::mutex>& lock) {
  poster_looks_.store(true);
  while (!work_.empty()) {
    const Work work = std::move(work_.front());
    work_.pop_front();
    // Taken while the queue is locked: whoever removes the lane finds its work either queued or being posted.
    std::unique_lock posting(*work.posting);
    lock.unlock();
    post_now(work);
    posting.unlock();
    int done;
    {
      Attending all(nullptr);  // it is looked at below
      done = poll();
    }
    if (done) handle();
    lock.lock();
  }
  lock.unlock();
  poster_looks_.store(false);
  if (!armed_.load()) kick();
  lock.lock();
}

void Rail::post_now(const Work& work) {
  ibv_sge piece{work.local, work.nbytes, work.lkey};
  ibv_send_wr request{}, *bad;
  request.wr_id = id_of(What::chunk, work.chunk);
  request.sg_list = &piece;
  request.num_sge = work.nbytes ? 1 : 0;
  request.opcode = work.opcode;
  request.send_flags = IBV_SEND_SIGNALED | (work.solicited ? IBV_SEND_SOLICITED : 0);
  request.imm_data = htonl(work.immediate);
  request.wr.rdma.remote_addr = work.remote;
  request.wr.rdma.rkey = work.rkey;
  auto& counter = work.opcode == IBV_WR_RDMA_READ ? counters.reads : counters.writes;
  counter.fetch_add(std::max<size_t>(1, work.rows.requests.size()), std::memory_order_relaxed);
  const uint64_t began = now_ns();
  int error = work.rows.requests.empty() ? ibv_post_send(work.qp, &request, &bad) : post_rows(work, request);
  if (work.nbytes >
      kSlotBytes) {  // an average of the last few; threads that overwrite each other's do no harm
    uint64_t mean = posting_ns_.load(std::memory_order_relaxed);
    posting_ns_.store(mean - mean / 8 + (now_ns() - began) / 8, std::memory_order_relaxed);
  }
  work.lane->chunk_posted();
  if (error) work.lane->chunk_done(work.chunk, error);
}

// `last` is what the last of them is to be: they complete in order, so its end is that of all.
int Rail::post_rows(const Work& work, ibv_send_wr last) {
  const size_t count = work.rows.requests.size();
  std::vector<ibv_sge> pieces;
  pieces.reserve(work.rows.pieces.size());
  for (const Piece& piece : work.rows.pieces) pieces.push_back({piece.local, piece.nbytes, work.lkey});
  std::vector<ibv_send_wr> requests(count, last);
  ibv_sge* next = pieces.data();
  for (size_t i = 0; i < count; ++i) {
    ibv_send_wr& request = requests[i];
    request.wr.rdma.remote_addr = work.rows.requests[i].remote;
    request.sg_list = next;
    request.num_sge = static_cast<int>(work.rows.requests[i].pieces);
    next += request.num_sge;
    if (i + 1 == count) break;
    request.next = &requests[i + 1];
    request.opcode = work.opcode == IBV_WR_RDMA_READ ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
    request.send_flags = 0;
  }
  ibv_send_wr* bad;
  return ibv_post_send(work.qp, requests.data(), &bad);
}

const std::byte* Rail::slot(uint32_t index) const {
  return slabs_[index / kCredits].memory.get() + static_cast<size_t>(index % kCredits) * kSlotBytes;
}

void Rail::give_back(uint32_t index) {
  if (!frames_srq_) return;
  const Slab& slab = slabs_[index / kCredits];
  ibv_sge piece{reinterpret_cast<uint64_t>(slot(index)), kSlotBytes, slab.region->lkey};
  ibv_recv_wr request{}, *bad;
  request.wr_id = id_of(What::slot, index);
  request.sg_list = &piece;
  request.num_sge = 1;
  ibv_post_srq_recv(frames_srq_, &request, &bad);
}

// ---------------------------------------------------------------- in

int Rail::poll() {
  std::unique_lock lock(polling_, std::try_to_lock);
  return lock ? poll_queues() : 0;
}

int Rail::poll_queues() {
  if (!context_) return 0;
  if (int n = poll_queue(express_queue_)) return n;  // a loop waits for these; the others at the next look
  return poll_queue(frames_queue_) + poll_queue(bulk_queue_);
}

void Rail::drain() {
  std::lock_guard lock(polling_);
  while (poll_queues() > 0) {
  }
}

// The loop was woken by frames for it. The channel has told once and tells again only of what comes after it is armed:
// what came before that is found by this look.
void Rail::on_ready(uint32_t) {
  if (!context_) return;
  ibv_cq* queue;
  void* context;
  if (verbs_.get_cq_event(express_channel_, &queue, &context) == 0) verbs_.ack_cq_events(queue, 1);
  ibv_req_notify_cq(express_queue_, 1);
  {
    std::lock_guard lock(polling_);
    Attending all(nullptr);
    int found = 0, n;
    do {
      found += n = poll_queue(express_queue_);
    } while (n == kBatch);
    if (!found) return;
    attended_ = all_lanes_;
  }
  // None of them is freed while the token is held; one that has ended meanwhile has nothing to say.
  for (Completions* lane : attended_) lane->attend();
}

int Rail::poll_queue(ibv_cq* queue) {
  ibv_wc done[kBatch];
  int n = ibv_poll_cq(queue, kBatch, done);
  for (int i = 0; i < n; ++i) dispatch(done[i]);
  return std::max(n, 0);
}

void Rail::dispatch(const ibv_wc& wc) {
  auto it = lanes_.find(wc.qp_num);
  Completions* lane = it == lanes_.end() ? nullptr : it->second;
  auto which = static_cast<uint32_t>(wc.wr_id);
  bool ok = wc.status == IBV_WC_SUCCESS;
  switch (what_of(wc.wr_id)) {
    case What::slot:
      if (!ok || !lane) {  // of a peer that is gone
        give_back(which);
        return;
      }
      counters.received.fetch_add(1, std::memory_order_relaxed);
      return lane->arrived(which, wc.byte_len, slot(which));
    case What::immediate: {
      ibv_recv_wr request{}, *bad;
      request.wr_id = wc.wr_id;
      ibv_post_srq_recv(bulk_srq_, &request, &bad);
      if (!ok || !lane) return;
      counters.immediates.fetch_add(1, std::memory_order_relaxed);
      return lane->immediate(ntohl(wc.imm_data), wc.byte_len);
    }
    case What::frame:
      counters.send_completions.fetch_add(1, std::memory_order_relaxed);
      if (!lane) return;
      if (ok) return lane->frame_sent(which);
      if (wc.status != IBV_WC_WR_FLUSH_ERR) lane->failed(name() + ": " + verbs_.wc_status_str(wc.status));
      return;
    case What::chunk:
      counters.send_completions.fetch_add(1, std::memory_order_relaxed);
      if (!lane) return;
      // Flushed, without an error of its own before it: the other end of the queue pair broke.
      lane->chunk_done(which, ok                                   ? 0
                              : wc.status == IBV_WC_REM_ACCESS_ERR ? EACCES
                              : wc.status == IBV_WC_WR_FLUSH_ERR   ? ECONNRESET
                                                                   : EIO);
      if (!ok && wc.status != IBV_WC_WR_FLUSH_ERR)
        lane->failed(name() + ": " + verbs_.wc_status_str(wc.status));
      return;
  }
}

void Rail::run_poller() {
  pthread_setname_np(pthread_self(), "aiocomm-poll");
  while (!stopping_.load(std::memory_order_acquire)) {
    bool expecting = false;
    int n;
    {
      std::lock_guard lock(polling_);
      n = poll_queue(frames_queue_) + poll_queue(bulk_queue_);
      if (!n) {
        ibv_req_notify_cq(frames_queue_, 1);
        arm_bulk();
        n = poll_queue(frames_queue_) + poll_queue(bulk_queue_);  // what came before it was armed
        for (auto [number, lane] : lanes_) expecting = expecting || lane->expects();
      }
    }
    if (!n && !wait(expecting) && expecting) {
      std::lock_guard lock(polling_);
      poll_queue(express_queue_);
      const uint64_t now = now_ns();
      for (auto [number, lane] : lanes_) lane->look(now);
    }
  }
}

// Under `polling_`.
void Rail::arm_bulk() {
  armed_.store(false);
  if (poster_looks_.load()) return;
  uint64_t posted =
      counters.writes.load(std::memory_order_relaxed) + counters.reads.load(std::memory_order_relaxed);
  bool ours = std::exchange(posted_before_, posted) != posted;  // and likely goes on so
  for (Completions* lane : all_lanes_) ours = ours || lane->moves();
  ibv_req_notify_cq(bulk_queue_, !ours);
  if (ours) armed_.store(true);
}

bool Rail::wait(bool expecting) {
  epoll_event ready[4];
  int n = epoll_wait(epoll_, ready, 4, expecting ? kLookMs : -1);
  counters.wakeups.fetch_add(1, std::memory_order_relaxed);
  for (int i = 0; i < n; ++i) {
    if (ready[i].data.fd == wake_) {
      clear_fd(wake_);
    } else if (ready[i].data.fd == channel_->fd) {
      ibv_cq* queue;
      void* context;
      while (verbs_.get_cq_event(channel_, &queue, &context) == 0) {
        if (queue == bulk_queue_) armed_.store(false);
        verbs_.ack_cq_events(queue, 1);
      }
    } else {
      read_events();
    }
  }
  return n > 0;
}

void Rail::read_events() {
  ibv_async_event event;
  while (verbs_.get_async_event(context_, &event) == 0) {
    ibv_event_type type = event.event_type;
    bool ours = event.element.port_num == port_.number;
    if (type == IBV_EVENT_QP_LAST_WQE_REACHED) {
      std::lock_guard lock(ended_mutex_);
      ended_.insert(event.element.qp->qp_num);
    }
    verbs_.ack_async_event(&event);  // before that its queue pair is not destroyed
    // The queues are the rail's, whose own they all are on this context: without one of them nothing would ever be heard
    // of what is under way.
    if (type == IBV_EVENT_DEVICE_FATAL || type == IBV_EVENT_CQ_ERR || type == IBV_EVENT_SRQ_ERR) {
      on_gone(verbs_.event_type_str(type));
      continue;
    }
    bool down = type == IBV_EVENT_PORT_ERR && ours;
    bool up = type == IBV_EVENT_PORT_ACTIVE && ours;
    if (!down && !up) continue;
    up_.store(up, std::memory_order_release);
    if (up) continue;
    std::lock_guard lock(polling_);
    for (auto [number, lane] : lanes_) lane->failed(name() + ": " + verbs_.event_type_str(type));
  }
}

}  // namespace aiocomm::rdma
