#include "links/rdma/rail.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <utility>

#include "core/doorbell.hpp"
#include "core/link.hpp"

namespace aiocomm::rdma {

namespace {

constexpr int kBatch = 32;

// Work request ids: what it was, and which.
enum class What : uint64_t { frame = 1, chunk, slot, immediate };
uint64_t id_of(What what, uint32_t which) { return static_cast<uint64_t>(what) << 32 | which; }
What what_of(uint64_t id) { return static_cast<What>(id >> 32); }

template <typename T>
T* check(T* made, const std::string& rail, const char* what) {
  if (made) return made;
  int error = errno;
  std::string text = rail + ": cannot make " + what + ": " + strerror(error);
  if (error == ENOMEM || error == EPERM)
    text += "; the locked-memory limit may be too small: ulimit -l unlimited";
  throw LinkFailure(text, error);
}

void non_blocking(int fd) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }

}  // namespace

Numbers QueuePairs::numbers() const {
  Numbers numbers{};
  for (size_t i = 0; i < all.size(); ++i) numbers[i] = all[i] ? all[i]->qp_num : 0;
  return numbers;
}

Rail::Rail(const Verbs& verbs, Port port, const Transport& transport)
    : verbs_(verbs), port_(std::move(port)), transport_(transport) {
  try {
    int count = 0;
    ibv_device** list = check(verbs_.get_device_list(&count), name(), "a list of devices");
    std::unique_ptr<ibv_device*, void (*)(ibv_device**)> owned(list, verbs_.free_device_list);
    for (int i = 0; i < count && !context_; ++i)
      if (port_.device == verbs_.get_device_name(list[i])) context_ = verbs_.open_device(list[i]);
    check(context_, name(), "a context");
    node_ = context_->device->dev_name;
    ibv_device_attr limits{};
    verbs_.query_device(context_, &limits);
    auto at_most = [](uint32_t wanted, int limit) {
      return limit > 0 ? std::min(wanted, static_cast<uint32_t>(limit)) : wanted;
    };
    max_slots_ = at_most(kMaxSlots, limits.max_srq_wr) / kCredits * kCredits;
    immediates_ = at_most(kImmediates, limits.max_srq_wr);
    int depth = static_cast<int>(at_most(1 << 15, limits.max_cqe));
    domain_ = check(verbs_.alloc_pd(context_), name(), "a protection domain");
    for (ibv_comp_channel** channel : {&channel_, &express_channel_}) {
      *channel = check(verbs_.create_comp_channel(context_), name(), "a completion channel");
      non_blocking((*channel)->fd);
    }
    auto queue = [&](ibv_comp_channel* channel) {
      return check(verbs_.create_cq(context_, depth, nullptr, channel, 0), name(), "a completion queue");
    };
    express_queue_ = queue(express_channel_);
    frames_queue_ = queue(channel_);
    bulk_queue_ = queue(channel_);
    ibv_srq_init_attr shared{};
    shared.attr.max_sge = 1;
    shared.attr.max_wr = max_slots_;
    frames_srq_ = check(verbs_.create_srq(domain_, &shared), name(), "a shared receive queue");
    shared.attr.max_wr = immediates_;
    bulk_srq_ = check(verbs_.create_srq(domain_, &shared), name(), "a shared receive queue");
    slabs_.resize(max_slots_ / kCredits);
    for (uint32_t i = 0; i < immediates_; ++i) {
      ibv_recv_wr request{}, *bad;
      request.wr_id = id_of(What::immediate, 0);
      if (int error = ibv_post_srq_recv(bulk_srq_, &request, &bad))
        throw LinkFailure(name() + ": cannot post receives: " + strerror(error), error);
    }
    non_blocking(context_->async_fd);
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    wake_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (epoll_ < 0 || wake_ < 0) throw LinkFailure(name() + ": no descriptors left", errno);
    for (int fd : {channel_->fd, context_->async_fd, wake_}) {
      epoll_event event{EPOLLIN, {nullptr}};
      event.data.fd = fd;
      epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
    }
  } catch (...) {
    release_all();
    throw;
  }
}

Rail::~Rail() {
  stop();
  release_all();
}

void Rail::release_all() {
  auto give = [](auto*& held, auto release) {
    if (held) release(held);
    held = nullptr;
  };
  give(frames_srq_, verbs_.destroy_srq);
  give(bulk_srq_, verbs_.destroy_srq);
  for (Slab& slab : slabs_) give(slab.region, verbs_.dereg_mr);  // their bytes may still be looked at
  for (ibv_cq** queue : {&express_queue_, &frames_queue_, &bulk_queue_}) give(*queue, verbs_.destroy_cq);
  for (ibv_comp_channel** channel : {&channel_, &express_channel_})
    give(*channel, verbs_.destroy_comp_channel);
  give(domain_, verbs_.dealloc_pd);
  give(context_, verbs_.close_device);
  for (int* fd : {&epoll_, &wake_})
    if (int open = std::exchange(*fd, -1); open >= 0) ::close(open);
}

bool Rail::present() const { return ::access(("/sys/class/infiniband_verbs/" + node_).c_str(), F_OK) == 0; }

