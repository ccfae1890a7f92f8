"""The kernel that copies rows which lie apart, for transfers of pages with a budget of multiprocessors.

Copy engines take each row that has no common stride with others as a copy of its own. A few multiprocessors
that read and write whole rows, one to a warp, are faster then. The rows are a table in the GPU's memory, to
which the copy thread brings it; the far side is mapped, as for copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiocomm.collectives.kernels import THREADS, device_of, kernels_of
from aiocomm.errors import LinkError, UsageError

if TYPE_CHECKING:
    from aiocomm._device import Description

    Gather = tuple[int, int, int]

__all__ = ["ROW_COPY", "SOURCE", "gather_of"]

_AT_ONCE: Final = 8  # vectors that a thread has under way
ROW_COPY: Final = f"""typedef unsigned long long size_type;
struct Row {{ size_type to, from, nbytes; }};

// The row's bytes from `done` on that are whole units, by one warp; returns how far it came.
template <typename Unit>
__device__ size_type copied(const Row& row, size_type done, unsigned lane) {{
  const size_type count = (row.nbytes - done) / sizeof(Unit);
  const Unit* from = (const Unit*)(row.from + done);
  Unit* to = (Unit*)(row.to + done);
  for (size_type i = lane; i < count; i += 32 * {_AT_ONCE}) {{
    Unit part[{_AT_ONCE}];
#pragma unroll
    for (unsigned k = 0; k < {_AT_ONCE}; ++k)
      if (i + 32 * k < count) part[k] = from[i + 32 * k];
#pragma unroll
    for (unsigned k = 0; k < {_AT_ONCE}; ++k)
      if (i + 32 * k < count) to[i + 32 * k] = part[k];
  }}
  return done + count * sizeof(Unit);
}}
"""
SOURCE: Final = f"""// aiocomm gather: rows
{ROW_COPY}
extern "C" __global__ void __launch_bounds__({THREADS}) gather(const Row* rows, size_type count) {{
  const unsigned lane = threadIdx.x % 32;
  const size_type stride = (size_type)gridDim.x * (blockDim.x / 32);
  size_type next = (size_type)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (next >= count) return;
  Row row = rows[next];
  for (;;) {{
    next += stride;
    Row after = row;
    if (next < count) after = rows[next];  // is on its way while this one is copied
    size_type done = 0;
    if (((row.to | row.from) & 15) == 0) done = copied<uint4>(row, done, lane);
    if (((row.to | row.from) & 3) == 0) done = copied<unsigned>(row, done, lane);
    copied<unsigned char>(row, done, lane);
    if (next >= count) return;
    row = after;
  }}
}}
"""


def gather_of(local: Description, sm_budget: int | None) -> Gather | None:
    """What is launched for rows of this memory: the function, how many blocks, threads of each.

    Raises:
        UsageError: it cannot be compiled here.
    """
    if sm_budget is None or not local[2]:
        return None
    try:
        kernels = kernels_of(device_of(local))
        return kernels.entry(SOURCE, "gather"), sm_budget, THREADS
    except (LinkError, OSError) as error:
        raise UsageError(f"cannot gather on this GPU: {error}") from error
