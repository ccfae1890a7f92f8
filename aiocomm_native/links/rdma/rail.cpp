#include "links/rdma/rail.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
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
#include "core/guarded.hpp"
#include "core/link.hpp"
#include "links/rdma/clock.hpp"
#include "links/rdma/work_id.hpp"

namespace aiocomm::rdma {

namespace {

constexpr int kMostPieces = 8;  // of one request: room in the queues grows with it

template <typename T>
T* check(T* made, const std::string& rail, const char* what) {
  if (made) return made;
  int error = errno;
  std::string text = rail + ": cannot make " + what + ": " + strerror(error);
  if (error == ENOMEM || error == EPERM)
    text += "; the device has no more of them, or the locked-memory limit is too small: ulimit -l unlimited";
  if (error == EAGAIN) text += "; this process's control group allows no more: raise its rdma.max";
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
    if (!present()) node_.clear();  // the list is not to be seen from here
    ibv_device_attr limits{};
    verbs_.query_device(context_, &limits);
    auto at_most = [](uint32_t wanted, int limit) {
      return limit > 0 ? std::min(wanted, static_cast<uint32_t>(limit)) : wanted;
    };
    // Not all devices gather as many for a read as they scatter for a write; those that do not say take one.
    most_pieces_ = static_cast<uint32_t>(std::clamp(limits.max_sge, 1, kMostPieces));
    most_read_pieces_ =
        std::min(most_pieces_, static_cast<uint32_t>(std::clamp(limits.max_sge_rd, 1, kMostPieces)));
    max_slots_ = at_most(kMaxSlots, limits.max_srq_wr) / kCredits * kCredits;
    immediates_ = at_most(kImmediates, limits.max_srq_wr);
    int depth = static_cast<int>(at_most(1 << 15, limits.max_cqe));
    domain_ = check(verbs_.alloc_pd(context_), name(), "a protection domain");
    for (ibv_comp_channel** channel : {&channel_, &express_channel_}) {
      *channel = check(verbs_.create_comp_channel(context_), name(), "a completion channel");
      non_blocking((*channel)->fd);
    }
    // Each vector interrupts another processor: what many processes and rails wait for is spread over them.
    int vector = ::getpid();
    auto queue = [&](ibv_comp_channel* channel) {
      return check(verbs_.create_cq(context_, depth, nullptr, channel,
                                    vector++ % std::max(context_->num_comp_vectors, 1)),
                   name(), "a completion queue");
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

bool Rail::present() const {
  return node_.empty() || ::access(("/sys/class/infiniband_verbs/" + node_).c_str(), F_OK) == 0;
}

void Rail::leave(const char* why) {
  up_.store(false, std::memory_order_release);
  if (gone_.exchange(true)) return;
  std::lock_guard lock(polling_);
  for (Completions* lane : all_lanes_) lane->failed(name() + ": " + why);
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
  poller_ = std::thread([this] { run(&Rail::run_poller); });
  poster_ = std::thread([this] { run(&Rail::run_poster); });
}

void Rail::run(void (Rail::*turns)()) noexcept {
  guarded([&] { (this->*turns)(); }, on_failed);
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

ibv_qp* Rail::make_pair(ibv_cq* queue, ibv_srq* receives, uint32_t depth, uint32_t pieces,
                        uint32_t inline_bytes) {
  ibv_qp_init_attr wanted{};
  wanted.qp_type = IBV_QPT_RC;
  wanted.send_cq = wanted.recv_cq = queue;
  wanted.srq = receives;
  wanted.cap.max_send_sge = pieces;
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
    uint32_t takes = max_inline_;
    while (!(pairs.all[0] = make_pair(express_queue_, frames_srq_, kFrameDepth, 1, takes)) && takes)
      takes = takes < 128 ? 0 : takes / 2;
    check(pairs.all[0], name(), "a queue pair");
    max_inline_ = takes;  // else it was not that which it lacked
    pairs.all[1] =
        check(make_pair(frames_queue_, frames_srq_, kFrameDepth, 1, max_inline_), name(), "a queue pair");
    for (size_t level = 0; level < transport_.bulk.size(); ++level)
      pairs.all[2 + level] =
          check(make_pair(bulk_queue_, bulk_srq_, kBulkDepth, most_pieces_, 0), name(), "a queue pair");
    for (size_t i = 0; i < pairs.all.size() && pairs.all[i]; ++i) {
      ibv_qp_attr attributes{};
      attributes.qp_state = IBV_QPS_INIT;
      attributes.port_num = port_.number;
      attributes.pkey_index = port_.pkey_index;
      // Frames reach no memory but slots, and the ring of a loop that spins.
      attributes.qp_access_flags = i == 0   ? IBV_ACCESS_REMOTE_WRITE
                                   : i == 1 ? 0
                                            : IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
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
  const Numbers numbers = pairs.numbers();
  for (ibv_qp*& qp : pairs.all)
    if (qp) verbs_.destroy_qp(std::exchange(qp, nullptr));
  {
    std::lock_guard lock(ended_mutex_);
    for (uint32_t number : numbers) ended_.erase(number);
  }
  std::lock_guard lock(slabs_mutex_);
  --peers_;
}

void Rail::connect(const QueuePairs& pairs, const Address& theirs, const Numbers& numbers,
                   const std::atomic<bool>& given_up) {
  for (size_t i = 0; i < pairs.all.size() && !given_up.load(std::memory_order_relaxed); ++i) {
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
    to.max_dest_rd_atomic = port_.address.reads;
    to.min_rnr_timer = 12;  // 0.64 ms
    to.ah_attr.is_global =
        theirs.link_layer == IBV_LINK_LAYER_ETHERNET || theirs.routed || port_.address.routed;
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
      send.max_rd_atomic = std::min(port_.reads, theirs.reads);  // the peer refuses more
      error = verbs_.modify_qp(pairs.all[i], &send,
                               IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
                                   IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
    }
    if (error)
      throw LinkFailure(name() + ": no way from " + describe(port_.address) + " (GID index " +
                            std::to_string(port_.gid_index) + ") to " + describe(theirs) + " (" +
                            strerror(error) +
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
  std::vector<uint32_t> receive;
  for (ibv_qp* qp : pairs.all)
    if (qp && (qp->state == IBV_QPS_RTR || qp->state == IBV_QPS_RTS)) receive.push_back(qp->qp_num);
  fail(pairs);  // a call that is posting ends soon
  {
    std::lock_guard lock(queue_);
    std::erase_if(work_, [&](const Work& work) { return work.posting == &posting; });
  }
  std::lock_guard posted(posting);
  await_receives(std::move(receive));
  {
    std::lock_guard lock(polling_);
    // What has come before is acknowledged: the peer does not say it again.
    while (poll_queues() > 0) {
    }
    forget(pairs);
  }
  destroy(pairs);
}

// Which takes a device microseconds. One that does not tell is not asked again.
void Rail::await_receives(std::vector<uint32_t> numbers) {
  const uint64_t until = now_ns() + kEndsNs;
  while (tells_ended_ && !gone()) {
    read_events();
    {
      std::lock_guard lock(ended_mutex_);
      std::erase_if(numbers, [this](uint32_t number) { return ended_.contains(number); });
    }
    if (numbers.empty()) return;
    tells_ended_ = now_ns() < until;
    sched_yield();
  }
}

void Rail::ignore(const QueuePairs& pairs) {
  std::lock_guard lock(polling_);
  forget(pairs);
}

// Under `polling_`.
void Rail::forget(const QueuePairs& pairs) {
  if (auto lane = lanes_.find(pairs.all[0]->qp_num); lane != lanes_.end())
    std::erase(all_lanes_, lane->second);
  for (ibv_qp* qp : pairs.all)
    if (qp) lanes_.erase(qp->qp_num);
}

}  // namespace aiocomm::rdma
