#include "links/rdma/registrar.hpp"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "core/slice.hpp"

namespace aiocomm::rdma {

namespace {

std::string explain(uint64_t nbytes, int error) {
  std::string text = "cannot register " + std::to_string(nbytes) + " bytes with the device (" +
                     std::string(strerror(error)) + ")";
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if ((error == ENOMEM || error == EPERM || error == EAGAIN) && limit.rlim_cur != RLIM_INFINITY)
    text += ": registered memory is locked, and this process may lock " +
            std::to_string(limit.rlim_cur >> 10) +
            " KiB; raise it by `ulimit -l unlimited`, or memlock in /etc/security/limits.conf";
  return text;
}

// The page is there: it has been registered.
int node_of(const void* address) {
  constexpr unsigned long kNode = 1, kOfAddress = 2;  // MPOL_F_NODE, MPOL_F_ADDR
  int node = -1;
  return ::syscall(SYS_get_mempolicy, &node, nullptr, 0ul, address, kNode | kOfAddress) == 0 ? node : -1;
}

}  // namespace

void register_now(const Verbs& verbs, Registering& job) {
  int fd = -1;
  try {
    if (job.open) fd = job.open();
  } catch (const std::exception&) {  // its device has been closed
  }
  if (job.open && fd < 0) {
    job.error = EADDRNOTAVAIL;
    job.reason = "the GPU's driver does not export this memory as a dma-buf";
    return;
  }
  auto add = [&](ibv_pd* domain) {
    return fd < 0 ? verbs.reg_mr(domain, job.base, job.nbytes, job.access)
                  : verbs.reg_dmabuf_mr(domain, 0, job.nbytes, reinterpret_cast<uint64_t>(job.base), fd,
                                        job.access);
  };
  for (size_t i = 0; i < job.domains.size() && !job.error; ++i) {
    if (!job.domains[i] || (job.regions[i] = add(job.domains[i]))) continue;
    job.error = errno;
    job.reason = explain(job.nbytes, job.error);
  }
  if (fd >= 0) ::close(fd);  // the registrations keep the memory
  if (job.error)
    for (ibv_mr*& region : job.regions)
      if (region) verbs.dereg_mr(std::exchange(region, nullptr));
  if (job.by_node && !job.error) job.node = node_of(job.base);
}

Registrar::~Registrar() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
  for (Registering& job : done_)
    for (ibv_mr* region : job.regions)
      if (region) verbs_.dereg_mr(region);
}

void Registrar::push(Job job) {
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
    if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  }
  wake_.notify_one();
}

void Registrar::submit(Registering job) { push({std::move(job), {}, false}); }

void Registrar::give_back(const Regions& regions) { push({{}, regions, true}); }

std::vector<Registering> Registrar::take() {
  std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

bool Registrar::busy() {
  std::lock_guard lock(mutex_);
  return asked_ = working_ || !jobs_.empty() || !done_.empty();
}

void Registrar::work() {
  pthread_setname_np(pthread_self(), "aiocomm-pin");
  take_short_slices(SCHED_BATCH);  // as copy threads: it must not take a core from an event loop in its turn
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    if (stopping_ && !job.gives_back) continue;
    working_ = true;
    lock.unlock();
    if (job.gives_back) {
      for (ibv_mr* region : job.unwanted)
        if (region) verbs_.dereg_mr(region);
    } else {
      register_now(verbs_, job.wanted);
      job.wanted.segment.reset();  // unmapping takes long, too
    }
    lock.lock();
    working_ = false;
    if (!job.gives_back) done_.push_back(std::move(job.wanted));
    if (job.gives_back && (!asked_ || !jobs_.empty())) continue;
    lock.unlock();
    ring_();
    lock.lock();
  }
}

}  // namespace aiocomm::rdma