void Rail::leave() {
  up_.store(false, std::memory_order_release);
  if (gone_.exchange(true)) return;
  std::lock_guard lock(polling_);
  for (Completions* lane : all_lanes_) lane->failed(name() + ": the device was removed");
}

bool Rail::idle_without_device() {
  if (!gone() || !context_) return false;
  std::lock_guard lock(polling_);
  return lanes_.empty();
}

void Rail::retire() {
  stop();
  release_all();
}

std::string Rail::name() const { return "device " + port_.device + " port " + std::to_string(port_.number); }

void Rail::start() {
  ibv_req_notify_cq(express_queue_, 1);
  poller_ = std::thread([this] { run_poller(); });
  poster_ = std::thread([this] { run_poster(); });
}

void Rail::stop() {
  {
    std::lock_guard lock(queue_);
    stopping_.store(true, std::memory_order_release);
  }
  queued_.notify_all();
  kick();
  for (std::thread* thread : {&poller_, &poster_})
    if (thread->joinable()) thread->join();
}

void Rail::kick() {
  if (wake_ >= 0) ring_fd(wake_);
}

// ---------------------------------------------------------------- queue pairs

void Rail::add_slots(uint32_t count) {
  uint32_t index = slab_count_.load(std::memory_order_relaxed);
  if (index == slabs_.size())
    return;  // what there is, is shared: receivers that are not ready make senders wait
  void* memory = std::aligned_alloc(4096, count * static_cast<size_t>(kSlotBytes));
  if (!memory) throw LinkFailure(name() + ": no memory for receive slots", ENOMEM);
  Slab slab{{static_cast<std::byte*>(memory), std::free}, nullptr};
  slab.region =
      check(verbs_.reg_mr(domain_, memory, count * static_cast<size_t>(kSlotBytes), IBV_ACCESS_LOCAL_WRITE),
            name(), "receive slots");
  slabs_[index] = std::move(slab);
  slab_count_.store(index + 1, std::memory_order_release);
  for (uint32_t i = 0; i < count; ++i) give_back(index * kCredits + i);
}

ibv_qp* Rail::make_pair(ibv_cq* queue, ibv_srq* receives, uint32_t depth, uint32_t inline_bytes) {
  ibv_qp_init_attr wanted{};
  wanted.qp_type = IBV_QPT_RC;
  wanted.send_cq = wanted.recv_cq = queue;
  wanted.srq = receives;
  wanted.cap.max_send_sge = 1;
  wanted.cap.max_send_wr = depth;
  wanted.cap.max_inline_data = inline_bytes;
  return verbs_.create_qp(domain_, &wanted);
}

QueuePairs Rail::open() {
  if (gone()) throw LinkFailure(name() + ": the device was removed", ENODEV);
  QueuePairs pairs;
  try {
    {
      std::lock_guard lock(slabs_mutex_);
      if (++peers_ > slab_count_.load(std::memory_order_relaxed)) add_slots(kCredits);
    }
    // Devices do not tell what they take inline: ask for less until it fits.
    while (!(pairs.all[0] = make_pair(express_queue_, frames_srq_, kFrameDepth, max_inline_)) &&
           max_inline_) {
      max_inline_ /= 2;
      if (max_inline_ < 64) max_inline_ = 0;
    }
    check(pairs.all[0], name(), "a queue pair");
    pairs.all[1] =
        check(make_pair(frames_queue_, frames_srq_, kFrameDepth, max_inline_), name(), "a queue pair");
    for (size_t level = 0; level < transport_.bulk.size(); ++level)
      pairs.all[2 + level] = check(make_pair(bulk_queue_, bulk_srq_, kBulkDepth, 0), name(), "a queue pair");
    for (size_t i = 0; i < pairs.all.size() && pairs.all[i]; ++i) {
      ibv_qp_attr attributes{};
      attributes.qp_state = IBV_QPS_INIT;
      attributes.port_num = port_.number;
      // Frames reach no memory but slots.
      attributes.qp_access_flags = i < 2 ? 0 : IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
      int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
      if (int error = verbs_.modify_qp(pairs.all[i], &attributes, mask))
        throw LinkFailure(name() + ": a queue pair cannot be initialised: " + strerror(error), error);
    }
  } catch (...) {
    destroy(pairs);
    throw;
  }
  return pairs;
}

void Rail::destroy(QueuePairs& pairs) {
  for (ibv_qp*& qp : pairs.all)
    if (qp) verbs_.destroy_qp(std::exchange(qp, nullptr));
  std::lock_guard lock(slabs_mutex_);
  --peers_;
}

