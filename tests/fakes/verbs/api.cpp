// libibverbs as far as the rdma link calls it, over adapters that exist only here. Both ends of a pair are in one process.
//
// FAKE_VERBS_DEVICES: how many (2), fake0, fake1, …, of one InfiniBand port each.

#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <string>

#include "queues.hpp"

#undef ibv_reg_mr
#undef ibv_query_port

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace fake;

namespace {

ibv_device* devices() {
  static ibv_device all[kMostDevices];
  return all;
}

// What a test has broken: a call by that thread throws.
void work_unless_broken() {
  const char* broken = machine().broken.load();
  char name[16];
  if (broken && pthread_getname_np(pthread_self(), name, sizeof name) == 0 && !std::strcmp(name, broken))
    throw std::bad_alloc();
}

int number_of(const ibv_context* context) { return static_cast<int>(context->device - devices()); }

int post_send(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad) {
  work_unless_broken();
  std::lock_guard lock(machine().mutex);
  auto& pair = *static_cast<Pair*>(qp);
  for (; wr; wr = wr->next) {
    *bad = wr;
    if (pair.state != IBV_QPS_RTS && pair.state != IBV_QPS_ERR) return EINVAL;
    Send send;
    send.id = wr->wr_id;
    send.opcode = wr->opcode;
    send.flags = wr->send_flags;
    send.immediate = wr->imm_data;
    send.remote = wr->wr.rdma.remote_addr;
    send.rkey = wr->wr.rdma.rkey;
    send.pieces.assign(wr->sg_list, wr->sg_list + wr->num_sge);
    const size_t most = wr->opcode == IBV_WR_RDMA_READ ? kMostReadPieces : pair.most_pieces;
    if (send.pieces.size() > most || pair.posted.size() == pair.depth) return ENOMEM;
    for (const ibv_sge& piece : send.pieces) send.nbytes += piece.length;
    if (send.opcode == IBV_WR_SEND || send.flags & IBV_SEND_INLINE) {
      for (const ibv_sge& piece : send.pieces) {
        if (!(send.flags & IBV_SEND_INLINE) && !reach(piece.lkey, piece.addr, piece.length, 0)) return EINVAL;
        auto data = reinterpret_cast<const std::byte*>(piece.addr);
        send.data.insert(send.data.end(), data, data + piece.length);
      }
      send.pieces.clear();
    }
    pair.posted.push_back(std::move(send));
    machine().requests += 1;
  }
  if (pair.state == IBV_QPS_ERR) break_pair(pair);
  progress(pair);
  return 0;
}

int post_srq_recv(ibv_srq* srq, ibv_recv_wr* wr, ibv_recv_wr**) {
  std::lock_guard lock(machine().mutex);
  for (; wr; wr = wr->next) {
    Receive receive{wr->wr_id};
    if (wr->num_sge) {
      receive.address = wr->sg_list[0].addr;
      receive.nbytes = wr->sg_list[0].length;
      receive.lkey = wr->sg_list[0].lkey;
    }
    static_cast<SharedReceives*>(srq)->posted.push_back(receive);
  }
  progress_all();
  return 0;
}

int poll_cq(ibv_cq* cq, int room, ibv_wc* into) {
  work_unless_broken();
  std::lock_guard lock(machine().mutex);
  auto& done = static_cast<Queue*>(cq)->done;
  int n = 0;
  for (; n < room && !done.empty(); ++n) {
    into[n] = done.front();
    done.pop_front();
  }
  return n;
}

int req_notify_cq(ibv_cq* cq, int solicited_only) {
  std::lock_guard lock(machine().mutex);
  static_cast<Queue*>(cq)->armed = solicited_only ? Queue::Armed::solicited : Queue::Armed::all;
  return 0;
}

int refused(int error) {
  errno = error;
  return -1;
}

bool lacks(int device, const char* call) {
  std::lock_guard lock(machine().mutex);
  auto found = machine().lacking.find({device, call});
  if (found == machine().lacking.end()) return false;
  errno = found->second;
  return true;
}

}  // namespace

EXPORT ibv_device** ibv_get_device_list(int* count) {
  const char* text = getenv("FAKE_VERBS_DEVICES");
  int n = text ? std::min(std::atoi(text), kMostDevices) : 2;
  auto list = static_cast<ibv_device**>(calloc(static_cast<size_t>(n) + 1, sizeof(ibv_device*)));
  for (int i = 0; i < n; ++i) {
    list[i] = &devices()[i];
    std::snprintf(list[i]->name, sizeof list[i]->name, "fake%d", i);
    std::snprintf(list[i]->dev_name, sizeof list[i]->dev_name, "uverbs-fake%d", i);  // the kernel lists none
  }
  if (count) *count = n;
  return list;
}
EXPORT void ibv_free_device_list(ibv_device** list) { free(list); }
EXPORT const char* ibv_get_device_name(ibv_device* device) { return device->name; }

