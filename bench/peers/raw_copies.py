"""One copy, by one thread, of memory that is mapped and warm.

No bound: who copies by several threads, or past the caches where libc's memcpy does not, is faster than that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import TYPE_CHECKING

import numpy as np

from .. import cma
from ..sizes import show
from .base import Array, Peer, Transport
from .blocking import BlockingTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..control import Control
    from ..model import Metrics
    from ..plan import Plan

_libc = ctypes.CDLL(None)
_libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memcpy.restype = ctypes.c_void_p


def copy(out: Array, data: Array) -> None:
    """Copy `data` to the beginning of `out`, which has room for it."""
    _libc.memcpy(out.ctypes.data, data.ctypes.data, data.nbytes)


class _Nothing(BlockingTransport):
    """None of them sends anything."""


async def _open(role: int, control: Control) -> Transport:
    return _Nothing()


def _segment(nbytes: int, value: int) -> Array:
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[:] = value
    return memory


def _rates(plan: Plan, copy: Callable[[int], object]) -> Metrics:
    found: Metrics = {}
    for nbytes, count in plan.bulk:
        copy(nbytes)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            copy(nbytes)
        gbytes = nbytes * count / 1e9
        found[f"gbytes_s/{show(nbytes)}"] = gbytes / (time.perf_counter() - start)
        found[f"cpu_s_per_gb/{show(nbytes)}"] = (time.process_time() - cpu) / gbytes
    return found


async def _memcpy(transport: Transport, role: int, plan: Plan, control: Control) -> Metrics:
    """Copy between two shared segments, within one process."""
    if role == 1:
        return {}
    source, target = _segment(plan.largest, 1), _segment(plan.largest, 2)
    return _rates(plan, lambda nbytes: _libc.memcpy(target.ctypes.data, source.ctypes.data, nbytes))


async def _vm_readv(transport: Transport, role: int, plan: Plan, control: Control) -> Metrics:
    """Copy from another process's private memory."""
    cma.allow()
    data, into = await transport.allocate(plan.largest)  # private, on huge pages where the kernel grants them
    pid, remote = control.swap((os.getpid(), data.ctypes.data))
    found = _rates(plan, lambda n: cma.read(pid, remote, into.ctypes.data, n)) if role == 0 else {}
    control.swap("done")
    return found


PEERS = [
    Peer(
        "memcpy-one-thread",
        _open,
        "raw",
        "memory",
        "blocking",
        sequence=_memcpy,
        note="libc's, in one process",
    ),
    Peer("process-vm-readv-one-thread", _open, "raw", "memory", "blocking", sequence=_vm_readv),
]
