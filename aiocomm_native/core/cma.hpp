// Cross-memory attach: one copy between this process's memory and another's, by the kernel. 0 or errno.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

#include "core/rows.hpp"

namespace aiocomm {

int read_process(pid_t from, uint64_t address, std::byte* into, size_t nbytes);
// Bytes [offset, offset + nbytes) of rows, whose offsets count from `address` and `into`.
int read_rows(pid_t from, uint64_t address, std::byte* into, const RowList& rows, uint64_t offset,
              uint64_t nbytes);
int write_process(pid_t to, uint64_t address, const std::byte* from, size_t nbytes);

// Whether this process can read its own memory there, which others may still not be let to: else it would be its end.
bool readable(const std::byte* data, size_t nbytes);

}  // namespace aiocomm
