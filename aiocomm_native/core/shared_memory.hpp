// Shared memory of other processes, made by them with memfd.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace aiocomm {

// Whether it has that size, and cannot lose it: touching what another process has cut off would be our end.
bool keeps_size(int fd, uint64_t nbytes);

// What another process has under a descriptor of its own, to be read and written; null: it cannot be mapped here.
void* map_of_process(pid_t owner, int fd, uint64_t nbytes);

}  // namespace aiocomm