EXPORT int ibv_fork_init() {
  std::lock_guard lock(machine().mutex);
  if (machine().registered) return EINVAL;
  machine().fork_safe = true;
  return 0;
}

EXPORT ibv_context* ibv_open_device(ibv_device* device) {
  if (lacks(static_cast<int>(device - devices()), "open_device")) return nullptr;
  auto* context = new ibv_context{};
  context->device = device;
  context->ops.post_send = post_send;
  context->ops.post_srq_recv = post_srq_recv;
  context->ops.poll_cq = poll_cq;
  context->ops.req_notify_cq = req_notify_cq;
  context->num_comp_vectors = 8;
  context->async_fd = eventfd(0, EFD_CLOEXEC);
  std::lock_guard lock(machine().mutex);
  machine().contexts.emplace(number_of(context), context);
  return context;
}
EXPORT int ibv_close_device(ibv_context* context) {
  {
    std::lock_guard lock(machine().mutex);
    std::erase_if(machine().contexts, [&](const auto& one) { return one.second == context; });
    machine().events.erase(context);
  }
  ::close(context->async_fd);
  delete context;
  return 0;
}
EXPORT int ibv_query_device(ibv_context* context, ibv_device_attr* attributes) {
  *attributes = {};
  std::lock_guard lock(machine().mutex);
  attributes->max_qp_init_rd_atom = machine().limits[number_of(context)].initiates;
  attributes->max_qp_rd_atom = machine().limits[number_of(context)].answers;
  attributes->phys_port_cnt = 1;
  attributes->max_srq = 1 << 10;
  attributes->max_srq_wr = 1 << 14;
  attributes->max_cqe = 1 << 16;
  attributes->max_sge = 5;
  attributes->max_sge_rd = kMostReadPieces;
  return 0;
}
EXPORT int ibv_query_port(ibv_context* context, uint8_t, _compat_ibv_port_attr* out) {
  auto* attributes = reinterpret_cast<ibv_port_attr*>(out);
  attributes->state = IBV_PORT_ACTIVE;
  attributes->link_layer = IBV_LINK_LAYER_INFINIBAND;
  attributes->active_mtu = attributes->max_mtu = IBV_MTU_4096;
  attributes->gid_tbl_len = attributes->pkey_tbl_len = 1;
  attributes->lid = static_cast<uint16_t>(number_of(context) + 1);
  std::lock_guard lock(machine().mutex);
  if (machine().limits[number_of(context)].routed) attributes->flags |= IBV_QPF_GRH_REQUIRED;
  return 0;
}
EXPORT int ibv_query_gid(ibv_context* context, uint8_t, int index, ibv_gid* gid) {
  *gid = {};
  if (index) return 0;
  inet_pton(AF_INET6, "fe80::a", gid->raw);
  gid->raw[15] = static_cast<uint8_t>(number_of(context) + 1);
  return 0;
}
EXPORT int ibv_query_pkey(ibv_context*, uint8_t, int, __be16* key) {
  *key = htons(0xffff);
  return 0;
}
EXPORT ibv_pd* ibv_alloc_pd(ibv_context* context) {
  if (lacks(number_of(context), "alloc_pd")) return nullptr;
  auto* domain = new ibv_pd{};
  domain->context = context;
  return domain;
}
EXPORT int ibv_dealloc_pd(ibv_pd* domain) {
  delete domain;
  return 0;
}

namespace {

ibv_mr* add_region(ibv_pd* domain, void* base, std::byte* bytes, size_t nbytes, int access) {
  Machine& all = machine();
  std::unique_lock lock(all.mutex);
  ++all.waiting;
  all.changed.notify_all();
  all.changed.wait(lock, [&] { return nbytes < all.paused.from; });
  --all.waiting;
  if (nbytes >= all.failing.from) {
    errno = all.failing.error;
    return nullptr;
  }
  auto* region = new Region{};
  region->context = domain->context;
  region->pd = domain;
  region->addr = base;
  region->length = nbytes;
  region->lkey = region->rkey = region->handle = all.next_key++;
  region->access = access;
  region->bytes = bytes;
  region->device = number_of(domain->context);
  all.regions[region->lkey] = region;
  ++all.registered;
  return region;
}

}  // namespace

// The kernel pins pages for writing where a device may write there. Addresses of which it knows nothing are a GPU's.
static bool can_be_written(void* base) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t from, to;
    char rights[5];
    if (std::sscanf(line.c_str(), "%zx-%zx %4s", &from, &to, rights) != 3) continue;
    if (auto at = reinterpret_cast<uintptr_t>(base); from <= at && at < to) return rights[1] == 'w';
  }
  return true;
}

