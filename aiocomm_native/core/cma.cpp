#include "core/cma.hpp"

#include <sys/uio.h>

#include <cerrno>

namespace aiocomm {

namespace {

template <class Call>
int move(Call call, pid_t process, uint64_t address, std::byte* here, size_t nbytes) {
  for (size_t done = 0; done < nbytes;) {
    iovec local{here + done, nbytes - done}, remote{reinterpret_cast<void*>(address + done), nbytes - done};
    const ssize_t n = call(process, &local, 1, &remote, 1, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : EFAULT;
    done += static_cast<size_t>(n);
  }
  return 0;
}

}  // namespace

int read_process(pid_t from, uint64_t address, std::byte* into, size_t nbytes) {
  return move(process_vm_readv, from, address, into, nbytes);
}

int write_process(pid_t to, uint64_t address, const std::byte* from, size_t nbytes) {
  return move(process_vm_writev, to, address, const_cast<std::byte*>(from), nbytes);
}

}  // namespace aiocomm
