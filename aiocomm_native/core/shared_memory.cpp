#include "core/shared_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

namespace aiocomm {

bool keeps_size(int fd, uint64_t nbytes) {
  struct stat info;
  const int seals = fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_SHRINK) && fstat(fd, &info) == 0 &&
         static_cast<uint64_t>(info.st_size) >= nbytes;
}

void* map_of_process(pid_t owner, int fd, uint64_t nbytes) {
  const std::string path = "/proc/" + std::to_string(owner) + "/fd/" + std::to_string(fd);
  const int here = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
  if (here < 0) return nullptr;
  void* base = MAP_FAILED;
  if (keeps_size(here, nbytes)) base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, here, 0);
  ::close(here);
  return base == MAP_FAILED ? nullptr : base;
}

}  // namespace aiocomm