EXPORT ibv_mr* ibv_reg_mr(ibv_pd* domain, void* base, size_t nbytes, int access) {
  if (access & (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE) && nbytes >= 4096 &&
      !can_be_written(base)) {
    errno = EFAULT;
    return nullptr;
  }
  return add_region(domain, base, static_cast<std::byte*>(base), nbytes, access);
}

// In a dma-buf's place the simulated GPU gives a memfd that stands where the pages begin.
EXPORT ibv_mr* ibv_reg_dmabuf_mr(ibv_pd* domain, uint64_t offset, size_t nbytes, uint64_t address, int fd,
                                 int access) {
  {
    std::lock_guard lock(machine().mutex);
    if (!machine().dma_buf) {
      errno = EOPNOTSUPP;
      return nullptr;
    }
  }
  size_t into = offset % 4096;
  off_t at = lseek(fd, 0, SEEK_CUR) + static_cast<off_t>(offset - into);
  void* pages = mmap(nullptr, into + nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, at);
  if (pages == MAP_FAILED) return nullptr;
  auto base = reinterpret_cast<void*>(address);
  ibv_mr* region = add_region(domain, base, static_cast<std::byte*>(pages) + into, nbytes, access);
  if (!region) munmap(pages, into + nbytes);
  return region;
}
EXPORT int ibv_dereg_mr(ibv_mr* mr) {
  work_unless_broken();
  Machine& all = machine();
  std::unique_lock lock(all.mutex);
  ++all.leaving;
  all.changed.notify_all();
  all.changed.wait(lock, [&] { return mr->length < all.kept.from; });
  --all.leaving;
  if (!all.regions.erase(mr->lkey)) return EINVAL;
  auto* bytes = static_cast<Region*>(mr)->bytes;
  size_t into = reinterpret_cast<uintptr_t>(bytes) % 4096;
  if (bytes != mr->addr) munmap(bytes - into, into + mr->length);
  delete static_cast<Region*>(mr);
  all.changed.notify_all();
  return 0;
}

EXPORT ibv_comp_channel* ibv_create_comp_channel(ibv_context* context) {
  if (lacks(number_of(context), "create_comp_channel")) return nullptr;
  auto* channel = new Channel{};
  channel->context = context;
  channel->fd = eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC);
  return channel;
}
EXPORT int ibv_destroy_comp_channel(ibv_comp_channel* channel) {
  ::close(channel->fd);
  delete static_cast<Channel*>(channel);
  return 0;
}
EXPORT int ibv_get_cq_event(ibv_comp_channel* channel, ibv_cq** cq, void** context) {
  uint64_t one;
  if (::read(channel->fd, &one, sizeof one) != sizeof one) return -1;
  std::lock_guard lock(machine().mutex);
  auto& events = static_cast<Channel*>(channel)->events;
  if (events.empty()) return refused(EAGAIN);
  *cq = events.front();
  *context = events.front()->cq_context;
  events.pop_front();
  return 0;
}
EXPORT void ibv_ack_cq_events(ibv_cq*, unsigned) {}
EXPORT ibv_cq* ibv_create_cq(ibv_context* context, int, void* cq_context, ibv_comp_channel* channel,
                             int vector) {
  if (lacks(number_of(context), "create_cq")) return nullptr;
  if (vector < 0 || vector >= context->num_comp_vectors) {
    errno = EINVAL;
    return nullptr;
  }
  auto* queue = new Queue{};
  queue->context = context;
  queue->channel = channel;
  queue->cq_context = cq_context;
  std::lock_guard lock(machine().mutex);
  machine().vectors.insert(vector);
  return queue;
}
EXPORT int ibv_destroy_cq(ibv_cq* cq) {
  std::lock_guard lock(machine().mutex);
  if (cq->channel) std::erase(static_cast<Channel*>(cq->channel)->events, cq);
  delete static_cast<Queue*>(cq);
  return 0;
}
EXPORT ibv_srq* ibv_create_srq(ibv_pd* domain, ibv_srq_init_attr*) {
  if (lacks(number_of(domain->context), "create_srq")) return nullptr;
  auto* receives = new SharedReceives{};
  receives->context = domain->context;
  receives->pd = domain;
  return receives;
}
EXPORT int ibv_destroy_srq(ibv_srq* srq) {
  std::lock_guard lock(machine().mutex);
  delete static_cast<SharedReceives*>(srq);
  return 0;
}

