#include "core/cma.hpp"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
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

namespace {

// Places at both ends, which are read by as few calls as the kernel lets them.
class Places {
 public:
  explicit Places(pid_t from) : from_(from) {}
  // 0 or errno.
  int add(uint64_t address, std::byte* into, size_t nbytes) {
    there_[count_] = {reinterpret_cast<void*>(address), nbytes};
    here_[count_] = {into, nbytes};
    return ++count_ == here_.size() ? read() : 0;
  }
  int read() {
    for (size_t first = 0; first < count_;) {
      const ssize_t n =
          process_vm_readv(from_, &here_[first], count_ - first, &there_[first], count_ - first, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return n < 0 ? errno : EFAULT;
      auto done = static_cast<size_t>(n);  // it may end anywhere
      for (; first < count_ && done >= here_[first].iov_len; ++first) done -= here_[first].iov_len;
      for (iovec* one : {&here_[first], &there_[first]}) {
        if (!done) break;
        one->iov_base = static_cast<std::byte*>(one->iov_base) + done;
        one->iov_len -= done;
      }
    }
    count_ = 0;
    return 0;
  }

 private:
  const pid_t from_;
  std::array<iovec, 512> here_, there_;
  size_t count_ = 0;
};

}  // namespace

int read_rows(pid_t from, uint64_t address, std::byte* into, const RowList& rows, uint64_t offset,
              uint64_t nbytes) {
  Places places(from);
  int error = 0;
  rows.cut(offset, nbytes, [&](const Rows& one) {
    for (uint64_t i = 0; i < one.count && !error; ++i)
      error = places.add(address + one.from + i * static_cast<uint64_t>(one.from_step),
                         into + one.to + static_cast<int64_t>(i) * one.to_step, one.nbytes);
    return !error;
  });
  return error ? error : places.read();
}

int write_process(pid_t to, uint64_t address, const std::byte* from, size_t nbytes) {
  return move(process_vm_writev, to, address, const_cast<std::byte*>(from), nbytes);
}

// The kernel reads a byte of each page, and says where it cannot.
bool readable(const std::byte* data, size_t nbytes) {
  constexpr uintptr_t kPage = 4096;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return true;  // as far as can be told
  std::array<iovec, 512> bytes;
  std::array<std::byte, bytes.size()> taken;
  const auto end = reinterpret_cast<uintptr_t>(data) + nbytes;
  bool fine = true;
  for (auto at = reinterpret_cast<uintptr_t>(data); fine && at < end;) {
    size_t count = 0;
    for (; count < bytes.size() && at < end; at = (at / kPage + 1) * kPage)
      bytes[count++] = {reinterpret_cast<void*>(at), 1};
    fine = writev(ends[1], bytes.data(), static_cast<int>(count)) == static_cast<ssize_t>(count) &&
           ::read(ends[0], taken.data(), count) == static_cast<ssize_t>(count);
  }
  for (int one : ends) ::close(one);
  return fine;
}

}  // namespace aiocomm
