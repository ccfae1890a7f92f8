#include "links/rdma/verbs.hpp"

#include <dlfcn.h>

#include <cerrno>
#include <map>
#include <memory>
#include <mutex>

#include "core/link.hpp"

namespace aiocomm::rdma {

namespace {

template <typename F>
void find(void* library, F& function, const char* name, const std::string& path) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function) throw LinkFailure(path + " has no " + name + ": install rdma-core 15 or newer", ENOSYS);
}

std::unique_ptr<Verbs> load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for the life of the process
  if (!library)
    throw LinkFailure("the verbs library does not load (" + std::string(dlerror()) +
                          "): install rdma-core (Debian, Ubuntu: apt install libibverbs1 ibverbs-providers)",
                      ENOENT);
  auto verbs = std::make_unique<Verbs>();
#define AIOCOMM_FIND(name) find(library, verbs->name, "ibv_" #name, path)
  AIOCOMM_FIND(get_device_list);
  AIOCOMM_FIND(free_device_list);
  AIOCOMM_FIND(get_device_name);
  AIOCOMM_FIND(open_device);
  AIOCOMM_FIND(close_device);
  AIOCOMM_FIND(query_device);
  AIOCOMM_FIND(query_port);
  AIOCOMM_FIND(query_gid);
  AIOCOMM_FIND(query_pkey);
  AIOCOMM_FIND(alloc_pd);
  AIOCOMM_FIND(dealloc_pd);
  AIOCOMM_FIND(reg_mr);
  AIOCOMM_FIND(dereg_mr);
  AIOCOMM_FIND(create_comp_channel);
  AIOCOMM_FIND(destroy_comp_channel);
  AIOCOMM_FIND(create_cq);
  AIOCOMM_FIND(destroy_cq);
  AIOCOMM_FIND(get_cq_event);
  AIOCOMM_FIND(ack_cq_events);
  AIOCOMM_FIND(create_srq);
  AIOCOMM_FIND(destroy_srq);
  AIOCOMM_FIND(create_qp);
  AIOCOMM_FIND(modify_qp);
  AIOCOMM_FIND(destroy_qp);
  AIOCOMM_FIND(get_async_event);
  AIOCOMM_FIND(ack_async_event);
  AIOCOMM_FIND(wc_status_str);
  AIOCOMM_FIND(event_type_str);
#undef AIOCOMM_FIND
  // Before Linux 5.12 a fork would leave a device with the pages that its parent writes no more. Where the kernel sees to
  // it, this does nothing; where others have registered memory before, it is too late (EINVAL).
  if (auto fork_init = reinterpret_cast<int (*)()>(dlsym(library, "ibv_fork_init"))) fork_init();
  verbs->reg_dmabuf_mr =
      reinterpret_cast<decltype(verbs->reg_dmabuf_mr)>(dlsym(library, "ibv_reg_dmabuf_mr"));
  return verbs;
}

}  // namespace

const Verbs& Verbs::get(const std::string& library) {
  static std::mutex mutex;
  static std::map<std::string, std::unique_ptr<Verbs>> loaded;
  std::lock_guard lock(mutex);
  std::string path = library.empty() ? "libibverbs.so.1" : library;
  auto& slot = loaded[path];
  if (!slot) slot = load(path);
  return *slot;
}

}  // namespace aiocomm::rdma