EXPORT ibv_qp* ibv_create_qp(ibv_pd* domain, ibv_qp_init_attr* wanted) {
  if (wanted->cap.max_inline_data > 512) {
    errno = EINVAL;
    return nullptr;
  }
  auto* pair = new Pair{};
  pair->context = domain->context;
  pair->pd = domain;
  pair->device = number_of(domain->context);
  pair->send_cq = wanted->send_cq;
  pair->recv_cq = wanted->recv_cq;
  pair->srq = wanted->srq;
  pair->qp_type = wanted->qp_type;
  pair->most_pieces = wanted->cap.max_send_sge;
  pair->depth = wanted->cap.max_send_wr;
  std::lock_guard lock(machine().mutex);
  if (machine().pairs.size() >= machine().most_pairs) {
    delete pair;
    errno = ENOMEM;
    return nullptr;
  }
  pair->qp_num = machine().next_pair++;
  machine().pairs[pair->qp_num] = pair;
  return pair;
}
EXPORT int ibv_modify_qp(ibv_qp* qp, ibv_qp_attr* attributes, int mask) {
  Machine& all = machine();
  std::unique_lock lock(all.mutex);
  auto& pair = *static_cast<Pair*>(qp);
  if (mask & IBV_QP_AV) {  // on Ethernet the kernel asks the network who has that address
    ++all.connecting;
    all.changed.notify_all();
    all.changed.wait(lock, [&] { return all.held != pair.device; });
    --all.connecting;
    if (auto error = all.unreachable.find(pair.device); error != all.unreachable.end()) return error->second;
  }
  const Limits& has = machine().limits[pair.device];
  if (mask & IBV_QP_MAX_QP_RD_ATOMIC && (pair.initiates = attributes->max_rd_atomic) > has.initiates)
    return EINVAL;
  if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && (pair.answers = attributes->max_dest_rd_atomic) > has.answers)
    return EINVAL;
  if (mask & IBV_QP_AV && !(pair.routed = attributes->ah_attr.is_global) && has.routed) return EINVAL;
  if (mask & IBV_QP_DEST_QPN) pair.other = attributes->dest_qp_num;
  if (!(mask & IBV_QP_STATE)) return 0;
  qp->state = attributes->qp_state;
  if (attributes->qp_state == IBV_QPS_ERR) {
    break_pair(pair);
    return 0;
  }
  pair.state = attributes->qp_state;
  progress_all();  // what was sent to it before
  return 0;
}
EXPORT int ibv_destroy_qp(ibv_qp* qp) {
  Machine& all = machine();
  std::unique_lock lock(all.mutex);
  auto* pair = static_cast<Pair*>(qp);
  std::erase_if(all.events[qp->context], [&](const ibv_async_event& event) {
    return event.event_type == IBV_EVENT_QP_LAST_WQE_REACHED && event.element.qp == qp;
  });
  all.changed.wait(lock, [&] { return !pair->unacknowledged; });
  std::erase_if(all.ending, [&](const auto& one) { return one.first == pair; });
  // What has completed and was not looked at is gone, and so is a receive that it was at.
  for (ibv_cq* queue : {qp->send_cq, qp->recv_cq})
    std::erase_if(static_cast<Queue*>(queue)->done,
                  [&](const ibv_wc& wc) { return wc.qp_num == qp->qp_num; });
  all.pairs.erase(qp->qp_num);
  delete pair;
  return 0;
}

EXPORT int ibv_get_async_event(ibv_context* context, ibv_async_event* event) {
  uint64_t count;
  {
    std::lock_guard lock(machine().mutex);
    auto& ending = machine().ending;
    for (auto& [pair, asks] : ending)
      if (pair->context == context && --asks == 0) end_receives(*pair);
    std::erase_if(ending, [](const auto& one) { return one.second == 0; });
    auto& events = machine().events[context];
    if (!events.empty()) {
      *event = events.front();
      events.pop_front();
      if (event->event_type == IBV_EVENT_QP_LAST_WQE_REACHED)
        ++static_cast<Pair*>(event->element.qp)->unacknowledged;
      return 0;
    }
  }
  if (::read(context->async_fd, &count, sizeof count) < 0) return -1;
  return refused(EAGAIN);
}
EXPORT void ibv_ack_async_event(ibv_async_event* event) {
  if (event->event_type != IBV_EVENT_QP_LAST_WQE_REACHED) return;
  std::lock_guard lock(machine().mutex);
  --static_cast<Pair*>(event->element.qp)->unacknowledged;
  machine().changed.notify_all();
}
EXPORT const char* ibv_wc_status_str(ibv_wc_status status) {
  return status == IBV_WC_REM_ACCESS_ERR ? "remote access error" : "simulated error";
}
EXPORT const char* ibv_event_type_str(ibv_event_type type) {
  return type == IBV_EVENT_CQ_ERR ? "CQ error" : type == IBV_EVENT_SRQ_ERR ? "SRQ error" : "event";
}
