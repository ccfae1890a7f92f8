#include "links/rdma/registrar.hpp"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "core/guarded.hpp"
#include "core/slice.hpp"

namespace aiocomm::rdma {

namespace {

std::string explain(uint64_t nbytes, int error) {
  std::string text = "cannot register " + std::to_string(nbytes) + " bytes with the device (" +
                     std::string(strerror(error)) + ")";
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if (error == EAGAIN)
    text += ": this process's control group allows no more; raise its rdma.max";
  else if ((error == ENOMEM || error == EPERM) && limit.rlim_cur != RLIM_INFINITY)
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

void deregister(const Verbs& verbs, const Regions& regions) {
  for (ibv_mr* region : regions)
    if (region) verbs.dereg_mr(region);
}

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
                  : verbs.reg_dmabuf_mr(domain, job.offset, job.nbytes, reinterpret_cast<uint64_t>(job.base),
                                        fd, job.access);
  };
  for (size_t i = 0; i < job.domains.size() && !job.error; ++i) {
    if (!job.domains[i] || (job.regions[i] = add(job.domains[i]))) continue;
    job.error = errno;
    job.reason = explain(job.nbytes, job.error);
  }
  if (fd >= 0) ::close(fd);  // the registrations keep the memory
  if (job.error) deregister(verbs, std::exchange(job.regions, {}));
  if (job.by_node && !job.error) job.node = node_of(job.base);
}

Registrar::~Registrar() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread* thread : {&registering_, &giving_back_})
    if (thread->joinable()) thread->join();
  for (const Registering& job : done_) deregister(verbs_, job.regions);
  for (const Unwanted& job : unwanted_)
    deregister(verbs_, job.regions);  // a thread that failed has left them
}

void Registrar::submit(Registering job) {
  {
    std::lock_guard lock(mutex_);
    wanted_.push_back(std::move(job));
    if (!registering_.joinable()) registering_ = std::thread([this] { run(&Registrar::register_all); });
  }
  wake_.notify_all();
}

void Registrar::give_back(const Regions& regions, uint32_t number) {
  {
    std::lock_guard lock(mutex_);
    unwanted_.push_back({regions, number});
    if (!giving_back_.joinable()) giving_back_ = std::thread([this] { run(&Registrar::give_back_all); });
  }
  wake_.notify_all();
}

std::vector<Registering> Registrar::take() {
  std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

std::vector<uint32_t> Registrar::take_given_back() {
  std::lock_guard lock(mutex_);
  return std::exchange(given_back_, {});
}

bool Registrar::busy() {
  std::lock_guard lock(mutex_);
  return asked_ =
             working_ || !wanted_.empty() || !unwanted_.empty() || !done_.empty() || !given_back_.empty();
}

void Registrar::run(void (Registrar::*jobs)()) noexcept {
  guarded([&] { (this->*jobs)(); }, failed_);
}

void Registrar::register_all() {
  pthread_setname_np(pthread_self(), "aiocomm-pin");
  take_short_slices(SCHED_BATCH);  // as copy threads: it must not take a core from an event loop in its turn
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !wanted_.empty(); });
    if (stopping_) return;
    Registering job = std::move(wanted_.front());
    wanted_.pop_front();
    ++working_;
    lock.unlock();
    try {
      register_now(verbs_, job);
    } catch (const std::exception& error) {
      deregister(verbs_, std::exchange(job.regions, {}));
      job.error = ENOMEM;
      job.reason = error.what();
    }
    job.segment.reset();  // unmapping takes long, too
    lock.lock();
    done_.push_back(std::move(job));
    end_job(lock, true);
  }
}

void Registrar::give_back_all() {
  pthread_setname_np(pthread_self(), "aiocomm-unpin");
  take_short_slices(SCHED_BATCH);
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !unwanted_.empty(); });
    if (unwanted_.empty()) return;
    Unwanted& job =
        unwanted_.front();  // until it is done: should this thread fail, others give it back at the end
    ++working_;
    lock.unlock();
    for (ibv_mr*& region : job.regions) {
      if (region) verbs_.dereg_mr(region);
      region = nullptr;
    }
    lock.lock();
    const uint32_t number = job.number;
    unwanted_.pop_front();
    if (number) given_back_.push_back(number);
    end_job(lock, number != 0);
  }
}

void Registrar::end_job(std::unique_lock<std::mutex>& lock, bool tells) {
  --working_;
  bool all_done = asked_ && !working_ && wanted_.empty() && unwanted_.empty();
  if (!tells && !all_done) return;
  lock.unlock();
  ring_();
  lock.lock();
}

}  // namespace aiocomm::rdma