void Rail::connect(const QueuePairs& pairs, const Address& theirs, const Numbers& numbers) {
  for (size_t i = 0; i < pairs.all.size(); ++i) {
    if (!pairs.all[i] != !numbers[i])
      throw LinkFailure(name() +
                            ": the peer has another number of service levels: set AIOCOMM_RDMA_SERVICE_LEVEL "
                            "and AIOCOMM_RDMA_TRAFFIC_CLASS alike on all hosts",
                        EPROTO);
    if (!pairs.all[i]) continue;
    const Level& level = i < 2 ? transport_.frames : transport_.bulk[i - 2];
    ibv_qp_attr to{};
    to.qp_state = IBV_QPS_RTR;
    to.path_mtu = static_cast<ibv_mtu>(std::min(port_.address.mtu, theirs.mtu));
    to.dest_qp_num = numbers[i];
    to.max_dest_rd_atomic = 16;
    to.min_rnr_timer = 12;  // 0.64 ms
    to.ah_attr.is_global = theirs.link_layer == IBV_LINK_LAYER_ETHERNET;
    to.ah_attr.grh.dgid = theirs.gid;
    to.ah_attr.grh.sgid_index = static_cast<uint8_t>(port_.gid_index);
    to.ah_attr.grh.hop_limit = 64;
    to.ah_attr.grh.traffic_class = level.traffic;
    to.ah_attr.sl = level.service;
    to.ah_attr.dlid = theirs.lid;
    to.ah_attr.port_num = port_.number;
    int error = verbs_.modify_qp(pairs.all[i], &to,
                                 IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
                                     IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (!error) {
      ibv_qp_attr send{};
      send.qp_state = IBV_QPS_RTS;
      send.timeout = transport_.timeout;
      send.retry_cnt = Transport::kRetries;
      send.rnr_retry = 7;
      send.max_rd_atomic = 16;
      error = verbs_.modify_qp(pairs.all[i], &send,
                               IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                   IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
    }
    if (error)
      throw LinkFailure(name() + ": no way to " + describe(theirs) + " (" + strerror(error) +
                            "): see that the address can be reached from this port's network interface",
                        error);
  }
}

void Rail::add(const QueuePairs& pairs, Completions* lane) {
  std::lock_guard lock(polling_);
  for (ibv_qp* qp : pairs.all)
    if (qp) lanes_[qp->qp_num] = lane;
  all_lanes_.push_back(lane);
}

void Rail::fail(const QueuePairs& pairs) {
  ibv_qp_attr error{};
  error.qp_state = IBV_QPS_ERR;
  for (ibv_qp* qp : pairs.all)
    if (qp) verbs_.modify_qp(qp, &error, IBV_QP_STATE);
}

void Rail::remove(QueuePairs& pairs, std::mutex& posting) {
  if (!pairs) return;
  fail(pairs);  // a call that is posting ends soon
  {
    std::lock_guard lock(queue_);
    std::erase_if(work_, [&](const Work& work) { return work.posting == &posting; });
  }
  std::lock_guard posted(posting);
  {
    std::lock_guard lock(polling_);
    if (auto lane = lanes_.find(pairs.all[0]->qp_num); lane != lanes_.end())
      std::erase(all_lanes_, lane->second);
    for (ibv_qp* qp : pairs.all)
      if (qp) lanes_.erase(qp->qp_num);
  }
  destroy(pairs);
}

// ---------------------------------------------------------------- out

int Rail::post_frame(const QueuePairs& pairs, Wake wake, uint32_t seq, const std::byte* data, uint32_t nbytes,
                     uint32_t lkey) {
  ibv_sge piece{reinterpret_cast<uint64_t>(data), nbytes, lkey};
  ibv_send_wr request{}, *bad;
  request.wr_id = id_of(What::frame, seq);
  request.sg_list = &piece;
  request.num_sge = 1;
  request.opcode = IBV_WR_SEND;
  request.send_flags = IBV_SEND_SIGNALED | (wake == Wake::none ? 0 : IBV_SEND_SOLICITED);
  counters.sends.fetch_add(1, std::memory_order_relaxed);
  if (nbytes <= max_inline_) {
    request.send_flags |= IBV_SEND_INLINE;
    counters.inline_sends.fetch_add(1, std::memory_order_relaxed);
  }
  return ibv_post_send(pairs.frames(wake), &request, &bad);
}

void Rail::post_bulk(const Work& work) {
  if (work.opcode == IBV_WR_RDMA_READ || work.nbytes <= kSlotBytes)
    if (std::unique_lock posting(*work.posting, std::try_to_lock); posting) {
      post_now(work);
      if (!armed_.load() && !poster_looks_.load()) kick();
      return;
    }
  {
    std::lock_guard lock(queue_);
    auto before =
        std::find_if(work_.begin(), work_.end(), [&](const Work& other) { return other.cls < work.cls; });
    work_.insert(before, work);
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
    Work work = work_.front();
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
  counter.fetch_add(1, std::memory_order_relaxed);
  int error = ibv_post_send(work.qp, &request, &bad);
  work.lane->chunk_posted();
  if (error) work.lane->chunk_done(work.chunk, error);
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
  return poll_queue(express_queue_) + poll_queue(frames_queue_) + poll_queue(bulk_queue_);
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
    poll_queues();
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
      timespec t;
      clock_gettime(CLOCK_MONOTONIC, &t);
      uint64_t now_ns = static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
      for (auto [number, lane] : lanes_) lane->look(now_ns);
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
    verbs_.ack_async_event(&event);
    if (type == IBV_EVENT_DEVICE_FATAL) {
      on_gone();
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
